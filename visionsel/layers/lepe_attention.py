"""Full attention with a locally enhanced position encoding: the last stage of BiFormer (Zhu et al. 2023).

The encoding is a depthwise convolution added to the attention's output. The authors' first code convolves the
layer's input, their refactored code (`models/biformer_stl_nchw.py`) the values.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from visionsel.layers.convolution import Conv2d

__all__ = ["AttentionLePE"]


@register_notrace_module
class AttentionLePE(nn.Module):
    """Every token of the map attends to all.

    Args:
        dim: channels in and out.
        num_heads: attention heads; 8 in every released model, whatever its width.
        qkv_bias: the released models have none.
        scale: factor on the logits; default head_dim**-0.5.
        side_dwconv: kernel size of the depthwise convolution; 0 for none.
        lepe_of_value: convolve the values, not the input.
        device, dtype: of the parameters.

    Raises:
        ValueError: for heads that do not divide the channels, or an even kernel.

    Examples:
        >>> import torch
        >>> from visionsel.layers.lepe_attention import AttentionLePE
        >>> AttentionLePE(dim=32)(torch.randn(1, 7, 7, 32)).shape
        torch.Size([1, 7, 7, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        scale: float | None = None,
        side_dwconv: int = 5,
        lepe_of_value: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError(f"num_heads {num_heads} must divide dim {dim}")
        if side_dwconv < 0 or (side_dwconv > 0 and side_dwconv % 2 == 0):
            raise ValueError(f"side_dwconv must be odd, or 0 for none; got {side_dwconv}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.side_dwconv = side_dwconv
        self.lepe_of_value = lepe_of_value
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.lepe = (
            Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim, **dd)
            if side_dwconv > 0
            else nn.Identity()
        )
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` -> `[B, H, W, dim]`."""
        batch, height, width, dim = x.shape
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        heads = (batch, height * width, self.num_heads, dim // self.num_heads)
        out = F.scaled_dot_product_attention(
            query.reshape(heads).transpose(1, 2),
            key.reshape(heads).transpose(1, 2),
            value.reshape(heads).transpose(1, 2),
            scale=self.scale,
        )
        out = out.transpose(1, 2).reshape(batch, height, width, dim)
        if self.side_dwconv > 0:
            local = value if self.lepe_of_value else x
            out = out + self.lepe(local.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(out)
