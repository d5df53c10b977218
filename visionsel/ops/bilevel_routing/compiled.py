"""Bi-level routing attention by `torch.compile`: cutting into windows and gathering become one copy."""

from typing import Any

from torch import Tensor

from visionsel.ops.bilevel_routing.tiled import tiled
from visionsel.ops.compilation import call_compiled, no_compiler

__all__ = ["compiled", "why_not"]


def compiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_windows: tuple[int, int],
    scale: float,
    index: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """Attend from every window to those that `index` `[B, windows, topk]` names; None means all windows."""
    return call_compiled(tiled, query, key, value, num_windows, scale, index, weight)


def why_not(query: Tensor, *others: Any) -> str | None:
    """Why a call of `compiled` cannot be served; None if it can."""
    return no_compiler(query.device.type)
