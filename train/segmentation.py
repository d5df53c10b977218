"""Semantic segmentation: the decoders of segmentation_models_pytorch over a hierarchical timm model.

    python -m train.segmentation fit --config configs/shapes/upernet_biformer.yaml
    python -m train.segmentation fit --config configs/ade20k/upernet_biformer_small.yaml \\
        --data.root /data/ADEChallengeData2016 --model.checkpoint biformer_small_best.pth --trainer.devices 8
    python -m train.segmentation test --config runs/shapes/upernet_biformer/config.yaml \\
        --ckpt_path runs/shapes/upernet_biformer/checkpoints/best.ckpt           # or validate, predict

- mmsegmentation's recipe: the transforms of `train.segmentation_transforms`, an auxiliary head, AdamW, a
  polynomial schedule with warmup that steps after every update, whole images or sliding windows;
- the loss is the sum over labelled pixels divided by the number of all pixels, as there: what is unlabelled
  weighs nothing, and a crop without labels gives 0;
- a resumed run equals one that was never stopped.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from train.cli import RunCLI, run_cli
from train.recipe import average_of_weights, check, check_optimization, count_updates, with_rate
from train.segmentation_data import SegmentationData
from train.segmentation_metrics import mean_measures, write_class_table
from train.segmentation_net import SegmentationNet, load_encoder, resized, slide
from train.segmentation_pictures import WritePredictions
from train.segmentation_transforms import IGNORED
from visionsel.data.resumable import seed_generators

__all__ = ["SegmentationCLI", "SemanticSegmentation", "main", "pixel_loss", "poly_rate"]


class SemanticSegmentation(LightningModule):
    """A segmentation network with its recipe.

    Args:
        model: the encoder, a timm name with `features_only`.
        class_names: of the data, in the order of the labels; they set the number of classes.
        preprocessing: `SegmentationData.preprocessing`; a checkpoint keeps it.
        decoder: of segmentation_models_pytorch: "upernet", "fpn", "unet", ...
        model_args: arguments of the timm model, such as `{drop_path_rate: 0.3}`.
        decoder_args: arguments of the decoder, such as `{decoder_channels: 512}`.
        pretrained: start the encoder from the released weights.
        checkpoint: start the encoder from a file, see `load_encoder`.
        auxiliary_weight: of the auxiliary head's loss; 0 builds no such head. mmsegmentation's 0.4.
        auxiliary_channels: of that head.
        optimizer: timm's name.
        optimizer_args: its further arguments.
        lr: the peak learning rate, of the decoder; the default and those below are the papers' for ADE20K.
        weight_decay: not applied to biases, norms and what the encoder's `no_weight_decay` names.
        layer_decay: factor on the learning rate from each layer of the encoder to the one before it.
        warmup_steps: updates of the linear warmup, part of the schedule.
        warmup_ratio: share of the rate at which it starts.
        power: of the polynomial that the rate falls by.
        min_lr: where it ends.
        ema_decay: validate, save and apply the exponential average of the weights with this decay.
        sync_batchnorm: batch norm over the images of all devices.
        evaluation: "whole" images, or "slide" a window over them.
        window: pixels a side of it; default the crop that was trained on.
        stride: pixels from one window to the next; default two thirds of a window.
        seed: of dropout and stochastic depth.

    Raises:
        ValueError: naming the argument that is wrong, or the weights that do not fit.
    """

    def __init__(
        self,
        model: str,
        class_names: Sequence[str],
        preprocessing: dict[str, Any],
        decoder: str = "upernet",
        model_args: dict[str, Any] | None = None,
        decoder_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint: str | None = None,
        auxiliary_weight: float = 0.4,
        auxiliary_channels: int = 256,
        optimizer: str = "adamw",
        optimizer_args: dict[str, Any] | None = None,
        lr: float = 6e-5,
        weight_decay: float = 0.01,
        layer_decay: float | None = None,
        warmup_steps: int = 1500,
        warmup_ratio: float = 1e-6,
        power: float = 1.0,
        min_lr: float = 0.0,
        ema_decay: float | None = None,
        sync_batchnorm: bool = False,
        evaluation: Literal["whole", "slide"] = "whole",
        window: int | None = None,
        stride: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        class_names = list(class_names)
        self.save_hyperparameters()
        self.window = preprocessing["input_size"][1] if window is None else window
        self.stride = max(1, self.window * 2 // 3) if stride is None else stride
        check_optimization(self.hparams)
        for holds, message in (
            (0 <= min_lr < lr, f"min_lr must be from 0 to below lr {lr}, got {min_lr}"),
            (power > 0, f"power must be above 0, got {power}"),
            (warmup_steps >= 0, f"warmup_steps must be at least 0, got {warmup_steps}"),
            (0 < warmup_ratio <= 1, f"warmup_ratio must be above 0 and at most 1, got {warmup_ratio}"),
            (auxiliary_weight >= 0, f"auxiliary_weight must be at least 0, got {auxiliary_weight}"),
            (auxiliary_channels > 0, f"auxiliary_channels must be above 0, got {auxiliary_channels}"),
            (layer_decay is None or 0 < layer_decay <= 1, f"layer_decay is from 0 to 1, got {layer_decay}"),
            (0 < self.stride <= self.window, f"stride {self.stride} must be from 1 to window {self.window}"),
            (not (pretrained and checkpoint), "give either pretrained or checkpoint, not both"),
        ):
            check(holds, message)
        classes = len(class_names)
        channels = auxiliary_channels if auxiliary_weight else 0
        self.net = SegmentationNet(decoder, model, classes, model_args or {}, decoder_args or {}, channels)
        if pretrained or checkpoint is not None:
            load_encoder(self.net, model, model_args or {}, pretrained, checkpoint)
        self.synchronized = False
        self.confusion = nn.ModuleDict(
            {
                f"{stage}_pixels": MulticlassConfusionMatrix(
                    classes, ignore_index=IGNORED, validate_args=False
                )
                for stage in ("val", "test")
            }
        )
        self.losses = nn.ModuleDict({f"{stage}_loss": MeanMetric() for stage in ("val", "test")})
        self.counted: Tensor | None = None
        """The confusion matrix of the last evaluation."""

    def configure_model(self) -> None:
        """Synchronize batch norm if wanted."""
        if self.hparams["sync_batchnorm"] and self.trainer.world_size > 1 and not self.synchronized:
            self.net = convert_sync_batchnorm(self.net)
            self.synchronized = True

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` -> logits `[B, classes, H, W]`, whole or by windows as `evaluation` says."""
        if self.hparams["evaluation"] == "slide":
            return slide(self.net, images, self.window, self.stride)
        return self.net(images)[0].float()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_generators(self.hparams["seed"], self.global_rank, self.current_epoch, batch_idx)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of the pixels, plus `auxiliary_weight` times that of the auxiliary head."""
        images, labels = batch
        logits, auxiliary = self.net(images)
        loss = pixel_loss(logits, labels)
        named = {"train/loss": loss}
        if auxiliary is not None:
            named["train/auxiliary_loss"] = pixel_loss(auxiliary, labels)
        for name, value in named.items():
            self.log(
                name,
                value,
                on_step=True,
                on_epoch=True,
                prog_bar=True,
                batch_size=len(images),
                sync_dist=True,
            )
        rates = [group["lr"] for group in self.trainer.optimizers[0].param_groups]
        self.log("lr", max(rates), on_step=True, on_epoch=False)
        return loss + self.hparams["auxiliary_weight"] * named.get("train/auxiliary_loss", 0)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Count the pixels of the validation split; returns the labels found."""
        return self._count("val", *batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Count the pixels of the test split; returns the labels found."""
        return self._count("test", *batch)

    def _count(self, stage: str, images: Tensor, labels: Tensor) -> Tensor:
        logits = resized(self(images), labels.shape[-2:])
        found = logits.argmax(1)
        counter, losses = self._counters(stage)
        counter.update(found, labels.long())
        labelled = int((labels != IGNORED).sum())
        if labelled:
            loss = cross_entropy(logits, labels.long(), ignore_index=IGNORED)
            losses.update(loss, labelled)
        return found

    def _counters(self, stage: str) -> tuple[Any, Any]:
        return self.confusion[f"{stage}_pixels"], self.losses[f"{stage}_loss"]

    def on_validation_epoch_end(self) -> None:
        self._measure("val")

    def on_test_epoch_end(self) -> None:
        self._measure("test")

    def _measure(self, stage: str) -> None:
        counter, losses = self._counters(stage)
        self.counted = counter.compute().cpu()
        measures = mean_measures(self.counted) | {"loss": float(losses.compute())}
        for name, value in measures.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "miou", sync_dist=True)
        counter.reset()
        losses.reset()

    def predict_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> list[tuple[int, Tensor]]:
        """Position of each image in the list of files, and its labels at the size of the file."""
        images, positions, sizes = batch
        found = [
            resized(logits[None], size).argmax(1)[0]
            for logits, size in zip(self(images), sizes.tolist(), strict=True)
        ]
        return list(zip(positions.tolist(), found, strict=True))

    configure_callbacks = average_of_weights

    def configure_optimizers(self) -> Any:
        """timm's optimizer, rates by layer, and a schedule over the whole run."""
        hparams = self.hparams
        updates = count_updates(self.trainer, hparams["warmup_steps"])
        optimizer = create_optimizer_v2(
            self.net,
            hparams["optimizer"],
            lr=hparams["lr"],
            weight_decay=hparams["weight_decay"],
            layer_decay=hparams["layer_decay"],
            **(hparams["optimizer_args"] or {}),
        )
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)

        def rate(step: int) -> float:
            return poly_rate(
                step,
                updates,
                hparams["power"],
                hparams["min_lr"] / hparams["lr"],
                hparams["warmup_steps"],
                hparams["warmup_ratio"],
            )

        return with_rate(optimizer, rate)


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy summed over labelled pixels and divided by all of them; 0 where none is labelled."""
    total = cross_entropy(logits.float(), labels.long(), ignore_index=IGNORED, reduction="sum")
    return total / labels.numel()


def poly_rate(step: int, updates: int, power: float, least: float, warmup: int, start: float) -> float:
    """mmsegmentation's polynomial schedule with its linear warmup, as a share of the peak rate.

    Args:
        step: updates done.
        updates: of the run.
        power: of the polynomial.
        least: share where it ends.
        warmup: updates of the warmup.
        start: share of the schedule's rate at which the warmup starts.
    """
    share = (1 - least) * (1 - min(step, updates) / updates) ** power + least
    return share if step >= warmup else share * (1 - (1 - step / warmup) * (1 - start))


class SegmentationCLI(RunCLI):
    """The command line: fixed classes, so that a configuration names no class of ours."""

    monitor = "val/miou"
    fixed = ("model", "model_args", "decoder", "decoder_args", "class_names")
    first_weights = ("checkpoint", "pretrained")

    def __init__(self, arguments: Sequence[str] | None = None) -> None:
        super().__init__(SemanticSegmentation, SegmentationData, arguments)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What the model takes from the data, and whether predictions are drawn."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--pictures",
            type=bool,
            default=False,
            help="with the predict verb: also draw the labels over the images, to OUTPUT/pictures",
        )
        for name in ("class_names", "preprocessing"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def evaluate(self, verb: str, **kwargs: Any) -> Any:
        """Run a verb that does not train; validate and test write `OUTPUT/classes_VERB.csv`."""
        results = super().evaluate(verb, **kwargs)
        counted = self.model.counted
        if verb != "predict" and counted is not None and self.trainer.is_global_zero:
            table = self.output / f"classes_{verb}.csv"
            print(f"classes in {write_class_table(table, self.model.hparams['class_names'], counted)}")
        return results

    def predict(self, **kwargs: Any) -> None:
        """Write a label map for each image, each under its name when complete."""
        writer = WritePredictions(
            Path(self._get(self.config, "predictions") or self.output / "predictions"),
            self.model.hparams["class_names"],
            self.datamodule.reduce_zero_label,
            self.output / "pictures" if self._get(self.config, "pictures") else None,
        )
        self.trainer.callbacks.append(writer)  # type: ignore[attr-defined]
        self.evaluate("predict", return_predictions=False, **kwargs)
        print(f"{writer.written} label maps in {writer.folder}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_cli("train.segmentation", SegmentationCLI, arguments)


if __name__ == "__main__":
    sys.exit(main())
