"""The rules of GLC as functions on tensors: which image tokens matter, which layer looks at them.

See `visionsel.multimodal.decoding.glc` for the paper and how we read it. `N`: image tokens of a sample.
"""

import torch
from torch import Tensor

__all__ = ["check_rules", "choose_layer", "glimpse", "layer_scores", "refocus", "text_regions"]

CODE_SHIFT = 1e8


def text_regions(
    query_attention: Tensor,
    first: Tensor,
    last: Tensor,
    keep: int = 128,
    stable: float = 0.5,
    eps: float = 1e-6,
    valid: Tensor | None = None,
    fidelity: str = "paper",
) -> Tensor:
    """ZoomText: the image tokens that matter to the question.

    Args:
        query_attention: of the question to the image tokens in the last layer, `[B, N]` or
            `[B, heads, Q, N]`.
        first, last: attention among image tokens in the first and the last layer, `[B, N, N]` or
            `[B, heads, N, N]`, queries before keys.
        keep, stable, eps, fidelity: see `GLC`.
        valid: bool `[B, N]`: real tokens in a ragged batch.

    Returns:
        bool `[B, N]`.

    Raises:
        ValueError: for shapes that do not fit, values out of range, or NaN.
    """
    candidates = glimpse(query_attention, keep, valid)
    size = candidates.shape[-1]

    def received(name: str, attention: Tensor) -> Tensor:
        if attention.ndim not in (3, 4) or attention.shape[-2:] != (size, size):
            raise ValueError(
                f"{name} must be [B, N, N] or [B, heads, N, N] with N = {size}, got {list(attention.shape)}"
            )
        matrix = attention if attention.ndim == 3 else attention.mean(1)
        return matrix.masked_fill(~candidates[..., None], 0).sum(1)

    return refocus(received("first", first), received("last", last), candidates, stable, eps, fidelity)


def glimpse(query_attention: Tensor, keep: int = 128, valid: Tensor | None = None) -> Tensor:
    """The image tokens that the question attends to most (eq. 4).

    Args:
        query_attention: `[B, N]` or `[B, heads, Q, N]`, of which the mean is taken.
        keep: how many; at most all.
        valid: bool `[B, N]`: real tokens in a ragged batch.

    Returns:
        bool `[B, N]`; ties go to the lower index.

    Raises:
        ValueError: for other shapes, a `keep` below 1, or NaN.
    """
    check_rules(keep=keep)
    if query_attention.ndim not in (2, 4):
        raise ValueError(
            f"query_attention must be [B, N] or [B, heads, Q, N], got {list(query_attention.shape)}"
        )
    attention = query_attention if query_attention.ndim == 2 else query_attention.mean((1, 2))
    valid = _valid(valid, attention)
    return _top(attention, valid.sum(1).clamp(max=keep), valid)


def refocus(
    first: Tensor,
    last: Tensor,
    candidates: Tensor,
    stable: float = 0.5,
    eps: float = 1e-6,
    fidelity: str = "paper",
) -> Tensor:
    """The candidates whose importance shifts between the first and the last layer (eq. 5).

    Args:
        first, last: `[B, N]`: attention that each token gets from all candidates in these layers, in sum.
        candidates: bool `[B, N]`.
        stable: which part of them, those that shift least, is dropped; at least one stays.
        eps: is added to the importance in the first layer.
        fidelity: `"code"`: see `visionsel.multimodal.decoding.glc`; then `stable` and `eps` are not used, and
            it may be that none stays.

    Returns:
        bool `[B, N]`; ties go to the lower index.

    Raises:
        ValueError: for shapes that do not fit, values out of range, or NaN.
    """
    check_rules(stable=stable, eps=eps, fidelity=fidelity)
    if not first.shape == last.shape == candidates.shape:
        raise ValueError(
            "first, last and candidates must be [B, N] each, got "
            f"{list(first.shape)}, {list(last.shape)} and {list(candidates.shape)}"
        )
    _refuse_nan("attention among the candidates", first + last, candidates)
    if fidelity == "code":
        before, after = (_spread(one, candidates) for one in (first, last))
        return candidates & ((after - before).abs() / before > CODE_SHIFT)
    before, after = (_shares(one, candidates) for one in (first, last))
    number = ((1 - stable) * candidates.sum(1)).round().long().clamp(min=1)
    return _top(((after - before) / (before + eps)).abs(), number, candidates)


def layer_scores(received: Tensor, regions: Tensor, valid: Tensor | None = None) -> Tensor:
    """Which part of the attention among image tokens goes to the region, for each layer (eq. 3).

    Args:
        received: `[layers, B, N]`: attention that each image token gets from all of them, in sum.
        regions: bool `[B, N]`.
        valid: bool `[B, N]`: real tokens in a ragged batch.

    Returns:
        `[layers, B]`; 0 where there is no attention.

    Raises:
        ValueError: for shapes that do not fit, or NaN.
    """
    if received.ndim != 3 or received.shape[1:] != regions.shape:
        raise ValueError(
            "received must be [layers, B, N] and regions [B, N], got "
            f"{list(received.shape)} and {list(regions.shape)}"
        )
    valid = _valid(valid, received[0])
    _refuse_nan("attention among image tokens", received.sum(0), valid)
    whole = received.masked_fill(~valid, 0).sum(-1)
    inside = received.masked_fill(~(regions & valid), 0).sum(-1)
    return torch.where(whole > 0, inside / whole, 0)


def choose_layer(received: Tensor, regions: Tensor, valid: Tensor | None = None) -> Tensor:
    """The grounded layer: the one with the highest of `layer_scores`, the first of equals.

    Args:
        received, regions, valid: as there.

    Returns:
        int64 `[B]`; -1 where the region is empty.

    Raises:
        ValueError: for shapes that do not fit, or NaN.
    """
    scores = layer_scores(received, regions, valid)
    return scores.argmax(0).masked_fill(~regions.any(1), -1)


def check_rules(keep: int = 1, stable: float = 0.0, eps: float = 1.0, fidelity: str = "paper") -> None:
    """Refuse hyperparameters that are out of range.

    Raises:
        ValueError: naming what is allowed.
    """
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep must be a number of tokens from 1 up, got {keep!r}")
    if not 0 <= stable < 1:
        raise ValueError(f"stable must be a part from 0 up and below 1, got {stable!r}")
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be a positive number, got {eps!r}")
    if fidelity not in ("paper", "code"):
        raise ValueError(f'fidelity must be "paper" or "code", got {fidelity!r}')


def _valid(valid: Tensor | None, like: Tensor) -> Tensor:
    if valid is None:
        return torch.ones_like(like, dtype=torch.bool)
    if valid.dtype != torch.bool or valid.shape != like.shape:
        raise ValueError(f"valid must be bool {list(like.shape)}, got {valid.dtype} {list(valid.shape)}")
    return valid


def _refuse_nan(name: str, values: Tensor, valid: Tensor) -> None:
    if bool((values.isnan() & valid).any()):
        raise ValueError(f"{name} has NaN: look at the model's outputs (a half-precision overflow?)")


def _top(scores: Tensor, number: Tensor, valid: Tensor) -> Tensor:
    """bool `[B, N]`: the highest `number` `[B]` of the scores `[B, N]` of valid tokens."""
    _refuse_nan("attention", scores, valid)
    order = scores.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(dim=1) < number[:, None]) & valid


def _shares(importance: Tensor, candidates: Tensor) -> Tensor:
    """`[B, N]`: parts of the sum over candidates."""
    importance = importance.masked_fill(~candidates, 0)
    whole = importance.sum(1, keepdim=True)
    return importance / torch.where(whole > 0, whole, 1)


def _spread(importance: Tensor, candidates: Tensor) -> Tensor:
    """`[B, N]`: candidates from 0 for the least to 1 for the most."""
    least = importance.masked_fill(~candidates, torch.inf).amin(1, keepdim=True)
    most = importance.masked_fill(~candidates, -torch.inf).amax(1, keepdim=True)
    return (importance - least) / (most - least)
