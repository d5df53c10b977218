"""PruMerge: the tokens that stand out in the attention of the vision tower, the others merged into them.

After Shang et al. 2024, "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models"
(arXiv:2403.15388), and the authors' code for what the paper leaves open. What differs from that code:

- Tokens stay at their places; the extra token sits where the most attended pruned token was. They are merged
  before the projector, as there, where the family's projector works on single tokens, and after it elsewhere.
- Each sample of a batch has its own number of tokens.
- The uniform samples of PruMerge+ reach to the last token (the code leaves one out), and where no token
  stands out they are about three (the code divides by zero).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.multimodal.pruning.checks import require_finite, valid_or_all
from visionsel.multimodal.pruning.pruner import Pruner, Stage, TowerCrop, VisualTokens

__all__ = ["PruMerge", "select"]


@dataclass(frozen=True)
class PruMerge(Pruner):
    """Outliers of the class token's attention, their nearest tokens merged into them (Shang et al. 2024).

    There is no `keep`: the image decides.

    Args:
        plus: PruMerge+, about three evenly spaced tokens more for each outlier.
        neighbours: how many tokens are merged into each that stays.

    Raises:
        ValueError: for values out of range.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import PruMerge
        >>> with PruMerge(plus=True)(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().equivalent_tokens < 64  # the image decides how many
        True
    """

    plus: bool = False
    neighbours: int = 32

    def __post_init__(self) -> None:
        _check(self.neighbours)

    def stages(self, layers: int) -> list[Stage]:
        """See `Pruner`."""
        return [Stage(0, self._select, tower=True, tower_layer=-1)]

    def _select(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        attention = tokens.pool_tower(_one_head)
        keys = tokens.tower_keys().transpose(1, 2).flatten(2)
        features, project = tokens.mergeable()
        mask, merged = select(attention, keys, features, self.neighbours, tokens.valid, self.plus)
        return mask, project(merged)


def _one_head(crop: TowerCrop) -> Tensor:
    """`[patches]`: what a patch gets if all heads are one, logits scaled by C ** -0.5 (authors' code)."""
    query, key = (x.transpose(0, 1).flatten(1)[None] for x in (crop.query, crop.key))
    joined = TowerCrop(query, key, query.shape[-1] ** -0.5, crop.skip)
    return (joined.class_row() if crop.skip else joined.received())[0]


def select(
    attention: Tensor,
    keys: Tensor,
    features: Tensor,
    neighbours: int = 32,
    valid: Tensor | None = None,
    plus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Keep the outliers of the attention, and add to each its nearest tokens.

    A token stands out whose attention is above Q3 + 1.5 (Q3 - Q1), by the quartiles of its sample. To each
    that stays are added the `neighbours` other tokens, kept or not, with the most similar keys (cosine),
    each times its attention. One token more is the sum of all pruned tokens times their attention; it sits
    at the most attended of them.

    Args:
        attention: `[B, N]`: what each token gets from the class token.
        keys: `[B, N, C]` of the vision tower, heads joined.
        features: `[B, N, C]`.
        neighbours: how many tokens are added to each that stays; all others where there are fewer.
        valid: bool `[B, N]`: which tokens there are; default all.
        plus: keep every `max(1, N // outliers // 3)`-th token of the sample too, from the first.

    Returns:
        bool `[B, N]` and features `[B, N, C]` with the kept ones replaced.

    Raises:
        ValueError: for neighbours below 1, and for NaN.
    """
    _check(neighbours)
    valid = valid_or_all(valid, features)
    require_finite("attention", attention, valid)
    require_finite("keys", keys, valid)
    require_finite("features", features, valid)
    weight, metric, values = (
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in (attention, keys, features)
    )
    lower, upper = weight.masked_fill(~valid, torch.nan).nanquantile(weight.new_tensor([0.25, 0.75]), dim=1)
    kept = valid & (weight > (upper + 1.5 * (upper - lower))[:, None])
    if plus:
        step = (valid.sum(1) // kept.sum(1).clamp(min=1) // 3).clamp(min=1)
        kept = kept | (valid & ((valid.cumsum(1) - 1) % step[:, None] == 0))
    values = values.masked_fill(~valid[..., None], 0)
    weight = weight.masked_fill(~valid, 0).to(values.dtype)
    metric = F.normalize(metric.masked_fill(~valid[..., None], 0), dim=-1)

    # one token more, of all that is dropped
    pruned = valid & ~kept
    extra = F.one_hot(weight.masked_fill(~pruned, -torch.inf).argmax(1), valid.shape[1]).bool() & pruned
    rest = torch.einsum("bn,bnc->bc", weight * pruned, values)
    merged = torch.where(extra[..., None], rest[:, None].to(features.dtype), features)

    # K kept tokens of each sample, from the left; `there` says which of them exist
    number = kept.sum(1)
    index = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, : int(number.amax())]
    there = torch.arange(index.shape[1], device=index.device) < number[:, None]
    columns = index[..., None].expand(-1, -1, features.shape[-1])
    mixing = _nearest(metric, index, valid, neighbours).to(weight.dtype) * weight[:, None]
    new = (values.gather(1, columns) + mixing @ values).to(features.dtype)
    return kept | extra, merged.scatter(
        1, columns, torch.where(there[..., None], new, merged.gather(1, columns))
    )


def _nearest(metric: Tensor, index: Tensor, valid: Tensor, neighbours: int) -> Tensor:
    """bool `[B, K, N]`: the most similar other tokens of each in `index`, of unit vectors `[B, N, C]`."""
    similarity = metric.gather(1, index[..., None].expand(-1, -1, metric.shape[-1])) @ metric.transpose(1, 2)
    itself = F.one_hot(index, valid.shape[1]).bool()
    other = valid[:, None] & ~itself
    # whole steps above the rounding errors: tokens that are alike are taken in their order
    steps = (similarity / (16 * torch.finfo(similarity.dtype).eps)).round()
    nearest = steps.masked_fill(~other, -torch.inf).argsort(dim=2, descending=True, stable=True)
    return torch.zeros_like(other).scatter(2, nearest[..., :neighbours], True) & other


def _check(neighbours: int) -> None:
    if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1:
        raise ValueError(f"neighbours must be a whole number from 1 up, got {neighbours!r}")
