"""Halo attention by `torch.compile`: cutting windows and adding up relative logits become one loop each."""

from typing import Any

from torch import Tensor

from visionsel.ops.compilation import call_compiled, no_compiler
from visionsel.ops.halo.tiled import tiled

__all__ = ["compiled", "why_not"]


def compiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    rel_pos_height: Tensor | None,
    rel_pos_width: Tensor | None,
    scale: float,
) -> Tensor:
    """See `halo_attention`; `stride` is the side of k's map divided by that of q's."""
    return call_compiled(tiled, q, k, v, block_size, halo_size, stride, rel_pos_height, rel_pos_width, scale)


def why_not(q: Tensor, *others: Any) -> str | None:
    """Why a call of `compiled` cannot be served; None if it can."""
    return no_compiler(q.device.type)
