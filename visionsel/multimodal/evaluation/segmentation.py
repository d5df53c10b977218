"""Masks against the truth: referring segmentation, panoptic narratives, answer grounding, and bare heatmaps.

An evaluation keeps one `Overlap` a sample, which is all that the scores need, so that it can stop and go on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "THRESHOLDS",
    "Overlap",
    "average_recall",
    "box_iou",
    "box_scores",
    "energy_inside",
    "overlap",
    "peak_inside",
    "score",
]

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Overlap:
    """Pixels of a predicted mask and of the true one.

    Attributes:
        intersection, union: of the two.
        predicted, truth: of each.
    """

    intersection: int
    union: int
    predicted: int
    truth: int

    @property
    def iou(self) -> float:
        """Intersection over union; 1 where both are empty, as gRefCOCO counts it."""
        return self.intersection / self.union if self.union else 1.0


def overlap(predicted: np.ndarray, truth: np.ndarray) -> Overlap:
    """Count pixels of two masks, bool `[H, W]`.

    Raises:
        ValueError: for masks that are not bool, or of different sizes.
    """
    if predicted.dtype != np.bool_ or truth.dtype != np.bool_ or predicted.shape != truth.shape:
        raise ValueError(
            "masks are bool and of one size, got "
            f"{predicted.dtype} {list(predicted.shape)} and {truth.dtype} {list(truth.shape)}"
        )
    return Overlap(
        int((predicted & truth).sum()),
        int((predicted | truth).sum()),
        int(predicted.sum()),
        int(truth.sum()),
    )


def score(overlaps: Sequence[Overlap], thresholds: Sequence[float] = THRESHOLDS) -> dict[str, float]:
    """Scores of referring segmentation (Yu et al. 2016; Liu et al. 2023 for expressions that mean nothing).

    Args:
        overlaps: one a sample.
        thresholds: of `precision_...`.

    Returns:
        `samples`; `c_iou`, intersections over unions summed over all samples (also called oIoU; large objects
        count more); `g_iou`, the mean IoU of the samples (also mIoU); `precision_50` and so on, the share of
        samples whose IoU is above; where some expressions mean nothing `n_acc`, the share of these with an
        empty prediction, and `t_acc`, the share of the others without one.

    Raises:
        ValueError: without samples.
    """
    if not overlaps:
        raise ValueError("nothing to score: there are no samples")
    union = sum(one.union for one in overlaps)
    ious = np.array([one.iou for one in overlaps])
    scores: dict[str, float] = {
        "samples": len(overlaps),
        "c_iou": sum(one.intersection for one in overlaps) / union if union else 1.0,
        "g_iou": float(ious.mean()),
    }
    for threshold in thresholds:
        scores[f"precision_{round(100 * threshold)}"] = float((ious > threshold).mean())
    empty = [one for one in overlaps if not one.truth]
    if empty:
        others = [one for one in overlaps if one.truth]
        scores["n_acc"] = sum(not one.predicted for one in empty) / len(empty)
        scores["t_acc"] = sum(one.predicted > 0 for one in others) / len(others) if others else float("nan")
    return scores


def average_recall(
    overlaps: Sequence[Overlap], groups: Mapping[str, Sequence[bool]] | None = None
) -> dict[str, float]:
    """The measure of panoptic narrative grounding: the area under recall as a function of the IoU wanted.

    Recall at a threshold is the share of phrases above it, so that the area over thresholds from 0 to 1 is
    the mean IoU; the released code sums it up in steps of 1e-5 (Gonzalez et al. 2021, section 4.2).

    Args:
        overlaps: one a phrase.
        groups: for each name which phrases belong to it, such as things, stuff, plurals.

    Returns:
        `all` and each group's; NaN for a group without phrases.

    Raises:
        ValueError: without phrases, or for a group of another length.
    """
    if not overlaps:
        raise ValueError("nothing to score: there are no phrases")
    ious = np.array([one.iou for one in overlaps])
    scores = {"all": float(ious.mean())}
    for name, members in (groups or {}).items():
        chosen = np.asarray(members, dtype=bool)
        if chosen.shape != ious.shape:
            raise ValueError(f"group {name} has {len(chosen)} entries for {len(ious)} phrases")
        scores[name] = float(ious[chosen].mean()) if chosen.any() else float("nan")
    return scores


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1).

    Examples:
        >>> from visionsel.multimodal.evaluation.segmentation import box_iou
        >>> box_iou((0, 0, 10, 10), (0, 0, 10, 5))
        0.5
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    areas = sum(max(b[2] - b[0], 0.0) * max(b[3] - b[1], 0.0) for b in (first, second))
    return shared / (areas - shared) if areas > shared else 0.0


def box_scores(
    predicted: Sequence[Sequence[float] | None], truth: Sequence[Sequence[float]], threshold: float = 0.5
) -> dict[str, float]:
    """Referring comprehension: `accuracy`, the share of boxes with an IoU of `threshold` or more, and `iou`.

    Raises:
        ValueError: for different numbers of boxes, or none.
    """
    if len(predicted) != len(truth) or not truth:
        raise ValueError(f"one predicted box (or None) for each true one, got {len(predicted)}, {len(truth)}")
    ious = [
        0.0 if said is None else box_iou(said, there) for said, there in zip(predicted, truth, strict=True)
    ]
    return {
        "samples": len(ious),
        "accuracy": sum(iou >= threshold for iou in ious) / len(ious),
        "iou": sum(ious) / len(ious),
    }


def peak_inside(heatmap: np.ndarray, mask: np.ndarray, tolerance: int = 0) -> bool:
    """The pointing game (Zhang et al. 2018): does the largest value lie in the mask, or so near?

    Args:
        heatmap: `[H, W]`; of equal values the first counts.
        mask: bool `[H, W]`.
        tolerance: pixels of distance that still hit; the paper takes 15 on COCO.
    """
    y, x = np.unravel_index(int(np.argmax(heatmap)), heatmap.shape)
    if not tolerance:
        return bool(mask[y, x])
    rows, columns = np.nonzero(mask)
    return bool(((rows - y) ** 2 + (columns - x) ** 2 <= tolerance**2).any())


def energy_inside(heatmap: np.ndarray, mask: np.ndarray) -> float:
    """The share of a heatmap's positive values that lies in a mask (Wang et al. 2020); 0 without any."""
    positive = np.clip(heatmap, 0, None)
    whole = float(positive.sum())
    return float(positive[mask].sum()) / whole if whole else 0.0
