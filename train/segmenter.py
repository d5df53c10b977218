"""Train the small SAM on points, boxes and its own masks, over endless scenes of the shapes world.

    python -m train.segmenter fit --config configs/shapes/segmenter.yaml
    python -m train.segmenter validate --config runs/shapes/segmenter/config.yaml \\
        --ckpt_path runs/shapes/segmenter/checkpoints/best.ckpt

- prompts and losses of SAM (Kirillov et al. 2023, appendix A): a pixel of the object or its box first, then
  rounds with a further point where the answer was wrong and the answer itself as a mask prompt; focal and
  dice loss, the best of three masks is trained, and a head predicts each mask's IoU. Unlike there, the single
  mask is trained in every round, and half of the boxes are exact;
- the encoder runs in the trainer's precision, prompts and decoder in float32: coordinates need it;
- a run ends by writing `OUTPUT/export/`, which `visionsel.embedded.segmenter.load_segmenter` reads.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.cli import LightningArgumentParser
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.utils.data import DataLoader

from train.cli import EndlessCLI, run_cli
from train.recipe import average_of_weights, check, check_optimization, with_cosine
from train.shapes_data import VALIDATION_SEED, ShapesStreamData
from visionsel.boxes import mask_boxes
from visionsel.data.resumable import seed_generators
from visionsel.data.shapes import Sample
from visionsel.embedded.segmentation_quality import (
    Targets,
    collect_targets,
    intersection_over_union,
    pick_best,
    pick_errors,
    pick_pixels,
    prompt_ious,
    upscale,
)
from visionsel.embedded.segmenter import SamConfig, build_sam, decode_prompts, save_segmenter

__all__ = ["PromptData", "SegmenterTraining", "main"]


class PromptData(ShapesStreamData):
    """Scenes and masks of some of their objects, as `Targets`.

    Args:
        prompts_per_image: objects of a training scene that are asked for, at most; validation asks for all.
    """

    def __init__(
        self,
        batch_size: int = 16,
        epoch_size: int = 3200,
        val_size: int = 200,
        image_size: int = 64,
        prompts_per_image: int = 6,
        train_share: float = 0.0,
        max_objects: int = 6,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        check(prompts_per_image >= 1, f"prompts_per_image must be at least 1, got {prompts_per_image}")
        self.prompts_per_image = prompts_per_image
        super().__init__(
            batch_size, epoch_size, val_size, image_size, train_share, max_objects, num_workers, seed
        )

    def make(
        self, sample: Sample, generator: np.random.Generator, epoch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pixels `[H, W, 3]` and masks `[objects, H, W]`."""
        chosen = np.arange(len(sample.objects))
        if epoch >= 0:
            chosen = generator.permutation(chosen)[: self.prompts_per_image]
        return sample.pixels, sample.labels == chosen[:, None, None] + 1

    def collate(self, items: list[Any]) -> Targets:
        return collect_targets(items)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Scenes of the "balanced" distribution."""
        return super().val_dataloader()[1:]


class SegmenterTraining(LightningModule):
    """A SAM with its recipe.

    Args:
        sam: sizes that differ from the defaults of `SamConfig`.
        image_size: of the data and of the encoder.
        box_share: of the objects that are asked for by box; the others are by point.
        box_jitter: deviation of a box's sides from the true ones, in parts of the box's width or height; half
            of the boxes stay exact. 0.1 in SAM.
        refinements: rounds after the first, each with a further point; 8 in SAM.
        refine_share: how often a batch has these rounds.
        mask_share: how often such a round has the earlier answer as a mask prompt.
        focal_weight, focal_gamma, dice_weight, iou_weight: of the losses; 20, 2, 1 and 1 in SAM.
        optimizer: timm's name.
        optimizer_args: its further arguments, such as `{betas: [0.9, 0.98]}`.
        lr: the peak learning rate.
        weight_decay: not applied to biases and norms.
        warmup_steps: linear, from 0; then the rate falls to 0 along a cosine.
        ema_decay: validate, save and export the exponential average of the weights with this decay.
        seed: of the prompts.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        sam: dict[str, Any] | None = None,
        image_size: int = 64,
        box_share: float = 0.3,
        box_jitter: float = 0.1,
        refinements: int = 1,
        refine_share: float = 1.0,
        mask_share: float = 0.8,
        focal_weight: float = 20.0,
        focal_gamma: float = 2.0,
        dice_weight: float = 1.0,
        iou_weight: float = 1.0,
        optimizer: str = "adamw",
        optimizer_args: dict[str, Any] | None = None,
        lr: float = 1.5e-3,
        weight_decay: float = 0.02,
        warmup_steps: int = 50,
        ema_decay: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, share in (
            ("box_share", box_share),
            ("refine_share", refine_share),
            ("mask_share", mask_share),
        ):
            check(0 <= share <= 1, f"{name} must be from 0 to 1, got {share}")
        for name, value in (
            ("box_jitter", box_jitter),
            ("refinements", refinements),
            ("focal_weight", focal_weight),
            ("focal_gamma", focal_gamma),
            ("dice_weight", dice_weight),
            ("iou_weight", iou_weight),
            ("weight_decay", weight_decay),
            ("warmup_steps", warmup_steps),
        ):
            check(value >= 0, f"{name} must be at least 0, got {value}")
        sizes = {"image_size": image_size, **(sam or {})}
        check(
            sizes["image_size"] == image_size,
            f"sam.image_size {sizes['image_size']} is not that of the data, {image_size}; leave it out",
        )
        self.sam = build_sam(sizes)
        sam = asdict(SamConfig(**sizes))
        sam["global_layers"] = list(sam["global_layers"])
        self.save_hyperparameters()
        check_optimization(self.hparams)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_generators(self.hparams["seed"], self.global_rank, self.current_epoch, batch_idx)

    def training_step(self, batch: Targets, batch_idx: int) -> Tensor:
        """Points for some objects of a batch, boxes for the others, and refinements of both."""
        images, masks, owners = batch
        embeddings = self.sam.image_encoder(self.sam.preprocess(images.float()))
        order = torch.randperm(len(owners)).to(masks.device)
        boxed = round(self.hparams["box_share"] * len(owners))
        loss = embeddings.new_zeros((), dtype=torch.float32)
        with torch.autocast(masks.device.type, enabled=False):
            for by, part in (("box", order[:boxed]), ("point", order[boxed:])):
                if len(part):
                    losses, iou = self._ask(embeddings.float(), masks[part], owners[part], by == "box")
                    loss = loss + losses.sum() / len(owners)
                    self.log(f"train/{by}_iou", iou.mean(), batch_size=len(part))
        self.log(
            "train/loss",
            loss,
            on_step=True,
            on_epoch=True,
            prog_bar=True,
            batch_size=len(owners),
            sync_dist=True,
        )
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], on_step=True, on_epoch=False)
        return loss

    def _ask(self, embeddings: Tensor, masks: Tensor, owners: Tensor, by_box: bool) -> tuple[Tensor, Tensor]:
        """Loss of each prompt, mean over the rounds, and IoU after the first round: `[P]` both."""
        device, size = masks.device, masks.shape[1:]
        boxes = _jitter(mask_boxes(masks), self.hparams["box_jitter"], size) if by_box else None
        pixels = torch.empty(len(owners), 0, 2, device=device)
        labels = torch.empty(len(owners), 0, device=device)
        answer: Tensor | None = None
        losses, first = torch.zeros(len(owners), device=device), torch.empty(0)
        refined = torch.rand(()) < self.hparams["refine_share"]
        rounds = 1 + self.hparams["refinements"] if refined else 1
        for turn in range(rounds):
            if turn or not by_box:
                draws = torch.rand(len(owners))  # on the CPU: the same for every device
                if answer is None:
                    pixel, label = pick_pixels(masks, draws), torch.ones(len(owners), device=device)
                else:
                    pixel, label = pick_errors(upscale(answer, size)[:, 0] > 0, masks, draws)
                pixels = torch.cat([pixels, pixel[:, None]], 1)
                labels = torch.cat([labels, label[:, None]], 1)
            shown = answer if answer is not None and torch.rand(()) < self.hparams["mask_share"] else None
            logits, scores = decode_prompts(
                self.sam,
                embeddings,
                owners,
                points=(pixels, labels) if pixels.shape[1] else None,
                boxes=boxes,
                masks=shown,
            )
            answer = pick_best(logits, scores).detach()
            losses = losses + self._loss(upscale(logits, size), scores, masks) / rounds
            if turn == 0:
                first = intersection_over_union(upscale(answer, size), masks)[:, 0]
        return losses, first

    def _loss(self, logits: Tensor, scores: Tensor, masks: Tensor) -> Tensor:
        """The single mask, the best of three, and the predicted IoUs: `[P]`."""
        hparams, target = self.hparams, masks[:, None].float().expand_as(logits)
        likely = logits.sigmoid()
        entropy = binary_cross_entropy_with_logits(logits, target, reduction="none")
        missed = (likely - target).abs()
        focal = (entropy * missed ** hparams["focal_gamma"]).mean((2, 3))
        shared, total = (likely * target).sum((2, 3)), (likely + target).sum((2, 3))
        dice = 1 - (2 * shared + 1) / (total + 1)
        each = hparams["focal_weight"] * focal + hparams["dice_weight"] * dice
        quality = mse_loss(scores, intersection_over_union(logits.detach(), masks), reduction="none").mean(1)
        return each[:, 0] + each[:, 1:].amin(1) + hparams["iou_weight"] * quality

    def validation_step(self, batch: Targets, batch_idx: int) -> None:
        """Mean IoU from each kind of prompt; the same prompts at every validation."""
        draws = torch.rand(
            len(batch.owners), 2, generator=torch.Generator().manual_seed(VALIDATION_SEED + batch_idx)
        )
        with torch.autocast(batch.masks.device.type, enabled=False):  # as the exported model is used
            ious = prompt_ious(self.sam, batch, draws)
        for name, values in ious.items():
            self.log(
                f"val/{name}_iou",
                values.mean(),
                prog_bar=name in ("point", "box"),
                batch_size=len(values),
                sync_dist=True,
            )

    configure_callbacks = average_of_weights

    def configure_optimizers(self) -> Any:
        """timm's optimizer, and a cosine over the whole run that steps after every update."""
        hparams = self.hparams
        optimizer = create_optimizer_v2(
            self.sam,
            hparams["optimizer"],
            lr=hparams["lr"],
            weight_decay=hparams["weight_decay"],
            **(hparams["optimizer_args"] or {}),
        )
        return with_cosine(optimizer, self.trainer, hparams["warmup_steps"])


def _jitter(boxes: Tensor, deviation: float, size: Sequence[int]) -> Tensor:
    """Move the sides of a random half of the boxes, never out of the image nor past each other."""
    x0, y0, x1, y1 = boxes.unbind(1)
    extent = torch.stack([x1 - x0, y1 - y0] * 2, 1)
    # drawn on the CPU: the same for every device
    noise = torch.randn(boxes.shape) * deviation * (torch.rand(len(boxes), 1) < 0.5)
    moved = boxes + extent * noise.clamp(-0.4, 0.4).to(boxes.device)
    height, width = size
    return moved.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))


class SegmenterCLI(EndlessCLI):
    """The command line: fixed classes, so that a configuration names no class of ours."""

    monitor = "val/point_iou"
    program = "train.segmenter"
    fixed = ("sam",)

    def __init__(self, arguments: Sequence[str] | None = None) -> None:
        super().__init__(SegmenterTraining, PromptData, arguments)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What model and data share."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments("data.image_size", "model.image_size")

    def after_fit(self) -> None:
        """Write the model, of averaged weights where there is an average, for `load_segmenter`."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            save_segmenter(self.model.sam, self.model.hparams["sam"], self.output / "export")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_cli("train.segmenter", SegmenterCLI, arguments)


if __name__ == "__main__":
    sys.exit(main())
