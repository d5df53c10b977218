"""Neighborhood attention by the fused kernels of natten (github.com/SHI-Labs/NATTEN, 0.20 and later)."""

import functools
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from visionsel.ops.checks import learns

__all__ = ["fused_kernels", "installed", "natten", "why_not"]


def natten(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    rel_pos_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend from each position of `[B, H, W, heads, head_dim]` to its kernel of neighbors."""
    package: Any = library()
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    return package.functional.na2d(query, key, value, kernel_size, dilation=dilation, scale=scale)


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    rel_pos_bias: Tensor | None,
    scale: float,
) -> str | None:
    """Why natten cannot serve a call; None if it can."""
    if rel_pos_bias is not None:
        return "natten has no relative position bias since 0.20"
    device, head_dim, value_dim = query.device.type, query.shape[4], value.shape[4]
    if device not in ("cpu", "cuda"):
        return f"natten runs on cuda and cpu, the tensors are on {device}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"natten computes in float32, float16 or bfloat16, the tensors are {query.dtype}"
    if 1 in kernel_size:
        return f"natten's kernels have at least 3 positions a side, got {kernel_size}"
    if scale == 0:
        return "natten takes scale 0 for no scale given"
    if device == "cuda" and (head_dim % 8 or value_dim % 8):
        return f"natten's kernels need head dims that are multiples of 8, got {head_dim} and {value_dim}"
    if device == "cpu":
        if learns(query, key, value):
            return "natten has no backward on the cpu"
        if head_dim != value_dim or head_dim not in (8, 16, 32, 64, 128, 256, 512):
            return (
                "on the cpu natten needs one head dim for q, k and v, a power of two from 8 to 512, "
                f"got {head_dim} and {value_dim}"
            )
    if not installed():
        return "natten cannot be imported: pip install --no-build-isolation 'visionsel[natten]'"
    if device == "cuda" and not fused_kernels():
        return "the installed natten was built without its CUDA kernels (natten.HAS_LIBNATTEN is False)"
    return None


def installed() -> bool:
    """Whether natten can be imported."""
    return library() is not None


def fused_kernels() -> bool:
    """Whether natten is installed with its CUDA kernels."""
    return bool(getattr(library(), "HAS_LIBNATTEN", False))


def library() -> ModuleType | None:
    """The natten package, if it can be imported."""
    if "natten" not in sys.modules and not on_path():
        return None
    try:
        import natten
        import natten.functional
    except ImportError:
        return None
    return natten


@functools.cache
def on_path() -> bool:
    """Whether there is a natten to import; a search that fails is slow."""
    return importlib.util.find_spec("natten") is not None
