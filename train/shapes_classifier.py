"""Train a small classifier of single shapes, with dense auxiliary targets that let it start.

    python -m train.shapes_classifier fit --config configs/shapes/nat.yaml
    python -m train.shapes_classifier fit --config runs/shapes/nat/config.yaml \\
        --ckpt_path runs/shapes/nat/checkpoints/last.ckpt                             # continue exactly
    python -m train.shapes_classifier validate --config runs/shapes/nat/config.yaml \\
        --ckpt_path runs/shapes/nat/checkpoints/best.ckpt

One small or faint shape in an image, pooled over all positions, gives a backbone little to start from. Here
each position of one stage's map also predicts the shape at its place, or background, through a head that
`export_classifier` leaves out; scenes of several shapes, which have no label, teach it too. What that brings
is measured by taking it away:

    --data.dense_share 0                             # images of one shape only
    --model.dense_weight 0 --data.dense_share 0      # no dense targets
    --model.model_args.swin_layout true              # BiFormer: patch embeddings for convolutions

NAT and SelectFormer always have a convolutional stem; `--model.model focalnet_tiny_srf` with its own
`model_args` is a model of timm's with patch embeddings.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, one_hot

from train.classification import ClassificationCLI, ImageClassifier
from train.cli import EndlessCLI, RunCLI, below, brief, read_checkpoint, run_cli
from train.recipe import check
from train.shapes_data import ShapesStreamData, training_seed
from visionsel.data.shapes import SHAPES, Sample, ShapesWorld
from visionsel.embedded.classifier import save_classifier

__all__ = ["ShapesClassifier", "SingleShapesData", "dense_targets", "export_classifier", "main"]

IGNORED = -100
"""The label of an image of several shapes; PyTorch's losses leave it out."""


class SingleShapesData(ShapesStreamData):
    """Images of one shape: `([3, H, W], label, [H, W])`, the last 0 for background, else 1 + label.

    With `dense_share` some training images hold one to six shapes; their label is -100, ignored.

    Args:
        batch_size: on each device.
        epoch_size: images of an epoch, on all devices together.
        val_size: images of the validation, of one shape each; the same every time and never trained on.
        image_size: pixels a side.
        dense_share: share of the training images that hold one to six shapes.
        mean, std: of the normalization.
        num_workers: processes that make images on each device; 0 makes them in the main process.
        seed: of the run.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        batch_size: int = 64,
        epoch_size: int = 6400,
        val_size: int = 500,
        image_size: int = 64,
        dense_share: float = 0.0,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.25, 0.25, 0.25),
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size,
            epoch_size,
            val_size,
            image_size,
            max_objects=1,
            num_workers=num_workers,
            seed=seed,
        )
        check(0 <= dense_share < 1, f"dense_share must be at least 0 and below 1, got {dense_share}")
        check(min(std) > 0, f"std must be above 0, got {std}")
        self.preprocessing: dict[str, Any] = {
            "input_size": (3, image_size, image_size),
            "interpolation": "bicubic",
            "mean": tuple(mean),
            "std": tuple(std),
            "crop_pct": 1.0,
        }
        """What evaluation does to an image, in the words of timm's pretrained configurations."""
        self.class_names = list(SHAPES)
        self.dense_share = dense_share
        self._mean = np.array(mean, dtype=np.float32)
        self._std = np.array(std, dtype=np.float32)

    def scene(self, epoch: int, index: int) -> Sample:
        """Training scene `index` of an epoch; the shares are exact over an epoch."""
        if int((index + 1) * self.dense_share) == int(index * self.dense_share):
            return super().scene(epoch, index)
        # a world of its own: the seeds below the training worlds' are nobody's
        world = ShapesWorld("balanced", training_seed(self.seed) - 2**20, 2**32 - 1, self.image_size)
        return world[epoch * self.epoch_size + index]

    def make(self, sample: Sample, generator: np.random.Generator, epoch: int) -> Any:
        """Normalized image, label, and the label of each pixel."""
        pixels = (sample.pixels.astype(np.float32) / 255 - self._mean) / self._std
        labels = [SHAPES.index(thing.shape) for thing in sample.objects]
        of_object = np.array([0, *(1 + label for label in labels)], dtype=np.uint8)
        return (
            torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
            labels[0] if len(labels) == 1 else IGNORED,
            torch.from_numpy(of_object[sample.labels]),
        )

    def val_dataloader(self) -> Any:
        """The loader of the "balanced" world; "train" has no single shapes."""
        return super().val_dataloader()[1]


class ShapesClassifier(ImageClassifier):
    """A timm model that is also taught what is where.

    Args:
        model: a timm name.
        class_names: of the data, in the order of the labels.
        preprocessing: `SingleShapesData.preprocessing`.
        batch_size: on each device.
        model_args: arguments of the model.
        dense_weight: weight of the dense cross entropy; 0 trains the classifier alone.
        dense_stage: the map whose positions predict, counted from 0 as `forward_intermediates` counts; the
            default has 8 x 8 positions of a 64 pixel image in a hierarchical model.
        background_weight: class weight of the background in the dense cross entropy.
        kwargs: the rest of the recipe, see `ImageClassifier`.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    dense_class_weights: Tensor

    def __init__(
        self,
        model: str,
        class_names: Sequence[str],
        preprocessing: dict[str, Any],
        batch_size: int = 64,
        model_args: dict[str, Any] | None = None,
        dense_weight: float = 1.0,
        dense_stage: int = 1,
        background_weight: float = 0.1,
        **kwargs: Any,
    ) -> None:
        if dense_weight < 0:
            raise ValueError(f"dense_weight must be at least 0, got {dense_weight}")
        if not 0 < background_weight <= 1:
            raise ValueError(f"background_weight must be above 0 and at most 1, got {background_weight}")
        if dense_weight and (kwargs.get("mixup") or kwargs.get("cutmix")):
            raise ValueError("mixup and cutmix leave no dense targets: set dense_weight or them to 0")
        if kwargs.get("teacher"):
            raise ValueError("train.shapes_classifier does not distill: leave teacher out")
        super().__init__(model, class_names, preprocessing, batch_size, model_args, **kwargs)
        if dense_weight:
            width = _width(self.net, model, dense_stage, preprocessing["input_size"])
            # a part of the net, so that one optimizer, schedule and average serve both
            self.net.add_module(
                "auxiliary",
                nn.Sequential(LayerNorm2d(width), nn.Conv2d(width, 1 + len(class_names), 1)),
            )
            weights = torch.ones(1 + len(class_names))
            weights[0] = background_weight
            self.register_buffer("dense_class_weights", weights, persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy of the labels that there are, plus `dense_weight` times that of the positions."""
        images, target, labels = batch
        single = target != IGNORED
        if not self.hparams["dense_weight"]:
            if not single.all():
                raise ValueError(
                    "without dense targets images of several shapes teach nothing: set dense_share to 0"
                )
            return super().training_step((images, target), batch_idx)
        if self.hparams["channels_last"]:
            images = images.contiguous(memory_format=torch.channels_last)
        net: Any = self.net
        features, (maps,) = net.forward_intermediates(images, indices=[self.hparams["dense_stage"]])
        loss = cross_entropy(
            net.forward_head(features).float(),
            target,
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.hparams["label_smoothing"],
        )
        loss = loss / single.sum().clamp(min=1)  # a batch may by chance hold no image of one shape
        positions = net.auxiliary(maps).float()
        dense = cross_entropy(positions, dense_targets(labels, positions), weight=self.dense_class_weights)
        rates = [group["lr"] for group in self.trainer.optimizers[0].param_groups]
        for name, value in (("train/loss", loss), ("train/dense_loss", dense)):
            self.log(
                name,
                value,
                on_step=True,
                on_epoch=True,
                prog_bar=True,
                batch_size=len(images),
                sync_dist=True,
            )
        self.log("lr", max(rates), on_step=True, on_epoch=False)
        return loss + self.hparams["dense_weight"] * dense

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Top-1, top-5 and loss on fresh images."""
        self._evaluate("val", *batch[:2])


def dense_targets(labels: Tensor, positions: Tensor) -> Tensor:
    """What each position of a map has to predict: the shape that has most pixels in its cell, if any has.

    Args:
        labels: uint8 `[B, H, W]`, 0 for background, else 1 + label.
        positions: logits `[B, 1 + classes, h, w]`.

    Returns:
        int64 `[B, h, w]`.
    """
    _, classes, height, width = positions.shape
    pixels = one_hot(labels.long(), classes).movedim(-1, 1)[:, 1:].float()
    share, shape = adaptive_avg_pool2d(pixels, (height, width)).max(1)
    return torch.where(share > 0, shape + 1, 0)


def _width(net: Any, name: str, stage: int, input_size: Sequence[int]) -> int:
    """Channels of a stage's map."""
    if not hasattr(net, "forward_intermediates"):
        raise ValueError(f"{name} has no forward_intermediates for dense targets; set dense_weight to 0")
    if stage < 0:
        raise ValueError(f"dense_stage counts from 0, got {stage}")
    try:
        with torch.no_grad():
            (maps,) = net.eval().forward_intermediates(
                torch.zeros(1, *input_size), indices=[stage], intermediates_only=True
            )
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} has no map {stage} for dense_stage: {brief(error)}") from error
    net.train()
    return maps.shape[1]


def export_classifier(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write what `load_classifier` reads from a checkpoint of this program, without the auxiliary head.

    Args:
        checkpoint: of a run; with `ema_decay` the averaged weights are taken.
        folder: where to write; `visionsel.embedded.files.WEIGHTS / "classifier_nat"` ships with the package.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: when there is no checkpoint.
        ValueError: when it is not one of this program.
    """
    content = read_checkpoint(checkpoint)
    trained = content.get("hyper_parameters") or {}
    if "dense_weight" not in trained or "state_dict" not in content:
        raise ValueError(f"{checkpoint} is not a checkpoint of train.shapes_classifier")
    arguments = trained["model_args"] or {}
    model = timm.create_model(
        trained["model"],
        num_classes=len(trained["class_names"]),
        pretrained_cfg_overlay=dict(trained["preprocessing"]),
        **arguments,
    )
    state = {
        key: value
        for key, value in below("net.", content["state_dict"]).items()
        if not key.startswith("auxiliary.")
    }
    model.load_state_dict(state)
    return save_classifier(model, folder, trained["model"], arguments, trained["class_names"])


class ShapesClassifierCLI(EndlessCLI, ClassificationCLI):
    """The command line; there is no end of images, so that a test would be a validation."""

    def __init__(self, arguments: Sequence[str] | None = None) -> None:
        RunCLI.__init__(self, ShapesClassifier, SingleShapesData, arguments)

    def after_fit(self) -> None:
        """Write the last checkpoint as `load_classifier` reads it, where the run has our checkpoints."""
        last = self.output / "checkpoints" / "last.ckpt"
        if self.trainer.is_global_zero and last.is_file():
            export_classifier(last, self.output / "export")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_cli("train.shapes_classifier", ShapesClassifierCLI, arguments)


if __name__ == "__main__":
    sys.exit(main())
