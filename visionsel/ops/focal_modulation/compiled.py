"""Focal modulation by `torch.compile`: what lies between two convolutions becomes one loop.

On the CPU the compiler changes the layout of maps around its loops, which costs more than these save: there
`tiled` is the faster one.
"""

from typing import Any

from torch import Tensor

from visionsel.ops.compilation import call_compiled, no_compiler
from visionsel.ops.focal_modulation.tiled import tiled

__all__ = ["compiled", "why_not"]


def compiled(
    query: Tensor,
    context: Tensor,
    gates: Tensor,
    kernels: list[Tensor],
    modulator_weight: Tensor,
    modulator_bias: Tensor | None,
    normalize: bool,
) -> Tensor:
    """See `focal_modulation`."""
    return call_compiled(tiled, query, context, gates, kernels, modulator_weight, modulator_bias, normalize)


def why_not(query: Tensor, *others: Any) -> str | None:
    """Why a call of `compiled` cannot be served; None if it can."""
    return no_compiler(query.device.type)
