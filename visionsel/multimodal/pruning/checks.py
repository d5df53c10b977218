"""What the pruners have in common: how many tokens a `keep` means, the top of scores, checks of arguments."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_keep", "check_layer", "count", "counts", "require_finite", "top", "valid_or_all"]


def check_keep(keep: float | int, name: str = "keep") -> None:
    """Refuse what is neither a ratio nor a number of tokens.

    Raises:
        ValueError: naming what is allowed.
    """
    ratio = isinstance(keep, float) and 0 < keep <= 1
    number = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    if not (ratio or number):
        raise ValueError(f"{name} must be a ratio in (0, 1] or a number of tokens from 1 up, got {keep!r}")


def count(keep: float | int, n: int) -> int:
    """How many of `n` tokens stay: `max(1, round(keep * n))` for a ratio, at most `n`."""
    if n == 0:
        return 0
    return min(keep, n) if isinstance(keep, int) else max(1, round(keep * n))


def counts(keep: float | int, valid: Tensor) -> Tensor:
    """int64 `[B]`: how many tokens of each sample stay, of bool `[B, N]`."""
    check_keep(keep)
    numbers = [count(keep, n) for n in valid.sum(1).tolist()]
    return torch.tensor(numbers, dtype=torch.int64, device=valid.device)


def check_layer(layer: int, layers: int, first: int = 0) -> int:
    """The number of an existing decoder layer.

    Raises:
        ValueError: for another one.
    """
    if isinstance(layer, bool) or not isinstance(layer, int) or not first <= layer < layers:
        raise ValueError(
            f"layer {layer} does not exist: choose one of {first} to {layers - 1} of this decoder"
        )
    return layer


def check_layers(chosen: Sequence[int], layers: int, first: int = 0) -> list[int]:
    """Numbers of existing decoder layers, rising.

    Raises:
        ValueError: for layers that do not exist or do not rise.
    """
    if any(later <= earlier for earlier, later in itertools.pairwise(chosen)):
        raise ValueError(f"layers must rise, got {tuple(chosen)}")
    return [check_layer(layer, layers, first) for layer in chosen]


def valid_or_all(valid: Tensor | None, like: Tensor) -> Tensor:
    """bool `[B, N]`: `valid`, or every token of `like` `[B, N, ...]`."""
    if valid is None:
        return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    if valid.dtype != torch.bool or valid.shape != like.shape[:2]:
        raise ValueError(f"valid must be bool {list(like.shape[:2])}, got {valid.dtype} {list(valid.shape)}")
    return valid


def require_finite(name: str, values: Tensor, valid: Tensor) -> None:
    """Refuse NaN where tokens are; infinities may be scores.

    Args:
        name: of the argument, for the message.
        values: `[B, N, ...]`.
        valid: bool `[B, N]`.

    Raises:
        ValueError: when there is one.
    """
    bad = values.isnan().flatten(2).any(2) if values.ndim > 2 else values.isnan()
    if bool((bad & valid).any()):
        sample = int((bad & valid).any(1).nonzero()[0])
        raise ValueError(
            f"{name} has NaN in sample {sample}: tokens cannot be ranked; look at the model's outputs "
            "(a half-precision overflow?)"
        )


def top(scores: Tensor, number: Tensor, valid: Tensor) -> Tensor:
    """The highest scores of each sample.

    Args:
        scores: `[B, N]`.
        number: int64 `[B]`: how many.
        valid: bool `[B, N]`: which tokens there are.

    Returns:
        bool `[B, N]`; ties go to the lower index.

    Raises:
        ValueError: for NaN at a valid token.
    """
    require_finite("scores", scores, valid)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # valid tokens first, then by falling score; stable sorts keep the order of the index
    order = wide.masked_fill(~valid, -math.inf).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, (~valid).gather(1, order).to(torch.int8).argsort(dim=1, stable=True))
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return (rank < number[:, None]) & valid
