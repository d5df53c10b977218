"""Halo attention as a layer (Vaswani et al. 2021, arXiv:2103.12731), its parameters those of timm.

What differs: maps of any size are accepted. timm refuses those that the blocks do not divide.
"""

import torch
import torch.nn.functional as F
from timm.layers import make_divisible, register_notrace_module, trunc_normal_
from torch import Tensor, nn

from visionsel.ops.halo import halo_attention
from visionsel.ops.halo.tiled import tiled

__all__ = ["HaloAttention"]


class RelativeTables(nn.Module):
    """The two tables of relative positions, `[2 * window - 1, head_dim]` each."""

    def __init__(
        self,
        window: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim, device=device, dtype=dtype))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, head_dim, device=device, dtype=dtype))


@register_notrace_module
class HaloAttention(nn.Module):
    """Blocked local attention with halos, optionally downsampling.

    A map that the blocks do not divide is padded with zeros at the right and the bottom before the
    projections, and the result is cropped; like the halo outside the image, the padding takes part in the
    softmax.

    Args:
        dim: channels in.
        dim_out: channels out, `num_heads` times the head_dim of the values; None means `dim`.
        num_heads: attention heads.
        dim_head: head_dim of queries and keys; None means `dim_out * qk_ratio` over the heads.
        block_size: side of a block of the input map (8 in HaloNet H0 to H2, H6).
        halo_size: rows and columns of keys added around a block (3 in HaloNet H0 to H3, H7).
        stride: downsampling by strided queries, or by average pooling after the attention where the stride
            does not divide `block_size`.
        qk_ratio: width of queries and keys over `dim_out`, where `dim_head` is None.
        qkv_bias: biases of the projections.
        avg_down: average pooling in place of strided queries.
        scale_pos_embed: scale the relative logits as well.
        backend: of `visionsel.ops.halo_attention`.
        device, dtype: of the parameters.

    Raises:
        ValueError: if the heads do not divide `dim_out`, or a number is not positive.

    Examples:
        >>> import torch
        >>> from visionsel.layers import HaloAttention
        >>> layer = HaloAttention(dim=32, num_heads=2, block_size=8, halo_size=3, stride=2)
        >>> layer(torch.randn(1, 32, 20, 23)).shape
        torch.Size([1, 32, 10, 12])
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        *,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        stride: int = 1,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim_out = dim if dim_out is None else dim_out
        if dim_out % num_heads:
            raise ValueError(f"num_heads must divide dim_out, got {num_heads} heads and dim_out {dim_out}")
        if dim_head is None:
            dim_head = make_divisible(dim_out * qk_ratio, divisor=8) // num_heads
        for name, value, least in (
            ("dim_head", dim_head, 1),
            ("block_size", block_size, 1),
            ("halo_size", halo_size, 0),
            ("stride", stride, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.num_heads = num_heads
        self.dim_head_qk = dim_head
        self.dim_head_v = dim_out // num_heads
        self.block_size = block_size
        self.halo_size = halo_size
        self.stride = stride
        self.query_stride = 1 if avg_down or block_size % stride else stride
        self.scale = dim_head**-0.5
        self.scale_pos_embed = scale_pos_embed
        self.backend = backend
        self.q = nn.Conv2d(
            dim, num_heads * dim_head, 1, stride=self.query_stride, bias=qkv_bias, device=device, dtype=dtype
        )
        self.kv = nn.Conv2d(
            dim, num_heads * (dim_head + self.dim_head_v), 1, bias=qkv_bias, device=device, dtype=dtype
        )
        self.pos_embed = RelativeTables(block_size + 2 * halo_size, dim_head, device=device, dtype=dtype)
        self.pool: nn.Module = nn.Identity()
        if self.query_stride != stride:
            # partial windows average what they hold, so that no padding dims the border of odd maps
            self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as timm does: projections by fan-in, tables by the attention's scale."""
        std = self.q.in_channels**-0.5
        for projection in (self.q, self.kv):
            trunc_normal_(projection.weight, std=std)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        trunc_normal_(self.pos_embed.height_rel, std=self.scale)
        trunc_normal_(self.pos_embed.width_rel, std=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, dim, H, W]` -> `[B, dim_out, ceil(H / stride), ceil(W / stride)]`."""
        batch, _, height, width = x.shape
        block = self.block_size
        padded_height = (height + block - 1) // block * block
        padded_width = (width + block - 1) // block * block
        pads = True
        if torch.jit.is_scripting() or not torch.compiler.is_compiling():  # a compiler's sizes may be symbols
            pads = padded_height > height or padded_width > width
        if pads:
            x = F.pad(x, (0, padded_width - width, 0, padded_height - height))
        # one change of layout here saves those of queries, keys and values below
        x = x.contiguous(memory_format=torch.channels_last)
        step = self.query_stride
        query = self.q(x).permute(0, 2, 3, 1)
        query = query.reshape(
            batch, padded_height // step, padded_width // step, self.num_heads, self.dim_head_qk
        )
        kv = self.kv(x).permute(0, 2, 3, 1)
        kv = kv.reshape(
            batch, padded_height, padded_width, self.num_heads, self.dim_head_qk + self.dim_head_v
        )
        key, value = kv[..., : self.dim_head_qk], kv[..., self.dim_head_qk :]
        height_rel, width_rel = self.pos_embed.height_rel, self.pos_embed.width_rel
        if self.scale_pos_embed:
            height_rel, width_rel = height_rel * self.scale, width_rel * self.scale
        if torch.jit.is_scripting():
            out = tiled(query, key, value, block, self.halo_size, step, height_rel, width_rel, self.scale)
        else:
            out = halo_attention(
                query,
                key,
                value,
                block,
                self.halo_size,
                rel_pos_height=height_rel,
                rel_pos_width=width_rel,
                scale=self.scale,
                backend=self.backend,
            )
        out = out.flatten(3)
        if pads:
            rows, columns = (height + step - 1) // step, (width + step - 1) // step
            out = F.pad(out, (0, 0, 0, columns - out.shape[2], 0, rows - out.shape[1]))
        return self.pool(out.permute(0, 3, 1, 2))
