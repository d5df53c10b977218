"""The operators against their plain references, in turn: `visionsel bench ops [--rounds 7]`.

The reference restates the method as its paper does, so the ratio says what the formulation is worth, on this
machine, at the map sizes of a 224 image. Training means forward and backward of all inputs and tables.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import run as run_program
from benchmarks.paired import Timing, compare, found, quiet, tables
from visionsel import ops

__all__ = ["cases", "measure", "tables"]


def neighborhood(
    side: int, heads: int, dilation: int, batch: int
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """NAT's attention: kernel 7, head_dim 32, with the relative position bias."""
    bias = 0.1 * torch.randn(heads, 13, 13)

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, backend: str) -> Tensor:
        return ops.neighborhood_attention(q, k, v, 7, dilation, bias, backend=backend)

    return call, [*_qkv(batch, side, heads), bias]


def bilevel_routing(
    side: int, heads: int, topk: int, batch: int
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """BiFormer's attention: 7 x 7 windows, head_dim 32."""

    def call(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        return ops.bilevel_routing_attention(q, k, v, 7, topk, scale=(32 * heads) ** -0.5, backend=backend)

    return call, _qkv(batch, side, heads)


def halo(side: int, heads: int, batch: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """HaloNet's attention: blocks of 8, halo 3, head_dim 16, relative tables."""
    tables = [0.1 * torch.randn(27, 16) for _ in range(2)]

    def call(q: Tensor, k: Tensor, v: Tensor, height: Tensor, width: Tensor, backend: str) -> Tensor:
        return ops.halo_attention(q, k, v, 8, 3, height, width, backend=backend)

    return call, [*_qkv(batch, side, heads, 16), *tables]


def focal_modulation(side: int, dim: int, batch: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """FocalNet's modulation with three levels; its inputs are slices of one projection, as in use."""
    projected = torch.randn(batch, side, side, 2 * dim + 4)
    kernels = [0.3 * torch.randn(dim, 1, k, k) / k for k in (3, 5, 7)]
    weight = torch.randn(dim, dim, 1, 1) / dim**0.5

    def call(projected: Tensor, weight: Tensor, *kernels: Tensor, backend: str) -> Tensor:
        query, context, gates = projected.split((dim, dim, 4), -1)
        return ops.focal_modulation(query, context, gates, kernels, weight, backend=backend)

    return call, [projected, weight, *kernels]


def _qkv(batch: int, side: int, heads: int, head_dim: int = 32) -> list[Tensor]:
    """Slices of one fused projection, as in use."""
    return list(torch.randn(batch, side, side, 3, heads, head_dim).unbind(3))


def cases(batch: int) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """What is measured, by name."""
    return {
        "neighborhood 56x56, 2 heads": neighborhood(56, 2, 1, batch),
        "neighborhood 56x56, 2 heads, dilation 8": neighborhood(56, 2, 8, batch),
        "neighborhood 28x28, 4 heads": neighborhood(28, 4, 1, batch),
        "neighborhood 14x14, 8 heads": neighborhood(14, 8, 1, batch),
        "bilevel routing 56x56, 2 heads, topk 1": bilevel_routing(56, 2, 1, batch),
        "bilevel routing 28x28, 4 heads, topk 4": bilevel_routing(28, 4, 4, batch),
        "bilevel routing 14x14, 8 heads, topk 16": bilevel_routing(14, 8, 16, batch),
        "halo 32x32, 8 heads": halo(32, 8, batch),
        "halo 16x16, 8 heads": halo(16, 8, batch),
        "focal modulation 56x56, 96 channels": focal_modulation(56, 96, batch),
        "focal modulation 28x28, 192 channels": focal_modulation(28, 192, batch),
    }


def forward(call: Callable[..., Tensor], inputs: list[Tensor], backend: str) -> Tensor:
    """One call without gradients."""
    with torch.inference_mode():
        return call(*inputs, backend=backend)


def train(call: Callable[..., Tensor], inputs: list[Tensor], backend: str) -> Tensor:
    """One call and its backward; returns the gradients side by side, so that these are compared too."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves, backend=backend)
    return torch.cat([g.flatten() for g in torch.autograd.grad(out.sum(), leaves)])


def measure(
    *, rounds: int, batch: int, device: str | torch.device, say: Callable[[str], None] = quiet
) -> dict[str, Any]:
    """All cases, forward and training."""
    torch.manual_seed(0)
    timings: list[Timing] = []
    measured = list(cases(batch).items())
    for number, (name, (call, inputs)) in enumerate(measured, 1):
        say(f"[{number}/{len(measured)}] {name}")
        inputs = [x.to(device) for x in inputs]
        for mode, run in {"forward": forward, "training": train}.items():
            functions: dict[str, Any] = {b: partial(run, call, inputs, b) for b in ("reference", "auto")}
            timings += compare(f"{name}, {mode}", functions, rounds)
    return found(timings)


if __name__ == "__main__":
    sys.exit(run_program("ops"))
