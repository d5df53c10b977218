"""The README's table of speeds: `python -m benchmarks.speeds runs/bench/*.json --write`.

A few rows of docs/benchmarks, from the files of these pages: geometric means of medians of ratios, as the
goals are judged.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import targets
from benchmarks.model_table import rewrite
from benchmarks.targets import BIASED, DETECTION, FOCALS, HALOS, THREE_STAGES, Target

PAGE = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- python -m benchmarks.speeds runs/bench/*.json --write -->\n", "<!-- end of the speeds -->"
GATHERED, AUTHORS = "its neighbors gathered", "the authors' formulation"
ACCELERATED = ("accelerated", "packed")
# what; against what, in words and as the results name it; program, cases, and which of ours, the best counts
ROWS: list[tuple[str, str, str, str, Sequence[str], tuple[str, ...]]] = [
    (
        "neighborhood attention, 56 x 56, 7 x 7 keys, bias",
        GATHERED,
        "naive gather",
        "ops",
        [BIASED],
        ("auto",),
    ),
    ("bi-level routing, BiFormer's three stages at 224", AUTHORS, "authors'", "ops", THREE_STAGES, ("auto",)),
    ("bi-level routing, three maps of 800 x 1216", AUTHORS, "authors'", "ops", DETECTION, ("auto",)),
    ("halo attention, three maps", "timm", "timm", "ops", HALOS, ("auto",)),
    ("focal modulation, three maps", "timm", "timm", "ops", FOCALS, ("auto",)),
    ("`nat_tiny`, accelerated", GATHERED, "naive gather", "models", ["nat_tiny 224"], ACCELERATED),
    ("`biformer_tiny`, accelerated", AUTHORS, "authors'", "models", ["biformer_tiny 224"], ACCELERATED),
    ("`halonet50ts`, accelerated", "timm", "timm", "models", ["halonet50ts 256"], ACCELERATED),
    ("`focalnet_tiny_srf`, accelerated", "timm", "timm", "models", ["focalnet_tiny_srf 224"], ACCELERATED),
]


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """As Markdown; a ratio that was not measured is a dash."""
    lines = ["| | against | forward | forward and backward |", "|---|---|---|---|"]
    for what, words, against, program, cases, ours in ROWS:
        wanted = [Target(program, cases, mode, against, 1, ours) for mode in ("forward", "training")]
        measured = [row["measured"] for row in targets.judge(results, wanted)]
        cells = [what, words, *("-" if one is None else f"{one:.1f}x" for one in measured)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what the programs wrote, JSON")
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    options = parser.parse_args(arguments)
    text = table(targets.read(options.files))
    if options.write:
        rewrite(PAGE, BEGIN, END, f"{text}\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
