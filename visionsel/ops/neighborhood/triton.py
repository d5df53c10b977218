"""Neighborhood attention by fused kernels (CUDA, in Triton), with the relative position bias.

A program attends from a tile of queries to the keys that some of them see, where they lie in the map: no
neighbors are gathered, and no logits leave the chip. The forward keeps log2 of the softmax's sums; the
backward computes the logits again, for the queries in the same way, for the keys from the queries that see
them, for the bias over strips of rows. There are no atomics, so results repeat bit for bit. Logits, softmax
and sums are float32; float32 maps are multiplied in float32 (no TF32), half-precision maps on tensor cores.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visionsel.ops.checks import in_autocast_dtype
from visionsel.ops.gpu import interpreted, no_second_derivative, padded, power_of_two, refusal

__all__ = ["triton", "why_not"]

LOG2E = 1.4426950408889634

# by bytes of an element and padded head dim: positions of a tile and of a block, warps, stages
FORWARD = {
    (2, 16): (64, 64, 4, 3),
    (2, 32): (64, 64, 4, 3),
    (2, 64): (64, 64, 4, 2),
    (2, 128): (64, 32, 4, 2),
    (2, 256): (64, 32, 8, 1),
    (4, 16): (64, 32, 4, 2),
    (4, 32): (32, 32, 4, 2),
    (4, 64): (32, 32, 4, 2),
    (4, 128): (32, 16, 4, 1),
    (4, 256): (16, 16, 4, 1),
}
BACKWARD = {
    (2, 16): (64, 64, 4, 2),
    (2, 32): (64, 64, 4, 2),
    (2, 64): (64, 32, 4, 2),
    (2, 128): (64, 32, 8, 1),
    (2, 256): (32, 32, 8, 1),
    (4, 16): (64, 32, 4, 1),
    (4, 32): (32, 32, 4, 1),
    (4, 64): (32, 16, 4, 1),
    (4, 128): (16, 16, 4, 1),
    (4, 256): (16, 16, 4, 1),
}
# likewise, for the gradient of the bias: most columns of queries and of keys, warps, stages
TABLE = {
    (2, 16): (32, 4, 2),
    (2, 32): (32, 4, 2),
    (2, 64): (32, 4, 1),
    (2, 128): (32, 4, 1),
    (2, 256): (16, 4, 1),
    (4, 16): (32, 4, 1),
    (4, 32): (32, 4, 1),
    (4, 64): (16, 4, 1),
    (4, 128): (16, 4, 1),
    (4, 256): (16, 4, 1),
}


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
    return attention(query, key, value, rel_pos_bias, list(kernel_size), list(dilation), float(scale))[0]


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
    return refusal(query, value)


@torch.library.custom_op("visionsel::neighborhood_triton", mutates_args=())
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
    tile, block, warps, stages = FORWARD[sort_of(query, value)]
    programs, tiles, sizes = tiling(query, dilation, tile)
    with torch.cuda.device_of(query):
        kernels.forward[(programs,)](
            query,
            key,
            value,
            None if bias is None else bias.contiguous(),
            out,
            lse,
            query.stride(),
            key.stride(),
            value.stride(),
            *query.shape[1:4],
            *tiles,
            *dilation,
            scale * LOG2E,
            **constants(query, value, kernel_size),
            **sizes,
            BIASED=bias is not None,
            BLOCK=block,
            num_warps=warps,
            num_stages=stages,
        )
    return out, lse


def empty_results(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Where the result and the sums go."""
    out = query.new_empty(*query.shape[:4], value.shape[4])
    return out, query.new_empty(query.shape[:4], dtype=torch.float32)


@torch.library.custom_op("visionsel::neighborhood_triton_backward", mutates_args=())
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
    shared: dict[str, Any] = constants(query, value, kernel_size)
    tile, block, warps, stages = BACKWARD[sort_of(query, value)]
    programs, tiles, sizes = tiling(query, dilation, tile)
    numbers = (*query.shape[1:4], *tiles, *dilation, scale * LOG2E, scale)
    options: dict[str, Any] = {"BIASED": bias is not None, "BLOCK": block, **sizes, **shared}
    options |= {"num_warps": warps, "num_stages": stages}
    with torch.cuda.device_of(query):
        rows = 4096 // shared["BLOCK_V"]
        kernels.row_products[(-(-lse.numel() // rows),)](
            out, grad, delta, lse.numel(), DIM=value.shape[4], BLOCK_D=shared["BLOCK_V"], ROWS=rows
        )
        if for_query:
            kernels.query_gradient[(programs,)](*tensors, grad_query, *strides, *numbers, **options)
        if for_key or for_value:
            kernels.key_gradient[(programs,)](
                *tensors,
                grad_key,
                grad_value,
                *strides,
                *numbers,
                FOR_KEY=for_key,
                FOR_VALUE=for_value,
                **options,
            )
        if for_bias:
            columns, warps, stages = TABLE[sort_of(query, value)]
            splits, blocks, strips, sizes = shares(query, kernel_size, dilation, columns)
            parts = lse.new_empty(splits * blocks * strips * dilation[1], *grad_bias.shape)
            kernels.table_gradient[(parts[..., 0].numel(),)](
                *tensors,
                parts,
                *strides,
                *query.shape[:4],
                *dilation,
                splits,
                blocks,
                strips,
                scale * LOG2E,
                **shared,
                **sizes,
                num_warps=warps,
                num_stages=stages,
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
    """Gradients of all that `attention` takes."""
    needed = list(ctx.needs_input_grad[:4])
    saved = ctx.saved_tensors  # once: checkpointing gives them a single time
    found = gradients(needed, grad, *saved, ctx.kernel_size, ctx.dilation, ctx.scale)
    query, key, value, bias = (x if wanted else None for x, wanted in zip(found, needed, strict=True))
    if bias is not None:
        bias = bias.to(saved[3].dtype)
    return query, key, value, bias, None, None, None


attention.register_fake(empty_results)
attention.register_autograd(backward, setup_context=keep)
gradients.register_fake(empty_gradients)
gradients.register_autograd(no_second_derivative)


def sort_of(query: Tensor, value: Tensor) -> tuple[int, int]:
    """What the sizes of programs go by: bytes of an element and the larger padded head dim."""
    return query.element_size(), max(padded(query.shape[4]), padded(value.shape[4]))


def constants(query: Tensor, value: Tensor, kernel_size: Sequence[int]) -> dict[str, int]:
    """What every kernel is compiled for."""
    return {
        "HEAD_DIM": query.shape[4],
        "VALUE_DIM": value.shape[4],
        "BLOCK_D": padded(query.shape[4]),
        "BLOCK_V": padded(value.shape[4]),
        "UPCAST": interpreted() and query.dtype == torch.bfloat16,
        "KERNEL_H": kernel_size[0],
        "KERNEL_W": kernel_size[1],
    }


def tiling(
    query: Tensor, dilation: Sequence[int], positions: int
) -> tuple[int, tuple[int, int], dict[str, int]]:
    """Cut the grids of a map `[B, H, W, heads, head_dim]` into tiles, square where they are not narrower.

    Returns:
        How many programs there are, the tiles of a grid along both axes, and the sides of a tile.
    """
    batch, height, width, heads, _head_dim = query.shape
    height, width = -(-height // dilation[0]), -(-width // dilation[1])
    tile_w = min(1 << positions.bit_length() // 2, power_of_two(width))
    tile_h = min(positions // tile_w, power_of_two(height))
    tile_w = positions // tile_h
    tiles = -(-height // tile_h), -(-width // tile_w)
    programs = batch * heads * dilation[0] * dilation[1] * tiles[0] * tiles[1]
    return programs, tiles, {"TILE_H": tile_h, "TILE_W": tile_w}


def shares(
    query: Tensor, kernel_size: Sequence[int], dilation: Sequence[int], columns: int
) -> tuple[int, int, int, dict[str, int]]:
    """Divide the gradient of the bias among programs of at most so many columns of queries and of keys.

    There are some 2048 programs: enough for the largest GPUs, and the same sums on all of them.

    Returns:
        Splits of the rows of the batch, blocks of keys of a strip of queries, strips, and the sizes of these.
    """
    batch, height, width, heads, _head_dim = query.shape
    rows = batch * dilation[0] * -(-height // dilation[0])
    width = -(-width // dilation[1])
    columns = min(columns, padded(width))
    strip = columns
    if width > columns and kernel_size[1] <= columns // 2:
        strip = columns - kernel_size[1] + 1  # then one block holds all the neighbors of a strip
    blocks = -(-min(strip + kernel_size[1] - 1, width) // columns)
    strips = -(-width // strip)
    programs = heads * (2 * kernel_size[0] - 1) * blocks * strips * dilation[1]
    splits = max(1, min(2048 // max(1, programs), rows // 16))
    return splits, blocks, strips, {"STRIP": strip, "BLOCK": columns}
