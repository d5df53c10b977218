"""Neighborhood attention of tiles in the order of their kinds, without gradients, on the CPU.

What `tiled` computes. There each tile gets a table of logits of its own, which for large maps is more memory
than all else, and all tiles have windows of one size. Here tiles of one kind stand together and share one
table, which stays in the cache of the processor, and those at the ends of a map have smaller windows. Tokens
are gathered with all their heads in one row, some tiles at a time, and the fused kernel takes them as they
lie. A backward through that would add up slices, so training is left to `tiled`.

`torch.compile` would write the tables as loops that find each logit's place anew, which take several times as
long as the attention. It is shown one operator instead, `opaque`; exported programs get the plain form.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.ops.checks import learns
from visionsel.ops.compilation import is_exporting, is_transformed
from visionsel.ops.neighborhood.tables import axis_tables, tile_sizes
from visionsel.ops.plans import keep_plans

__all__ = ["by_kind", "opaque", "serves", "serves_compiled"]

_NUMBERS = 2**19  # keys that are gathered at a time: two megabytes, which stay in the cache


def serves(query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None) -> bool:
    """Whether a call is one of these: eager, on the CPU, in single or double precision, nothing learnt."""
    return (
        _suits(query, key, value, rel_pos_bias)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def serves_compiled(query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None) -> bool:
    """Whether a compiler looks on at such a call and may find an operator of this package in it."""
    return (
        torch.compiler.is_compiling()
        and not is_exporting()
        and not torch.is_autocast_enabled("cpu")  # it is off while compiled code runs
        and _suits(query, key, value, rel_pos_bias)
        and not is_transformed()
    )


def _suits(query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None) -> bool:
    return (
        type(query) is Tensor  # a plan of fake tensors has no numbers
        and query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and not learns(query, key, value, rel_pos_bias)
    )


def by_kind(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    rel_pos_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """See `neighborhood_attention`; maps `[B, H, W, heads, head_dim]`."""
    batch, height, width, heads, head_dim = query.shape
    if batch == 0:
        return torch.empty_like(value)
    queries, places, *kinds = kept_plan(height, width, kernel_size, dilation, query.device)
    # a grid that is one tile of the whole map lies in order already
    whole = len(queries) == 1 and dilation == (1, 1)
    table: Tensor | None = None
    if rel_pos_bias is not None:
        table = rel_pos_bias.to(query.dtype)
    elif (dilation[0] * kernel_size[0], dilation[1] * kernel_size[1]) != (height, width):
        table = query.new_zeros(1, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1)
    if table is not None:
        # the row and the column behind the end are for keys that are not neighbors
        table = F.pad(table, [0, 1, 0, 1], value=-float("inf")).transpose(1, 2).contiguous()

    query, key, value = (x.flatten(1, 2) if whole else _rows(x) for x in (query, key, value))
    outs, stop = [], 0
    for keys, mask in zip(kinds[::3], _masks(table, kinds), strict=True):
        step = max(1, _NUMBERS // (batch * keys.shape[1] * heads * head_dim))
        start, stop = stop, stop + len(keys)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            indices = queries[first:last], *[keys[first - start : last - start]] * 2
            q, k, v = (
                (x if whole else _gather(x, index, batch, height * width, heads)).transpose(1, 2)
                for x, index in zip((query, key, value), indices, strict=True)
            )
            outs.append(F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    if not whole:
        tile, local = places
        sample = torch.arange(batch, device=tile.device)[:, None]
        row = (tile * batch + sample) * queries.shape[1] + local
        out = out.reshape(-1, heads * out.shape[3]).index_select(0, row.flatten())
    return out.reshape(batch, height, width, heads, -1)


def _masks(table: Tensor | None, kinds: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """What is added to the logits of each kind.

    Args:
        table: of biases `[heads or 1, across, down]`, or None.
        kinds: of the plan.

    Yields:
        `[1, heads or 1, queries, keys]`, or None.
    """
    columns = across = None
    for keys, own, lines in zip(kinds[::3], kinds[1::3], kinds[2::3], strict=True):
        if table is None:
            yield None
            continue
        if across is None or own is not columns:  # kinds of the same columns follow each other
            columns = own
            # both selections copy whole rows
            across = table.index_select(1, columns.flatten()).transpose(1, 2)
            across = across.reshape(len(table), -1, columns.shape[1])
        yield across.index_select(1, lines).view(1, len(table), -1, keys.shape[1])


@torch.library.custom_op("visionsel::neighborhood_by_kind", mutates_args=())
def opaque(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    rel_pos_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """`by_kind` as one operator; maps `[B, H, W, heads, head_dim]` of any size. Its backward raises."""
    (kh, kw), (dh, dw) = kernel_size, dilation
    return by_kind(query, key, value, (kh, kw), (dh, dw), rel_pos_bias, scale).contiguous()


@opaque.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(*query.shape[:4], value.shape[4])


def _rows(x: Tensor) -> Tensor:
    """`[B, H, W, heads, head_dim]` -> a row a pixel."""
    batch, height, width, heads, head_dim = x.shape
    return x.reshape(batch * height * width, heads * head_dim)


def _gather(rows: Tensor, index: Tensor, batch: int, pixels: int, heads: int) -> Tensor:
    """Pixels `[tiles, N]` of maps of so many -> `[tiles * B, N, heads, head_dim]`."""
    if batch > 1:
        index = index[:, None] + torch.arange(batch, device=index.device)[:, None] * pixels
    return rows.index_select(0, index.flatten()).view(-1, index.shape[-1], heads, rows.shape[1] // heads)


def build_plan(
    height: int, width: int, kernel_size: tuple[int, int], dilation: tuple[int, int], device: torch.device
) -> tuple[Tensor, ...]:
    """What lies where, with tiles in the order of their kinds.

    Returns:
        The pixels of the queries `[tiles, queries]`; where each pixel of the map is among them, tile and
        place `[2, H * W]`. Then, three for each kind: the pixels of the keys `[tiles of the kind, keys]`; the
        columns of the bias table for queries and keys `[queries across, keys across]`; the row of the table
        and the query's column for all `[queries * keys down]`, as one number (see `_masks`).
    """
    sizes = tuple(zip((height, width), kernel_size, dilation, strict=True))
    tiles = [tile_sizes(length, step)[1] for length, _, step in sizes]
    if dilation != (1, 1) or (height, width) != (tiles[0], tiles[1]):
        # tokens have to be gathered anyway
        tiles = [_halved(*size, tile) for size, tile in zip(sizes, tiles, strict=True)]
    down, right = (_axis(*size, tile, device) for size, tile in zip(sizes, tiles, strict=True))
    queries, insides, kinds = [], [], []
    for tiles_w, window_w, columns in right.kinds:
        for tiles_h, window_h, rows in down.kinds:
            query_h, query_w = down.query[tiles_h][:, None, :, None], right.query[tiles_w][:, None, :]
            # what lies behind the end is dropped
            insides.append(((query_h < height) & (query_w < width)).flatten(2).flatten(0, 1))
            query_h, query_w = query_h.clamp(max=height - 1), query_w.clamp(max=width - 1)
            queries.append((query_h * width + query_w).flatten(2).flatten(0, 1))
            key_h, key_w = down.key[tiles_h, window_h], right.key[tiles_w, window_w]
            keys = key_h[:, None, :, None] * width + key_w[:, None, :]
            lines = rows[:, None] * len(columns) + torch.arange(len(columns), device=device)[:, None]
            kinds += [keys.flatten(2).flatten(0, 1), columns, lines.flatten()]
    order = torch.cat(queries)
    tile, local = torch.cat(insides).nonzero(as_tuple=True)
    places = order.new_empty(2, height * width)
    places[:, order[tile, local]] = torch.stack([tile, local])
    return order, places, *kinds


class _Axis(NamedTuple):
    """Places of queries and keys `[grids * tiles, N]`; of each kind its tiles, keys and table."""

    query: Tensor
    key: Tensor
    kinds: list[tuple[Tensor, slice, Tensor]]


def _axis(length: int, kernel_size: int, dilation: int, tile: int, device: torch.device) -> _Axis:
    longest = -(-length // dilation)
    tiles = -(-longest // tile)
    grids = torch.arange(dilation, device=device)[:, None, None]
    key, relative, kind = axis_tables(length, kernel_size, dilation, dilation, device, tile)
    query = torch.arange(tiles * tile, device=device).view(1, tiles, tile)
    # what lies behind the end is masked
    query, key = query * dilation + grids, (key * dilation + grids).clamp(max=length - 1)
    kinds = []
    for number, table in enumerate(relative):
        seen = (table < 2 * kernel_size - 1).any(0).nonzero()
        window = slice(int(seen[0]), int(seen[-1]) + 1)  # at the ends of the map it is shorter
        kinds.append(((kind.flatten() == number).nonzero()[:, 0], window, table[:, window]))
    return _Axis(query.flatten(0, 1), key.flatten(0, 1), kinds)


def _halved(length: int, kernel_size: int, dilation: int, tile: int) -> int:
    """Half of a tile of a whole grid, if queries of halves have to do with much fewer keys."""
    longest = -(-length // dilation)
    half = -(-longest // 2)
    with_halves = 2 * half * min(half + kernel_size // 2, longest)
    return half if tile == longest and with_halves <= 0.75 * longest**2 else tile


kept_plan = keep_plans(build_plan)
