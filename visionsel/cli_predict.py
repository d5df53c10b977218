"""`visionsel predict`: the likeliest classes of images."""

import argparse
import json
from pathlib import Path
from typing import Any

from visionsel.cli_text import Progress, add_verb, report_error

__all__ = ["add_predict"]


def add_predict(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb `predict` to the command; `common` has the options of every verb."""
    predict = add_verb(
        verbs,
        "predict",
        common,
        "classify images; one that cannot be read is named, and the exit status is 1 after all others",
        "visionsel predict cat.jpg --model nat_tiny --checkpoint nat_tiny.pth --topk 3",
        "visionsel predict scans/a.png scans/b.png --checkpoint best.ckpt --json",
        "visionsel predict cat.jpg --model dinat_large.in22k_ft_in1k_384 --device cpu",
    )
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    predict.add_argument(
        "--model", metavar="NAME", help="a timm model name, with its tag if it has several releases"
    )
    predict.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights: a released file, or a checkpoint of train.classification, which also names the "
        "model; without it the model's released weights are downloaded",
    )
    predict.add_argument(
        "--topk", type=int, default=5, metavar="N", help="classes to print for each image (default: 5)"
    )
    predict.add_argument("--device", help="default: cuda if there is one, else cpu")
    predict.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> int:
    from visionsel.prediction import load_classifier, predict_images

    if options.topk < 1:
        raise ValueError(f"--topk must be at least 1, got {options.topk}")
    classifier = load_classifier(options.model, options.checkpoint, options.device)
    results: list[dict[str, Any]] = []
    failures: list[Exception] = []
    try:
        with Progress("images") as progress:
            for number, path in enumerate(options.images):
                progress.count(number, len(options.images))
                try:
                    results += predict_images(classifier, [path], options.topk)
                except (ValueError, FileNotFoundError) as error:
                    failures.append(error)
            progress.count(len(options.images), len(options.images))
    finally:  # what is known is printed, also when the user loses patience
        _show(results, options)
        for failure in failures:
            report_error(options, failure)
    return 1 if failures else 0


def _show(results: list[dict[str, Any]], options: argparse.Namespace) -> None:
    if options.json and results:
        print(json.dumps(results, indent=2))
    elif not options.json:
        for result in results:
            print(result["image"])
            for entry in result["classes"]:
                print(f"  {entry['probability']:7.2%}  {entry['label']}")
