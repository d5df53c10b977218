"""`visionsel data`: data sets that are made, not downloaded."""

import argparse
import json
from pathlib import Path
from typing import Any

from visionsel.cli_text import Progress, add_verb, add_verbs, print_table, writing

__all__ = ["add_data"]


def add_data(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb `data` to the command; `common` has the options of every verb."""
    data = verbs.add_parser(
        "data",
        help="write a data set",
        description="Write a data set.",
        epilog="example:\n  visionsel data shapes --out shapes",
    )
    shapes = add_verb(
        add_verbs(data, "data_set", metavar="NAME"),
        "shapes",
        common,
        "coloured shapes with masks, captions, questions and expressions, in common formats",
        "visionsel data shapes --out shapes --size 2000 --image-size 64",
        "visionsel data shapes --out noisy --caption-noise 0.3 --seed 7 --json",
    )
    shapes.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    shapes.add_argument("--size", type=int, default=2000, metavar="N", help="training images (default: 2000)")
    shapes.add_argument(
        "--test-size",
        type=int,
        metavar="N",
        help="images of each other split (default: a tenth of --size)",
    )
    shapes.add_argument(
        "--seed", type=int, default=0, metavar="SEED", help="another seed is other data (default: 0)"
    )
    shapes.add_argument(
        "--distribution",
        default="train",
        metavar="NAME",
        help="of the training data and its validation split: train, balanced or anti (default: train)",
    )
    shapes.add_argument(
        "--image-size",
        type=int,
        default=64,
        metavar="PIXELS",
        help="of a side, 32 to 1024 (default: 64)",
    )
    shapes.add_argument(
        "--caption-noise",
        type=float,
        default=0.0,
        metavar="P",
        help="with this probability training captions mention a usual companion that is absent (default: 0)",
    )
    shapes.set_defaults(run=_data_shapes)


def _data_shapes(options: argparse.Namespace) -> None:
    from visionsel.data.shapes import write_shapes

    with Progress("images") as progress, writing(options.out, alone=False):
        root = write_shapes(
            options.out,
            options.size,
            options.test_size,
            options.seed,
            options.distribution,
            options.image_size,
            caption_noise=options.caption_noise,
            progress=progress.count,
        )
    card = json.loads((root / "shapes.json").read_text())
    if options.json:
        print(json.dumps({"out": str(root), **card}, indent=2))
        return
    print_table(
        ["split", "distribution", "seed", "images"],
        [
            [name, split["distribution"], str(split["seed"]), str(split["size"])]
            for name, split in card["splits"].items()
        ],
    )
