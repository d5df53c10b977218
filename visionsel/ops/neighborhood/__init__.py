"""Neighborhood attention: each position attends to the kernel of positions nearest to it.

Of NAT (Hassani et al. 2023, arXiv:2204.07143) and, dilated, of DiNAT (Hassani & Shi 2022,
arXiv:2209.15001). At the borders the window is moved inside the map, not cut, exactly as in the authors'
NATTEN.
"""

from typing import Any

import torch
from torch import Tensor

from visionsel.ops.checks import check_attention_maps, pair
from visionsel.ops.choice import Backend, compute
from visionsel.ops.compilation import sizes_are_fixed, why_not
from visionsel.ops.gpu import unmeasured
from visionsel.ops.neighborhood import compiled, flex, natten, triton
from visionsel.ops.neighborhood.by_kind import opaque, serves_compiled
from visionsel.ops.neighborhood.reference import reference
from visionsel.ops.neighborhood.tiled import tiled
from visionsel.ops.neighborhood.traced import traced

__all__ = ["neighborhood_attention"]


def _tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    rel_pos_bias: Tensor | None,
    scale: float,
) -> Tensor:
    if serves_compiled(query, key, value, rel_pos_bias):
        return opaque(query, key, value, list(kernel_size), list(dilation), rel_pos_bias, scale)
    form = tiled if sizes_are_fixed(query) else traced
    return form(query, key, value, kernel_size, dilation, rel_pos_bias, scale)


BACKENDS = {
    "tiled": Backend(_tiled),
    "reference": Backend(reference),
    "natten": Backend(natten.natten, natten.why_not),
    "triton": Backend(triton.triton, triton.why_not, unmeasured),
    "flex": Backend(flex.flex, flex.why_not),
    "compiled": Backend(compiled.compiled, why_not),
}


def example_calls(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Calls that backends tell apart, as they receive them."""
    x = torch.zeros(1, 7, 7, 1, 32, device=device)
    leaf = x.clone().requires_grad_()
    bias = torch.zeros(1, 13, 13, device=device)
    return {
        "inference": (x, x, x, (7, 7), (1, 1), None, 1.0),
        "training": (leaf, leaf, leaf, (7, 7), (1, 1), None, 1.0),
        "inference with rel_pos_bias": (x, x, x, (7, 7), (1, 1), bias, 1.0),
        "training with rel_pos_bias": (leaf, leaf, leaf, (7, 7), (1, 1), bias, 1.0),
    }


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    rel_pos_bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention from each position to the kernel of positions around it.

    Args:
        q: `[B, H, W, heads, head_dim]`.
        k: the same shape.
        v: `[B, H, W, heads, value_dim]`.
        kernel_size: neighbors per side, odd, or (per column, per row).
        dilation: distance between neighbors; kernel_size x dilation fits into the map.
        rel_pos_bias: `[heads, 2 * Kh - 1, 2 * Kw - 1]`, added to the scaled logits; its index along an axis
            is (key - query) / dilation + K - 1.
        scale: factor on the logits; default head_dim**-0.5.
        backend: "auto", or one by name: "tiled" (any device), "triton" (CUDA), "flex" and "compiled"
            (compile at each new shape), "natten" (needs the natten extra, serves no rel_pos_bias),
            "reference" (the plainest code).

    Returns:
        `[B, H, W, heads, value_dim]`.

    Raises:
        ValueError: for maps that do not fit each other, even kernels, kernels that reach beyond the map, a
            bias of another shape, and unknown backends.
        NotImplementedError: if the backend asked for cannot serve the call, with the reason.

    Examples:
        >>> import torch
        >>> from visionsel import ops
        >>> q, k, v = torch.randn(3, 1, 14, 14, 2, 16)
        >>> ops.neighborhood_attention(q, k, v, kernel_size=7, dilation=2).shape
        torch.Size([1, 14, 14, 2, 16])
    """
    check_attention_maps(q, k, v)
    if q.shape != k.shape:
        raise ValueError(f"q and k must have one shape, got q {tuple(q.shape)} and k {tuple(k.shape)}")
    kernel, step = pair(kernel_size, "kernel_size"), pair(dilation, "dilation")
    for side, length, size, distance in zip(("height", "width"), q.shape[1:3], kernel, step, strict=True):
        if size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}; choose {size - 1} or {size + 1}")
        if size * distance > length:
            raise ValueError(
                f"kernel_size x dilation is {size} x {distance} = {size * distance}, more than the map's "
                f"{side} of {length}; pad the map to {size * distance} or choose a smaller kernel or dilation"
            )
    if rel_pos_bias is not None:
        expected = (q.shape[3], 2 * kernel[0] - 1, 2 * kernel[1] - 1)
        if rel_pos_bias.shape != expected or not rel_pos_bias.is_floating_point():
            raise ValueError(
                f"rel_pos_bias must be floating point of shape {expected} ([heads, 2 * Kh - 1, 2 * Kw - 1]), "
                f"got {rel_pos_bias.dtype} of shape {tuple(rel_pos_bias.shape)}"
            )
        if rel_pos_bias.device != q.device:
            raise ValueError(f"rel_pos_bias is on {rel_pos_bias.device}, q on {q.device}; move it there")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return compute("neighborhood", BACKENDS, backend, q, k, v, kernel, step, rel_pos_bias, scale)
