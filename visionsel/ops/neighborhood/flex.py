"""Neighborhood attention by torch's flex_attention (Dong et al. 2024, arXiv:2412.05496).

flex_attention compiles one kernel from a mask, a change of the logits and the list of blocks that are not
masked as a whole. A block here is a tile of 8 x 8 positions of one grid, the positions of one remainder
modulo the dilation; tiles stand one behind another, grid by grid. A tile of queries visits the tiles that
hold its neighbors; inside of them the mask keeps the neighbors, and the bias is read from its table.

Every new shape is compiled, which takes seconds. On the CPU torch has the forward kernel alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from visionsel.ops.checks import in_autocast_dtype, learns
from visionsel.ops.compilation import call_compiled, sizes_are_fixed
from visionsel.ops.flexible import attention, ordered, refusal, refuse_uncompiled
from visionsel.ops.plans import keep_plans

__all__ = ["attend", "build_plan", "flex", "why_not"]

TILE = 8
BLOCK = TILE * TILE  # tokens; the kernels need a multiple of 16


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    rel_pos_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend from each position of `[B, H, W, heads, head_dim]` to its kernel of neighbors.

    Inside torch.compile this joins the graph that is compiled; otherwise it is compiled here.

    Raises:
        RuntimeError: if torch.compile is switched off, or where a tracer other than it looks on.
    """
    query, key, value = in_autocast_dtype(query, key, value)
    if not torch.is_grad_enabled():  # on the CPU flex_attention refuses tensors that ask for a gradient
        query, key, value = query.detach(), key.detach(), value.detach()
        rel_pos_bias = None if rel_pos_bias is None else rel_pos_bias.detach()
    plan = kept_plan(query.shape[1], query.shape[2], kernel_size, dilation, query.device)
    return call_compiled(fused, query, key, value, kernel_size, dilation, rel_pos_bias, scale, plan)


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    rel_pos_bias: Tensor | None,
    scale: float,
) -> str | None:
    """Why flex_attention cannot serve a call; None if it can."""
    if not sizes_are_fixed(query):
        return "its blocks are laid out for a map of fixed size, and torch.compile keeps this one's symbolic"
    return refusal(query, value, learns(query, key, value, rel_pos_bias))


def fused(*call: Any) -> Tensor:
    """`attend`, but never uncompiled."""
    refuse_uncompiled()
    return attend(*call)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    rel_pos_bias: Tensor | None,
    scale: float,
    plan: tuple[Tensor, ...],
) -> Tensor:
    """What is compiled; `plan` is that of `build_plan`."""
    height, width = size = query.shape[1], query.shape[2]
    rows, columns = tile_counts(size, dilation)
    tokens = dilation[0] * dilation[1] * rows * columns * BLOCK
    mask = BlockMask(
        seq_lengths=(tokens, tokens),
        kv_num_blocks=plan[0],
        kv_indices=plan[1],
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=plan[2],
        q_indices=plan[3],
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=neighbors_only(size, kernel_size, dilation),
    )
    score_mod = None
    if rel_pos_bias is not None:
        score_mod = with_bias(rel_pos_bias, size, kernel_size, dilation)
    query, key, value = (to_tiles(x, dilation) for x in (query, key, value))
    out = attention(query, key, value, scale, (BLOCK, BLOCK), score_mod, mask)
    batch, heads, _, value_dim = value.shape
    out = out.reshape(batch, heads, *dilation, rows, columns, TILE, TILE, value_dim)
    out = out.permute(0, 4, 6, 2, 5, 7, 3, 1, 8)
    out = out.reshape(batch, rows * TILE * dilation[0], columns * TILE * dilation[1], heads, value_dim)
    return out[:, :height, :width]


def tile_counts(size: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    """Tiles of the longest grid, per column and per row."""
    reach = TILE * dilation[0], TILE * dilation[1]
    return (size[0] + reach[0] - 1) // reach[0], (size[1] + reach[1] - 1) // reach[1]


def to_tiles(x: Tensor, dilation: tuple[int, int]) -> Tensor:
    """`[B, H, W, heads, head_dim]` -> `[B, heads, grids * tiles * 64, head_dim]`, padded with zeros."""
    batch, height, width, heads, head_dim = x.shape
    dh, dw = dilation
    rows, columns = tile_counts((height, width), dilation)
    x = F.pad(x, (0, 0, 0, 0, 0, columns * TILE * dw - width, 0, rows * TILE * dh - height))
    x = x.reshape(batch, rows, TILE, dh, columns, TILE, dw, heads, head_dim)
    x = x.permute(0, 7, 3, 6, 1, 4, 2, 5, 8)
    return x.reshape(batch, heads, dh * dw * rows * columns * BLOCK, head_dim)


def neighbors_only(
    size: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask of tokens in the order of `to_tiles`; padding attends as the last position before it."""

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_grid, *query_place = place(query, size, dilation)
        key_grid, *key_place = place(key, size, dilation)
        kept = query_grid == key_grid
        grids = query_grid // dilation[1], query_grid % dilation[1]
        axes = zip(query_place, key_place, grids, size, kernel_size, dilation, strict=True)
        for position, neighbor, grid, length, neighbors, step in axes:
            start = window_start(position, grid, length, neighbors, step)
            kept = kept & (neighbor >= start) & (neighbor < start + neighbors)
        return kept

    return mask_mod


def with_bias(
    table: Tensor, size: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The logits and, of the table `[heads, 2 * Kh - 1, 2 * Kw - 1]`, the entry of key minus query."""

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        _, query_row, query_column = place(query, size, dilation)
        _, key_row, key_column = place(key, size, dilation)
        row = table_index(key_row - query_row, kernel_size[0])
        column = table_index(key_column - query_column, kernel_size[1])
        return score + table[head, row, column].to(score.dtype)

    return score_mod


def table_index(offset: Tensor, kernel_size: int) -> Tensor:
    """Row of the bias table of an offset; what no kernel reaches is masked, but read before."""
    return offset.clamp(1 - kernel_size, kernel_size - 1) + kernel_size - 1


def place(token: Tensor, size: tuple[int, int], dilation: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Number of a token's grid, and its row and column in that grid."""
    rows, columns = tile_counts(size, dilation)
    tile, inner = token // BLOCK, token % BLOCK
    grid, tile = tile // (rows * columns), tile % (rows * columns)
    return grid, tile // columns * TILE + inner // TILE, tile % columns * TILE + inner % TILE


def window_start(position: Tensor, grid: Tensor, length: int, kernel_size: int, dilation: int) -> Tensor:
    """First neighbor of a position, all along one axis of a grid; the window is moved, never cut."""
    grid_length = (length + dilation - 1 - grid) // dilation
    start = position.minimum(grid_length - 1) - kernel_size // 2
    return start.clamp(min=0).minimum(grid_length - kernel_size)


def build_plan(
    height: int,
    width: int,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which blocks visit which.

    Returns:
        For each block of queries the number `[1, 1, blocks]` and, first, the indices
        `[1, 1, blocks, blocks]` of the blocks of keys that it visits; for each block of keys the same of the
        queries that visit it. All int32.
    """
    rows = visited_tiles(height, kernel_size[0], dilation[0], device)
    columns = visited_tiles(width, kernel_size[1], dilation[1], device)
    grids, tiles = dilation[0] * dilation[1], rows.shape[1] * columns.shape[1]
    visited = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    own = torch.eye(grids, dtype=torch.bool, device=device)
    blocks = visited.reshape(grids, tiles, 1, tiles) & own[:, None, :, None]
    blocks = blocks.reshape(1, 1, grids * tiles, grids * tiles)
    return *ordered(blocks), *ordered(blocks.transpose(2, 3))


kept_plan = keep_plans(build_plan)


def visited_tiles(length: int, kernel_size: int, dilation: int, device: torch.device) -> Tensor:
    """Along one axis, which tiles hold neighbors of a tile's queries: bool `[grids, tiles, tiles]`."""
    tiles = (length + TILE * dilation - 1) // (TILE * dilation)
    grid = torch.arange(dilation, device=device)[:, None]
    first = torch.arange(tiles, device=device) * TILE
    start = window_start(first, grid, length, kernel_size, dilation)[:, :, None]
    end = window_start(first + TILE - 1, grid, length, kernel_size, dilation)[:, :, None] + kernel_size
    return (first < end) & (first + TILE > start)
