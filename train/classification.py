"""Train, validate, test and apply an image classifier: any timm model, Lightning's trainer, timm's recipes.

    python -m train.classification fit --config configs/digits/biformer.yaml
    python -m train.classification fit --config runs/digits/biformer/config.yaml \\
        --ckpt_path runs/digits/biformer/checkpoints/last.ckpt                        # continue exactly
    python -m train.classification test --config runs/digits/biformer/config.yaml \\
        --ckpt_path runs/digits/biformer/checkpoints/best.ckpt                        # or validate, predict

- any timm name, ours too, with its optimizer, schedule, mixup, cutmix and layer decay from timm;
- the randomness of an update depends on seed, epoch and batch only, and that of a sample on seed, epoch and
  position, so that a resumed run equals one that was never stopped;
- everything that can be known to be wrong is refused before the run's folder is made.
"""

import csv
import difflib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from lightning import LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from timm.data import Mixup
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

import visionsel  # noqa: F401  (registers the models with timm)
from train.cli import RunCLI, WeightEMA, brief, read_checkpoint, run_cli
from train.image_data import ImageFolderData
from visionsel.data.resumable import seed_generators
from visionsel.models.pyramid import unwrap_state_dict

__all__ = ["ImageClassifier", "main"]


class ImageClassifier(LightningModule):
    """A timm model with its recipe.

    Args:
        model: a timm name, with a tag if a release is meant.
        class_names: of the data, in the order of the labels; they set the number of classes.
        preprocessing: `ImageFolderData.preprocessing`; becomes the model's pretrained configuration.
        batch_size: on each device.
        model_args: arguments of the model, such as `{drop_path_rate: 0.1}`.
        pretrained: start from the released weights.
        checkpoint: start from a file: a release, or a checkpoint of this program.
        optimizer: timm's name.
        optimizer_args: its further arguments, such as `{betas: [0.9, 0.98]}`.
        lr: the peak learning rate.
        lr_batch_size: the batch size that `lr` is meant for; `lr` is scaled linearly to the batch of an
            update (`batch_size` x devices x accumulated batches). None uses `lr` as it is.
        weight_decay: not applied to biases, norms and what the model's `no_weight_decay` names.
        layer_decay: factor on the learning rate from each layer to the one before it.
        scheduler: timm's name; it steps after every update.
        scheduler_args: its further arguments.
        warmup_epochs, warmup_lr: linear warmup from this rate; it is part of the schedule's epochs.
        min_lr: where the schedule ends.
        cooldown_epochs: at `min_lr`, the last of the trainer's `max_epochs`.
        mixup, cutmix: alpha of the Beta distributions; 0 switches off.
        mixup_prob, mixup_switch_prob: how often any of them is applied, and cutmix if both could be.
        label_smoothing: of the training targets.
        ema_decay: validate, save and apply the exponential average of the weights with this decay.
        channels_last: memory layout of model and images.
        compile: `torch.compile` the model.
        seed: of dropout, stochastic depth and mixup.

    Raises:
        ValueError: naming the argument that is wrong: an unknown model (with names that are near), arguments
            or an image size that it does not take, an odd batch with mixup, a checkpoint that does not fit.
    """

    def __init__(
        self,
        model: str,
        class_names: Sequence[str],
        preprocessing: dict[str, Any],
        batch_size: int = 128,
        model_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        checkpoint: str | None = None,
        optimizer: str = "adamw",
        optimizer_args: dict[str, Any] | None = None,
        lr: float = 1e-3,
        lr_batch_size: int | None = None,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        scheduler: str = "cosine",
        scheduler_args: dict[str, Any] | None = None,
        warmup_epochs: float = 0,
        warmup_lr: float = 1e-6,
        min_lr: float = 0.0,
        cooldown_epochs: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        mixup_switch_prob: float = 0.5,
        label_smoothing: float = 0.0,
        ema_decay: float | None = None,
        channels_last: bool = False,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        class_names = list(class_names)
        self.save_hyperparameters()
        mixing = mixup > 0 or cutmix > 0
        _check(lr > 0, f"lr must be above 0, got {lr}")
        _check(
            lr_batch_size is None or lr_batch_size > 0, f"lr_batch_size must be above 0, got {lr_batch_size}"
        )
        _check(ema_decay is None or 0 < ema_decay < 1, f"ema_decay must be between 0 and 1, got {ema_decay}")
        _check(0 <= label_smoothing < 1, f"label_smoothing must be in [0, 1), got {label_smoothing}")
        _check(
            not (mixing and batch_size % 2),
            f"mixup and cutmix pair the images of a batch: batch_size must be even, got {batch_size}",
        )
        optimizers = [str(name) for name in list_optimizers()]
        _check(optimizer in optimizers, f"unknown optimizer {optimizer!r}{_near(optimizer, optimizers)}")
        _check(not (pretrained and checkpoint), "give either pretrained or checkpoint, not both")

        self.net = _build(model, len(class_names), preprocessing, model_args or {}, pretrained, checkpoint)
        if channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
        if compile:
            self.net.compile()
        self.mix = None
        if mixing:
            self.mix = Mixup(
                mixup,
                cutmix,
                prob=mixup_prob,
                switch_prob=mixup_switch_prob,
                label_smoothing=label_smoothing,
                num_classes=len(class_names),
            )
        self.metrics = nn.ModuleDict({f"{stage}_metrics": self._metrics() for stage in ("val", "test")})

    def _metrics(self) -> nn.ModuleDict:
        classes = len(self.hparams["class_names"])
        return nn.ModuleDict(
            {
                "loss": MeanMetric(),
                "top1": MulticlassAccuracy(classes, top_k=1, average="micro"),
                "top5": MulticlassAccuracy(classes, top_k=min(5, classes), average="micro"),
            }
        )

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` -> logits `[B, classes]`."""
        if self.hparams["channels_last"]:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.net(images)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_generators(self.hparams["seed"], self.global_rank, self.current_epoch, batch_idx)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy with the labels, or the soft targets of mixup (which hold the smoothing then)."""
        images, target = batch
        smoothing = self.hparams["label_smoothing"]
        if self.mix is not None:
            images, target = self.mix(images, target)
            smoothing = 0.0
        loss = cross_entropy(self(images).float(), target, label_smoothing=smoothing)
        self.log(
            "train/loss",
            loss,
            on_step=True,
            on_epoch=True,
            prog_bar=True,
            batch_size=len(images),
            sync_dist=True,
        )
        rates = [group["lr"] for group in self.trainer.optimizers[0].param_groups]
        self.log("lr", max(rates), on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Top-1, top-5 and loss of the validation split."""
        self._evaluate("val", *batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Top-1, top-5 and loss of the test split."""
        self._evaluate("test", *batch)

    def _evaluate(self, stage: str, images: Tensor, target: Tensor) -> None:
        logits = self(images).float()
        metrics = self.metrics[f"{stage}_metrics"]
        metrics["loss"].update(cross_entropy(logits, target), len(images))  # type: ignore[index]
        metrics["top1"].update(logits, target)  # type: ignore[index]
        metrics["top5"].update(logits, target)  # type: ignore[index]
        for name, metric in metrics.items():  # type: ignore[operator]
            self.log(f"{stage}/{name}", metric, prog_bar=name == "top1", batch_size=len(images))

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Position of each image in the list of files, its likeliest class and that class's probability."""
        images, position = batch
        probability, index = self(images).float().softmax(-1).max(-1)
        return position, index, probability

    def configure_callbacks(self) -> list[Any]:
        """The average of the weights, if wanted."""
        decay = self.hparams["ema_decay"]
        return [WeightEMA(decay=decay)] if decay and self.trainer.state.fn == "fit" else []

    def configure_optimizers(self) -> Any:
        """timm's optimizer and a schedule over the whole run that steps after every update."""
        trainer, hparams = self.trainer, self.hparams
        updates = trainer.estimated_stepping_batches
        if not math.isfinite(updates):
            raise ValueError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
        optimizer = create_optimizer_v2(
            self.net,
            hparams["optimizer"],
            lr=self.peak_lr,
            weight_decay=hparams["weight_decay"],
            layer_decay=hparams["layer_decay"],
            **(hparams["optimizer_args"] or {}),
        )
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        warmup = hparams["warmup_epochs"] * per_epoch
        cooldown = hparams["cooldown_epochs"] * per_epoch
        if warmup + cooldown >= updates:
            raise ValueError(
                f"warmup_epochs {hparams['warmup_epochs']} and cooldown_epochs {hparams['cooldown_epochs']} "
                f"leave none of the {updates} updates of this run; train longer or shorten them"
            )
        # in units of updates: one "epoch" of timm's factory is one update here
        scheduler, _ = create_scheduler_v2(
            optimizer,
            hparams["scheduler"],
            num_epochs=int(updates - cooldown),
            warmup_epochs=round(warmup),
            cooldown_epochs=round(cooldown),
            warmup_lr=hparams["warmup_lr"],
            min_lr=hparams["min_lr"],
            step_on_epochs=False,
            updates_per_epoch=1,
            **(hparams["scheduler_args"] or {}),
        )
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """timm's schedulers are told the number of updates done."""
        scheduler.step_update(self.global_step)

    @property
    def peak_lr(self) -> float:
        """`lr`, scaled to the batch of an update."""
        reference = self.hparams["lr_batch_size"]
        if reference is None:
            return self.hparams["lr"]
        batch = self.hparams["batch_size"] * self.trainer.world_size * self.trainer.accumulate_grad_batches
        return self.hparams["lr"] * batch / reference


def _build(
    name: str,
    classes: int,
    preprocessing: dict[str, Any],
    arguments: dict[str, Any],
    pretrained: bool,
    checkpoint: str | None,
) -> nn.Module:
    """The timm model, known to take the image size."""
    architecture, _, tag = name.partition(".")
    if ":" not in name and not timm.is_model(architecture):
        raise ValueError(f"unknown model {name!r}{_near(architecture, timm.list_models())}")
    if ":" not in name and tag and name not in timm.list_models(f"{architecture}.*", include_tags=True):
        releases = [n for n in timm.list_models(f"{architecture}.*", include_tags=True) if "." in n]
        raise ValueError(f"unknown release {name!r}; {architecture} has {', '.join(releases) or 'none'}")
    overlay = {key: value for key, value in preprocessing.items() if value is not None}
    if checkpoint is not None:
        overlay |= _weights(checkpoint)
    try:
        net = timm.create_model(
            name,
            pretrained=pretrained or checkpoint is not None,
            num_classes=classes,
            pretrained_cfg_overlay=overlay,
            **arguments,
        )
    except (TypeError, ValueError, RuntimeError) as error:
        weights = f" and the weights of {checkpoint or 'the release'}" if checkpoint or pretrained else ""
        raise ValueError(f"{name} with model_args {arguments}{weights}: {brief(error)}") from error
    net.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr, operator]
    channels, height, width = preprocessing["input_size"]
    try:
        with torch.no_grad():
            logits = net.eval()(torch.zeros(1, channels, height, width))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} does not take images of {height} x {width}: {brief(error)}") from error
    if logits.shape != (1, classes):
        raise ValueError(
            f"{name} gives {tuple(logits.shape)} for an image, not (1, {classes}); is it a classifier?"
        )
    return net.train()


def _weights(path: str) -> dict[str, Any]:
    """What timm needs to load a file; a checkpoint of this program says its number of classes."""
    state = read_checkpoint(path)
    trained = state.get("hyper_parameters")
    if trained is None:
        return {"state_dict": unwrap_state_dict(state)}
    net = {
        key.removeprefix("net."): value
        for key, value in state["state_dict"].items()
        if key.startswith("net.")
    }
    return {"state_dict": net, "num_classes": len(trained["class_names"])}


def _near(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    return f"; near it are {', '.join(near)}" if near else ""


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


class ClassificationCLI(RunCLI):
    """The command line: fixed classes, so that a configuration names no class of ours."""

    def __init__(self, arguments: Sequence[str] | None = None) -> None:
        super().__init__(ImageClassifier, ImageFolderData, arguments)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What the model takes from the data and the seed."""
        super().add_arguments_to_parser(parser)
        for name in ("class_names", "preprocessing", "batch_size"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        for target in ("data.seed", "model.seed"):
            parser.link_arguments("seed_everything", target)

    def after_instantiate_classes(self) -> None:
        """Refuse a checkpoint of another model."""
        if not self.resumed:
            if self.subcommand != "fit" and not (
                self.model.hparams["pretrained"] or self.model.hparams["checkpoint"]
            ):
                raise ValueError(f"{self.subcommand} needs weights: give --ckpt_path, or --model.checkpoint")
            return
        path = self._get(self.config, "ckpt_path")
        saved = self.checkpoint.pop("hyper_parameters", None)
        if saved is None or "state_dict" not in self.checkpoint:
            raise ValueError(
                f"{path} is not a checkpoint of this program; "
                "to start from other weights, give them as --model.checkpoint"
            )
        for name in ("model", "model_args", "class_names"):
            if saved[name] != self.model.hparams[name]:
                raise ValueError(
                    f"{path} was trained with {name} {saved[name]}, not {self.model.hparams[name]}"
                )
        del self.checkpoint

    def predict(self, **kwargs: Any) -> None:
        """Write file, class and probability of each image as CSV, under its name when complete."""
        if self.trainer.world_size > 1:
            raise ValueError("predict runs on one device: set --trainer.devices 1")
        files = self.datamodule.predict_files
        names = self.model.hparams["class_names"]
        target = Path(self._get(self.config, "predictions") or self.output / "predictions.csv")
        results = self.evaluate("predict", **kwargs) or []
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with partial.open("w", newline="") as stream:
                writer = csv.writer(stream)
                writer.writerow(["file", "class", "probability"])
                for batch in results:
                    for position, index, probability in zip(*(t.tolist() for t in batch), strict=True):
                        writer.writerow([files[position], names[index], f"{probability:.6f}"])
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)
        print(f"{len(files)} predictions in {target}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_cli("train.classification", ClassificationCLI, arguments)


if __name__ == "__main__":
    sys.exit(main())
