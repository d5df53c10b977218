"""Neighborhood attention with its projections (Hassani et al. 2023, arXiv:2204.07143; dilated:
arXiv:2209.15001).

Names of parameters are those of the authors' `NeighborhoodAttention2D` in NATTEN 0.14.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module, trunc_normal_
from torch import Tensor, nn

from visionsel.ops.checks import pair
from visionsel.ops.compilation import sizes_are_fixed
from visionsel.ops.neighborhood import neighborhood_attention
from visionsel.ops.neighborhood.tiled import tiled

__all__ = ["NeighborhoodAttention"]


@register_notrace_module
class NeighborhoodAttention(nn.Module):
    """Each position attends to the kernel of positions around it.

    Maps smaller than kernel_size x dilation are padded with zeros at the right and bottom before the
    projection, so that padding takes part as keys and values, as in the authors' module.

    Args:
        dim: channels in and out.
        num_heads: attention heads; divides dim.
        kernel_size: neighbors per side, odd, or (per column, per row).
        dilation: distance between neighbors.
        qkv_bias: bias of the projection to queries, keys and values.
        scale: factor on the logits; default head_dim**-0.5.
        rel_pos_bias: learn a bias `rpb` `[heads, 2 * Kh - 1, 2 * Kw - 1]` on the logits.
        proj_drop: dropout after the output projection.
        backend: of the operator.
        device, dtype: of the parameters.

    Raises:
        ValueError: for heads that do not divide dim, and even kernels.

    Examples:
        >>> import torch
        >>> from visionsel.layers import NeighborhoodAttention
        >>> layer = NeighborhoodAttention(dim=32, num_heads=2, kernel_size=7, dilation=2)
        >>> layer(torch.randn(1, 20, 23, 32)).shape
        torch.Size([1, 20, 23, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, int] = 7,
        dilation: int | tuple[int, int] = 1,
        qkv_bias: bool = True,
        scale: float | None = None,
        rel_pos_bias: bool = True,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"num_heads {num_heads} must divide dim {dim}")
        kh, kw = pair(kernel_size, "kernel_size")
        if kh % 2 == 0 or kw % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}; 7 is the authors' choice")
        self.dim = dim
        self.num_heads = num_heads
        self.kernel_size = (kh, kw)
        self.dilation = pair(dilation, "dilation")
        self.scale = (dim // num_heads) ** -0.5 if scale is None else float(scale)
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.register_parameter("rpb", None)
        if rel_pos_bias:
            self.rpb = nn.Parameter(
                torch.empty(num_heads, 2 * kh - 1, 2 * kw - 1, device=device, dtype=dtype)
            )
            trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` -> `[B, H, W, dim]`."""
        height, width = x.shape[1], x.shape[2]
        least_h, least_w = self.kernel_size[0] * self.dilation[0], self.kernel_size[1] * self.dilation[1]
        x = pad_to(x, least_h, least_w)
        qkv = self.qkv(x).unflatten(3, (3, self.num_heads, self.dim // self.num_heads))
        query, key, value = qkv.unbind(3)
        if torch.jit.is_scripting():
            out = tiled(query, key, value, self.kernel_size, self.dilation, self.rpb, self.scale)
        else:
            out = neighborhood_attention(
                query, key, value, self.kernel_size, self.dilation, self.rpb, self.scale, self.backend
            )
        return self.proj_drop(self.proj(crop_to(out, height, width).flatten(3)))

    def extra_repr(self) -> str:
        """What the representation shows beside the submodules."""
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """`[B, H, W, C]` with zeros at the bottom and right, at least of the given size."""
    if torch.jit.is_scripting():
        return F.pad(x, [0, 0, 0, max(width - x.shape[2], 0), 0, max(height - x.shape[1], 0)])
    else:
        fixed = sizes_are_fixed(x)
        if fixed and x.shape[1] >= height and x.shape[2] >= width:
            return x
        larger: Any = max if fixed else torch.sym_max  # a symbol stays one
        below, beside = larger(height, x.shape[1]) - x.shape[1], larger(width, x.shape[2]) - x.shape[2]
        return F.pad(x, (0, 0, 0, beside, 0, below))


def crop_to(x: Tensor, height: int, width: int) -> Tensor:
    """Undo `pad_to` on `[B, H, W, heads, head_dim]`."""
    if torch.jit.is_scripting():
        return x[:, :height, :width]
    else:  # whether a slice is contiguous depends on its size, and a trace that asks fixes the answer
        if sizes_are_fixed(x):
            return x[:, :height, :width]
        return F.pad(x, (0, 0, 0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))
