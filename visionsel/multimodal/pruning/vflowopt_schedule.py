"""The schedules of VFlowOpt: how many tokens are left at which layer, within a budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

__all__ = ["LAYERS", "PUBLISHED", "Schedule", "last_keep", "mean_keep", "scheduled"]


@dataclass(frozen=True)
class Schedule:
    """What the search of the paper finds.

    Attributes:
        vision_keep: ratio of the tokens that enters the decoder.
        stage_keep: for each later stage the ratio, of the tokens that arrive, that stays.
        threshold: a token is global that receives more than this times the mean attention.
        block: side of the blocks that recycle, in tokens.
    """

    vision_keep: float
    stage_keep: tuple[float, ...]
    threshold: float
    block: float


# LLaVA-OneVision-7B, by the ratio of its tokens that a decoder layer has on average
PUBLISHED = {
    0.5: Schedule(0.723, (0.749, 0.487), 28.7, 11.76),
    0.25: Schedule(0.265, (0.983, 0.877), 34.8, 15.6),
    0.1: Schedule(0.1166, (1.0, 0.601), 39.3, 17.4),
}
# its later stages, as fractions of its 28 layers
LAYERS = (9 / 28, 18 / 28)


def scheduled(keep: float) -> Schedule:
    """The published schedule of a budget, or what lies on the lines between the published ones.

    Above 0.5 the lines go to a schedule that keeps everything, below 0.1 to one that keeps nothing at the
    input. Between the published budgets the mean over layers is near `keep`, not at it.

    Args:
        keep: the ratio of tokens that a decoder layer has on average, in (0, 1].
    """
    knots = {
        0.0: replace(PUBLISHED[0.1], vision_keep=0.0),
        **dict(sorted(PUBLISHED.items())),
        1.0: replace(PUBLISHED[0.5], vision_keep=1.0, stage_keep=(1.0, 1.0)),
    }
    if keep in knots:
        return knots[keep]
    low, high = next((a, b) for a, b in pairwise(knots) if a < keep < b)
    below, above = knots[low], knots[high]

    def between(a: float, b: float) -> float:
        return a + (keep - low) / (high - low) * (b - a)

    return Schedule(
        between(below.vision_keep, above.vision_keep),
        tuple(map(between, below.stage_keep, above.stage_keep)),
        between(below.threshold, above.threshold),
        between(below.block, above.block),
    )


def mean_keep(vision_keep: float, stage_keep: Sequence[float], starts: Sequence[int], depth: int) -> float:
    """The ratio of tokens that a decoder layer has on average.

    Args:
        vision_keep: ratio that enters the decoder.
        stage_keep: for each later stage the ratio, of what arrives, that stays.
        starts: before which decoder layers these stages are.
        depth: number of decoder layers.
    """
    left, total = vision_keep, 0.0
    for (start, end), ratio in zip(pairwise((0, *starts, depth)), (*stage_keep, 1.0), strict=True):
        total += left * (end - start)
        left *= ratio
    return total / depth


def last_keep(
    target: float, vision_keep: float, stage_keep: Sequence[float], starts: Sequence[int], depth: int
) -> float | None:
    """The ratio of the last stage with which a schedule meets a budget, at most 1.

    Args:
        target: the ratio of tokens that a decoder layer has on average.
        vision_keep: ratio that enters the decoder.
        stage_keep: the ratios of all later stages but the last.
        starts: before which decoder layers the later stages are.
        depth: number of decoder layers.

    Returns:
        None where the layers before the last stage use up the budget by themselves.
    """
    before = mean_keep(vision_keep, stage_keep, starts[:-1], starts[-1]) * starts[-1]
    left = vision_keep
    for ratio in stage_keep:
        left *= ratio
    ratio = (target * depth - before) / (left * (depth - starts[-1]))
    return min(ratio, 1.0) if ratio > 0 else None
