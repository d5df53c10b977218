"""Focal modulation on channels-last memory, each level added to the sum as soon as it is known.

The operator's maps are [B, H, W, C]; seen as [B, C, H, W] they already lie in the layout that convolutions
like best, so nothing is transposed; everything between the convolutions runs on contiguous [B, H, W, C].

Written in the subset that TorchScript compiles.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def tiled(
    query: Tensor,
    context: Tensor,
    gates: Tensor,
    kernels: list[Tensor],
    modulator_weight: Tensor,
    modulator_bias: Tensor | None,
    normalize: bool,
) -> Tensor:
    """See `focal_modulation`."""
    # a slice of a fused projection has gaps between its pixels; convolutions would copy it to another layout
    context = context.contiguous()
    gathered: Tensor | None = None
    for level, kernel in enumerate(kernels):
        same = (kernel.shape[2] // 2, kernel.shape[3] // 2)
        context = F.conv2d(context.permute(0, 3, 1, 2), kernel, padding=same, groups=kernel.shape[0])
        context = F.gelu(context.permute(0, 2, 3, 1))
        gate = gates[..., level : level + 1]
        gathered = context * gate if gathered is None else torch.addcmul(gathered, context, gate)
    overall = F.gelu(context.mean((1, 2), keepdim=True))
    gate = gates[..., -1:]
    gathered = overall * gate if gathered is None else torch.addcmul(gathered, overall, gate)
    if normalize:
        gathered = gathered / (len(kernels) + 1)
    modulator = F.conv2d(gathered.permute(0, 3, 1, 2), modulator_weight, modulator_bias)
    return query * modulator.permute(0, 2, 3, 1)
