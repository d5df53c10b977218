"""Focal modulation as the paper writes it: the truth that other backends are compared with."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    query: Tensor,
    context: Tensor,
    gates: Tensor,
    kernels: list[Tensor],
    modulator_weight: Tensor,
    modulator_bias: Tensor | None,
    normalize: bool,
) -> Tensor:
    """See `focal_modulation`."""
    query, context, gates = (x.permute(0, 3, 1, 2) for x in (query, context, gates))
    levels = []
    for kernel in kernels:
        same = (kernel.shape[2] // 2, kernel.shape[3] // 2)
        context = F.gelu(F.conv2d(context, kernel, padding=same, groups=context.shape[1]))
        levels.append(context)
    levels.append(F.gelu(context.mean((2, 3), keepdim=True)))
    gathered = torch.zeros_like(query)
    for i, level in enumerate(levels):
        gathered = gathered + gates[:, i : i + 1] * level
    if normalize:
        gathered = gathered / len(levels)
    modulator = F.conv2d(gathered, modulator_weight, modulator_bias)
    return (query * modulator).permute(0, 2, 3, 1)
