"""The pages of docs/benchmarks, from what was measured: `python -m benchmarks.tables runs/bench/*.json`.

One page a file, named like it, with the machine's class, versions and the date, and, where all programs
with goals are given, `targets.md`, which says of each goal whether it is reached. Nothing on these pages is
written by hand.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import targets
from visionsel.cli_text import table
from visionsel.files import whole_file

__all__ = ["main", "page", "target_page", "write"]

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
TITLES = {
    "ops": "Operators",
    "attention": "What selecting saves",
    "models": "Whole models",
    "growth": "Growth with the image",
    "memory": "Peak memory",
    "pruning": "What pruning saves",
    "grounding": "Reading attention",
}
ABOUT = {
    "ops": "Each operator in turn with what it replaces: medians over the rounds of the ratio of times, with "
    "the smallest and the largest. The first of a case is what the others are compared with.",
    "attention": "Each operator without projections in turn with attention to all tokens of the map: medians "
    "over the rounds of the ratio of times, with the smallest and the largest.",
    "models": "Whole models in turn with what they replace, with the same weights: medians over the rounds "
    "of the ratio of times, with the smallest and the largest.",
    "growth": "The first stage of each operator at images of growing size: the power of tokens that time "
    "grows with, by least squares in each round; the median, with the smallest and the largest.",
    "memory": "The most bytes alive at once during a call, above those before it.",
    "pruning": "A decoder with pruned image tokens in turn with the whole one: pruned / full.",
    "grounding": "`generate()` alone and with an `AttentionRecorder`, in turn.",
}


def page(found: Mapping[str, Any], name: str | None = None) -> str:
    """What a program found, as a page of Markdown.

    Args:
        found: with `program` and `machine`.
        name: of the file of results without its ending, for the command that makes the page again; or None.
    """
    program = found["program"]
    batch = found.get("options", {}).get("batch", 1)
    title = TITLES[program] + (f", {batch} images at a time" if batch > 1 else "")
    parts = [f"# {title}", ABOUT[program], _setting(found)]
    if name is not None:
        parts.insert(1, f"<!-- python -m benchmarks.tables runs/bench/{name}.json -->")
    for heading, header, rows in import_module(f"benchmarks.{program}").tables(found):
        parts += [heading] if heading else []
        parts.append(table(header, rows, markdown=True))
    return "\n\n".join(parts) + "\n"


def target_page(results: Sequence[Mapping[str, Any]]) -> str:
    """Which goals are reached, as a page of Markdown."""
    [(title, header, rows)] = targets.tables(targets.judge(results))
    about = (
        "What the operators are meant to reach on a CPU in float32, and what was measured: how many times as "
        "fast as what they replace (CPU time of one thread; geometric mean over several cases), the power of "
        "tokens that time grows with, and peak memory over that of what they replace (the worst case)."
    )
    parts = ["# Targets", "<!-- python -m benchmarks.tables runs/bench/*.json -->", about, title]
    parts.append(table(header, rows, markdown=True))
    programs = {target.program for target in targets.TARGETS}
    judged = [found for found in results if found["program"] in programs and targets.is_of_the_goals(found)]
    parts += [f"{TITLES[found['program']]}: {_setting(found)}" for found in judged]
    return "\n\n".join(parts) + "\n"


def _setting(found: Mapping[str, Any]) -> str:
    """The machine, versions, options and the date, in a line."""
    machine = found["machine"]
    cores, threads = machine["cores"], machine["threads"]
    parts = [f"{machine['processor']}, {cores} core{'s' * (cores != 1)}"]
    if machine["gpu"] is not None:
        parts.append(machine["gpu"])
    parts.append(f"{threads} thread{'s' * (threads != 1)}")
    parts.append(", ".join(f"{name} {number}" for name, number in machine["versions"].items()))
    options = found.get("options", {})
    said = [
        f"{name.replace('_', ' ')} {_words(value)}" for name, value in options.items() if value is not None
    ]
    parts += [", ".join(said)] if said else []
    return f"{'; '.join(parts)}. Measured on {machine['date']}."


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def write(paths: Sequence[Path], folder: Path = FOLDER) -> list[Path]:
    """Write the page of each file of results; returns the pages.

    Where all programs that have goals are among them, the page of the targets is written too.

    Raises:
        ValueError: for a file that has no results.
    """
    results = targets.read(paths)
    pages = {path.stem: page(found, path.stem) for path, found in zip(paths, results, strict=True)}
    if {found["program"] for found in results} >= {target.program for target in targets.TARGETS}:
        pages["targets"] = target_page(results)
    written = []
    for name, text in pages.items():
        written.append(folder / f"{name}.md")
        with whole_file(written[-1]) as partial:
            partial.write_text(text)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages and say which."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what the programs wrote, JSON")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the pages (default: docs/benchmarks)")
    options = parser.parse_args(arguments)
    for path in write(options.files, options.folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
