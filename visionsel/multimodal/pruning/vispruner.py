"""VisPruner: the tokens that the vision tower attends to, and of the others those that are not duplicates.

Zhang et al. 2024, "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs",
arXiv:2412.01818.

What differs from the release: an odd number of remaining tokens is allowed. Where a family's projector does
not work on single tokens, similarity is measured behind it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.multimodal.pruning.checks import check_keep, counts, require_finite, top, valid_or_all
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens

__all__ = ["VisPruner", "select"]

ROUND = 8  # tokens that a round drops at most, as released


@dataclass(frozen=True)
class VisPruner(Pruner):
    """Keeps important and diverse tokens at the input of the decoder.

    Newline tokens stand for no patch; nothing attends to them in the tower, so they are never important.

    Args:
        keep: ratio or number of tokens.
        important: share of the kept tokens that is chosen by attention, in [0, 1] (the release's default).

    Raises:
        ValueError: for a value out of range.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import VisPruner
        >>> with VisPruner(keep=16)(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().visual_tokens  # of each decoder layer
        (16.0, 16.0, 16.0, 16.0)
    """

    keep: float | int
    important: float = 0.5

    def __post_init__(self) -> None:
        check_keep(self.keep)
        _check_important(self.important)

    def stages(self, layers: int) -> list[Stage]:
        """See `Pruner`."""
        return [Stage(0, self._select, tower=True)]

    def _select(self, tokens: VisualTokens) -> Tensor:
        features, _ = tokens.mergeable()  # of the tower, as in the release
        return select(tokens.tower_attention(), features, self.keep, self.important, tokens.valid)


def _check_important(important: float) -> None:
    if not 0 <= important <= 1:
        raise ValueError(f"important must be a share in [0, 1], got {important!r}")


def select(
    attention: Tensor,
    features: Tensor,
    keep: float | int,
    important: float = 0.5,
    valid: Tensor | None = None,
) -> Tensor:
    """Important tokens by attention, diverse ones by dropping duplicates.

    Of `T` tokens to keep, `int(T * important)` are those with the highest attention, averaged over heads.
    The others stand in a list by falling attention. A round splits the list into its even and its odd
    places, drops those at even places (8, or as many as are left to drop) whose highest cosine with one at
    an odd place is highest, and goes on with the rest of the even places, by falling similarity, followed
    by the odd ones, until `T` are left.

    Args:
        attention: `[B, heads, N]`, the row of the class token, or what tokens receive on average.
        features: `[B, N, C]`.
        keep: ratio or number of tokens.
        important: share in [0, 1].
        valid: bool `[B, N]`, True at tokens; None: all.

    Returns:
        bool `[B, N]`. Ties of attention go to the lower index; of equally similar tokens (up to rounding)
        the earlier in the list is dropped, as in a stable sort.

    Raises:
        ValueError: for NaN at a valid token, or a share out of range.
    """
    _check_important(important)
    scores = attention.to(torch.promote_types(attention.dtype, torch.float32)).mean(1)
    valid = valid_or_all(valid, scores)
    require_finite("features", features, valid)
    number = counts(keep, valid)
    first = torch.tensor([int(n * important) for n in number.tolist()], device=number.device)
    kept = top(scores, first, valid)
    wanted = number - first

    # the rest by falling attention, packed to the left; `left` of them are in each sample's list
    rest = scores.argsort(dim=1, descending=True, stable=True)
    rest = _pack(rest, (valid & ~kept).gather(1, rest))
    left = (valid & ~kept).sum(1).masked_fill(wanted == 0, 0)
    similarity = _cosines(features, valid)
    while bool((left > wanted).any()):
        even, odd = rest[:, 0::2], rest[:, 1::2]
        evens, odds = (left + 1) // 2, left // 2
        pairs = similarity.gather(1, even[..., None].expand(-1, -1, similarity.shape[2]))
        pairs = pairs.gather(2, odd[:, None].expand(-1, even.shape[1], -1))
        nearest = pairs.masked_fill(~_below(odds, odd.shape[1])[:, None], -math.inf).amax(2)
        nearest = nearest.masked_fill(~_below(evens, even.shape[1]), -math.inf)
        even = even.gather(1, nearest.argsort(dim=1, descending=True, stable=True))
        drop = torch.minimum((left - wanted).clamp(0, ROUND), evens)
        stays = _below(evens, even.shape[1]) & ~_below(drop, even.shape[1])
        rest = _pack(torch.cat([even, odd], 1), torch.cat([stays, _below(odds, odd.shape[1])], 1))
        left = left - drop
    return kept | torch.zeros_like(valid).scatter(1, rest, _below(left, rest.shape[1]))


def _cosines(features: Tensor, valid: Tensor) -> Tensor:
    """`[B, N, N]`, rounded to steps well above the error of a product, so that equal pairs are equal."""
    unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    unit = unit.masked_fill(~valid[..., None], 0.0)
    step = 16 * torch.finfo(unit.dtype).eps
    return (unit @ unit.transpose(1, 2) / step).round() * step


def _below(number: Tensor, length: int) -> Tensor:
    """bool `[B, length]`, True at the first `number` `[B]` places."""
    return torch.arange(length, device=number.device) < number[:, None]


def _pack(values: Tensor, stays: Tensor) -> Tensor:
    """`values` `[B, n]` with those that stay moved to the left, in their order."""
    return values.gather(1, (~stays).byte().argsort(dim=1, stable=True))
