"""Train, validate, test and apply detectors over hierarchical timm backbones: Mask R-CNN, RetinaNet, RT-DETR.

    python -m train.detection fit --config configs/shapes/mask_rcnn_biformer.yaml
    python -m train.detection fit --config configs/coco/mask_rcnn_nat_tiny_3x.yaml --data.root /data/coco
    python -m train.detection fit --config runs/shapes/mask_rcnn_biformer/config.yaml \\
        --ckpt_path runs/shapes/mask_rcnn_biformer/checkpoints/last.ckpt              # continue exactly
    python -m train.detection validate --config runs/shapes/mask_rcnn_biformer/config.yaml \\
        --ckpt_path runs/shapes/mask_rcnn_biformer/checkpoints/best.ckpt              # or test, predict

- `detector`: torchvision's Mask R-CNN, Faster R-CNN and RetinaNet, transformers' RT-DETR, RT-DETR v2, D-FINE;
- COCO's average precision of boxes and masks; results as COCO's JSON; pictures of each validation;
- the randomness of an update depends on seed, epoch and batch only, and that of a sample on seed, epoch and
  position, so that a resumed run equals one that was never stopped.
"""

import math
import sys
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from timm.optim import create_optimizer_v2
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from train.cli import RunCLI, run_cli
from train.detection_data import CocoData, Target
from train.detection_detr import Detr
from train.detection_models import BatchNorm
from train.detection_recipe import (
    Detectors,
    backbone_of,
    build_detector,
    check_recipe,
    load_start,
    parameter_groups,
    settle,
)
from train.detection_results import (
    average_precision,
    coco_rows,
    draw_detections,
    gather,
    precision_metric,
    sheet,
    write_results,
)
from train.recipe import average_of_weights, check, peak_lr, with_cosine, with_rate
from visionsel.data.resumable import seed_generators
from visionsel.files import whole_file

__all__ = ["Detector", "main"]


class Detector(LightningModule):
    """A detector with its recipe.

    Args:
        backbone: a timm name, with a tag if a release is meant.
        categories: `CocoData.categories`: names by id, in the order of the classes.
        size, max_size: of images in evaluation; see `CocoData`. A DETR sees squares of `size`.
        batch_size: on each device.
        detector: "mask_rcnn", "faster_rcnn" or "retinanet" of torchvision; "rt_detr", "rt_detr_v2" or
            "d_fine" of transformers.
        backbone_args: arguments of the backbone, such as `{drop_path_rate: 0.1}`; not with a DETR.
        pretrained: start from the released weights of the backbone.
        checkpoint: start the backbone from a file, a release or a checkpoint of train.classification; or from
            a small classifier of the package, as "embedded:biformer".
        start: start all of the detector from a checkpoint of this program; where the categories differ, the
            layers of the classes begin anew.
        detector_args: further arguments of torchvision's class, such as `{box_score_thresh: 0.01}`, or of
            transformers' configuration, such as `{num_queries: 100}`.
        least_stride: of the finest map; default 4, and 8 for RetinaNet and DETRs.
        pyramid_channels, box_channels, mask_channels, mask_layers: sizes of torchvision's pyramid and heads;
            defaults of the papers.
        anchor_scales: sides of the anchors, in strides of their level; default 8, and 4, 5.04, 6.35 for
            RetinaNet.
        anchor_ratios: heights over widths.
        output_norms: a LayerNorm on each map of the backbone, as the authors of BiFormer and NAT have it.
        batch_norm: of the backbone: "eval" keeps the statistics and trains the affine part, as the papers do;
            "frozen" keeps both; "train" is for large batches.
        group_norm: GroupNorm in the pyramid and the convolutional heads; else they have no norm.
        sampling_ratio: points a side of each bin of RoIAlign; 2 in torchvision, 0 (as many as the bin has
            pixels) in mmdetection.
        frozen_stages: 0 trains everything, n keeps the stem and the first n stages as they are.
        grad_checkpointing: recompute the backbone's activations in backward instead of keeping them.
        mean, std: of the pixels; default those of the backbone.
        optimizer: timm's name.
        optimizer_args: its further arguments.
        lr: the peak learning rate.
        lr_batch_size: the batch size that `lr` is meant for; `lr` is scaled linearly to the batch of an
            update. None uses `lr` as it is.
        weight_decay: not applied to biases, norms and what the backbone exempts.
        backbone_lr: rate of the backbone, as a share of `lr`.
        layer_decay: factor on the rate from each layer of the backbone to the one before it.
        schedule: "step" multiplies the rate by `lr_factor` at the ends of the epochs `lr_epochs`; "cosine"
            falls to 0. Both step after every update.
        lr_epochs, lr_factor: see `schedule`.
        warmup_steps: updates of a linear warmup from 0.
        ema_decay: validate, save and apply the exponential average of the weights with this decay.
        pictures: images of the validation split that are drawn.
        picture_threshold: scores below it are not drawn.
        seed: of dropout, stochastic depth and the sampling of proposals.

    Raises:
        ValueError: naming the argument that is wrong.
        ImportError: for a DETR without the extra "multimodal".
    """

    def __init__(
        self,
        backbone: str,
        categories: dict[int, str],
        size: int = 800,
        max_size: int = 1333,
        batch_size: int = 2,
        detector: Detectors = "mask_rcnn",
        backbone_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint: str | None = None,
        start: str | None = None,
        detector_args: dict[str, Any] | None = None,
        least_stride: int | None = None,
        pyramid_channels: int = 256,
        box_channels: int = 1024,
        mask_channels: int = 256,
        mask_layers: int = 4,
        anchor_scales: Sequence[float] | None = None,
        anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        output_norms: bool = False,
        batch_norm: BatchNorm = "eval",
        group_norm: bool = False,
        sampling_ratio: int = 2,
        frozen_stages: int = 0,
        grad_checkpointing: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        optimizer: str = "adamw",
        optimizer_args: dict[str, Any] | None = None,
        lr: float = 1e-4,
        lr_batch_size: int | None = None,
        weight_decay: float = 0.05,
        backbone_lr: float = 1.0,
        layer_decay: float = 1.0,
        schedule: Literal["step", "cosine"] = "step",
        lr_epochs: Sequence[int] = (8, 11),
        lr_factor: float = 0.1,
        warmup_steps: int = 500,
        ema_decay: float | None = None,
        pictures: int = 9,
        picture_threshold: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__()
        categories = dict(categories)
        anchor_ratios = list(anchor_ratios)
        lr_epochs = list(lr_epochs)
        self.save_hyperparameters()
        check_recipe(self.hparams)
        self._built = [build_detector(self.hparams)]  # in a list, as what follows: no modules of this one
        self.net = self._built[0].net
        # those of the first weights stay with the model
        self.hparams["mean"], self.hparams["std"] = self._built[0].mean, self._built[0].std
        if start is not None:
            load_start(self.net, start)
        self.folder: Path | None = None  # where results and pictures go; set by the command line
        self._metric: list[MeanAveragePrecision] = []
        self._rows: list[dict[str, Any]] = []
        self._drawn: list[Image.Image] = []

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> Any:
        """Losses in training, else detections; see `train.detection_models`. Images are uint8 or float."""
        scaled = [i / 255 if i.dtype == torch.uint8 else i for i in images]
        if isinstance(self.net, Detr):
            return self.net(scaled, targets)
        device, pyramid = self.device.type, cast(Any, self.net.backbone)
        automatic = torch.is_autocast_enabled(device)
        pyramid.precision = torch.get_autocast_dtype(device) if automatic else None
        with torch.autocast(device, enabled=False):
            return self.net(scaled, targets)

    def on_train_epoch_start(self) -> None:
        settle(backbone_of(self.net), self.hparams["batch_norm"])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_generators(self.hparams["seed"], self.global_rank, self.current_epoch, batch_idx)

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> Tensor:
        """The sum of the detector's losses.

        Raises:
            ValueError: when it is not finite, with the ids of the images.
        """
        images, targets = batch
        losses = self(images, targets)
        loss = torch.stack([value.reshape(()) for value in losses.values()]).sum()
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss is {loss.item()} at images {[target['image_id'] for target in targets]} of epoch "
                f"{self.current_epoch}; a lower lr, more warmup_steps or trainer.gradient_clip_val may help"
            )
        common: dict[str, Any] = {"batch_size": len(images), "sync_dist": True}
        # a DETR has each of its losses again for every layer and for denoising
        main = {name: value for name, value in losses.items() if "_aux" not in name and "_dn" not in name}
        self.log_dict({f"train/{name}": value for name, value in main.items()}, **common)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, **common)
        rates = [group["lr"] for group in self.trainer.optimizers[0].param_groups]
        self.log("lr", max(rates), on_step=True, on_epoch=False)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._begin()

    def on_test_epoch_start(self) -> None:
        self._begin()

    def validation_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> None:
        """Average precisions of the validation split."""
        self._measure(*batch)

    def test_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> None:
        """Average precisions of the test split."""
        self._measure(*batch)

    def on_validation_epoch_end(self) -> None:
        self._end("val")

    def on_test_epoch_end(self) -> None:
        self._end("test")

    def predict_step(self, batch: tuple[list[Tensor], list[Target]], batch_idx: int) -> list[dict[str, Any]]:
        """Detections as rows of COCO's results; `image_id` is the position in the list of files, from 1."""
        found = zip(self._detect(batch[0]), batch[1], strict=True)
        return [row for one, t in found if not t.get("filler") for row in self._results(one, t)]

    def _begin(self) -> None:
        metric = precision_metric(self.hparams["detector"] == "mask_rcnn")
        self._metric, self._rows, self._drawn = [metric], [], []

    def _detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = self(images)
        for one in found:
            if "masks" in one:
                one["masks"] = one["masks"][:, 0] > 0.5
        return [{name: value.cpu() for name, value in one.items()} for one in found]

    def _results(self, found: dict[str, Tensor], target: Target) -> list[dict[str, Any]]:
        return coco_rows(found, target["image_id"], list(self.hparams["categories"]))

    def _measure(self, images: list[Tensor], targets: list[Target]) -> None:
        found = self._detect(images)
        real = [number for number, target in enumerate(targets) if not target.get("filler")]
        images, found = [images[number] for number in real], [found[number] for number in real]
        targets = [targets[number] for number in real]
        truth = [{k: v.cpu() if isinstance(v, Tensor) else v for k, v in t.items()} for t in targets]
        self._metric[0].update(found, truth)
        names, threshold = list(self.hparams["categories"].values()), self.hparams["picture_threshold"]
        for image, one, target in zip(images, found, targets, strict=True):
            if self.trainer.state.fn != "fit":
                self._rows += self._results(one, target)
            if len(self._drawn) < self.hparams["pictures"] and self.global_rank == 0:
                self._drawn.append(draw_detections(image, one, names, threshold))

    def _end(self, stage: str) -> None:
        scores = average_precision(self._metric[0])
        for name, value in scores.items():
            self.log(f"{stage}/{name}", value, prog_bar=name.endswith("_ap"), sync_dist=True)
        rows = gather(self._rows)
        if self.global_rank == 0 and not self.trainer.sanity_checking:
            if self.trainer.state.fn != "fit" and self.folder is not None:
                write_results(rows, self.folder / f"{stage}_results.json")
            if self._drawn:
                self._show(stage, sheet(self._drawn))
        self._metric, self._rows, self._drawn = [], [], []

    def _show(self, stage: str, picture: Image.Image) -> None:
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(
                    f"{stage}/detections", np.asarray(picture), self.global_step, dataformats="HWC"
                )
        if self.folder is not None:
            epoch = f"_epoch{self.current_epoch:03d}" if self.trainer.state.fn == "fit" else ""
            with whole_file(self.folder / "pictures" / f"{stage}{epoch}.png") as partial:
                picture.save(partial)

    configure_callbacks = average_of_weights

    def configure_optimizers(self) -> Any:
        """timm's optimizer over groups of parameters, and a schedule that steps after every update."""
        trainer, hparams = self.trainer, self.hparams
        lr = peak_lr(self)
        groups = parameter_groups(self._built[0], hparams, lr)
        optimizer = create_optimizer_v2(
            groups, hparams["optimizer"], lr=lr, **(hparams["optimizer_args"] or {})
        )
        warmup = hparams["warmup_steps"]
        if hparams["schedule"] == "cosine":
            return with_cosine(optimizer, trainer, warmup)
        updates = trainer.estimated_stepping_batches
        check(warmup < updates, f"warmup_steps {warmup} leave none of the {updates} updates of this run")
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        ends = [epoch * per_epoch for epoch in sorted(hparams["lr_epochs"])]

        def rate(step: int) -> float:
            return min(1, (step + 1) / (warmup + 1)) * hparams["lr_factor"] ** bisect_right(ends, step)

        return with_rate(optimizer, rate)


class DetectionCLI(RunCLI):
    """The command line: fixed classes, so that a configuration names no class of ours."""

    monitor = "val/box_ap"
    fixed = ("detector", "backbone", "backbone_args", "categories")
    first_weights = ("start", "checkpoint", "pretrained")
    whole_weights = ("start",)

    def __init__(self, arguments: Sequence[str] | None = None) -> None:
        super().__init__(Detector, CocoData, arguments)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What model and data take from each other."""
        super().add_arguments_to_parser(parser)
        for name in ("categories", "size", "max_size", "batch_size"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        parser.link_arguments("model.detector", "data.masks", compute_fn=_has_masks)

    def before_instantiate_classes(self) -> None:
        """Take from a checkpoint how pixels are prepared and, to predict without annotations, categories."""
        super().before_instantiate_classes()
        if self.subcommand == "fit" or not self.resumed:
            return
        saved = self.checkpoint.get("hyper_parameters", {})
        model, data = (self.config[self.subcommand][part] for part in ("model", "data"))
        for name in ("mean", "std"):
            if model[name] is None:
                model[name] = saved.get(name)
        if self.subcommand == "predict" and data["categories"] is None:
            data["categories"] = saved.get("categories")

    def after_instantiate_classes(self) -> None:
        """Refuse a checkpoint of another detector; say where results go."""
        super().after_instantiate_classes()
        self.model.folder = self.output

    def predict(self, **kwargs: Any) -> None:
        """Write what was found in a folder of images as COCO's results, with the file of each row."""
        files = self.datamodule.predict_files
        target = Path(self._get(self.config, "predictions") or self.output / "predictions.json")
        rows = [row for batch in self.evaluate("predict", **kwargs) or [] for row in batch]
        rows = [{**row, "file_name": str(files[row["image_id"] - 1])} for row in rows]
        write_results(rows, target)
        print(f"{len(rows)} detections in {len(files)} images in {target}")


def _has_masks(detector: str) -> bool:
    return detector == "mask_rcnn"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_cli("train.detection", DetectionCLI, arguments)


if __name__ == "__main__":
    sys.exit(main())
