"""One page of what the package does: classification, captions, grounding, pruning, hallucination.

    python -m train.report --output quickstart

Written is `report.html`, a file that needs no other. Everything on it is run when it is made, with the small
models that ship with visionsel, on scenes of fixed seeds that no model was trained on; classification is that
of `train.quickstart`, which writes the same page with it.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import visionsel
from train.cli import run_cli
from train.report_captions import captions_section
from train.report_digits import Digits, classification_section
from train.report_grounding import grounding_section
from train.report_hallucination import hallucination_section
from train.report_page import Section, fill_page
from train.report_pruning import pruning_section
from visionsel.data.shapes import Sample, ShapesWorld
from visionsel.embedded import load_lvlm, load_segmenter
from visionsel.files import whole_file

__all__ = ["PAGE", "SEED", "Sizes", "fresh_scenes", "load_models", "main", "write_report"]

PAGE = "report.html"
SEED = 2026  # of the scenes; training, validation and the presets of heads have theirs from 2**28 - 3 on


@dataclass(frozen=True)
class Sizes:
    """How many scenes each section has; of captions of each of two distributions."""

    captions: int = 6
    grounding: int = 24
    pruning: int = 40
    hallucination: int = 60


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page alone, without the digits; returns the exit status."""
    return run_cli("train.report", _write_alone, arguments)


def _write_alone(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="train.report", description="Show what the package does with the models that ship with it."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="folder to write [quickstart]"
    )
    parser.add_argument("--lvlm", type=Path, help="folder of another model of the same shape [the package's]")
    parser.add_argument("--segmenter", type=Path, help="folder of another SAM [the package's]")
    options = parser.parse_args(arguments)
    print(write_report(options.output, *load_models(options.lvlm, options.segmenter)))


def load_models(lvlm: Path | None = None, segmenter: Path | None = None) -> tuple[Any, Any, Any]:
    """The vision-language model, its processor and the SAM; default those in the package.

    Raises:
        ImportError: without the extra "multimodal".
        FileNotFoundError: when a folder lacks a file.
    """
    return (*load_lvlm(lvlm), load_segmenter(segmenter))


def fresh_scenes(distribution: str, number: int, count: int) -> list[Sample]:
    """The first scenes of a seed of their own, one for each number of a section."""
    return list(ShapesWorld(distribution, SEED + number, count))


def write_report(
    output: Path,
    model: Any,
    processor: Any,
    sam: Any,
    digits: Digits | None = None,
    sizes: Sizes | None = None,
) -> Path:
    """Run everything and write `report.html`; returns its path.

    Args:
        output: folder, made if it is not there.
        model, processor, sam: as `load_models` gives them.
        digits: what was measured of classification; None: the page says how to get it.
        sizes: default `Sizes()`.

    Raises:
        ValueError: for a model whose heads `GroundingHeads.preset("embedded")` are not.
    """
    sizes = Sizes() if sizes is None else sizes
    captioned = [
        (name, sample) for name in ("balanced", "anti") for sample in fresh_scenes(name, 0, sizes.captions)
    ]
    asked: dict[str, Callable[[], Section]] = {
        "captions": lambda: captions_section(model, processor, sam, captioned),
        "grounding": lambda: grounding_section(
            model, processor, sam, fresh_scenes("balanced", 1, sizes.grounding), SEED
        ),
        "pruning": lambda: pruning_section(model, processor, fresh_scenes("balanced", 2, sizes.pruning)),
        "hallucination": lambda: hallucination_section(
            model, processor, fresh_scenes("anti", 3, sizes.hallucination)
        ),
    }
    sections, seconds = [classification_section(digits)], {}
    for name, make in asked.items():
        print(f"report: {name}", flush=True)
        start = time.perf_counter()
        sections.append(make())
        seconds[name] = time.perf_counter() - start
    facts = [
        f"visionsel {visionsel.__version__}",
        f"torch {torch.__version__}",
        f"language model of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters",
        f"SAM of {sum(p.numel() for p in sam.parameters()) / 1e6:.1f} M",
        f"seeds {SEED} to {SEED + 3}",
    ]
    with whole_file(output / PAGE) as partial:
        partial.write_text(fill_page(sections, facts, seconds), encoding="utf-8")
    return output / PAGE


if __name__ == "__main__":
    sys.exit(main())
