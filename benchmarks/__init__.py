"""Paired measurements: what `visionsel bench` runs, and the pages of docs/benchmarks.

`ops`, `attention`, `models`, `growth`, `memory`, `pruning` and `grounding` each have `measure`, which gives
all that was found as values of JSON, and `tables`, which shows it. `benchmarks.targets` says which goals are
reached, `benchmarks.tables` writes the pages.
"""

import sys
from collections.abc import Sequence

__all__ = ["run"]


def run(name: str, arguments: Sequence[str] | None = None) -> int:
    """`python -m benchmarks.NAME`: `visionsel bench NAME`, and runs/bench/NAME.json; returns the status."""
    from visionsel.cli import main

    given = sys.argv[1:] if arguments is None else arguments
    return main(["bench", name, "--out", f"runs/bench/{name}.json", *given])
