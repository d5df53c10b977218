"""Halo attention on the CPU, some blocks at a time: their windows and logits stay in the cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

import visionsel.ops.chunks as chunks
from visionsel.ops.checks import learns

__all__ = ["attend"]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    factors: Tensor | None,
    spread: Tensor | None,
    scale: float,
) -> Tensor:
    """Softmax attention of the queries of each block to its window.

    Args:
        query: `[N, L, heads, head_dim]`, the queries of a block in a row.
        key: `[pixels, heads * head_dim]`, of all samples.
        value: `[pixels, heads * value_dim]`.
        index: `[N, M]`, int64, the pixels of each window.
        factors: `[N, heads, L, F]`; the logits of relative position are `factors @ spread`. Or None.
        spread: `[F, M]`. Or None.
        scale: factor on the products of queries and keys.

    Returns:
        `[N, L, heads, value_dim]`. Gradients of every order flow to query, key, value and factors.
    """
    count, length, heads, _ = query.shape
    keys = index.shape[1]
    if learns(query, key, value, factors):
        k, v = (_windows(x, index, heads).flatten(0, 1) for x in (key, value))
        factors = None if factors is None else factors.flatten(0, 1)
        q = query.transpose(1, 2).flatten(0, 1)
        out = chunks.attend(q, k, v, scale, factors, None, spread)
        return out.view(count, heads, length, -1).transpose(1, 2)
    out = query.new_empty(count, length, heads, value.shape[1] // heads)
    parts = chunks.slices(count, heads * length * keys)
    room = query.new_empty(parts[0].stop * heads * length, keys)
    rooms = [x.new_empty(parts[0].stop * keys, x.shape[1]) for x in (key, value)]
    for some in parts:
        bias = None
        if factors is not None and spread is not None:
            rows = factors[some].flatten(0, 2)
            bias = torch.mm(rows, spread, out=room[: len(rows)]).view(-1, heads, length, keys)
        k, v = (_windows(x, index[some], heads, into) for x, into in zip((key, value), rooms, strict=True))
        q = query[some].transpose(1, 2)
        out[some] = F.scaled_dot_product_attention(q, k, v, bias, scale=scale).transpose(1, 2)
    return out


def _windows(rows: Tensor, index: Tensor, heads: int, room: Tensor | None = None) -> Tensor:
    """Pixels `[pixels, heads * dim]` at `[N, M]` -> `[N, heads, M, dim]`, in `room` if there is one."""
    out = None if room is None else room[: index.numel()]
    found = torch.index_select(rows, 0, index.flatten(), out=out)
    return found.view(*index.shape, heads, -1).transpose(1, 2)
