"""Train a net of sentence attention: from an image, a question and its answer to where the answer is seen.

    python -m train.grounding_sentence fit --config configs/shapes/sentence_attention.yaml
    python -m train.grounding_sentence validate --config runs/shapes/sentence_attention/config.yaml \\
        --ckpt_path runs/shapes/sentence_attention/checkpoints/best.ckpt

- after Khoshsirat & Kambhamettu 2023 (arXiv:2309.11593), see
  `visionsel.multimodal.grounding.sentence_attention`;
- fresh scenes of the shapes world ("where is the red star? top left"), or a folder of VizWiz-VQA-Grounding;
- the encoder of the sentences is frozen and no part of the checkpoints;
- a run ends by writing `OUTPUT/export/`, which `SentenceAttentionNet.load` reads.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from PIL import Image
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train.cli import EndlessCLI, run_cli
from train.recipe import with_cosine
from train.shapes_data import ShapesStreamData
from visionsel.data.resumable import seed_generators
from visionsel.data.shapes import Sample
from visionsel.data.shapes.language import cell
from visionsel.data.vizwiz import AnswerGrounding, read_answer_groundings
from visionsel.multimodal.grounding.sentence_attention import SentenceAttentionNet, mask_loss
from visionsel.multimodal.grounding.sentence_vectors import load_sentence_encoder

__all__ = ["AnswerMaskData", "SentenceTraining", "main"]

Item = tuple[np.ndarray, str, np.ndarray]
Batch = dict[str, Any]


class AnswerMaskData(ShapesStreamData):
    """Images with a sentence and the mask of what it is about.

    Args:
        root: folder of VizWiz-VQA-Grounding: `<split>_grounding.json`, the images in `<split>/`, and, if it
            has them, `binary_masks_png/<split>/`; its images are stretched to a square. None: scenes of the
            shapes world.
        train_split, val_split: of the folder.
        with_answer: the sentence is question and answer, as in the paper; else the question alone.
        batch_size: on each device.
        epoch_size, val_size, train_share, max_objects: of the shapes world, see `ShapesStreamData`.
        image_size: pixels a side.
        num_workers: processes that make samples on each device.
        seed: of the run.

    Raises:
        FileNotFoundError: for a folder that lacks a file or an image.
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        root: str | None = None,
        train_split: str = "train",
        val_split: str = "val",
        with_answer: bool = True,
        batch_size: int = 16,
        epoch_size: int = 3200,
        val_size: int = 200,
        image_size: int = 64,
        train_share: float = 0.0,
        max_objects: int = 6,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        self.with_answer = with_answer
        self.splits: dict[str, list[AnswerGrounding]] = {}
        if root is not None:
            self.root = Path(root)
            for split in dict.fromkeys((train_split, val_split)):
                self.splits[split] = read_answer_groundings(root, split)
                self._check_images(split)
            epoch_size, val_size = len(self.splits[train_split]), len(self.splits[val_split])
            if epoch_size < batch_size:
                raise ValueError(
                    f"{root} has {epoch_size} questions to train on, fewer than batch_size {batch_size}"
                )
        self.train_split, self.val_split = train_split, val_split
        # the worlds are not looked at where there is a folder, whose images may be of any size
        side = 64 if self.splits else image_size
        super().__init__(batch_size, epoch_size, val_size, side, train_share, max_objects, num_workers, seed)
        self.image_size = image_size
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")

    def _check_images(self, split: str) -> None:
        missing = [row for row in self.splits[split] if not (self.root / split / row.file_name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(self.splits[split])} images are not in {self.root / split}, such as "
                f"{missing[0].file_name}"
            )

    def scene(self, epoch: int, index: int) -> Any:
        """A sample of the shapes world, or a row of the folder with its split."""
        if self.splits:
            return self.train_split, self.splits[self.train_split][index]
        return super().scene(epoch, index)

    def make(self, sample: Any, generator: np.random.Generator, epoch: int) -> Item:
        """Pixels uint8 `[H, W, 3]`, sentence, and mask bool `[H, W]`."""
        if self.splits:
            return self._answered(*sample)
        return self._located(sample, generator)

    def _located(self, sample: Sample, generator: np.random.Generator) -> Item:
        if not sample.expressions:  # all objects alike: any of them is as good
            asked, words = 0, f"the {sample.objects[0].color} {sample.objects[0].shape}"
        else:
            chosen = sample.expressions[generator.integers(len(sample.expressions))]
            asked, words = chosen.object, chosen.text
        answer = cell(sample.objects[asked]) if self.with_answer else None
        sentence = f"where is {words}? {answer or ''}".strip()  # on the border of cells there is no answer
        return sample.pixels, sentence, sample.labels == asked + 1

    def _answered(self, split: str, row: AnswerGrounding) -> Item:
        with Image.open(self.root / split / row.file_name) as opened:
            image = opened.convert("RGB")  # as it is stored: the polygons are in its pixels
        if (image.height, image.width) != row.size:
            raise ValueError(
                f"{row.file_name} has {image.height} x {image.width} pixels, but its grounding is for "
                f"{row.size[0]} x {row.size[1]}"
            )
        size = (self.image_size, self.image_size)
        mask = Image.fromarray(row.mask().astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
        pixels = np.array(image.resize(size, Image.Resampling.BILINEAR))
        sentence = f"{row.question} {row.answers[0]}" if self.with_answer else row.question
        return pixels, sentence, np.array(mask) > 127

    def collate(self, items: list[Any]) -> Batch:
        """`image` float32 `[B, 3, H, W]` from 0 to 1, `sentence` a list, `mask` bool `[B, H, W]`."""
        images, sentences, masks = zip(*items, strict=True)
        stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return {
            "image": stacked.float() / 255,
            "sentence": list(sentences),
            "mask": torch.from_numpy(np.stack(masks)),
        }

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Scenes of the "balanced" distribution, or the validation split."""
        if not self.splits:
            return super().val_dataloader()[1:]
        rows = _Rows(self, self.val_split)
        return [DataLoader(rows, batch_size=self.batch_size, shuffle=False, **self.loading())]


class _Rows(Dataset[Item]):
    """A split of the folder, in its order."""

    def __init__(self, data: AnswerMaskData, split: str) -> None:
        self.data, self.split = data, split

    def __len__(self) -> int:
        return len(self.data.splits[self.split])

    def __getitem__(self, index: int) -> Item:
        return self.data._answered(self.split, self.data.splits[self.split][index])


class SentenceTraining(LightningModule):
    """A net with its recipe, and the frozen encoder of its sentences.

    Args:
        backbone: see `SentenceAttentionNet`.
        backbone_args: its further arguments.
        out_indices: which of its scales; None: all.
        pretrained: download its weights.
        sentences: `"words"` for the shapes world, or an encoder of transformers; see `load_sentence_encoder`.
        hidden, dropout: of the net.
        lr: the peak learning rate of AdamW.
        weight_decay: not applied to biases and norms.
        warmup_steps: linear, from 0; then the rate falls to 0 along a cosine.
        seed: of the dropout.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        backbone: str = "efficientnet_b7",
        backbone_args: dict[str, Any] | None = None,
        out_indices: list[int] | None = None,
        pretrained: bool = False,
        sentences: str = "words",
        hidden: int = 1536,
        dropout: float = 0.5,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if lr <= 0:
            raise ValueError(f"lr must be above 0, got {lr}")
        for name, value in (("weight_decay", weight_decay), ("warmup_steps", warmup_steps)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        self.encode, length = load_sentence_encoder(sentences)
        self.net = SentenceAttentionNet(
            backbone, length, hidden, dropout, pretrained, out_indices, **(backbone_args or {})
        )
        self.save_hyperparameters()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_generators(self.hparams["seed"], self.global_rank, self.current_epoch, batch_idx)

    def forward(self, image: Tensor, sentences: Sequence[str]) -> Tensor:
        """Logits `[B, H, W]` of images `[B, 3, H, W]` and their sentences."""
        return self.net(image, self.encode(sentences, image.device).to(image))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross-entropy and Dice."""
        loss = mask_loss(self(batch["image"], batch["sentence"]).float(), batch["mask"])
        common: dict[str, Any] = {"batch_size": len(batch["mask"]), "sync_dist": True}
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, **common)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss, and the mean IoU of the masks at the size that the net sees, empty ones left out."""
        logits, masks = self(batch["image"], batch["sentence"]).float(), batch["mask"]
        there = masks.any((1, 2))
        found, masks_there = (logits > 0)[there], masks[there]
        iou = (found & masks_there).sum((1, 2)) / (found | masks_there).sum((1, 2))
        self.log("val/loss", mask_loss(logits, masks), batch_size=len(masks), sync_dist=True)
        if len(iou):
            self.log("val/iou", iou.mean(), prog_bar=True, batch_size=len(iou), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW, and a cosine over the whole run that steps after every update."""
        hparams = self.hparams
        optimizer = create_optimizer_v2(
            self.net, "adamw", lr=hparams["lr"], weight_decay=hparams["weight_decay"]
        )
        return with_cosine(optimizer, self.trainer, hparams["warmup_steps"])


class SentenceCLI(EndlessCLI):
    """The command line: fixed classes, so that a configuration names no class of ours."""

    monitor = "val/iou"
    program = "train.grounding_sentence"
    fixed = ("backbone", "backbone_args", "out_indices", "sentences", "hidden")
    first_weights = ("pretrained",)

    def __init__(self, arguments: Sequence[str] | None = None) -> None:
        super().__init__(SentenceTraining, AnswerMaskData, arguments)

    def after_fit(self) -> None:
        """Write the net."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.model.net.save(self.output / "export", self.model.hparams["sentences"])
            print(f"net in {self.output / 'export'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_cli("train.grounding_sentence", SentenceCLI, arguments)


if __name__ == "__main__":
    sys.exit(main())
