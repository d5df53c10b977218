"""VisionZip: the tokens that the vision tower attends to most, and a few that sum up the rest.

After Yang et al. 2025, "VisionZip: Longer is Better but Not Necessary in Vision Language Models" (CVPR;
arXiv:2412.04467), sections 3.2 and 3.3. What differs from the authors' code:

- Tokens stay at their places in the prompt. They are merged before the projector, as there, where the
  family's projector works on single tokens, and after it elsewhere.
- The class token is not among the dominant ones: the models of transformers drop it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.multimodal.pruning.checks import check_keep, counts, require_finite, top, valid_or_all
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens

__all__ = ["VisionZip", "select"]


@dataclass(frozen=True)
class VisionZip(Pruner):
    """Dominant tokens by the attention of the vision tower, contextual ones by merging (Yang et al. 2025).

    Args:
        dominant: tokens that stay as they are: a number, or a ratio of the sample's.
        contextual: tokens into which the others are merged: a number (0 merges nothing), or a ratio.
        keep: in place of both, how many tokens stay in all, a number or a ratio: 27 of 32 are dominant, as
            in the paper's 162 + 30, 108 + 20 and 54 + 10.

    Raises:
        ValueError: for values out of range.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import VisionZip
        >>> with VisionZip(keep=0.25)(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().equivalent_tokens
        16.0
    """

    dominant: float | int = 54
    contextual: float | int = 10
    keep: float | int | None = None

    def __post_init__(self) -> None:
        _check(self.dominant, self.contextual)
        if self.keep is not None:
            check_keep(self.keep)

    def stages(self, layers: int) -> list[Stage]:
        """See `Pruner`."""
        return [Stage(0, self._select, tower=True)]

    def _select(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        features, project = tokens.mergeable()
        signals = tokens.tower_attention(), tokens.tower_keys(), features
        if self.keep is None:
            mask, merged = select(*signals, self.dominant, self.contextual, tokens.valid)
        else:
            total = counts(self.keep, tokens.valid)
            contextual = (5 * total + 16) // 32
            mask, merged = _zip(*signals, total - contextual, contextual, tokens.valid)
        return mask, project(merged)


def select(
    attention: Tensor,
    keys: Tensor,
    features: Tensor,
    dominant: float | int,
    contextual: float | int,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep the tokens with most attention; merge the others into evenly spaced ones.

    The `contextual` targets are every `max(1, rest // contextual)`-th of the tokens that are not dominant,
    from the first. Each further token belongs to the target with the most similar key (cosine, keys
    averaged over heads); a target becomes itself plus the mean of its tokens.

    Args:
        attention: `[B, heads, N]`, or `[B, N]`: what each token gets from the class token.
        keys: `[B, heads, N, head_dim]` of the vision tower.
        features: `[B, N, C]`.
        dominant: how many tokens stay as they are: a number or a ratio.
        contextual: how many targets, likewise; 0 for none. Fewer where fewer are left.
        valid: bool `[B, N]`: which tokens there are; default all.

    Returns:
        bool `[B, N]`, the dominant tokens and the targets, and features `[B, N, C]` with the targets
        replaced.

    Raises:
        ValueError: for values out of range, and for NaN.
    """
    _check(dominant, contextual)
    valid = valid_or_all(valid, features)
    targets = torch.zeros_like(valid.sum(1)) if contextual == 0 else counts(contextual, valid)
    return _zip(attention, keys, features, counts(dominant, valid), targets, valid)


def _check(dominant: float | int, contextual: float | int) -> None:
    check_keep(dominant, "dominant")
    if isinstance(contextual, bool) or contextual != 0:
        check_keep(contextual, "contextual")


def _zip(
    attention: Tensor, keys: Tensor, features: Tensor, dominant: Tensor, contextual: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """`select` with a number for each sample, int64 `[B]`."""
    scores = attention.sum(1, dtype=_wide(attention)) if attention.ndim == 3 else attention
    require_finite("attention", scores, valid)
    require_finite("keys", keys.transpose(1, 2), valid)
    require_finite("features", features, valid)
    chosen = top(scores, dominant, valid)
    rest = valid & ~chosen
    left = rest.sum(1)
    number = torch.minimum(contextual, left)
    step = (left // number.clamp(min=1)).clamp(min=1)[:, None]
    place = rest.cumsum(1) - 1
    target = rest & (place % step == 0) & (place // step < number[:, None])
    most = int(number.amax())
    if most == 0:
        return chosen, features

    # T targets of each sample, from the left; `there` says which of them exist
    index = (~target).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    there = torch.arange(most, device=index.device) < number[:, None]
    metric = keys.to(_wide(keys)).mean(1).masked_fill(~valid[..., None], 0)
    metric = F.normalize(metric, dim=-1)
    similarity = metric @ _take(metric, index).transpose(1, 2)
    # whole steps above the rounding errors: of targets that are alike the first is taken
    steps = (similarity / (16 * torch.finfo(similarity.dtype).eps)).round()
    owner = steps.masked_fill(~there[:, None], -torch.inf).argmax(2)

    values = features.to(_wide(features)).masked_fill(~valid[..., None], 0)
    member = F.one_hot(owner, most) * (rest & ~target)[..., None]  # [B, N, T]
    total = member.to(values.dtype).transpose(1, 2) @ values
    merged = _take(values, index) + total / member.sum(1).clamp(min=1)[..., None]
    merged = torch.where(there[..., None], merged, _take(values, index)).to(features.dtype)
    return chosen | target, _put(features, index, merged)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """`[B, T, C]` of `[B, N, C]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _put(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A copy of `[B, N, C]` with `[B, T, C]` at `index` `[B, T]`."""
    return x.scatter(1, index[..., None].expand(-1, -1, x.shape[-1]), values)
