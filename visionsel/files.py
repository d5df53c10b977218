"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["whole_file", "write_json"]


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A name to write under, with the same ending; it becomes `path` when the block ends well.

    Args:
        path: of the file; its folder is made where there is none.

    Yields:
        the name to write under, beside `path`; what was written is removed when the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(content: Any, path: str | Path) -> Path:
    """Write JSON; returns the path."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
    return Path(path)
