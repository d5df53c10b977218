"""The mask head of the small vision-language model, and how well it finds what is named."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionsel.data.shapes import CAPTION_PROMPT, Sample
from visionsel.embedded.files import WEIGHTS
from visionsel.embedded.segmenter import load_segmenter
from visionsel.multimodal.grounding.grid import TokenGrid
from visionsel.multimodal.grounding.mask_head import MaskHead
from visionsel.multimodal.grounding.replay import Replay
from visionsel.multimodal.grounding.word_features import answer_replay, refer_replay
from visionsel.multimodal.grounding.words import token_spans, tokens_between

__all__ = ["REFER_PROMPT", "caption_spans", "load_mask_head", "mask_ious", "measure_mask_head", "word_tokens"]

REFER_PROMPT = "locate {}."


def load_mask_head(folder: str | Path | None = None, segmenter: str | Path | None = None) -> MaskHead:
    """The head, with its refiner: `Grounder(*load_lvlm(), "embedded", heatmap="mask_head")` uses it.

    Args:
        folder: one that `train.grounding` exported; None: the shipped one.
        segmenter: folder of the SAM that it was trained with; None: the shipped one.

    Raises:
        ImportError: without the extra "multimodal".
        FileNotFoundError: when a folder lacks a file.
        ValueError: for broken files.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.embedded import load_mask_head
        >>> from visionsel.multimodal import Grounder
        >>> grounder = Grounder(model, processor, None, heatmap=load_mask_head())
        >>> grounder.refer(scene.image, "the cyan heart").mask.shape
        (64, 64)
    """
    return MaskHead.from_pretrained(folder or WEIGHTS / "mask_head", load_segmenter(segmenter))


def caption_spans(sample: Sample) -> list[tuple[int, int]]:
    """Where `sample.captions[0]` mentions each object (`small red ring`)."""
    caption, spans, end = sample.captions[0], [], 0
    for found in sample.objects:  # in the order of this caption
        phrase = f"{found.size} {found.color} {found.shape}"
        start = caption.index(phrase, end)
        end = start + len(phrase)
        spans.append((start, end))
    return spans


def word_tokens(
    processor: Any, replay: Replay, spans: Sequence[Sequence[tuple[int, int]]]
) -> list[list[list[int]]]:
    """The new tokens that write each span of each answer."""
    words = []
    for ids, valid, asked in zip(replay.tokens, replay.valid, spans, strict=True):
        written = token_spans(processor.tokenizer, ids[valid].tolist())[1]
        words.append([list(tokens_between(written, span)) for span in asked])
    return words


def measure_mask_head(
    head: MaskHead, model: Any, processor: Any, samples: Sequence[Sample], batch_size: int = 16
) -> dict[str, float]:
    """Mean IoU of the masks of referring expressions and of the shapes that captions name.

    Args:
        head: with its refiner, or without.
        model, processor: the vision-language model.
        samples: scenes; all their expressions, and the last words of what their first captions mention.
        batch_size: answers at once.

    Returns:
        `refer_iou`, its parts `refer_iou_name`, `refer_iou_relation` and `refer_iou_place`, the share
        `refer_at_half` of IoUs above 0.5, `caption_iou`; and `refer_iou_coarse` and `caption_iou_coarse`,
        those of the U-Net alone.
    """
    referred = [(sample, one) for sample in samples for one in sample.expressions]
    ious: dict[str, list[float]] = {}
    for start in range(0, len(referred), batch_size):
        part = referred[start : start + batch_size]
        images = [sample.image for sample, _ in part]
        texts = [one.text for _, one in part]
        replay, grids, words = refer_replay(model, processor, images, texts, head.config.refer_prompt)
        targets = [torch.from_numpy(sample.objects[one.object].mask)[None] for sample, one in part]
        for name, found in _ious(head, replay, grids, words, images, targets).items():
            ious.setdefault(f"refer_iou{name}", []).extend(found)
            if not name:
                for (_, one), iou in zip(part, found, strict=True):
                    ious.setdefault(f"refer_iou_{one.kind}", []).append(iou)
                    ious.setdefault("refer_at_half", []).append(float(iou > 0.5))
    for start in range(0, len(samples), batch_size):
        some = samples[start : start + batch_size]
        images = [sample.image for sample in some]
        captions = [sample.captions[0] for sample in some]
        replay, grids = answer_replay(model, processor, images, [CAPTION_PROMPT] * len(some), captions)
        spans = [
            [(end - len(o.shape), end) for o, (_, end) in zip(s.objects, caption_spans(s), strict=True)]
            for s in some
        ]
        targets = [torch.stack([torch.from_numpy(o.mask) for o in s.objects]) for s in some]
        words = word_tokens(processor, replay, spans)
        for name, found in _ious(head, replay, grids, words, images, targets).items():
            ious.setdefault(f"caption_iou{name}", []).extend(found)
    return {name: sum(values) / len(values) for name, values in ious.items()}


def _ious(
    head: MaskHead,
    replay: Replay,
    grids: Sequence[TokenGrid],
    words: list[list[list[int]]],
    images: Sequence[Any],
    targets: Sequence[Tensor],
) -> dict[str, list[float]]:
    """IoU of each word: `""` of the final masks, and `"_coarse"` of the U-Net's where there are others."""
    with torch.no_grad():
        features = head.features(replay, words, grids, None if head.refiner is None else images)
        coarse = head.coarse(features)
        masks = {"": coarse}
        if head.refiner is not None:
            masks = {"": head.refine(features, coarse), "_coarse": coarse}
    return {
        name: torch.cat([mask_ious(said, true) for said, true in zip(logits, targets, strict=True)]).tolist()
        for name, logits in masks.items()
    }


def mask_ious(logits: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union of masks `[N, H, W]` with what logits say, `[N]`, on the CPU."""
    inside, masks = logits.cpu() > 0, masks.cpu().bool()
    shared, total = (inside & masks).sum((1, 2)), (inside | masks).sum((1, 2))
    return shared / total.clamp(min=1)
