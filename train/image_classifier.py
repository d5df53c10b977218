"""A timm model with its recipe, for Lightning: what `train.classification` trains."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from train.classifier_net import build_classifier, check_name, shard
from train.distillation import Teacher, build_teacher, distillation_loss
from train.image_data import IGNORED
from train.recipe import average_of_weights, check, check_optimization, count_updates, peak_lr
from visionsel.data.resumable import seed_generators

__all__ = ["ImageClassifier"]


class ImageClassifier(LightningModule):
    """A timm model with its recipe.

    Args:
        model: a timm name, with a tag if a release is meant.
        class_names: of the data, in the order of the labels; they set the number of classes.
        preprocessing: `ImageFolderData.preprocessing`; becomes the model's pretrained configuration.
        batch_size: on each device.
        model_args: arguments of the model, such as `{drop_path_rate: 0.1}`.
        pretrained: start from the released weights.
        checkpoint: start from a file: a release, or a checkpoint of this program. A classifier of another
            number of classes is left out.
        checkpoint_classes: names of the classes of those weights ("imagenet-22k" or a text file with a name a
            line): the classifier keeps the rows of our classes.
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
        grad_checkpointing: compute activations again in the backward pass instead of keeping them.
        sync_batchnorm: batch norm over the images of all devices.
        teacher: a timm name to distill from, with its released weights; it sees the images of the student.
        teacher_checkpoint: its weights from a file instead.
        teacher_args: arguments of its model.
        distillation, temperature: see `distillation_loss`.
        distillation_weight: of that loss; that of the labels has the rest of 1 (DeiT: 0.5 hard; 0.1 soft at
            temperature 3).
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
        checkpoint_classes: str | None = None,
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
        grad_checkpointing: bool = False,
        sync_batchnorm: bool = False,
        teacher: str | None = None,
        teacher_checkpoint: str | None = None,
        teacher_args: dict[str, Any] | None = None,
        distillation: Literal["soft", "hard"] = "hard",
        distillation_weight: float = 0.5,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        class_names = list(class_names)
        self.save_hyperparameters()
        mixing = mixup > 0 or cutmix > 0
        check_optimization(self.hparams)
        check(0 <= label_smoothing < 1, f"label_smoothing must be in [0, 1), got {label_smoothing}")
        check(
            not (mixing and batch_size % 2),
            f"mixup and cutmix pair the images of a batch: batch_size must be even, got {batch_size}",
        )
        check(not (pretrained and checkpoint), "give either pretrained or checkpoint, not both")
        check(
            0 <= distillation_weight <= 1,
            f"distillation_weight must be from 0 to 1, got {distillation_weight}",
        )
        check(temperature > 0, f"temperature must be above 0, got {temperature}")
        check(
            teacher is not None or teacher_checkpoint is None,
            "teacher_checkpoint needs teacher, the timm name of its model",
        )
        if teacher is not None:
            check_name(teacher)
        self.teachers: list[Teacher] = []  # in a list, so that no teacher is trained, averaged or saved
        self.spread = False

        self.net = build_classifier(
            model, class_names, preprocessing, model_args, pretrained, checkpoint, checkpoint_classes
        )
        if grad_checkpointing:
            self._checkpoint_gradients()
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

    def _checkpoint_gradients(self) -> None:
        net: Any = self.net
        try:
            net.set_grad_checkpointing()
        except (AssertionError, AttributeError) as error:
            raise ValueError(f"{self.hparams['model']} has no gradient checkpointing") from error

    def _metrics(self) -> nn.ModuleDict:
        classes = len(self.hparams["class_names"])
        return nn.ModuleDict(
            {
                "loss": MeanMetric(),
                "top1": MulticlassAccuracy(classes, top_k=1, average="micro"),
                "top5": MulticlassAccuracy(classes, top_k=min(5, classes), average="micro"),
            }
        )

    def setup(self, stage: str) -> None:
        """The teacher, which only training needs."""
        hparams = self.hparams
        if stage == "fit" and hparams["teacher"] and not self.teachers:
            teacher = build_teacher(
                hparams["teacher"],
                hparams["class_names"],
                hparams["preprocessing"],
                hparams["teacher_args"],
                hparams["teacher_checkpoint"],
            )
            if hparams["compile"]:
                teacher.net.compile()
            self.teachers = [teacher]

    def configure_model(self) -> None:
        """Synchronize batch norm if wanted, and shard the model where the strategy shards (FSDP2)."""
        if self.spread:
            return
        if self.hparams["sync_batchnorm"] and self.trainer.world_size > 1:
            self.net = convert_sync_batchnorm(self.net)
        if self.device_mesh is not None:
            shard(self.net, self.device_mesh)
        self.spread = True

    def on_fit_start(self) -> None:
        for teacher in self.teachers:
            teacher.to(self.device)

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
        logits = self(images).float()
        loss = cross_entropy(logits, target, label_smoothing=smoothing)
        common: dict[str, Any] = {
            "on_step": True,
            "on_epoch": True,
            "batch_size": len(images),
            "sync_dist": True,
        }
        for teacher in self.teachers:
            weight = self.hparams["distillation_weight"]
            kind, temperature = self.hparams["distillation"], self.hparams["temperature"]
            distance = distillation_loss(logits, teacher(images), kind, temperature)
            self.log("train/distillation_loss", distance, **common)
            loss = (1 - weight) * loss + weight * distance
        self.log("train/loss", loss, prog_bar=True, **common)
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
        seen = target != IGNORED  # the others fill up a batch
        if seen.any():
            logits, target = logits[seen], target[seen]
            metrics["loss"].update(cross_entropy(logits, target), len(target))  # type: ignore[index]
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
        if self.hparams["ema_decay"] and isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise ValueError("ema_decay averages whole models, FSDP2 shards them: train with one of them")
        return average_of_weights(self)

    def configure_optimizers(self) -> Any:
        """timm's optimizer and a schedule over the whole run that steps after every update."""
        trainer, hparams = self.trainer, self.hparams
        updates = count_updates(trainer)
        optimizer = create_optimizer_v2(
            self.net,
            hparams["optimizer"],
            lr=peak_lr(self),
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
