"""Routed attention on the CPU, some windows at a time: what is gathered for them stays in the cache.

To gather for all windows at once is to copy every key as often as it is routed, into memory that the system
hands out anew. Nothing gathered and no logits are kept here: the backward gathers and computes them again.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.ops.checks import learns
from visionsel.ops.chunks import differentiable, logit_gradients, slices

__all__ = ["attend", "plain"]


def attend(query: Tensor, key: Tensor, value: Tensor, index: Tensor, scale: float) -> Tensor:
    """Softmax attention of the queries of each window to the tokens of the windows routed to it.

    Args:
        query: `[windows, tokens, head_dim]`; samples and heads have windows of their own.
        key: `[windows, keys * head_dim]`, the tokens of a window in one row.
        value: `[windows, keys * value_dim]`.
        index: `[windows, topk]`, int64, rows of key and value.
        scale: factor on the logits.

    Returns:
        `[windows, tokens, value_dim]`. Gradients of every order flow to query, key and value.
    """
    if learns(query, key, value):
        out: Tensor = _Attend.apply(query, key, value, index, scale)
        return out
    out = query.new_empty(*query.shape[:2], _value_dim(query, key, value))
    # the fused kernel keeps no logits
    parts = slices(len(query), (query.shape[2] + out.shape[2]) * _keys(query, key, index))
    rooms = [_room_of_rows(x, index, parts) for x in (key, value)]
    for some in parts:
        k = _gather(key, index[some], query.shape[2], rooms[0])
        v = _gather(value, index[some], out.shape[2], rooms[1])
        out[some] = F.scaled_dot_product_attention(query[None, some], k[None], v[None], scale=scale)[0]
    return out


def plain(query: Tensor, key: Tensor, value: Tensor, index: Tensor, scale: float) -> Tensor:
    """What `attend` computes, in the plainest code."""
    keys, values = _gather(key, index, query.shape[2]), _gather(value, index, _value_dim(query, key, value))
    return (scale * query @ keys.transpose(1, 2)).softmax(-1) @ values


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, index: Tensor, scale: float) -> Tensor:
        out = query.new_empty(*query.shape[:2], _value_dim(query, key, value))
        parts = _parts(query, key, index)
        room = _room(query, key, index, parts)
        rooms = [_room_of_rows(x, index, parts) for x in (key, value)]
        for some in parts:
            k = _gather(key, index[some], query.shape[2], rooms[0])
            weight = _weights(query[some], k, scale, room)
            torch.bmm(weight, _gather(value, index[some], out.shape[2], rooms[1]), out=out[some])
        ctx.save_for_backward(query, key, value, index, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, index, out = ctx.saved_tensors
        scale, needed = ctx.scale, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            again = partial(plain, index=index, scale=scale)
            return *differentiable(again, (query, key, value), needed, grad), None, None
        grad = grad.contiguous()
        grad_query = torch.empty_like(query) if needed[0] else None
        grad_key, grad_value = (
            torch.zeros_like(x) if need else None for x, need in zip((key, value), needed[1:], strict=True)
        )
        parts = _parts(query, key, index)
        room, more = (_room(query, key, index, parts) for _ in range(2))
        rooms = [_room_of_rows(x, index, parts) for x in (key, value)]
        for some in parts:
            q, g, rows = query[some], grad[some], index[some]
            k = _gather(key, rows, q.shape[2], rooms[0])
            v = _gather(value, rows, g.shape[2], rooms[1])
            weight = _weights(q, k, scale, room)
            logits = logit_gradients(g, out[some], v, weight, more).mul_(scale)
            # what a product adds takes the place of what was gathered and has served
            if grad_value is not None:
                _add(grad_value, rows, torch.bmm(weight.transpose(1, 2), g, out=v))
            if grad_query is not None:
                torch.bmm(logits, k, out=grad_query[some])
            if grad_key is not None:
                _add(grad_key, rows, torch.bmm(logits.transpose(1, 2), q, out=k))
        return grad_query, grad_key, grad_value, None, None


def _value_dim(query: Tensor, key: Tensor, value: Tensor) -> int:
    return value.shape[1] * query.shape[2] // key.shape[1]


def _gather(rows: Tensor, index: Tensor, dim: int, room: Tensor | None = None) -> Tensor:
    """Rows `[windows, keys * dim]` that each of `[some, topk]` names -> `[some, topk * keys, dim]`."""
    flat = index.flatten()
    out = None if room is None else room[: len(flat)]
    return torch.index_select(rows, 0, flat, out=out).view(len(index), -1, dim)


def _add(rows: Tensor, index: Tensor, product: Tensor) -> None:
    """The backward of `_gather`: add `[some, topk * keys, dim]` to the rows."""
    rows.index_add_(0, index.flatten(), product.view(index.numel(), -1))


def _weights(query: Tensor, key: Tensor, scale: float, room: Tensor) -> Tensor:
    """The softmax `[some, tokens, keys]`, in `room`."""
    logits = room[: len(query)]
    torch.baddbmm(logits, query, key.transpose(1, 2), beta=0, alpha=scale, out=logits)
    return torch.softmax(logits, -1, out=logits)


def _parts(query: Tensor, key: Tensor, index: Tensor) -> list[slice]:
    """Windows that are taken together, by the numbers of their logits and keys."""
    windows, tokens, head_dim = query.shape
    return slices(windows, (tokens + head_dim) * _keys(query, key, index))


def _room(query: Tensor, key: Tensor, index: Tensor, parts: list[slice]) -> Tensor:
    """Memory for the logits of a part."""
    return query.new_empty(parts[0].stop, query.shape[1], _keys(query, key, index))


def _room_of_rows(rows: Tensor, index: Tensor, parts: list[slice]) -> Tensor:
    """Memory for the rows that a part gathers; it stays in the cache from one part to the next."""
    return rows.new_empty(parts[0].stop * index.shape[1], rows.shape[1])


def _keys(query: Tensor, key: Tensor, index: Tensor) -> int:
    """Keys that a window attends to."""
    return index.shape[1] * key.shape[1] // query.shape[2]
