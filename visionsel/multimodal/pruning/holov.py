"""HoloV: a share of the tokens for every part of the image, the attended parts more.

After Zou et al. 2025, "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context
Retention" (NeurIPS; arXiv:2510.02912), section 4.1, and the released code where it differs from the paper:
chunks are consecutive tokens, not crops in two dimensions; the variance has a weight alpha; inside a chunk
tokens are ranked by attention alone; allocation is linear in the score (tau = 1). What differs from that
code: what a chunk cannot hold goes to others (there it is lost).
"""

from dataclasses import dataclass
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.multimodal.pruning.checks import check_keep, counts, require_finite, valid_or_all
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens

__all__ = ["HoloV", "select"]


@dataclass(frozen=True)
class HoloV(Pruner):
    """Quotas for chunks of the image by attention and diversity, the most attended of each (Zou et al. 2025).

    Args:
        keep: ratio or number of tokens.
        chunks: into how many runs of consecutive tokens the sample's are split.
        alpha: weight of the diversity; see `select` for how little it does.

    Raises:
        ValueError: for values out of range.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import HoloV
        >>> with HoloV(keep=0.25)(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().visual_tokens  # of each decoder layer
        (16.0, 16.0, 16.0, 16.0)
    """

    keep: float | int = 0.25
    chunks: int = 16
    alpha: float = 0.09

    def __post_init__(self) -> None:
        check_keep(self.keep)
        _check(self.chunks, self.alpha)

    def stages(self, layers: int) -> list[Stage]:
        """See `Pruner`."""
        return [Stage(0, self._select, tower=True)]

    def _select(self, tokens: VisualTokens) -> Tensor:
        attention = tokens.tower_attention().mean(1)
        features, _ = tokens.mergeable()  # of the tower, as in the release
        return select(attention, features, self.keep, self.chunks, self.alpha, tokens.valid)


def select(
    attention: Tensor,
    features: Tensor,
    keep: float | int,
    chunks: int = 16,
    alpha: float = 0.09,
    valid: Tensor | None = None,
) -> Tensor:
    """Keep in each chunk its share of the tokens, the most attended ones.

    The first `N % chunks` chunks have a token more than the others. A token's score is its attention plus
    alpha times the variance of its cosine similarities to the chunk (0 to itself), scaled so that the
    variances of a chunk are in the mean what its attention is (equations 1 to 3). A chunk's score is the
    mean of its tokens', its quota the floor of its share of `keep` (equation 4), at most its size. What is
    left over goes to the highest-scoring chunks that have room, one token each, round by round.

    By that scaling a chunk scores 1 + alpha times its mean attention, unless it is of one token: alpha hardly
    matters.

    Args:
        attention: `[B, N]`, not negative: what each token gets from the class token.
        features: `[B, N, C]`.
        keep: ratio or number of tokens.
        chunks: into how many runs of consecutive tokens the sample's are split; empty ones are left out.
        alpha: weight of the variance.
        valid: bool `[B, N]`: which tokens there are; default all.

    Returns:
        bool `[B, N]`.

    Raises:
        ValueError: for values out of range, and for NaN.
    """
    _check(chunks, alpha)
    valid = valid_or_all(valid, features)
    require_finite("attention", attention, valid)
    require_finite("features", features, valid)
    weight, values = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (attention, features))
    number, rank = valid.sum(1, keepdim=True), valid.cumsum(1) - 1
    small, longer = number // chunks, number % chunks  # the first `longer` chunks hold `small` + 1 tokens
    each = torch.arange(chunks, device=valid.device)
    sizes = small + (each < longer).long()  # [B, chunks]
    starts = each * small + torch.minimum(each, longer)

    # [B, chunks, M]: the tokens of each chunk, padded
    slot = torch.arange(max(int(sizes.amax()), 1), device=valid.device)
    held = slot < sizes[..., None]
    places = (~valid).to(torch.int8).argsort(dim=1, stable=True)
    index = places.gather(1, (starts[..., None] + slot).clamp(max=valid.shape[1] - 1).flatten(1))
    chunked = values.gather(1, index[..., None].expand(-1, -1, values.shape[-1])).unflatten(1, held.shape[1:])
    score = _chunk_scores(weight.gather(1, index).view_as(held), chunked, held, sizes, alpha)
    quota = _quotas(score, sizes, counts(keep, valid))

    # place of each token in its chunk by falling attention; stable sorts keep the order of the index
    boundary = longer * (small + 1)
    chunk = torch.where(
        rank < boundary, rank // (small + 1), longer + (rank - boundary) // small.clamp(min=1)
    ).masked_fill(~valid, chunks)
    order = weight.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, chunk.gather(1, order).argsort(dim=1, stable=True))
    position = torch.arange(valid.shape[1], device=valid.device).expand_as(order)
    inside = torch.empty_like(order).scatter_(1, order, position) - F.pad(starts, (0, 1)).gather(1, chunk)
    return valid & (inside < F.pad(quota, (0, 1)).gather(1, chunk))


def _chunk_scores(attention: Tensor, features: Tensor, held: Tensor, sizes: Tensor, alpha: float) -> Tensor:
    """`[B, chunks]` of attention `[B, chunks, M]` and features `[B, chunks, M, C]`; 0 for an empty chunk."""
    attention = attention.masked_fill(~held, 0)
    unit = F.normalize(features.masked_fill(~held[..., None], 0), dim=-1)
    itself = torch.eye(held.shape[-1], dtype=torch.bool, device=held.device)
    similarity = (unit @ unit.transpose(-1, -2)).masked_fill(itself, 0)
    others = (sizes - 1).clamp(min=1)[..., None]
    mean = similarity.sum(-1) / others
    variance = ((similarity - mean[..., None]).square() * held[..., None, :]).sum(-1) / others
    variance = variance.masked_fill(~held, 0)
    count = sizes.clamp(min=1)
    level, spread = attention.sum(-1) / count, variance.sum(-1) / count
    # equation 3, averaged over the chunk; the small number is the authors'
    return level + alpha * spread * level / (spread + 1e-6)


def _quotas(score: Tensor, sizes: Tensor, keep: Tensor) -> Tensor:
    """int64 `[B, chunks]`: how many tokens of each chunk stay, `keep` `[B]` in all."""
    total = score.sum(1, keepdim=True)
    share = torch.where(total > 0, score / total, 0)
    # shares that differ by rounding only are equal, and one that is a whole number of tokens is not below it
    tolerance = 16 * torch.finfo(share.dtype).eps
    quota = torch.minimum((share * (1 + tolerance) * keep[:, None]).floor().long().clamp(min=0), sizes)
    order = (share / tolerance).round().argsort(dim=1, descending=True, stable=True)
    while True:
        left = keep - quota.sum(1)
        room = quota < sizes
        if not bool((left > 0).any()):
            return quota
        turn = torch.empty_like(order).scatter_(1, order, room.gather(1, order).cumsum(1) - 1)
        quota = quota + (room & (turn < left[:, None])).long()


def _check(chunks: int, alpha: float) -> None:
    if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1:
        raise ValueError(f"chunks must be a whole number from 1 up, got {chunks!r}")
    if not (isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be a finite number from 0 up, got {alpha}")
