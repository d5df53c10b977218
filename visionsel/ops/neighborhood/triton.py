"""Neighborhood attention by fused kernels (CUDA, in Triton), with the relative position bias.

A program attends from a tile of queries to the keys that some of them see, where they lie in the map: no
neighbors are gathered, and no logits leave the chip. The forward keeps log2 of the softmax's sums; the
backward computes the logits again, for the queries in the same way, for the keys from the queries that see
them, for the bias block by block. There are no atomics, so results repeat bit for bit. Logits, softmax and
sums are float32; float32 maps are multiplied in float32 (no TF32), half-precision maps on tensor cores.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from visionsel.ops.checks import in_autocast_dtype
from visionsel.ops.gpu import interpreted, no_second_derivative, operator, padded, power_of_two, refusal
from visionsel.ops.neighborhood.rectangles import kept_plan

__all__ = ["triton", "why_not"]

LOG2E = 1.4426950408889634

# by bytes of an element and padded head dim: positions of a tile and of a block, warps, stages
FORWARD = {
    (2, 16): (16, 32, 1, 2),
    (2, 32): (16, 32, 1, 2),
    (2, 64): (16, 32, 1, 2),
    (2, 128): (64, 32, 4, 2),
    (2, 256): (64, 32, 8, 1),
    (4, 16): (64, 32, 4, 2),
    (4, 32): (32, 32, 4, 2),
    (4, 64): (32, 32, 4, 2),
    (4, 128): (32, 16, 4, 1),
}
BACKWARD = {
    (2, 16): (16, 32, 1, 2),
    (2, 32): (16, 32, 1, 2),
    (2, 64): (16, 32, 1, 2),
    (2, 128): (64, 32, 8, 1),
    (2, 256): (32, 32, 8, 1),
    (4, 16): (64, 32, 4, 1),
    (4, 32): (32, 32, 4, 1),
    (4, 64): (32, 16, 4, 1),
    (4, 128): (16, 16, 4, 1),
}
# likewise, how many numbers of what is added to the logits a thread keeps: more would be moved to memory
KEPT = {(2, 16): 96, (2, 32): 96, (2, 64): 96}
# programs of a call, some waves of the largest GPUs; more of them share the work less well among tiles
PROGRAMS = 2048


def triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    rel_pos_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend from each position of `[B, H, W, heads, head_dim]` to its kernel of neighbors.

    Maps may have any strides. Autocast casts them, but not the bias. It has no second derivatives.
    """
    query, key, value = in_autocast_dtype(query, key, value)
    return attend(query, key, value, rel_pos_bias, list(kernel_size), list(dilation), float(scale))[0]


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    rel_pos_bias: Tensor | None,
    scale: float,
) -> str | None:
    """Why the kernels cannot serve a call; None if they can."""
    return refusal(query, value, most=128 if query.dtype == torch.float32 else 256)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The result, and log2 of the sums of its softmax `[B, H, W, heads]`."""
    from visionsel.ops.neighborhood import triton_kernels as kernels

    out, lse = empty_results(query, key, value)
    plan, options = arrange(FORWARD, query, value, kernel_size, dilation)
    with torch.cuda.device_of(query):
        kernels.forward[(len(plan[1]) * query.shape[3],)](
            query,
            key,
            value,
            None if bias is None else bias.contiguous(),
            out,
            lse,
            *plan,
            query.stride(),
            key.stride(),
            value.stride(),
            tuple(query.shape[1:4]),
            tuple(dilation),
            scale * LOG2E,
            BIASED=bias is not None,
            **options,
        )
    return out, lse


def empty_results(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Where the result and the sums go."""
    out = query.new_empty(*query.shape[:4], value.shape[4])
    return out, query.new_empty(query.shape[:4], dtype=torch.float32)


def gradients(
    needed: Sequence[bool],
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias (float32); empty tensors for those that are not `needed`."""
    from visionsel.ops.neighborhood import triton_kernels as kernels

    for_query, for_key, for_value, for_bias = needed
    grad_query, grad_key, grad_value, grad_bias = empty_gradients(needed, grad, query, key, value, bias)
    grad = grad.contiguous()
    delta = torch.empty_like(lse)  # of each query: its result times the gradient of that
    tensors = (query, key, value, None if bias is None else bias.contiguous(), grad, lse, delta)
    strides = (query.stride(), key.stride(), value.stride(), grad.stride())
    numbers = (tuple(query.shape[1:4]), tuple(dilation), scale * LOG2E)
    heads, biased = query.shape[3], bias is not None
    with torch.cuda.device_of(query):
        block = padded(value.shape[4])
        rows = 4096 // block
        kernels.row_products[(-(-lse.numel() // rows),)](
            out, grad, delta, lse.numel(), DIM=value.shape[4], BLOCK_D=block, ROWS=rows
        )
        if for_query:
            plan, options = arrange(BACKWARD, query, value, kernel_size, dilation)
            kernels.query_gradient[(len(plan[1]) * heads,)](
                *tensors, grad_query, *plan, *strides, *numbers, scale, BIASED=biased, **options
            )
        if for_key or for_value:
            plan, options = arrange(BACKWARD, query, value, kernel_size, dilation, of_keys=True)
            kernels.key_gradient[(len(plan[1]) * heads,)](
                *tensors,
                grad_key,
                grad_value,
                *plan,
                *strides,
                *numbers,
                scale,
                BIASED=biased,
                FOR_KEY=for_key,
                FOR_VALUE=for_value,
                **options,
            )
        if for_bias:
            plan, options = arrange(BACKWARD, query, value, kernel_size, dilation, by_block=True)
            del options["KEPT"]
            parts = lse.new_zeros(len(plan[1]) * options["SHAPE"][5], *grad_bias.shape)
            kernels.table_gradient[(parts.shape[0] * heads,)](
                *tensors, parts, *plan, *strides, *numbers, **options
            )
            grad_bias = parts.sum(0)
    return grad_query, grad_key, grad_value, grad_bias


def empty_gradients(
    needed: Sequence[bool],
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the gradients go."""
    for_query, for_key, for_value, for_bias = needed
    return (
        query.new_empty(query.shape if for_query else (0,)),
        key.new_empty(key.shape if for_key else (0,)),
        value.new_empty(value.shape if for_value else (0,)),
        query.new_empty(bias.shape if bias is not None and for_bias else (0,), dtype=torch.float32),
    )


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """What the forward leaves for `backward`."""
    *tensors, ctx.kernel_size, ctx.dilation, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # the sums have no gradient


def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    """Gradients of all that `attend` takes."""
    needed = list(ctx.needs_input_grad[:4])
    saved = ctx.saved_tensors  # once: checkpointing gives them a single time
    found = differentiate(needed, grad, *saved, ctx.kernel_size, ctx.dilation, ctx.scale)
    query, key, value, bias = (x if wanted else None for x, wanted in zip(found, needed, strict=True))
    if bias is not None:
        bias = bias.to(saved[3].dtype)
    return query, key, value, bias, None, None, None


attend = operator("visionsel::neighborhood_triton", attention, empty_results, backward, keep)
differentiate = operator(
    "visionsel::neighborhood_triton_backward", gradients, empty_gradients, no_second_derivative
)


def arrange(
    sizes: Mapping[tuple[int, int], tuple[int, int, int, int]],
    query: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    of_keys: bool = False,
    by_block: bool = False,
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """What the programs of a kernel do, and what it is compiled for.

    Args:
        sizes: FORWARD or BACKWARD.
        query, value: maps `[B, H, W, heads, head_dim]`.
        kernel_size, dilation: of the neighborhoods.
        of_keys: whether tiles are of keys.
        by_block: whether each block of a rectangle has programs of its own.

    Returns:
        The tables of `rectangles.build_plan`, and arguments by name.
    """
    batch, height, width, heads, head_dim = query.shape
    dims = head_dim, value.shape[4], padded(head_dim), padded(value.shape[4])
    sort = query.element_size(), max(dims[2:])
    positions, block, warps, stages = sizes[sort]
    tile = tile_sides((height, width), dilation, positions)
    (kh, kw), (dh, dw) = kernel_size, dilation
    programs = PROGRAMS // (8 if by_block else 1)  # each of these ends with sums over all of its pairs
    call = (height, width), (kh, kw), (dh, dw), tile, of_keys, batch, -(-programs // heads), query.device
    plan = kept_plan(*call)
    rows, columns = plan[2].shape[2], plan[3].shape[2]
    blocks = -(-rows * columns // block)
    options: dict[str, Any] = {
        "DIMS": dims,
        "UPCAST": interpreted() and query.dtype == torch.bfloat16,
        "KERNEL": (kh, kw),
        "SHAPE": (*tile, rows, columns, block, blocks),
        "KEPT": blocks * block * positions <= KEPT.get(sort, 0) * 32 * warps,
        "num_warps": warps,
        "num_stages": stages,
    }
    return plan, options


def tile_sides(size: tuple[int, int], dilation: Sequence[int], positions: int) -> tuple[int, int]:
    """Rows and columns of a tile of so many positions, near to square where the grids are not narrower."""
    height, width = -(-size[0] // dilation[0]), -(-size[1] // dilation[1])
    columns = min(1 << positions.bit_length() // 2, power_of_two(width))
    rows = min(positions // columns, power_of_two(height))
    return rows, positions // rows
