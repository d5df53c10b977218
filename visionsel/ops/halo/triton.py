"""Halo attention by fused kernels (CUDA, in Triton): no window is ever copied, no logit leaves the chip.

A program attends from the queries of a block to the keys of its window where they lie in the map, with the
softmax computed as they pass by, and keeps the log2 of its sums. The backward of the queries goes the same
way; that of the keys goes over the blocks whose windows reach a tile of keys. Relative logits come as two
factors, one of the window's rows and one of its columns, from an operator of their own. There are no atomics,
so results repeat bit for bit. Logits, softmax and sums are float32; float32 maps are multiplied in float32
(no TF32), half-precision maps on the tensor cores.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from visionsel.ops.checks import in_autocast_dtype
from visionsel.ops.gpu import interpreted, no_second_derivative, operator, padded, refusal

__all__ = ["triton", "why_not"]

# by bytes of a number and the largest axis of a product: most queries of a program, keys that it reads at
# once, warps, stages; those beyond 64 are for large windows, whose factors are such an axis
FORWARD = {
    (2, 16): (64, 64, 4, 2),
    (2, 32): (64, 64, 4, 2),
    (2, 64): (64, 64, 4, 2),
    (2, 128): (64, 32, 8, 2),
    (2, 256): (32, 32, 8, 1),
    (4, 16): (64, 32, 4, 1),
    (4, 32): (32, 32, 4, 1),
    (4, 64): (32, 32, 4, 1),
    (4, 128): (32, 16, 4, 1),
    (4, 256): (16, 16, 4, 1),
}
BACKWARD = {
    (2, 16): (64, 64, 4, 2),
    (2, 32): (64, 64, 4, 2),
    (2, 64): (64, 32, 4, 2),
    (2, 128): (64, 32, 8, 2),
    (2, 256): (16, 32, 4, 1),
    (4, 16): (64, 32, 4, 1),
    (4, 32): (32, 32, 4, 1),
    (4, 64): (32, 32, 4, 1),
    (4, 128): (32, 16, 4, 1),
    (4, 256): (16, 16, 4, 1),
}
# likewise: rows and columns of a tile of keys, most queries that it reads at once, warps, stages
KEYS = {
    (2, 16): (8, 8, 64, 4, 2),
    (2, 32): (8, 8, 64, 4, 2),
    (2, 64): (8, 8, 32, 4, 2),
    (2, 128): (4, 8, 64, 4, 1),
    (2, 256): (4, 4, 32, 4, 1),
    (4, 16): (4, 8, 64, 4, 1),
    (4, 32): (4, 8, 32, 4, 1),
    (4, 64): (4, 8, 32, 4, 1),
    (4, 128): (4, 4, 32, 4, 1),
    (4, 256): (4, 4, 16, 4, 1),
}
# by bytes of a number and padded head dim: most queries of a tile, most rows of a table read at once
FACTORS = {
    (2, 16): (64, 64),
    (2, 32): (64, 64),
    (2, 64): (64, 64),
    (4, 16): (64, 32),
    (4, 32): (64, 32),
    (4, 64): (32, 32),
}
SHARES = 1024  # programs that add up the gradient of the tables: enough for the largest GPUs


def triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    rel_pos_height: Tensor | None,
    rel_pos_width: Tensor | None,
    scale: float,
) -> Tensor:
    """See `halo_attention`; `stride` is the side of k's map divided by that of q's.

    Maps may have any strides. It has no second derivatives.
    """
    q, k, v = in_autocast_dtype(q, k, v)
    factors = None
    if rel_pos_height is not None and rel_pos_width is not None:
        tables = torch.stack([rel_pos_height, rel_pos_width]).to(q.dtype)
        factors = relate(q, tables, block_size, halo_size, stride)
    return attend(q, k, v, factors, block_size, halo_size, stride, float(scale))[0]


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    rel_pos_height: Tensor | None,
    rel_pos_width: Tensor | None,
    scale: float,
) -> str | None:
    """Why the kernels cannot serve a call; None if they can."""
    return refusal(q, v, most=64)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factors: Tensor | None,
    block_size: int,
    halo_size: int,
    stride: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The result, and log2 of the sums of its softmax `[B, blocks, heads, side * side]`."""
    from visionsel.ops.halo import triton_kernels as kernels

    out, lse = empty_results(query, key, value, factors, block_size, halo_size, stride)
    owned, read, warps, stages = FORWARD[sort_of(query, value, factors)]
    owned = min(owned, padded(lse.shape[3]))
    programs = lse[..., 0].numel() * -(-lse.shape[3] // owned)
    with torch.cuda.device_of(query):
        kernels.forward[(programs,)](
            query,
            key,
            value,
            None if factors is None else factors.contiguous(),
            out,
            lse,
            query.stride(),
            key.stride(),
            value.stride(),
            *key.shape[1:4],
            scale,
            **constants(query, value, factors, block_size, halo_size, stride),
            OWNED=owned,
            **reading(read, block_size + 2 * halo_size),
            num_warps=warps,
            num_stages=stages,
        )
    return out, lse


def empty_results(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factors: Tensor | None,
    block_size: int,
    halo_size: int,
    stride: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    """Where the result and the sums go."""
    batch, height, width, heads, _head_dim = key.shape
    blocks = (height // block_size) * (width // block_size)
    lse = query.new_empty(batch, blocks, heads, (block_size // stride) ** 2, dtype=torch.float32)
    return query.new_empty(*query.shape[:4], value.shape[4]), lse


def gradients(
    needed: Sequence[bool],
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factors: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and factors; empty tensors for those that are not `needed`."""
    from visionsel.ops.halo import triton_kernels as kernels

    for_query, for_key, for_value, for_factors = needed
    found = empty_gradients(needed, grad, query, key, value, factors)
    grad_query, grad_key, grad_value, grad_factors = found
    factors = None if factors is None else factors.contiguous()
    delta = torch.empty_like(lse)
    strides = (query.stride(), key.stride(), value.stride(), grad.stride())
    numbers = (*key.shape[1:4], scale)
    shared: dict[str, Any] = constants(query, value, factors, block_size, halo_size, stride)
    sort = sort_of(query, value, factors)
    batch, height, width, heads, _head_dim = key.shape
    with torch.cuda.device_of(query):
        if for_query or for_key or for_factors:
            owned, read, warps, stages = BACKWARD[sort]
            owned = min(owned, padded(lse.shape[3]))
            programs = lse[..., 0].numel() * -(-lse.shape[3] // owned)
            kernels.backward_query[(programs,)](
                query,
                key,
                value,
                factors,
                out,
                lse,
                grad,
                delta,
                grad_query,
                grad_factors,
                *strides,
                *numbers,
                **shared,
                OWNED=owned,
                **reading(read, block_size + 2 * halo_size),
                FOR_QUERY=for_query,
                FOR_FACTORS=for_factors,
                num_warps=warps,
                num_stages=stages,
            )
        if for_key or for_value:
            tile_h, tile_w, read, warps, stages = KEYS[sort]
            shifts = best_shift(tile_h, block_size, halo_size), best_shift(tile_w, block_size, halo_size)
            programs = batch * heads * -(-(height + shifts[0]) // tile_h) * -(-(width + shifts[1]) // tile_w)
            kernels.backward_key[(programs,)](
                query,
                key,
                value,
                factors,
                lse,
                grad,
                delta,
                grad_key,
                grad_value,
                *strides,
                *numbers,
                **shared,
                TILE_H=tile_h,
                TILE_W=tile_w,
                SHIFT_H=shifts[0],
                SHIFT_W=shifts[1],
                READ=min(read, padded(lse.shape[3])),
                FOR_KEY=for_key,
                FOR_VALUE=for_value,
                num_warps=warps,
                num_stages=stages,
            )
    return found


def empty_gradients(
    needed: Sequence[bool],
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    factors: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where the gradients go."""
    for_query, for_key, for_value, for_factors = needed
    return (
        query.new_empty(query.shape if for_query else (0,)),
        key.new_empty(key.shape if for_key else (0,)),
        value.new_empty(value.shape if for_value else (0,)),
        query.new_empty(factors.shape if factors is not None and for_factors else (0,)),
    )


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """What the forward leaves for `backward`."""
    *tensors, ctx.block_size, ctx.halo_size, ctx.stride, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # the sums have no gradient


def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    """Gradients of all that `attend` takes."""
    needed = list(ctx.needs_input_grad[:4])
    saved = ctx.saved_tensors  # once: checkpointing gives them a single time
    found = differentiate(needed, grad, *saved, ctx.block_size, ctx.halo_size, ctx.stride, ctx.scale)
    grads = (x if wanted else None for x, wanted in zip(found, needed, strict=True))
    return (*grads, None, None, None, None)


attend = operator("visionsel::halo_triton", attention, empty_results, backward, keep)
differentiate = operator("visionsel::halo_triton_backward", gradients, empty_gradients, no_second_derivative)


def relative_factors(query: Tensor, tables: Tensor, block_size: int, halo_size: int, stride: int) -> Tensor:
    """Relative logits of the rows and of the columns of each query's window, which add up to those of keys.

    `tables` are those of height and width, `[2, 2 * window - 1, head_dim]`.

    Returns:
        `[B, blocks, heads, side * side, 2 * window]`.
    """
    from visionsel.ops.halo import triton_kernels as kernels

    factors = empty_factors(query, tables, block_size, halo_size, stride)
    tiles, sizes = tiling(query, tables, block_size, halo_size, stride)
    with torch.cuda.device_of(query):
        kernels.relate[(tiles,)](
            query,
            tables.contiguous(),
            factors,
            query.stride(),
            *map_size(query, stride),
            **sizes,
            num_warps=4,
        )
    return factors


def empty_factors(query: Tensor, tables: Tensor, block_size: int, halo_size: int, stride: int) -> Tensor:
    """Where the factors go."""
    batch, height, width, heads, _head_dim = query.shape
    side = block_size // stride
    blocks = (height // side) * (width // side)
    return query.new_empty(batch, blocks, heads, side * side, 2 * (block_size + 2 * halo_size))


def factor_gradients(
    needed: Sequence[bool],
    grad: Tensor,
    query: Tensor,
    tables: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and tables (float32); empty tensors for those that are not `needed`."""
    from visionsel.ops.halo import triton_kernels as kernels

    grad_query, grad_tables = empty_factor_gradients(needed, grad, query, tables)
    grad = grad.contiguous()
    tiles, sizes = tiling(query, tables, block_size, halo_size, stride)
    size = map_size(query, stride)
    with torch.cuda.device_of(query):
        if needed[0]:
            kernels.factor_query[(tiles,)](tables.contiguous(), grad, grad_query, *size, **sizes, num_warps=4)
        if needed[1]:
            share = max(8, -(-tiles // SHARES))
            shares = -(-tiles // share)
            parts = grad_tables.new_empty(shares, *tables.shape)
            chunks = -(-tables.shape[1] // sizes["READ"])
            kernels.factor_tables[(shares * chunks,)](
                query, grad, parts, query.stride(), *size, tiles, share, **sizes, num_warps=4
            )
            grad_tables = parts.sum(0)
    return grad_query, grad_tables


def empty_factor_gradients(
    needed: Sequence[bool], grad: Tensor, query: Tensor, tables: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    """Where the gradients go."""
    return (
        query.new_empty(query.shape if needed[0] else (0,)),
        query.new_empty(tables.shape if needed[1] else (0,), dtype=torch.float32),
    )


def keep_factors(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What the factors leave for `backward_factors`."""
    query, tables, *ctx.sizes = inputs
    ctx.save_for_backward(query, tables)


def backward_factors(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all that `relate` takes."""
    needed = list(ctx.needs_input_grad[:2])
    query, tables = ctx.saved_tensors  # once: checkpointing gives them a single time
    grad_query, grad_tables = differentiate_factors(needed, grad, query, tables, *ctx.sizes)
    return (
        grad_query if needed[0] else None,
        grad_tables.to(tables.dtype) if needed[1] else None,
        None,
        None,
        None,
    )


relate = operator(
    "visionsel::halo_triton_factors", relative_factors, empty_factors, backward_factors, keep_factors
)
differentiate_factors = operator(
    "visionsel::halo_triton_factors_backward", factor_gradients, empty_factor_gradients, no_second_derivative
)


def map_size(query: Tensor, stride: int) -> tuple[int, int, int]:
    """Height and width of the map of keys, and heads."""
    return query.shape[1] * stride, query.shape[2] * stride, query.shape[3]


def tiling(
    query: Tensor, tables: Tensor, block_size: int, halo_size: int, stride: int
) -> tuple[int, dict[str, Any]]:
    """How many tiles of queries there are, and what the kernels of factors are compiled for."""
    batch, height, width, heads, head_dim = query.shape
    side = block_size // stride
    owned, read = FACTORS[query.element_size(), padded(head_dim)]
    owned = min(owned, padded(side * side))
    tiles = batch * heads * (height // side) * (width // side) * -(-side * side // owned)
    return tiles, {
        "HEAD_DIM": head_dim,
        "PADDED_D": padded(head_dim),
        "BLOCK": block_size,
        "WINDOW": block_size + 2 * halo_size,
        "SIDE": side,
        "OWNED": owned,
        "READ": min(read, padded(tables.shape[1])),
        "OPERAND": operand(query),
    }


def sort_of(query: Tensor, value: Tensor, factors: Tensor | None) -> tuple[int, int]:
    """What the sizes of programs go by: bytes of a number, and the largest axis that products run over."""
    factor = 16 if factors is None else min(256, padded(factors.shape[4]))
    return query.element_size(), max(padded(query.shape[4]), padded(value.shape[4]), factor)


def reading(read: int, window: int) -> dict[str, int]:
    """Keys that are read at once: as many as said, then what is left of the window, in a power of two."""
    rest = window * window % read
    return {"READ": read, "LAST": padded(rest) if rest else 0}


@lru_cache
def best_shift(tile: int, block_size: int, halo_size: int) -> int:
    """How far before the map tiles of keys should begin, to be reached by the windows of fewest blocks.

    Where halos are at most half a block, tiles of a block's size that begin amid blocks are reached by two.
    """

    def reached(shift: int) -> int:
        first = range(-shift, tile * block_size - shift, tile)
        return sum((y + tile - 1 + halo_size) // block_size - (y - halo_size) // block_size for y in first)

    return min(range(tile), key=reached)


def constants(
    query: Tensor, value: Tensor, factors: Tensor | None, block_size: int, halo_size: int, stride: int
) -> dict[str, Any]:
    """What every kernel of the attention is compiled for."""
    window, dims = block_size + 2 * halo_size, (query.shape[4], value.shape[4])
    return {
        "DIMS": (*dims, *map(padded, dims), padded(2 * window)),
        "BLOCK": block_size,
        "HALO": halo_size,
        "WINDOW": window,
        "SIDE": block_size // stride,
        "RELATIVE": factors is not None,
        "OPERAND": operand(query),
    }


def operand(query: Tensor) -> Any:
    """The type that products are computed of."""
    import triton.language as tl

    if query.dtype == torch.bfloat16 and interpreted():
        return tl.float32  # the interpreter would multiply the bits of bfloat16 as integers
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[query.dtype]
