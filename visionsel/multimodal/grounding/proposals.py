"""From heatmaps to masks: a segmenter asked with their prompts, and asked again with its own answers.

VL-SAM (Lin et al. 2024, arXiv:2410.05963) refines twice: the first mask is a prompt beside the same
points (`"mask"`), and the heatmap is cut with the mask and sampled anew (`"resample"`). The proposals of all
rounds are kept; the caller chooses or has them compete.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from visionsel.multimodal.grounding.prompts import Prompt, cut_at, mask_logits, sample_prompt
from visionsel.multimodal.grounding.segmenters import Canvas, Segmenter

__all__ = ["KINDS", "REFINEMENTS", "Heat", "Proposal", "attention_consistency", "best_proposal", "propose"]

KINDS = ("points", "box", "points+box", "points+mask", "points+box+mask")
REFINEMENTS = ("mask", "resample")
Heat = Callable[[], np.ndarray]


@dataclass(frozen=True, eq=False)
class Proposal:
    """A mask for a heatmap.

    Attributes:
        iou: the quality that is predicted for it, 0 to 1.
        prompt: what it was asked with.
        logits: gives float32 `[H, W]`: above 0 is inside.
        low_res: what the segmenter takes as its next prompt, float32 `[1, h, w]`; None where there is none.
    """

    iou: float
    prompt: Prompt
    logits: Callable[[], np.ndarray]
    low_res: Tensor | None = None

    def mask(self) -> np.ndarray:
        """bool `[H, W]`."""
        inside: np.ndarray = self.logits() > 0
        return inside


def propose(
    segmenter: Segmenter,
    heatmaps: Sequence[Heat],
    kind: str = "points",
    threshold: float | str = 0.5,
    refine: Sequence[str] = (),
) -> list[list[Proposal]]:
    """Masks for heatmaps of the image that the segmenter is set on, all in one prediction a round.

    Args:
        segmenter: set on the image.
        heatmaps: functions that give them, `[H, W]`, so that they need not all be held.
        kind: what is shown to the segmenter, one of `KINDS`.
        threshold: see `cut_at`.
        refine: rounds after the first, of `REFINEMENTS`, in this order.

    Returns:
        for each heatmap the proposals of the rounds; none where nothing stands out in it.
    """
    prompts = [sample_prompt(heat(), threshold) for heat in heatmaps]
    found: list[list[Proposal]] = [[] for _ in heatmaps]
    here = [number for number, prompt in enumerate(prompts) if prompt is not None]
    asked = {number: prompt for number, prompt in enumerate(prompts) if prompt is not None}
    for step in ("first", *(name for name in REFINEMENTS if name in refine)):
        if step == "resample":
            again = {
                number: sample_prompt(heatmaps[number](), threshold, inside=found[number][-1].mask())
                for number in here
            }
            asked = {number: prompt for number, prompt in again.items() if prompt is not None}
        if not asked:
            continue
        numbers = list(asked)
        given: dict[str, Any] = _arguments([asked[number] for number in numbers], kind)
        if step == "mask":
            given["mask_input"] = torch.cat([cast(Tensor, found[number][-1].low_res) for number in numbers])
        elif kind.endswith("mask"):
            given["mask_input"] = torch.cat(
                [segmenter.mask_prompt(mask_logits(heatmaps[number]())) for number in numbers]
            )
        answer = segmenter.predict(**given).only_best()
        for row, number in enumerate(numbers):
            low_res, iou = answer.low_res[row], min(max(float(answer.iou[row, 0]), 0.0), 1.0)
            enlarge = partial(_enlarged, answer.canvas, low_res)
            found[number].append(Proposal(iou, asked[number], enlarge, low_res))
    return found


def best_proposal(proposals: Sequence[Proposal]) -> Proposal | None:
    """The one with the highest predicted IoU; of equal ones the first. None among none."""
    return max(proposals, key=lambda one: one.iou, default=None)


def attention_consistency(mask: np.ndarray, heatmap: np.ndarray, threshold: float | str = 0.5) -> float:
    """How far a mask agrees with a heatmap, 0 to 1 (s_ac of DecAF, ICLR 2026).

    The sum of the heatmap in the mask over that in its own active area; pixels of the mask outside of the
    area count as minus the largest value.

    Args:
        mask: bool `[H, W]`.
        heatmap: `[H, W]`, none of it negative.
        threshold: of the active area, see `cut_at`.
    """
    area = heatmap > cut_at(heatmap, threshold)
    whole = float(heatmap[area].sum())
    if not whole:
        return 0.0
    held = float(heatmap[area & mask].sum()) - float(heatmap.max()) * int((mask & ~area).sum())
    return min(max(held / whole, 0.0), 1.0)


def _arguments(prompts: Sequence[Prompt], kind: str) -> dict[str, Any]:
    """What `Segmenter.predict` takes; rows of fewer points are filled up."""
    given: dict[str, Any] = {}
    if "points" in kind:
        most = max(len(prompt.points) for prompt in prompts)
        points = np.zeros((len(prompts), most, 2), dtype=np.float32)
        labels = np.full((len(prompts), most), -1)
        for row, prompt in enumerate(prompts):
            points[row, : len(prompt.points)] = prompt.points
            labels[row, : len(prompt.points)] = prompt.labels
        given |= {"points": points, "labels": labels}
    if "box" in kind:
        given["boxes"] = np.array([prompt.box for prompt in prompts], dtype=np.float32)
    return given


def _enlarged(canvas: Canvas, low_res: Tensor) -> np.ndarray:
    logits: np.ndarray = canvas.enlarge(low_res)[0].float().cpu().numpy()
    return logits
