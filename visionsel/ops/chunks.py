"""Attention within many groups of tokens on the CPU, with gradients, in chunks that stay in the cache.

Each step of the plain way (product, bias, softmax, product, and the same again backward) writes the logits of
all groups into memory that the system hands out anew, and reads what has left the cache meanwhile, which
takes longer than the arithmetic. Here some groups at a time go through all steps, and of their logits nothing
is kept but the softmax.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.ops.compilation import is_watched

__all__ = ["attend", "differentiable", "logit_gradients", "plain", "serves", "slices"]

_NUMBERS = 2**18  # logits of a chunk, for each thread: a megabyte in float32


def serves(query: Tensor, numbers: int) -> bool:
    """Whether this pays for so many logits in all and can be done: eager, on the CPU, in 32 or 64 bits."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and numbers > 2 * _NUMBERS * torch.get_num_threads()
        and type(query) in (Tensor, nn.Parameter)
        and query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and not is_watched()
    )


def slices(groups: int, numbers: int) -> list[slice]:
    """Groups to take together, each with so many logits; the first slice is as long as any."""
    step = max(1, _NUMBERS * torch.get_num_threads() // max(1, numbers))
    parts = -(-groups // step)
    stops = [-(-groups * n // max(1, parts)) for n in range(parts + 1)]
    return [slice(*both) for both in pairwise(stops)]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    spread: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each group, with the logits `scale * query @ key.T + bias`.

    Args:
        query: `[groups, N, head_dim]`.
        key: `[groups, M, head_dim]`, or with `rows` `[tokens, head_dim]`.
        value: `[groups, M, value_dim]`, or with `rows` `[tokens, value_dim]`.
        scale: factor on the products.
        bias: what is added to the logits: a table `[rows, N, M]` with `index`, or factors `[groups, N, F]`
            with `spread`.
        index: `[groups]`, int64, the row of the table for each group.
        spread: `[F, M]`, by which factors become a bias, `factors @ spread`; it gets no gradient.
        rows: `[groups, M]`, int64, the tokens that each group attends to; they are gathered chunk by chunk.

    Returns:
        `[groups, N, value_dim]`. Gradients of every order flow to query, key, value and bias.

    Raises:
        ValueError: for a bias without `index` or `spread`, or with both.
    """
    if bias is not None:
        if (index is None) == (spread is None):
            raise ValueError("a bias is a table, with index, or factors, with spread: pass one of the two")
        bias = bias.contiguous()
    out: Tensor = _Attend.apply(
        query.contiguous(), key.contiguous(), value.contiguous(), bias, index, spread, rows, scale
    )
    return out


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    spread: Tensor | None,
    rows: Tensor | None,
    scale: float,
) -> Tensor:
    """What `attend` computes, in the plainest code."""
    if rows is not None:
        key, value = key[rows], value[rows]
    logits = scale * query @ key.transpose(1, 2)
    if bias is not None and index is not None:
        logits = logits + bias[index]
    elif bias is not None and spread is not None:
        logits = logits + bias @ spread
    return logits.softmax(-1) @ value


def logit_gradients(grad: Tensor, out: Tensor, value: Tensor, weight: Tensor, room: Tensor) -> Tensor:
    """Gradients of the logits of some groups, in `room`, from that of `out = weight @ value`.

    The softmax's backward: of each logit its weight, times the weight's gradient less the mean of its row.
    """
    logits = torch.bmm(grad, value.transpose(1, 2), out=room[: len(weight)])
    return logits.sub_((grad * out).sum(-1, keepdim=True)).mul_(weight)


def differentiable(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of the `needed` inputs of a plain function, which have gradients themselves."""
    aliases = [x if x is None else x.view_as(x) for x in inputs]  # one tensor may come twice
    learnt = [x for x, need in zip(aliases, needed, strict=True) if need and x is not None]
    found = iter(torch.autograd.grad(function(*aliases), learnt, grad, create_graph=True))
    return [next(found) if need else None for need in needed]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        index: Tensor | None,
        spread: Tensor | None,
        rows: Tensor | None,
        scale: float,
    ) -> Tensor:
        groups, length, _ = query.shape
        attention = query.new_empty(groups, length, (key if rows is None else rows).shape[1])
        out = query.new_empty(groups, length, value.shape[-1])
        parts = slices(groups, attention[:1].numel())
        rooms = [_room(x, rows, parts) for x in (key, value)]
        for some in parts:
            logits = attention[some]
            if bias is not None and index is not None:
                torch.index_select(bias, 0, index[some], out=logits)
            elif bias is not None and spread is not None:
                torch.mm(bias[some].flatten(0, 1), spread, out=logits.view(-1, spread.shape[1]))
            k, v = (_some(x, rows, some, room) for x, room in zip((key, value), rooms, strict=True))
            beta = 0 if bias is None else 1
            torch.baddbmm(logits, query[some], k.transpose(1, 2), beta=beta, alpha=scale, out=logits)
            torch.softmax(logits, -1, out=logits)
            torch.bmm(logits, v, out=out[some])
        ctx.save_for_backward(query, key, value, bias, index, spread, rows, attention, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, index, spread, rows, attention, out = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            again = partial(plain, index=index, spread=spread, rows=rows, scale=ctx.scale)
            return *differentiable(again, (query, key, value, bias), needed, grad), None, None, None, None
        grad = grad.contiguous()
        grad_query, grad_key, grad_value, grad_bias = (
            torch.empty_like(x) if need else None
            for x, need in zip((query, key, value, bias), needed, strict=True)
        )
        if grad_bias is not None and index is not None:
            grad_bias.zero_()
        if rows is not None:
            for added in (grad_key, grad_value):
                if added is not None:
                    added.zero_()
        parts = slices(len(attention), attention[:1].numel())
        room = torch.empty_like(attention[parts[0]]) if parts else attention
        rooms = [_room(x, rows, parts) for x in (key, value)]
        for some in parts:
            weight, g, q = attention[some], grad[some], query[some]
            k, v = (_some(x, rows, some, room) for x, room in zip((key, value), rooms, strict=True))
            logits = logit_gradients(g, out[some], v, weight, room)
            if grad_value is not None:  # now that the weights are in the cache
                _put(grad_value, rows, some, weight.transpose(1, 2), g, 1.0, rooms[1])
            if grad_query is not None:
                torch.baddbmm(q, logits, k, beta=0, alpha=ctx.scale, out=grad_query[some])
            if grad_key is not None:
                _put(grad_key, rows, some, logits.transpose(1, 2), q, ctx.scale, rooms[0])
            if grad_bias is not None and index is not None:
                grad_bias.index_add_(0, index[some], logits)
            elif grad_bias is not None and spread is not None:
                torch.mm(logits.flatten(0, 1), spread.T, out=grad_bias[some].view(-1, len(spread)))
        return grad_query, grad_key, grad_value, grad_bias, None, None, None, None


def _room(x: Tensor, rows: Tensor | None, parts: Sequence[slice]) -> Tensor:
    """Memory for what a part gathers, `[tokens, dim]`; it stays in the cache from one part to the next."""
    return x if rows is None or not parts else x.new_empty(parts[0].stop * rows.shape[1], x.shape[1])


def _some(x: Tensor, rows: Tensor | None, some: slice, room: Tensor) -> Tensor:
    """Keys or values of some groups, `[some, M, dim]`."""
    if rows is None:
        return x[some]
    index = rows[some].flatten()
    return torch.index_select(x, 0, index, out=room[: len(index)]).view(-1, rows.shape[1], x.shape[1])


def _put(
    grad: Tensor,
    rows: Tensor | None,
    some: slice,
    left: Tensor,
    right: Tensor,
    scale: float,
    room: Tensor,
) -> None:
    """Write `scale * left @ right` into the gradient of keys or values, or add it to what is gathered."""
    if rows is None:
        torch.baddbmm(grad[some], left, right, beta=0, alpha=scale, out=grad[some])
        return
    index = rows[some].flatten()
    product = room[: len(index)].view(*left.shape[:2], -1)
    torch.baddbmm(product, left, right, beta=0, alpha=scale, out=product)
    grad.index_add_(0, index, product.flatten(0, 1))
