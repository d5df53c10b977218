"""What torch's flex_attention can serve, and how its kernels are told to run; for the backends "flex"."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from visionsel.ops.compilation import no_compiler

__all__ = ["attention", "kernel_options", "ordered", "refusal", "refuse_uncompiled"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# its kernels of half precision with gradients want blocks of 64 or 128 tokens, whatever they are told
LARGE_BLOCKS_ONLY = torch.__version__ < "2.14"


def refusal(query: Tensor, value: Tensor, learns: bool) -> str | None:
    """What torch's kernels lack for tensors of this kind."""
    device, dims = query.device.type, (query.shape[4], value.shape[4])
    if device not in ("cpu", "cuda"):
        return f"it is written for cuda and cpu, the tensors are on {device}"
    if query.dtype not in DTYPES:
        return f"its kernels compute in float32, float16 or bfloat16, the tensors are {query.dtype}"
    if device == "cuda" and min(dims) < 16:
        return f"its CUDA kernels need head dims of at least 16, got {dims[0]} and {dims[1]}"
    if device == "cpu" and learns:
        return "flex_attention has no backward on the CPU"
    if device == "cuda" and learns and query.dtype != torch.float32 and LARGE_BLOCKS_ONLY:
        return f"its half-precision backward takes these blocks from PyTorch 2.14 on, not {torch.__version__}"
    if torch.compiler.is_compiling():
        return None
    if 0 in (*query.shape, *value.shape):
        return "a tensor is empty"
    capability = torch.backends.cpu.get_cpu_capability()
    if device == "cpu" and (sys.platform == "darwin" or capability not in ("AVX2", "AVX512")):
        return f"its CPU kernel needs AVX2 and no macOS, this is {sys.platform} with {capability}"
    return no_compiler(device)


def refuse_uncompiled() -> None:
    """Refuse the uncompiled flex_attention, which holds the logits of all pairs at once.

    Raises:
        RuntimeError: where torch.compile is not at work.
    """
    if not torch.compiler.is_compiling():
        raise RuntimeError(
            "backend 'flex' needs torch.compile, but it is switched off or another tracer looks on; "
            "choose another backend"
        )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    blocks: tuple[int, int],
    score_mod: Callable[..., Tensor] | None = None,
    mask: BlockMask | None = None,
) -> Tensor:
    """flex_attention on `[B, heads, tokens, head_dim]`, in blocks of so many queries and so many keys."""
    # scaled here, not by 1: torch's CPU kernel needs a query that is computed with these axes, and is no view
    left = 0.5 if scale == 1 else 1.0
    query = query * (scale / left)
    options = kernel_options(query, value, *blocks)
    return flex_attention(query, key, value, score_mod, mask, left, kernel_options=options)


def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of a boolean `[..., rows, columns]`, how many are true and, first, which ones, as int32."""
    index = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).contiguous(), index.int().contiguous()


def kernel_options(query: Tensor, value: Tensor, query_block: int, key_block: int) -> Any:
    """Tile sizes of the CUDA kernels, near torch's own; those divide blocks below 128 from torch 2.14 on."""
    row = query.element_size() * max(query.shape[3], value.shape[3])  # bytes
    keys = 64 if row <= 128 else 32 if row <= 256 else 16
    outer, inner = (64, 32) if query.dtype != torch.float32 and row <= 256 else (16, 16)
    inner = min(inner, query_block, key_block)
    return {
        "FORCE_USE_FLEX_ATTENTION": True,  # below 128 tokens it would take the kernel made for single queries
        "num_warps": 4,
        "fwd_BLOCK_M": min(64, query_block),
        "fwd_BLOCK_N": min(keys, key_block),
        "bwd_BLOCK_M1": inner,
        "bwd_BLOCK_N1": min(outer, key_block),
        "bwd_BLOCK_M2": min(outer, query_block),
        "bwd_BLOCK_N2": inner,
    }
