"""Neighborhood attention: each position attends to the kernel of positions nearest to it.

Of NAT (Hassani et al. 2023, arXiv:2204.07143) and, dilated, of DiNAT (Hassani & Shi 2022,
arXiv:2209.15001). At the borders the window is moved inside the map, not cut, exactly as in the authors'
NATTEN.
"""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from visionsel.ops.checks import check_attention_maps, pair
from visionsel.ops.neighborhood.natten import fused_kernels, installed, natten, why_not
from visionsel.ops.neighborhood.reference import reference
from visionsel.ops.neighborhood.tiled import tiled
from visionsel.ops.neighborhood.traced import traced

__all__ = ["neighborhood_attention", "sizes_are_fixed", "usable_backends"]

_BACKENDS = {"natten": natten, "tiled": tiled, "reference": reference}


def usable_backends() -> list[str]:
    """Names of the backends that are usable on this machine, best first."""
    if torch.cuda.is_available() and fused_kernels():
        return ["natten", "tiled", "reference"]
    # on the cpu natten is slower than the reference
    return ["tiled", "reference", *(["natten"] if installed() else [])]


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
        backend: "auto", "tiled", "reference" or "natten" (needs the natten extra, serves no rel_pos_bias).

    Returns:
        `[B, H, W, heads, value_dim]`.

    Raises:
        ValueError: for maps that do not fit each other, even kernels, kernels that reach beyond the map, a
            bias of another shape, and unknown backends.
        NotImplementedError: if natten is asked for and cannot serve the call.

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
    if backend not in ("auto", *_BACKENDS):
        raise ValueError(f"unknown backend {backend!r}; choose one of auto, {', '.join(_BACKENDS)}")
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if backend == "auto":
        # natten has kernels of its own on CUDA only, and the compiler cannot see into them
        fused = q.is_cuda and not torch.compiler.is_compiling()
        backend = "natten" if fused and why_not(q, k, v, kernel, rel_pos_bias, scale) is None else "tiled"
    if backend == "tiled" and not sizes_are_fixed(q):
        return traced(q, k, v, kernel, step, rel_pos_bias, scale)
    return _BACKENDS[backend](q, k, v, kernel, step, rel_pos_bias, scale)


def sizes_are_fixed(x: Tensor) -> bool:
    """Whether height and width of `[B, H, W, ...]` are plain numbers, not symbols of a trace."""
    return not torch.compiler.is_compiling() or (
        has_static_value(x.shape[1]) and has_static_value(x.shape[2])
    )
