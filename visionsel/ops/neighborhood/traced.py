"""Neighborhood attention for a trace of many map sizes (`torch.export`, `torch.compile` with dynamic sizes).

The tiles are those of `tiled.py`, all with 7 x 7 queries and windows of one size, and positions are
computed by tensors: the number of tiles is the only size that depends on the map, so that one graph serves
every map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.ops.plans import remainder

__all__ = ["traced"]

TILE = 7


def traced(
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
    dh, dw = dilation
    rows, columns = tile_count(height, dh), tile_count(width, dw)
    # one tile too many, a copy of the first: a size that could be 1 would be traced as the constant
    tile = torch.arange(rows * columns * dh * dw + 1, device=query.device)[:, None]
    query_h, key_h, relative_h = axis_tables(
        height,
        kernel_size[0],
        dh,
        remainder(tile // (columns * dw), rows),
        tile // (columns * dw * rows) % dh,
    )
    query_w, key_w, relative_w = axis_tables(
        width, kernel_size[1], dw, remainder(tile, columns), tile // columns % dw
    )

    # flat indices: a reshape of what they gather would be slow to trace
    place = torch.arange(TILE**2, device=query.device)
    seen = torch.arange(key_h.shape[1] * key_w.shape[1], device=query.device)
    row, column = place // TILE, place % TILE
    seen_row, seen_column = seen // key_w.shape[1], seen % key_w.shape[1]
    query = query[:, query_h[:, row], query_w[:, column]]  # [B, tiles, 49, heads, head_dim]
    key = key[:, key_h[:, seen_row], key_w[:, seen_column]]
    value = value[:, key_h[:, seen_row], key_w[:, seen_column]]
    query, key, value = (x.permute(0, 3, 1, 2, 4) for x in (query, key, value))
    if rel_pos_bias is None:
        rel_pos_bias = query.new_zeros(1, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1)
    table = F.pad(rel_pos_bias.to(query.dtype), (0, 1, 0, 1), value=-torch.inf)
    bias = table[:, relative_h[:, row, :, None], relative_w[:, column, None]].flatten(3)
    logits = (query * scale) @ key.transpose(3, 4) + bias
    out = logits.softmax(-1) @ value  # [B, heads, tiles, 49, value_dim]

    y, x = torch.arange(height, device=out.device)[:, None], torch.arange(width, device=out.device)
    tile = ((y % dh * rows + y // dh // TILE) * dw + x % dw) * columns + x // dw // TILE
    out = out[:, :, tile, y // dh % TILE * TILE + x // dw % TILE]
    return out.permute(0, 2, 3, 1, 4).contiguous()  # cutting off padding keeps the layout, tracing it may not


def tile_count(length: int, dilation: int) -> int:
    """Tiles along one axis of the longest grid."""
    return ((length + dilation - 1) // dilation + TILE - 1) // TILE


def axis_tables(
    length: int, kernel_size: int, dilation: int, tile: Tensor, grid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One axis, for tiles and grids `[N, 1]`: positions of queries and of keys, and their relative positions.

    Returns:
        `[N, queries]`, `[N, keys]` and `[N, queries, keys]`, the latter 2K-1 for keys that are not neighbors.
    """
    grid_length = (length - grid + dilation - 1) // dilation
    query = (tile * TILE + torch.arange(TILE, device=tile.device)).minimum(grid_length - 1)
    start = (query - kernel_size // 2).clamp(min=0).minimum(grid_length - kernel_size)
    key = (tile * TILE - kernel_size // 2).clamp(min=0).minimum(grid_length - kernel_size)
    key = key + torch.arange(TILE + kernel_size - 1, device=tile.device)
    offset = key[:, None] - start[:, :, None]
    relative = key[:, None] - query[:, :, None] + kernel_size - 1
    relative = torch.where((offset >= 0) & (offset < kernel_size), relative, 2 * kernel_size - 1)
    return query * dilation + grid, key.minimum(grid_length - 1) * dilation + grid, relative
