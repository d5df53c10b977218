"""Train F-LMM's mask head: masks of the words of a frozen vision-language model, from its attention.

    python -m train.grounding fit --config configs/shapes/mask_head.yaml
    python -m train.grounding fit --config runs/shapes/mask_head/config.yaml \\
        --ckpt_path runs/shapes/mask_head/checkpoints/last.ckpt                     # continue exactly
    python -m train.grounding validate --config runs/shapes/mask_head/config.yaml \\
        --ckpt_path runs/shapes/mask_head/checkpoints/best.ckpt

- after Wu et al. 2025 (arXiv:2406.05821), see `visionsel.multimodal.grounding.mask_head`; their losses:
  binary cross-entropy and dice, of the U-Net's masks and again of the refiner's;
- captions are read as if the model had said them; how expressions are asked for is up to `refer_prompt`;
- language model and image encoder of the SAM are frozen and no part of the checkpoints;
- a run ends by writing `OUTPUT/export/`, which `MaskHead.from_pretrained` reads.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from train.cli import EndlessCLI, run_cli
from train.grounding_data import Text, WordData
from train.recipe import with_cosine
from visionsel.data.shapes import CAPTION_PROMPT
from visionsel.embedded import load_lvlm, load_segmenter
from visionsel.embedded.mask_head import REFER_PROMPT, mask_ious, word_tokens
from visionsel.multimodal.grounding.mask_head import MaskHead, MaskHeadConfig, WordFeatures, describe_model
from visionsel.multimodal.grounding.segmenters import build_segmenter
from visionsel.multimodal.grounding.word_features import answer_replay, refer_replay

__all__ = ["MaskHeadTraining", "main", "mask_losses"]


class MaskHeadTraining(LightningModule):
    """A mask head with its recipe, and the frozen models that it is for.

    Args:
        lvlm: folder or name of a model of transformers; None: the shipped one.
        lvlm_dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        segmenter: of the refiner: folder of one that `train.segmenter` wrote, or `"sam:vit_l"` and its
            sisters; None: the shipped one.
        sam_checkpoint: the released file of a `"sam:..."`.
        refine: train a refiner, too.
        views, row, merge, base, stages, convolutions, groups, min_side, refer_prompt: see `MaskHeadConfig`.
        caption_prompt: what captions answer.
        lr: the peak learning rate of AdamW.
        refiner_lr: that of the refiner, as a share of `lr`.
        weight_decay: not applied to biases and norms.
        warmup: share of the run in which the rate rises, from 0; then it falls to 0 along a cosine.

    Raises:
        ValueError: naming the argument that is wrong.
        OSError: when transformers finds no such model.
    """

    def __init__(
        self,
        lvlm: str | None = None,
        lvlm_dtype: str = "float32",
        segmenter: str | None = None,
        sam_checkpoint: str | None = None,
        refine: bool = True,
        views: int = 1,
        row: str = "token",
        merge: str = "mean",
        base: int = 64,
        stages: int = 4,
        convolutions: int = 2,
        groups: int = 1,
        min_side: int = 64,
        refer_prompt: str = REFER_PROMPT,
        caption_prompt: str = CAPTION_PROMPT,
        lr: float = 1e-4,
        refiner_lr: float = 1.0,
        weight_decay: float = 0.01,
        warmup: float = 0.03,
    ) -> None:
        super().__init__()
        for name, value in (("lr", lr), ("refiner_lr", refiner_lr)):
            if value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is a share of the run, from 0 to below 1, got {warmup}")
        model, processor = _load_model(lvlm, lvlm_dtype)
        config = MaskHeadConfig(
            **describe_model(model, views),
            row=row,
            merge=merge,
            base=base,
            stages=stages,
            convolutions=convolutions,
            groups=groups,
            min_side=min_side,
            refer_prompt=refer_prompt,
        )
        sam = _load_sam(segmenter, sam_checkpoint) if refine else None
        self.head = MaskHead(config, sam)
        # in a tuple: neither in checkpoints nor in train() and eval()
        self._lvlm = (model.requires_grad_(False).eval(), processor)
        self._validation: dict[int, list[tuple[str, WordFeatures, list[Tensor]]]] = {}
        self.save_hyperparameters()

    def training_step(self, batch: list[Text], batch_idx: int) -> Tensor:
        """Loss of the U-Net's masks and of the refiner's, mean over all words."""
        losses: dict[str, list[Tensor]] = {}
        ious: dict[str, list[Tensor]] = {}
        for _, features, masks in self._read(batch):
            for name, logits in self._masks(features).items():
                losses.setdefault(name, []).extend(map(mask_losses, logits, masks))
                ious.setdefault(name, []).extend(map(mask_ious, logits, masks))
        means = {name: torch.cat(values).mean() for name, values in losses.items()}
        loss = torch.stack(list(means.values())).sum()
        common: dict[str, Any] = {"batch_size": len(batch), "sync_dist": True}
        self.log_dict({f"train/{name}_loss": value for name, value in means.items()}, **common)
        self.log_dict({f"train/{name}_iou": torch.cat(each).mean() for name, each in ious.items()}, **common)
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, **common)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: list[Text], batch_idx: int) -> None:
        """Mean IoU of referring expressions and of words of captions: the final masks, and the U-Net's."""
        if batch_idx not in self._validation:  # the same at every validation, for what reads them is frozen
            self._validation[batch_idx] = self._read(batch)
        for kind, features, masks in self._validation[batch_idx]:
            for name, logits in self._masks(features).items():
                ious = torch.cat(list(map(mask_ious, logits, masks))).to(self.device)
                final = name == ("refined" if self.head.refiner else "coarse")
                label = f"val/{kind}_iou" if final else f"val/{kind}_iou_{name}"
                self.log(label, ious.mean(), prog_bar=final, batch_size=len(ious), sync_dist=True)

    def _read(self, batch: list[Text]) -> list[tuple[str, WordFeatures, list[Tensor]]]:
        """Features and masks of the expressions and of the captions of a batch."""
        model, processor = self._lvlm[0].to(self.device), self._lvlm[1]
        hparams, found = self.hparams, []
        expressions = [text for text in batch if text.spans is None]
        captions = [text for text in batch if text.spans]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for kind, part in (("refer", expressions), ("caption", captions)):
                if not part:
                    continue
                images, texts = [text.image for text in part], [text.text for text in part]
                if kind == "refer":
                    prompt = hparams["refer_prompt"]
                    replay, grids, words = refer_replay(model, processor, images, texts, prompt)
                else:
                    prompts = [hparams["caption_prompt"]] * len(part)
                    replay, grids = answer_replay(model, processor, images, prompts, texts)
                    words = word_tokens(processor, replay, [text.spans or [] for text in part])
                features = self.head.features(replay, words, grids, images if self.head.refiner else None)
                found.append((kind, features, [torch.from_numpy(t.masks).to(self.device) for t in part]))
        return found

    def _masks(self, features: WordFeatures) -> dict[str, list[Tensor]]:
        """Logits in pixels: `coarse` and, with a refiner, `refined`."""
        coarse = self.head.coarse(features)
        if self.head.refiner is None:
            return {"coarse": coarse}
        return {"coarse": coarse, "refined": self.head.refine(features, coarse)}

    def configure_optimizers(self) -> Any:
        """AdamW, and a cosine over the whole run that steps after every update."""
        hparams = self.hparams
        optimizer = create_optimizer_v2(
            self.head,
            "adamw",
            lr=hparams["lr"],
            weight_decay=hparams["weight_decay"],
            param_group_fn=self._groups,
        )
        steps = self.trainer.estimated_stepping_batches
        return with_cosine(optimizer, self.trainer, int(hparams["warmup"] * min(steps, 2**40)))

    def _groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameters by their rate and decay."""
        hparams = self.hparams
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                share = hparams["refiner_lr"] if name.startswith("refiner.") else 1.0
                decay = hparams["weight_decay"] if parameter.ndim > 1 else 0.0
                groups.setdefault((share, decay), []).append(parameter)
        return [
            {"params": parameters, "lr": hparams["lr"] * share, "weight_decay": decay}
            for (share, decay), parameters in groups.items()
        ]


def mask_losses(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy and dice of each mask, `[N]` for logits and masks `[N, H, W]` (F-LMM, eq. 4)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = masks.to(logits)
    likely = logits.sigmoid()
    shared, total = (likely * target).sum((1, 2)), (likely + target).sum((1, 2))
    entropy = binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2))
    return entropy + 1 - (2 * shared + 1) / (total + 1)


def _load_model(lvlm: str | None, dtype: str) -> tuple[Any, Any]:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"lvlm_dtype must be float32, bfloat16 or float16, got {dtype!r}")
    if dtype == "float32" and (lvlm is None or Path(lvlm, "model.safetensors").is_file()):
        return load_lvlm(lvlm)
    if lvlm is None:
        raise ValueError(f"the shipped model runs in float32, not {dtype}; leave out lvlm_dtype")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(lvlm, dtype=getattr(torch, dtype))
    return model, AutoProcessor.from_pretrained(lvlm)


def _load_sam(segmenter: str | None, checkpoint: str | None) -> nn.Module:
    if segmenter is not None and segmenter.startswith("sam:"):
        return cast(nn.Module, build_segmenter(segmenter, "cpu", checkpoint=checkpoint).model)
    if checkpoint is not None:
        raise ValueError('sam_checkpoint goes with segmenter "sam:vit_b" and its sisters')
    return load_segmenter(segmenter)


class MaskHeadCLI(EndlessCLI):
    """The command line: fixed classes, so that a configuration names no class of ours."""

    monitor = "val/refer_iou"
    program = "train.grounding"
    seeded = ("data.seed",)
    fixed = ("refine", "views", "row", "merge", "base", "stages", "convolutions", "groups", "min_side")

    def __init__(self, arguments: Sequence[str] | None = None) -> None:
        super().__init__(MaskHeadTraining, WordData, arguments)

    def after_fit(self) -> None:
        """Write the head."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.model.head.save_pretrained(self.output / "export", half=True)
            print(f"mask head in {self.output / 'export'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_cli("train.grounding", MaskHeadCLI, arguments)


if __name__ == "__main__":
    sys.exit(main())
