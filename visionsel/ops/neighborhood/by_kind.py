"""Neighborhood attention of tiles in the order of their kinds, without gradients, on the CPU.

What `tiled` computes, by the same tiles and tables. There each tile gets a table of logits of its own, which
for large maps is more memory than all else. Here tiles of one kind stand together and share one table, which
stays in the cache of the processor; tokens are gathered with all their heads in one row, some tiles at a
time, and the fused kernel takes them as they lie. A backward through that would add up slices, so training is
left to `tiled`.

`torch.compile` would write the tables as loops that find each logit's place anew, which take several times as
long as the attention. It is shown one operator instead, `opaque`; exported programs get the plain form.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.ops.checks import learns
from visionsel.ops.compilation import is_exporting, is_transformed
from visionsel.ops.neighborhood.tables import axis_tables, kind_tables, tile_sizes
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
    queries, keys, places, rows, columns, numbers = kept_plan(
        height, width, kernel_size, dilation, query.device
    )
    tables: Tensor | None = None
    if rel_pos_bias is not None:
        tables = kind_tables(rel_pos_bias.to(query.dtype), rows, columns)
    elif (dilation[0] * kernel_size[0], dilation[1] * kernel_size[1]) != (height, width):
        zeros = query.new_zeros(1, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1)
        tables = kind_tables(zeros, rows, columns)

    # a grid that is one tile of the whole map lies in order already
    whole = len(queries) == 1 and dilation == (1, 1)
    query, key, value = (x.flatten(1, 2) if whole else _rows(x) for x in (query, key, value))
    step = max(1, _NUMBERS // (batch * keys.shape[1] * heads * head_dim))
    outs, stop = [], 0
    for kind, number in enumerate(numbers.tolist()):
        mask = None if tables is None else tables[None, :, kind]
        start, stop = stop, stop + number
        for first in range(start, stop, step):
            some = slice(first, min(first + step, stop))
            q, k, v = (
                (x if whole else _gather(x, index[some], batch, height * width, heads)).transpose(1, 2)
                for x, index in ((query, queries), (key, keys), (value, keys))
            )
            outs.append(F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    if not whole:
        tile, local = places
        sample = torch.arange(batch, device=tile.device)[:, None]
        row = (tile * batch + sample) * queries.shape[1] + local
        out = out.reshape(-1, heads * out.shape[3]).index_select(0, row.flatten())
    return out.reshape(batch, height, width, heads, -1)


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
        The pixels of the queries `[tiles, queries]` and keys `[tiles, keys]`; where each pixel of the map is
        among the queries, tile and place `[2, H * W]`; the relative positions of queries and keys along each
        axis `[kinds, queries, keys]`; how many tiles are of each kind.
    """
    axes = [
        _axis(length, size, step, device)
        for length, size, step in zip((height, width), kernel_size, dilation, strict=True)
    ]
    (query_h, key_h, rows, kind_h), (query_w, key_w, columns, kind_w) = axes
    kinds = (kind_h[:, None] * len(columns) + kind_w).flatten()  # of all tiles: those of the height first
    order = kinds.argsort(stable=True)

    def by_tile(x: Tensor) -> Tensor:  # [tiles down, tiles right, down, right]
        return x.flatten(2).flatten(0, 1)[order]

    inside = by_tile((query_h < height)[:, None, :, None] & (query_w < width)[:, None])
    query_h, query_w, key_h, key_w = (
        x.clamp(max=length - 1)  # what lies behind the end is masked, or dropped
        for x, length in ((query_h, height), (query_w, width), (key_h, height), (key_w, width))
    )
    queries = by_tile(query_h[:, None, :, None] * width + query_w[:, None])
    keys = by_tile(key_h[:, None, :, None] * width + key_w[:, None])
    places = queries.new_empty(2, height * width)
    tile, local = inside.nonzero(as_tuple=True)
    places[:, queries[tile, local]] = torch.stack([tile, local])
    numbers = kinds.bincount(minlength=len(rows) * len(columns))
    return queries, keys, places, rows, columns, numbers


def _axis(
    length: int, kernel_size: int, dilation: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One axis: places of queries and keys `[grids * tiles, N]`, relative positions, kinds of tiles."""
    _, tile, tiles = tile_sizes(length, dilation)
    grids = torch.arange(dilation, device=device)[:, None, None]
    key, relative, kind = axis_tables(length, kernel_size, dilation, dilation, device)
    query = torch.arange(tiles * tile, device=device).view(1, tiles, tile)
    query, key = query * dilation + grids, key * dilation + grids
    return query.flatten(0, 1), key.flatten(0, 1), relative, kind.flatten()


kept_plan = keep_plans(build_plan)
