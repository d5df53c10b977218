"""How the `visionsel` command shows tables and progress."""

import sys
from collections.abc import Sequence

__all__ = ["print_table", "show_progress"]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns on stdout, each as wide as its widest cell."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def show_progress(done: int, total: int) -> None:
    """A bar on stderr that redraws itself in place."""
    filled = 40 * done // total
    end = "\n" if done == total else ""
    print(f"\r[{'#' * filled:40}] {done}/{total}", end=end, file=sys.stderr, flush=True)
