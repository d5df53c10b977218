"""Paired measurements: what `visionsel bench` runs.

Each has `measure`, which gives all that was found as values of JSON, and `tables`, which shows it.
"""

import sys
from collections.abc import Sequence

__all__ = ["run"]


def run(name: str, arguments: Sequence[str] | None = None) -> int:
    """`python -m benchmarks.NAME`: `visionsel bench NAME`, and runs/bench/NAME.json; returns the status."""
    from visionsel.cli import main

    given = sys.argv[1:] if arguments is None else arguments
    return main(["bench", name, "--out", f"runs/bench/{name}.json", *given])
