"""Train, validate, test and apply an image classifier: any timm model, Lightning's trainer, timm's recipes.

    python -m train.classification fit --config configs/digits/biformer.yaml
    python -m train.classification fit --config runs/digits/biformer/config.yaml \\
        --ckpt_path runs/digits/biformer/checkpoints/last.ckpt                        # continue exactly
    python -m train.classification test --config runs/digits/biformer/config.yaml \\
        --ckpt_path runs/digits/biformer/checkpoints/best.ckpt                        # or validate, predict

- images from folders or from tar shards, on one device or on many;
- any timm name, ours too, with its optimizer, schedule, mixup, cutmix and layer decay from timm;
- the randomness of an update depends on seed, epoch and batch only, and that of a sample on seed, epoch and
  position, so that a resumed run equals one that was never stopped;
- everything that can be known to be wrong is refused before the run's folder is made.
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from train.cli import RunCLI, run_cli
from train.image_classifier import ImageClassifier
from train.image_data import ImageFolderData
from visionsel.files import whole_file

__all__ = ["ClassificationCLI", "ImageClassifier", "main"]


class ClassificationCLI(RunCLI):
    """The command line: fixed classes, so that a configuration names no class of ours."""

    fixed = ("model", "model_args", "class_names")
    marks = ("label_smoothing",)
    first_weights = ("checkpoint", "pretrained", "checkpoint_classes")
    whole_weights = ("checkpoint", "pretrained")

    def __init__(self, arguments: Sequence[str] | None = None) -> None:
        super().__init__(ImageClassifier, ImageFolderData, arguments)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What the model takes from the data."""
        super().add_arguments_to_parser(parser)
        for name in ("class_names", "preprocessing", "batch_size"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def predict(self, **kwargs: Any) -> None:
        """Write file, class and probability of each image as CSV, under its name when complete."""
        files = self.datamodule.predict_files
        names = self.model.hparams["class_names"]
        target = Path(self._get(self.config, "predictions") or self.output / "predictions.csv")
        results = self.evaluate("predict", **kwargs) or []
        with whole_file(target) as partial, partial.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["file", "class", "probability"])
            for batch in results:
                for position, index, probability in zip(*(t.tolist() for t in batch), strict=True):
                    writer.writerow([files[position], names[index], f"{probability:.6f}"])
        print(f"{len(files)} predictions in {target}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_cli("train.classification", ClassificationCLI, arguments)


if __name__ == "__main__":
    sys.exit(main())
