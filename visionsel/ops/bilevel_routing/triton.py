"""Bi-level routing attention by fused kernels (CUDA, in Triton): no routed key or value is ever copied.

A program attends from one block of a window's queries to the keys of its routed windows where they lie in
the map, with the softmax computed as they pass by, and keeps the log-sum-exp. The backward of the queries
goes the same way; that of the keys goes over the queries that read a window, by the routing turned round.
There are no atomics, so results repeat bit for bit. Logits, softmax and sums are float32; float32 maps are
multiplied in float32 (no TF32), half-precision maps on the tensor cores.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionsel.ops.bilevel_routing.tiled import tiled
from visionsel.ops.checks import in_autocast_dtype
from visionsel.ops.gpu import interpreted, no_second_derivative, operator, padded, refusal
from visionsel.ops.plans import keep_plans

__all__ = ["triton", "why_not"]

# by bytes of a number and head dim: most rows that a program owns and most that it reads at once, in the
# forward and in the backward; compiled for compute capability 8.0 and 9.0 these spill no or few registers
BLOCKS = {
    2: {64: ((64, 64), (64, 64)), 128: ((64, 32), (32, 32)), 256: ((32, 32), (32, 16))},
    4: {64: ((32, 32), (32, 32)), 128: ((32, 16), (32, 16)), 256: ((16, 16), (16, 16))},
}
# by bytes of a number: accumulated numbers for each warp, and most warps; float32 products need more of them,
# since their operands lie in registers
WARPS = {2: (1024, 8), 4: (256, 4)}


def triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_windows: tuple[int, int],
    scale: float,
    index: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """Attend from every window to those that `index` `[B, windows, topk]` names.

    None means all windows, that is plain attention on the whole map, which torch's own fused kernels serve.
    The values of `index` are not checked: on a GPU, looking at them would wait for the device.
    """
    if index is None:
        return tiled(query, key, value, num_windows, scale, None, None)
    query, key, value = in_autocast_dtype(query, key, value)
    return attend(query, key, value, index, weight, num_windows[0], num_windows[1], scale)[0]


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_windows: tuple[int, int],
    scale: float,
    index: Tensor | None,
    weight: Tensor | None,
) -> str | None:
    """Why the kernels cannot serve a call; None if they can."""
    return refusal(query, value)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    weight: Tensor | None,
    rows: int,
    columns: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The result, and the base-2 log-sum-exp of the logits `[B, heads, H * W]`, its tokens by windows."""
    from visionsel.ops.bilevel_routing import triton_kernels as kernels

    out, lse = empty_results(query, key, value)
    sizes = measure(query, key, index, rows, columns)
    blocks = block_sizes(sizes.tokens, sizes.topk * sizes.keys, query, value, backward=False)
    weights = query if weight is None else weight.contiguous()  # a pointer that is not followed
    tensors = (query, key, value, index.contiguous(), weights, out, lse)
    run(
        kernels.forward,
        sizes.tokens,
        blocks,
        tensors,
        (query, key, value),
        sizes,
        scale,
        WEIGHTED=weight is not None,
    )
    return out, lse


def empty_results(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Where the result and the log-sum-exp go."""
    batch, height, width, heads, _head_dim = query.shape
    out = query.new_empty(batch, height, width, heads, value.shape[4])
    return out, query.new_empty(batch, heads, height * width, dtype=torch.float32)


def gradients(
    needed: Sequence[bool],
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    weight: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rows: int,
    columns: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and weight (float32); empty tensors for those that are not `needed`."""
    from visionsel.ops.bilevel_routing import triton_kernels as kernels

    for_query, for_key, for_value, for_weight = needed
    grad_query, grad_key, grad_value, grad_weight = empty_gradients(needed, grad, query, key, value, index)
    maps = (query, key, value, grad)
    index = index.contiguous()
    weighted = weight is not None
    weights = query if weight is None else weight.contiguous()  # a pointer that is not followed
    delta = torch.empty_like(lse)
    sizes = measure(query, key, index, rows, columns)
    if for_query or for_key or for_weight:
        blocks = block_sizes(sizes.tokens, sizes.topk * sizes.keys, query, value, backward=True)
        parts = grad_weight
        if for_weight:
            count = -(-sizes.tokens // blocks[0])
            parts = lse.new_empty(query.shape[0], sizes.windows, count, sizes.heads, sizes.topk, sizes.keys)
        run(
            kernels.backward_query,
            sizes.tokens,
            blocks,
            (query, key, value, index, weights, out, lse, grad, delta, grad_query, parts),
            maps,
            sizes,
            scale,
            WEIGHTED=weighted,
            FOR_QUERY=for_query,
            FOR_WEIGHT=for_weight,
        )
        if for_weight:
            grad_weight = parts.sum((2, 3, 5))
    if for_key or for_value:
        blocks = block_sizes(sizes.keys, sizes.topk * sizes.tokens, query, value, backward=True)
        places, starts = turned(index, sizes.windows)
        run(
            kernels.backward_key,
            sizes.keys,
            blocks,
            (query, key, value, places, starts, weights, lse, grad, delta, grad_key, grad_value),
            maps,
            sizes,
            scale,
            WEIGHTED=weighted,
            FOR_KEY=for_key,
            FOR_VALUE=for_value,
        )
    return grad_query, grad_key, grad_value, grad_weight


def empty_gradients(
    needed: Sequence[bool], grad: Tensor, query: Tensor, key: Tensor, value: Tensor, index: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the gradients go."""
    for_query, for_key, for_value, for_weight = needed
    return (
        query.new_empty(query.shape if for_query else (0,)),
        key.new_empty(key.shape if for_key else (0,)),
        value.new_empty(value.shape if for_value else (0,)),
        query.new_empty(index.shape if for_weight else (0,), dtype=torch.float32),
    )


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """What the forward leaves for `backward`."""
    *tensors, ctx.rows, ctx.columns, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # the log-sum-exp has no gradient


def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    """Gradients of all that `attend` takes."""
    needed = [ctx.needs_input_grad[place] for place in (0, 1, 2, 4)]
    saved = ctx.saved_tensors  # once: checkpointing gives them a single time
    found = differentiate(needed, grad, *saved, ctx.rows, ctx.columns, ctx.scale)
    query, key, value, weight = (x if wanted else None for x, wanted in zip(found, needed, strict=True))
    if weight is not None:
        weight = weight.to(saved[4].dtype)
    return query, key, value, None, weight, None, None, None


attend = operator("visionsel::bilevel_routing_triton", attention, empty_results, backward, keep)
differentiate = operator(
    "visionsel::bilevel_routing_triton_backward", gradients, empty_gradients, no_second_derivative
)


def turned(index: Tensor, windows: int) -> tuple[Tensor, Tensor]:
    """The routing `[B, windows, topk]` by the windows that it names, without a look at its values.

    Returns:
        The flat places in `index` in the order of what they name, `[B, windows * topk]`, and where those of
        each named window begin, with the end, `[B, windows + 1]`; int64.
    """
    named, places = index.flatten(1).sort(dim=1, stable=True)
    (edges,) = window_edges(index.shape[0], windows, index.device)
    return places, torch.searchsorted(named, edges)


@keep_plans
def window_edges(batch: int, windows: int, device: torch.device) -> tuple[Tensor]:
    """0 to `windows` for each sample, `[B, windows + 1]`."""
    return (torch.arange(windows + 1, device=device).repeat(batch, 1),)


class Sizes(NamedTuple):
    """What the kernels know of a call beside its tensors, in the order of their arguments."""

    heads: int
    windows: int
    columns: int
    topk: int
    query_height: int
    query_width: int
    key_height: int
    key_width: int

    @property
    def tokens(self) -> int:
        """Queries of a window."""
        return self.query_height * self.query_width

    @property
    def keys(self) -> int:
        """Keys of a window."""
        return self.key_height * self.key_width


def measure(query: Tensor, key: Tensor, index: Tensor, rows: int, columns: int) -> Sizes:
    """The sizes of a call."""
    height, width = query.shape[1] // rows, query.shape[2] // columns
    key_height, key_width = key.shape[1] // rows, key.shape[2] // columns
    return Sizes(
        query.shape[3], rows * columns, columns, index.shape[2], height, width, key_height, key_width
    )


def block_sizes(owned: int, read: int, query: Tensor, value: Tensor, backward: bool) -> tuple[int, int]:
    """Rows of a block for a window of `owned` rows and `read` rows that go past it; powers of two from 16."""
    dim = max(64, padded(query.shape[4]), padded(value.shape[4]))
    most_owned, most_read = BLOCKS[query.element_size()][dim][backward]
    return min(padded(owned), most_owned), min(padded(read), most_read)


def run(
    kernel: Any,
    owned: int,
    blocks: tuple[int, int],
    tensors: tuple[Tensor, ...],
    maps: tuple[Tensor, ...],
    sizes: Sizes,
    scale: float,
    **flags: bool,
) -> None:
    """Launch a kernel on windows of `owned` rows; `maps` are the tensors that it reads by their strides."""
    import triton.language as tl

    query, value = maps[0], maps[2]
    operand = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[query.dtype]
    if operand == tl.bfloat16 and interpreted():
        operand = tl.float32  # the interpreter would multiply the bits of bfloat16 as integers
    dims = query.shape[4], value.shape[4]
    # one axis holds more than 65535 programs, the others do not
    programs = query.shape[0] * sizes.heads * sizes.windows * -(-owned // blocks[0])
    each, most = WARPS[query.element_size()]
    warps = min(most, max(1, blocks[0] * max(blocks[1], *map(padded, dims)) // each))
    with torch.cuda.device_of(query):
        kernel[(programs,)](
            *tensors,
            *(stride for x in maps for stride in x.stride()),
            *sizes,
            float(scale),
            HEAD_DIM=dims[0],
            VALUE_DIM=dims[1],
            BLOCK_D=padded(dims[0]),
            BLOCK_V=padded(dims[1]),
            OWNED=blocks[0],
            READ=blocks[1],
            OPERAND=operand,
            num_warps=warps,
            num_stages=2,
            **flags,
        )
