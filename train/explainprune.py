"""Train the net of ExplainPrune: which image tokens a vision-language model will need, from its first layer.

    python -m train.explainprune fit --config configs/shapes/explainprune.yaml
    python -m train.explainprune fit --config runs/shapes/explainprune/config.yaml \\
        --ckpt_path runs/shapes/explainprune/checkpoints/last.ckpt                    # continue exactly
    python -m train.explainprune validate --config runs/shapes/explainprune/config.yaml \\
        --ckpt_path runs/shapes/explainprune/checkpoints/best.ckpt

- after Lei et al. 2025 (arXiv:2506.01097), see `visionsel.multimodal.pruning.explainprune`;
- fresh scenes of the shapes world with their captions or with answers to questions, and the embedded model,
  which is frozen and no part of the checkpoints;
- targets are made on the way, by a backward pass of the embedded model for each batch: most of the time;
- a run ends by writing `OUTPUT/export/`, which `ExplainPrune(predictor=...)` reads.
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
from visionsel.data.shapes import CAPTION_PROMPT, Sample
from visionsel.embedded import load_lvlm
from visionsel.embedded.explainprune import KEEP, foresee_relevance
from visionsel.multimodal.pruning.explainprune import select
from visionsel.multimodal.pruning.explainprune_net import RelevancePredictor, relevance_loss

__all__ = ["AnswerData", "ExplainPruneTraining", "main"]

Batch = dict[str, list[Any]]


class AnswerData(ShapesStreamData):
    """Scenes with one prompt and its answer each: lists `image` (`[H, W, 3]` arrays), `question`, `answer`.

    Args:
        caption_share: how often the prompt is that for a caption; else a question, each kind as often.
    """

    def __init__(
        self,
        batch_size: int = 16,
        epoch_size: int = 3200,
        val_size: int = 200,
        image_size: int = 64,
        caption_share: float = 0.5,
        train_share: float = 0.3,
        max_objects: int = 6,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if not 0 <= caption_share <= 1:
            raise ValueError(f"caption_share must be from 0 to 1, got {caption_share}")
        self.caption_share = caption_share
        super().__init__(
            batch_size, epoch_size, val_size, image_size, train_share, max_objects, num_workers, seed
        )

    def make(self, sample: Sample, generator: np.random.Generator, epoch: int) -> tuple[np.ndarray, str, str]:
        """Pixels, question and answer."""
        if generator.random() < self.caption_share:
            return sample.pixels, CAPTION_PROMPT, sample.captions[0]
        kind = generator.choice(sorted({question.kind for question in sample.questions}))
        asked = [question for question in sample.questions if question.kind == kind]
        question = asked[generator.integers(len(asked))]
        return sample.pixels, question.text, question.answer

    def collate(self, items: list[Any]) -> Batch:
        """Lists: the processor of the model makes tensors of them."""
        return {
            name: list(part)
            for name, part in zip(("image", "question", "answer"), zip(*items, strict=True), strict=True)
        }

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Scenes of the "balanced" distribution."""
        return super().val_dataloader()[1:]


class ExplainPruneTraining(LightningModule):
    """A predictor with its recipe, and the frozen model that it is for.

    Args:
        lvlm: folder of the model, one that `train.lvlm` wrote; None: the shipped one.
        width: channels of the predictor.
        depth: its convolutions.
        kernel: their side.
        lr: the peak learning rate of AdamW.
        weight_decay: not applied to biases.
        warmup_steps: linear, from 0; then the rate falls to 0 along a cosine.

    Raises:
        ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        lvlm: str | None = None,
        width: int = 16,
        depth: int = 4,
        kernel: int = 3,
        lr: float = 3e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 20,
    ) -> None:
        super().__init__()
        if lr <= 0:
            raise ValueError(f"lr must be above 0, got {lr}")
        for name, value in (("weight_decay", weight_decay), ("warmup_steps", warmup_steps)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        model, processor = load_lvlm(lvlm)
        heads = model.config.get_text_config().num_attention_heads
        self.predictor = RelevancePredictor(heads, width, depth, kernel)
        # in a tuple: neither in checkpoints nor in train() and eval()
        self._lvlm = (model.requires_grad_(False), processor)
        self.save_hyperparameters()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Divergence of the foreseen relevance from the true one."""
        logits, target, valid = self._look(batch)
        loss = relevance_loss(logits, target, valid)
        common: dict[str, Any] = {"batch_size": len(logits), "sync_dist": True}
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, **common)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The loss, and how much of the relevance a quarter of the tokens holds: foreseen, and at best."""
        logits, target, valid = self._look(batch)
        share = target / target.sum(1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
        measures = {
            "val/loss": relevance_loss(logits, target, valid),
            "val/kept_relevance": (share * select(logits, KEEP, valid)).sum(1).mean(),
            "val/best_relevance": (share * select(target, KEEP, valid)).sum(1).mean(),
        }
        self.log_dict(measures, prog_bar=True, batch_size=len(logits), sync_dist=True)

    def _look(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, relevance and `valid`, `[B, N]` each."""
        model, processor = self._lvlm
        with torch.autocast(self.device.type, enabled=False):
            return foresee_relevance(
                self.predictor,
                model.to(self.device),
                processor,
                batch["image"],
                batch["question"],
                batch["answer"],
            )

    def configure_optimizers(self) -> Any:
        """AdamW, and a cosine over the whole run that steps after every update."""
        hparams = self.hparams
        optimizer = create_optimizer_v2(
            self.predictor, "adamw", lr=hparams["lr"], weight_decay=hparams["weight_decay"]
        )
        return with_cosine(optimizer, self.trainer, hparams["warmup_steps"])


class ExplainPruneCLI(EndlessCLI):
    """The command line: fixed classes, so that a configuration names no class of ours."""

    monitor = "val/kept_relevance"
    program = "train.explainprune"
    seeded = ("data.seed",)
    fixed = ("width", "depth", "kernel")

    def __init__(self, arguments: Sequence[str] | None = None) -> None:
        super().__init__(ExplainPruneTraining, AnswerData, arguments)

    def after_fit(self) -> None:
        """Write the predictor."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.model.predictor.save(self.output / "export")
            print(f"predictor in {self.output / 'export'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_cli("train.explainprune", ExplainPruneCLI, arguments)


if __name__ == "__main__":
    sys.exit(main())
