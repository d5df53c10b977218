"""Neighborhood attention by tiles of queries that share one window of keys.

Positions of one remainder modulo the dilation never see the others, so each such grid is attended by
itself, as if it were a sample. A grid is cut into tiles; a tile attends to the smallest window, moved
inside the grid, that holds the neighbors of all its queries, and keys that are not a query's neighbors get
the logit -inf. A side of at most 14 is not cut; a grid as large as the kernel is plain attention.

The tables of logits come from those of single axes: `relative[query, key]` is the row of the bias table, or
the one behind its end, which holds -inf, for keys that are not neighbors. Most tiles of a map are of one
kind, and their tables are computed once (`visionsel.ops.neighborhood.tables`). Where nothing is learnt on the
CPU, the tiles of a kind share theirs (`visionsel.ops.neighborhood.by_kind`); in training many tiles are taken
some at a time (`visionsel.ops.chunks`).

Everything here is in the TorchScript subset, since scripted layers call it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import visionsel.ops.chunks as chunks
from visionsel.ops.neighborhood.by_kind import by_kind, serves
from visionsel.ops.neighborhood.tables import axis_tables, kind_tables, tile_sizes
from visionsel.ops.plans import keep_plans

__all__ = ["tiled"]


def tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    rel_pos_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend from each position of `[B, H, W, heads, head_dim]` to its kernel of neighbors."""
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves out the branch in this form only)
        if serves(query, key, value, rel_pos_bias):
            return by_kind(query, key, value, kernel_size, dilation, rel_pos_bias, scale)
    batch, height, width, heads, head_dim = query.shape
    value_dim = value.shape[4]
    kh, kw = kernel_size
    dh, dw = dilation
    nh, th, rows = tile_sizes(height, dh)
    nw, tw, columns = tile_sizes(width, dw)
    # grids of one size share their tables and can stand in the batch; otherwise they stand beside the tiles
    alike = height % dh == 0 and width % dw == 0
    gh, gw = (1, 1) if alike else dilation

    query = pad_to(query, rows * th * dh, columns * tw * dw)
    query = query.reshape(batch, rows, th, dh, columns, tw, dw, heads, head_dim)
    if alike:
        query = query.permute(0, 3, 6, 7, 1, 4, 2, 5, 8)
    else:
        query = query.permute(0, 7, 3, 6, 1, 4, 2, 5, 8)
    samples = batch * (dh // gh) * (dw // gw)
    tiles = gh * gw * rows * columns
    query = query.reshape(samples, heads, tiles, th * tw, head_dim)

    if torch.jit.is_scripting():
        windows, relative_rows, relative_columns, kinds = build_plan(
            height, width, kernel_size, dilation, (gh, gw), query.device
        )
    else:
        windows, relative_rows, relative_columns, kinds = kept_plan(
            height, width, kernel_size, dilation, (gh, gw), query.device
        )
    key = grid_rows(key, dilation, (nh, nw), alike)
    value = grid_rows(value, dilation, (nh, nw), alike)
    index: Tensor | None = None
    if rows > 1 or columns > 1:
        # rows of one long list: on the CPU the backward is some times as fast as along a second axis
        first = torch.arange(samples * heads * gh * gw, device=windows.device)[:, None] * (nh * nw)
        index = (first + windows).flatten()

    bias: Tensor | None = None
    if rel_pos_bias is not None:
        bias = kind_tables(rel_pos_bias.to(query.dtype), relative_rows, relative_columns)
    elif not (nh == kh and nw == kw and alike):
        table = torch.zeros(1, 2 * kh - 1, 2 * kw - 1, dtype=query.dtype, device=query.device)
        bias = kind_tables(table, relative_rows, relative_columns)
    keys = windows.shape[0] // (rows * columns)
    out = attend(query, key, value, keys, index, bias, kinds, scale)

    if alike:
        out = out.view(batch, dh, dw, heads, rows, columns, th, tw, value_dim)
        out = out.permute(0, 4, 6, 1, 5, 7, 2, 3, 8)
    else:
        out = out.view(batch, heads, dh, dw, rows, columns, th, tw, value_dim)
        out = out.permute(0, 4, 6, 2, 5, 7, 3, 1, 8)
    out = out.reshape(batch, rows * th * dh, columns * tw * dw, heads, value_dim)
    return out[:, :height, :width]


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """`[B, H, W, heads, head_dim]` with zeros at the bottom and right."""
    if x.shape[1] == height and x.shape[2] == width:
        return x
    return F.pad(x, [0, 0, 0, 0, 0, width - x.shape[2], 0, height - x.shape[1]])


def grid_rows(x: Tensor, dilation: tuple[int, int], size: tuple[int, int], alike: bool) -> Tensor:
    """Tokens grid by grid: `[B, H, W, heads, head_dim]` -> `[B * heads * grids * tokens, head_dim]`."""
    batch, _, _, heads, head_dim = x.shape
    dh, dw = dilation
    nh, nw = size
    x = pad_to(x, nh * dh, nw * dw).reshape(batch, nh, dh, nw, dw, heads, head_dim)
    x = x.permute(0, 2, 4, 5, 1, 3, 6) if alike else x.permute(0, 5, 2, 4, 1, 3, 6)
    return x.reshape(batch * heads * dh * dw * nh * nw, head_dim)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: int,
    index: Tensor | None,
    bias: Tensor | None,
    kinds: Tensor,
    scale: float,
) -> Tensor:
    """Softmax attention of tiles of queries to their windows.

    Args:
        query: `[B, heads, tiles, N, head_dim]`.
        key: `[tokens, head_dim]`.
        value: `[tokens, value_dim]`.
        keys: of the window of each tile.
        index: `[B * heads * tiles * keys]`, the tokens of each tile's window; None for all tokens in order.
        bias: `[heads or 1, kinds of tiles, queries, keys]`, or None.
        kinds: of each tile `[tiles]`.
        scale: factor on the products.

    Returns:
        `[B, heads, tiles, N, value_dim]`.
    """
    samples, heads, tiles, length, head_dim = query.shape
    value_dim = value.shape[1]
    training = torch.is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (bias is not None and bias.requires_grad)
    )
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves out the branch in this form only)
        if training and chunks.serves(query, query.shape[:4].numel() * keys):
            return attend_in_chunks(query, key, value, index, bias, kinds, scale)
    if index is not None:
        key, value = key.index_select(0, index), value.index_select(0, index)
    key = key.view(samples, heads, tiles, keys, head_dim)
    value = value.view(samples, heads, tiles, keys, value_dim)
    if bias is not None and kinds.shape[0] > 1:
        bias = bias.index_select(1, kinds)
    # on CPU the fused kernel is slower than matrix products in backward and in bfloat16
    if query.device.type == "cpu" and (training or query.dtype not in (torch.float32, torch.float64)):
        logits = (query * scale) @ key.transpose(3, 4)
        if bias is not None:
            logits.add_(bias.unsqueeze(0))
        return logits.softmax(-1) @ value
    # the fused kernels repeat a bias along the first axis only
    shared = bias is not None and bias.shape[0] == 1
    first, last = (0, 1) if shared else (1, 2)
    if bias is not None:
        bias = bias if shared else bias.flatten(0, 1).unsqueeze(0)
    out = F.scaled_dot_product_attention(
        query.flatten(first, last), key.flatten(first, last), value.flatten(first, last), bias, scale=scale
    )
    return out.view(samples, heads, tiles, length, value_dim)


def attend_in_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    bias: Tensor | None,
    kinds: Tensor,
    scale: float,
) -> Tensor:
    """See `attend`."""
    samples, heads, tiles, length, _ = query.shape
    kind: Tensor | None = None
    if bias is not None:
        first = torch.arange(heads, device=kinds.device)[:, None] * bias.shape[1]
        kind = (kinds + (first if bias.shape[0] > 1 else 0 * first)).repeat(samples, 1).flatten()
        bias = bias.flatten(0, 1)
    q = query.flatten(0, 2)
    if index is None:
        key, value = (x.view(len(q), -1, x.shape[1]) for x in (key, value))
    else:
        index = index.view(len(q), -1)
    out = chunks.attend(q, key, value, scale, bias, kind, rows=index)
    return out.view(samples, heads, tiles, length, value.shape[-1])


def build_plan(
    height: int,
    width: int,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    grids: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index tables of a map.

    Returns:
        The windows `[tiles of a grid * keys]` as positions in a grid; the relative positions of queries and
        keys along each axis `[kinds, queries, keys]`; the kind of each tile `[grids * tiles of a grid]`.
    """
    key_h, rows, kind_h = axis_tables(height, kernel_size[0], dilation[0], grids[0], device)
    key_w, columns, kind_w = axis_tables(width, kernel_size[1], dilation[1], grids[1], device)
    windows = key_h[:, None, :, None] * ((width + dilation[1] - 1) // dilation[1]) + key_w[:, None, :]
    kinds = kind_h[:, None, :, None] * columns.shape[0] + kind_w[:, None, :]
    return windows.flatten(), rows, columns, kinds.flatten()


kept_plan = keep_plans(build_plan)
