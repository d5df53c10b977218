"""Neighborhood attention as the papers state it: gather all neighbors of every query, attend.

Hassani et al. 2023 (arXiv:2204.07143, eq. 1-3); dilation as in Hassani & Shi 2022 (arXiv:2209.15001, eq. 1).
"""

import torch
from torch import Tensor

__all__ = ["neighbors", "reference"]


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    rel_pos_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend from each position of `[B, H, W, heads, head_dim]` to its kernel of neighbors."""
    height, width = query.shape[1:3]
    rows, bias_rows = neighbors(height, kernel_size[0], dilation[0], query.device)
    columns, bias_columns = neighbors(width, kernel_size[1], dilation[1], query.device)
    index = (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2)  # [H, W, Kh * Kw]
    key = key.flatten(1, 2)[:, index]  # [B, H, W, Kh * Kw, heads, head_dim]
    value = value.flatten(1, 2)[:, index]
    logits = torch.einsum("bhwnd,bhwknd->bhwnk", query * scale, key)
    if rel_pos_bias is not None:
        bias = rel_pos_bias[:, bias_rows[:, None, :, None], bias_columns[None, :, None, :]].flatten(3)
        logits = logits + bias.permute(1, 2, 0, 3).to(logits.dtype)
    return torch.einsum("bhwnk,bhwknd->bhwnd", logits.softmax(-1), value)


def neighbors(length: int, kernel_size: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the neighbors along one axis, and the rows of the bias table that belong to them.

    Positions of one remainder modulo the dilation form a grid of their own. The window is centred on the
    query and moved inside that grid at the borders; it never shrinks.

    Returns:
        Two int64 tensors `[length, kernel_size]`.
    """
    position = torch.arange(length, device=device)
    grid = position % dilation
    grid_length = (length - grid + dilation - 1) // dilation
    start = (position // dilation - kernel_size // 2).clamp(min=0).minimum(grid_length - kernel_size)
    window = start[:, None] + torch.arange(kernel_size, device=device)
    bias_index = window - (position // dilation)[:, None] + kernel_size - 1
    return window * dilation + grid[:, None], bias_index
