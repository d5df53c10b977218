"""Focal modulation on channels-last memory, each level added to the sum as soon as it is known.

The operator's maps are [B, H, W, C]; seen as [B, C, H, W] they already lie in the layout that convolutions
like best, so nothing is transposed; everything between the convolutions runs on contiguous [B, H, W, C].
Where nothing is learnt, each step writes over what it has read: on a CPU fresh memory costs more than the
arithmetic.

Written in the subset that TorchScript compiles.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.ops.checks import has_autocast, learns
from visionsel.ops.compilation import is_watched
from visionsel.ops.depthwise import conv2d


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
    overwrite = False
    if not torch.jit.is_scripting():
        overwrite = _may_overwrite(query, context, gates, modulator_weight, modulator_bias, *kernels)
    # a slice of a fused projection has gaps between its pixels; convolutions would copy it to another layout
    context = context.contiguous()
    gathered: Tensor | None = None
    for level, kernel in enumerate(kernels):
        context = _depthwise(context.permute(0, 3, 1, 2), kernel).permute(0, 2, 3, 1)
        context = torch.ops.aten.gelu_(context) if overwrite else F.gelu(context)
        gathered = _add(gathered, context, gates[..., level : level + 1], overwrite)
    overall = F.gelu(context.mean((1, 2), keepdim=True))
    gathered = _add(gathered, overall, gates[..., -1:], overwrite)
    if normalize:
        gathered = gathered / (len(kernels) + 1)
    modulator = F.conv2d(gathered.permute(0, 3, 1, 2), modulator_weight, modulator_bias).permute(0, 2, 3, 1)
    return modulator.mul_(query) if overwrite else query * modulator


def _depthwise(x: Tensor, kernel: Tensor) -> Tensor:
    """`[B, C, H, W]` by kernels `[C, 1, kh, kw]` with odd sides, to the same size."""
    same = (kernel.shape[2] // 2, kernel.shape[3] // 2)
    if torch.jit.is_scripting():
        out = F.conv2d(x, kernel, padding=same, groups=kernel.shape[0])
    else:
        out = conv2d(x, kernel, padding=same, groups=kernel.shape[0])
    return out


def _add(gathered: Tensor | None, context: Tensor, gate: Tensor, overwrite: bool) -> Tensor:
    """`gathered + context * gate`."""
    if gathered is None:
        return context * gate
    return gathered.addcmul_(context, gate) if overwrite else torch.addcmul(gathered, context, gate)


def _may_overwrite(*tensors: Tensor | None) -> bool:
    """Whether nobody needs what lies between the steps, and all numbers have one dtype."""
    device = tensors[0].device.type if tensors[0] is not None else "cpu"
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not learns(*tensors)
        and not (has_autocast(device) and torch.is_autocast_enabled(device))
        and len({x.dtype for x in tensors if x is not None}) == 1
        and not is_watched()
    )
