"""Train SD-RPN's head: copies of decoder layers that tell, before an answer, where to look closer.

    python -m train.grounding_roi fit --config configs/shapes/roi_head.yaml
    python -m train.grounding_roi validate --config runs/shapes/roi_head/config.yaml \\
        --ckpt_path runs/shapes/roi_head/checkpoints/best.ckpt

- after Shi et al. 2025 (arXiv:2509.16944), see `visionsel.multimodal.grounding.roi_head`;
- fresh scenes of the shapes world with one "locate ..." each, and the embedded model, which is frozen and no
  part of the checkpoints;
- targets are the attention of the model's own heads while it reads the right answer. Boxes and masks of the
  objects are used by validation only, which also measures the attention that the targets are made of;
- a run ends by writing `OUTPUT/export/`, which `RoIHead.load` reads.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.utils.data import DataLoader

from train.cli import EndlessCLI, run_cli
from train.recipe import with_cosine
from train.shapes_data import ShapesStreamData
from visionsel.data.shapes import Sample
from visionsel.data.shapes.language import box_to_answer
from visionsel.embedded import load_lvlm
from visionsel.embedded.lvlm_quality import encode_prompts
from visionsel.multimodal.grounding.heatmaps import HeadSelector
from visionsel.multimodal.grounding.heatmaps.rows import image_views
from visionsel.multimodal.grounding.replay import Replay
from visionsel.multimodal.grounding.roi_head import RoIHead
from visionsel.multimodal.grounding.roi_labels import (
    IGNORED,
    answer_attention,
    attention_labels,
    pseudo_labels,
    roi_loss,
)
from visionsel.multimodal.grounding.roi_regions import find_regions

__all__ = ["LocateData", "RoITraining", "main", "region_scores"]

Batch = dict[str, Any]


class LocateData(ShapesStreamData):
    """Scenes with one object that is asked for: lists `image`, `question`, `answer`, and its `mask`."""

    def make(
        self, sample: Sample, generator: np.random.Generator, epoch: int
    ) -> tuple[np.ndarray, str, str, np.ndarray]:
        """Pixels, question, answer and mask of the object, bool `[H, W]`."""
        if not sample.expressions:  # all objects alike: any of them is as good
            asked, words = 0, f"the {sample.objects[0].color} {sample.objects[0].shape}"
        else:
            chosen = sample.expressions[generator.integers(len(sample.expressions))]
            asked, words = chosen.object, chosen.text
        box = sample.objects[asked].box
        return (
            sample.pixels,
            f"locate {words}.",
            box_to_answer(box, self.image_size),
            sample.labels == asked + 1,
        )

    def collate(self, items: list[Any]) -> Batch:
        """Lists, for the processor of the model, and masks bool `[B, H, W]`."""
        images, questions, answers, masks = zip(*items, strict=True)
        return {
            "image": list(images),
            "question": list(questions),
            "answer": list(answers),
            "mask": torch.from_numpy(np.stack(masks)),
        }

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Scenes of the "balanced" distribution."""
        return super().val_dataloader()[1:]


class RoITraining(LightningModule):
    """A head with its recipe, and the frozen model that it is copied from.

    Args:
        lvlm: folder of the model, one that `train.lvlm` wrote; None: the shipped one.
        start, number: which layers are copied, see `RoIHead`.
        heads: pairs of layer and head whose attention makes the targets; None: the three best of the shipped
            model, as `HeadSelector` found them without labels.
        row: whose attention that is, see `answer_attention`.
        sinks: image tokens to leave out, see `attention_labels`.
        foreground, background, largest: see `pseudo_labels`.
        threshold: of the regions that validation measures.
        attention_threshold: of those of the attention that it compares with, a share of the maximum.
        lr: the peak learning rate of AdamW; 5e-5 in the paper, for models of 7 billion parameters.
        weight_decay: not applied to norms.
        warmup_steps: linear, from 0; then the rate falls to 0 along a cosine.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        lvlm: str | None = None,
        start: int | None = None,
        number: int = 3,
        heads: list[list[int]] | None = None,
        row: str = "predict",
        sinks: str | None = None,
        foreground: float = 0.2,
        background: float = 0.1,
        largest: float = 0.5,
        threshold: float = 0.3,
        attention_threshold: float = 0.5,
        lr: float = 5e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 20,
    ) -> None:
        super().__init__()
        if lr <= 0:
            raise ValueError(f"lr must be above 0, got {lr}")
        for name, value in (("weight_decay", weight_decay), ("warmup_steps", warmup_steps)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if heads is not None and not (heads and all(len(pair) == 2 for pair in heads)):
            raise ValueError(f"heads must be pairs of layer and head, got {heads}")
        find_regions(torch.zeros(1, 1), threshold)
        find_regions(torch.zeros(1, 1), attention_threshold, relative=True)
        pseudo_labels(torch.zeros(1, 1), None, foreground, background, largest)
        model, processor = load_lvlm(lvlm)
        if heads is None:
            if lvlm is not None:
                raise ValueError("heads of another model must be given: find them with HeadSelector.fit")
            heads = [list(pair) for pair in HeadSelector.preset("embedded").best(3)]
        text = model.config.get_text_config()
        for layer, head in heads:
            if not (0 <= layer < text.num_hidden_layers and 0 <= head < text.num_attention_heads):
                raise ValueError(
                    f"heads has {[layer, head]}, but the model has {text.num_hidden_layers} layers of "
                    f"{text.num_attention_heads} heads, counted from 0"
                )
        self.head = RoIHead(model, start, number)
        start = self.head.start
        self.pairs = [(layer, head) for layer, head in heads]
        # in a tuple: neither in checkpoints nor in train() and eval()
        self._lvlm = (model.requires_grad_(False), processor)
        self.save_hyperparameters()

    def read(self, batch: Batch) -> Replay:
        """The prompts of a batch and their answers, ready to be read by the frozen model."""
        model, processor = self._lvlm
        images, questions = batch["image"], batch["question"]
        prompts = encode_prompts(processor, images, questions)
        answered = encode_prompts(processor, images, questions, batch["answer"])
        # padded on the left: what is longer than the prompt is the answer
        lengths = (answered["attention_mask"].sum(1) - prompts["attention_mask"].sum(1)).tolist()
        pad = processor.tokenizer.pad_token_id
        new = torch.full((len(lengths), max(lengths)), pad)
        for row, length in enumerate(lengths):
            new[row, :length] = answered["input_ids"][row, -length:]
        return Replay(model.to(self.device), prompts, new)

    def targets(self, replay: Replay) -> Tensor:
        """int64 `[B, n]`: what the attention of the answers says."""
        hparams = self.hparams
        names = ("sinks", "row", "foreground", "background", "largest")
        return attention_labels(replay, self.pairs, **{name: hparams[name] for name in names})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy of the map with the targets."""
        with torch.autocast(self.device.type, enabled=False):
            replay = self.read(batch)
            labels = self.targets(replay)
            loss = roi_loss(self.head(replay), labels)
        common: dict[str, Any] = {"batch_size": len(labels), "sync_dist": True}
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, **common)
        self.log("train/known", (labels != IGNORED).float().mean(), **common)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss, and how well regions cover what was asked for.

        `val/recall`: share of the object's pixels that are inside; `val/area`: share of the image that is,
        which is the recall of a region of that size anywhere; `val/iou`: with the object's box. The same of
        the heads that the targets are of: `prompt_` for the last token of the prompt, before an answer;
        `answer_` for the right answer.
        """
        with torch.autocast(self.device.type, enabled=False):
            replay = self.read(batch)
            labels = self.targets(replay)
            logits = self.head(replay)
            sources = {
                "": logits.sigmoid(),
                "prompt_": _shares(answer_attention(replay, self.pairs, "prompt")),
                "answer_": _shares(answer_attention(replay, self.pairs, self.hparams["row"])),
            }
        views = [view[0] for view in image_views(replay, whole=True)]
        for prefix, maps in sources.items():
            grids = [one[view.to(one.device)] for one, view in zip(maps, views, strict=True)]
            threshold = self.hparams["attention_threshold" if prefix else "threshold"]
            scores = region_scores(grids, batch["mask"], threshold, relative=bool(prefix))
            self.log_dict(
                {f"val/{prefix}{name}": value for name, value in scores.items()},
                prog_bar=not prefix,
                batch_size=len(views),
                sync_dist=True,
            )
        self.log("val/loss", roi_loss(logits, labels), batch_size=len(views), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW, and a cosine over the whole run that steps after every update."""
        hparams = self.hparams
        optimizer = create_optimizer_v2(
            self.head, "adamw", lr=hparams["lr"], weight_decay=hparams["weight_decay"]
        )
        return with_cosine(optimizer, self.trainer, hparams["warmup_steps"])


def region_scores(
    maps: Sequence[Tensor], masks: Tensor, threshold: float, relative: bool = False
) -> dict[str, float]:
    """How well the regions of maps cover objects, the mean over samples.

    Args:
        maps: `[h, w]` of each sample, over all of its image.
        masks: bool `[B, H, W]`.
        threshold, relative: see `find_regions`; of several regions the one box around all counts.

    Returns:
        `recall`, `area` and `iou`, see `RoITraining.validation_step`; 0 where there is no region.
    """
    recall, area, iou = [], [], []
    for likely, mask in zip(maps, masks.cpu(), strict=True):
        (height, width), (rows, columns) = mask.shape, likely.shape
        region, box = torch.zeros_like(mask), torch.zeros_like(mask)
        for x0, y0, x1, y1 in find_regions(likely.cpu(), threshold, relative, union=True):
            down, across = height / rows, width / columns
            region[round(y0 * down) : round(y1 * down), round(x0 * across) : round(x1 * across)] = True
        where = mask.nonzero()
        (top, left), (bottom, right) = where.amin(0).tolist(), where.amax(0).tolist()
        box[top : bottom + 1, left : right + 1] = True
        recall.append(float((mask & region).sum() / mask.sum()))
        area.append(float(region.float().mean()))
        iou.append(float((box & region).sum() / (box | region).sum()))
    return {
        name: sum(values) / len(values) for name, values in (("recall", recall), ("area", area), ("iou", iou))
    }


def _shares(attention: Tensor) -> Tensor:
    """Attention `[B, n]` as shares of its maximum."""
    return attention / attention.amax(1, keepdim=True).clamp(min=torch.finfo(attention.dtype).tiny)


class RoICLI(EndlessCLI):
    """The command line: fixed classes, so that a configuration names no class of ours."""

    monitor = "val/iou"
    program = "train.grounding_roi"
    seeded = ("data.seed",)
    fixed = ("start", "number")
    marks = ("foreground",)

    def __init__(self, arguments: Sequence[str] | None = None) -> None:
        super().__init__(RoITraining, LocateData, arguments)

    def after_fit(self) -> None:
        """Write the head."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.model.head.save(self.output / "export")
            print(f"head in {self.output / 'export'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_cli("train.grounding_roi", RoICLI, arguments)


if __name__ == "__main__":
    sys.exit(main())
