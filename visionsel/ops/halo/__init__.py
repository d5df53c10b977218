"""Halo attention: every block of queries attends to its block of keys and a halo around it.

The local attention of HaloNet (Vaswani et al. 2021, arXiv:2103.12731, section 2.2), in the form of timm's
`HaloAttn`: keys and values outside the map are zero and take part in the softmax.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from visionsel.ops.checks import check_attention_maps
from visionsel.ops.choice import Backend, compute
from visionsel.ops.compilation import call_compiled, why_not
from visionsel.ops.halo import triton
from visionsel.ops.halo.reference import reference
from visionsel.ops.halo.tiled import tiled

__all__ = ["halo_attention"]

BACKENDS = {
    "tiled": Backend(tiled),
    "reference": Backend(reference),
    "triton": Backend(triton.triton, triton.why_not),
    "compiled": Backend(partial(call_compiled, tiled), why_not),
}


def example_calls(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Calls that backends tell apart, as they receive them."""
    x = torch.zeros(1, 8, 8, 1, 16, device=device)
    leaf = x.clone().requires_grad_()
    table = torch.zeros(27, 16, device=device)
    return {
        "inference": (x, x, x, 8, 3, 1, table, table, 1.0),
        "training": (leaf, leaf, leaf, 8, 3, 1, table, table, 1.0),
    }


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    halo_size: int,
    rel_pos_height: Tensor | None = None,
    rel_pos_width: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention from blocks of queries to blocks of keys enlarged by a halo.

    A window has `window = block_size + 2 * halo_size` keys a side. The logit of a query and a key is
    `scale * q.k + q.height[i - y + window - 1] + q.width[j - x + window - 1]`, where (y, x) is the query's
    place in its block and (i, j) the key's in the window: relative logits use the unscaled query. Scale the
    tables to scale these too (timm's `scale_pos_embed`).

    Args:
        q: queries `[B, H / s, W / s, heads, head_dim]`. With s > 1 the attention downsamples: a block holds
            `block_size / s` queries a side, and y and x count them, not the pixels between (as in timm).
        k: keys `[B, H, W, heads, head_dim]`; H and W are multiples of `block_size`.
        v: values `[B, H, W, heads, value_dim]`; value_dim is free.
        block_size: side of a block on k's map; a multiple of s.
        halo_size: rows and columns of keys added on each side of a block; 0 is attention inside blocks.
        rel_pos_height: table `[2 * window - 1, head_dim]` of vertical offsets, or None for none at all. Cast
            to the dtype of q.
        rel_pos_width: the same of horizontal offsets; both tables or neither.
        scale: of the logits; `head_dim**-0.5` if None.
        backend: "auto", or one by name: "triton" (CUDA), "tiled" (any device), "compiled" (compiles at each
            new shape) or "reference" (the plainest code).

    Returns:
        `[B, H / s, W / s, heads, value_dim]`.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit as said above, or the backend is unknown.
        NotImplementedError: if the backend asked for cannot serve the call, with the reason.

    Examples:
        >>> import torch
        >>> from visionsel import ops
        >>> q, k, v = torch.randn(3, 1, 16, 16, 2, 16)
        >>> ops.halo_attention(q, k, v, block_size=8, halo_size=3).shape
        torch.Size([1, 16, 16, 2, 16])
    """
    stride = _check(q, k, v, block_size, halo_size, rel_pos_height, rel_pos_width)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if rel_pos_height is not None and rel_pos_width is not None:
        rel_pos_height, rel_pos_width = rel_pos_height.to(q.dtype), rel_pos_width.to(q.dtype)
    call = q, k, v, block_size, halo_size, stride, rel_pos_height, rel_pos_width, scale
    return compute("halo", BACKENDS, backend, *call)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    halo_size: int,
    rel_pos_height: Tensor | None,
    rel_pos_width: Tensor | None,
) -> int:
    """Raise on an invalid call; return how many times coarser the map of q is than that of k."""
    check_attention_maps(q, k, v)
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a positive int, got {block_size!r}")
    if not isinstance(halo_size, int) or halo_size < 0:
        raise ValueError(f"halo_size must be an int of 0 or more, got {halo_size!r}")
    height, width = k.shape[1:3]
    # by comparison, since a quotient of symbolic sizes would stay a symbol in all that follows
    stride = 1
    while q.shape[1] * stride != height or q.shape[2] * stride != width or block_size % stride:
        stride += 1
        if stride > block_size:
            raise ValueError(
                "the map of k must be that of q times an integer that divides block_size, got k "
                f"{height} x {width}, q {q.shape[1]} x {q.shape[2]} and block_size {block_size}"
            )
    if height % block_size or width % block_size:
        raise ValueError(
            f"block_size {block_size} must divide the map of k, got {height} x {width}; pad it to multiples "
            f"of {block_size} (layers.HaloAttention does) or choose a block that divides both sides"
        )
    if (rel_pos_height is None) != (rel_pos_width is None):
        raise ValueError("give both rel_pos_height and rel_pos_width, or neither")
    expected = (2 * (block_size + 2 * halo_size) - 1, q.shape[-1])
    for name, table in (("rel_pos_height", rel_pos_height), ("rel_pos_width", rel_pos_width)):
        if table is None:
            continue
        if tuple(table.shape) != expected:
            raise ValueError(
                f"{name} must be [2 * (block_size + 2 * halo_size) - 1, head_dim] = {list(expected)}, "
                f"got {list(table.shape)}"
            )
        if table.device != q.device or not table.is_floating_point():
            raise ValueError(
                f"{name} must be floating point on {q.device}, got {table.dtype} on {table.device}"
            )
    return stride
