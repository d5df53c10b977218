"""Focal modulation: each query is multiplied by a summary of ever wider contexts, chosen by gates.

The operator of FocalNets (Yang et al. 2022, arXiv 2203.11926, section 3.2). The projections before and
after it, and the optional norm after it, are the layer's.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visionsel.ops.choice import Backend, compute
from visionsel.ops.compilation import call_compiled, why_not
from visionsel.ops.focal_modulation.reference import reference
from visionsel.ops.focal_modulation.tiled import tiled

__all__ = ["focal_modulation"]

BACKENDS = {
    "tiled": Backend(tiled),
    "reference": Backend(reference),
    # on the CPU slower than tiled: the compiler changes the layout of maps around its loops
    "compiled": Backend(partial(call_compiled, tiled), why_not),
}


def example_calls(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Calls that backends tell apart, as they receive them."""
    x = torch.zeros(1, 8, 8, 16, device=device)
    leaf = x.clone().requires_grad_()
    gates = torch.zeros(1, 8, 8, 2, device=device)
    kernels = [torch.zeros(16, 1, 3, 3, device=device)]
    weight = torch.zeros(16, 16, 1, 1, device=device)
    return {
        "inference": (x, x, gates, kernels, weight, None, False),
        "training": (leaf, leaf, gates, kernels, weight, None, False),
    }


def focal_modulation(
    query: Tensor,
    context: Tensor,
    gates: Tensor,
    kernels: Sequence[Tensor],
    modulator_weight: Tensor,
    modulator_bias: Tensor | None = None,
    *,
    normalize: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Modulate queries by their focal context (Yang et al. 2022, eq. 4 to 7).

    Level l of L is `context_l = gelu(depthwise_l(context_{l-1}))`, zero-padded to the same size; one more
    level is the gelu of the last one's mean over the map. With a linear h the output is
    `query * h(sum over l of gates_l * context_l)`.

    Args:
        query: `[B, H, W, C]`.
        context: `[B, H, W, C]`, what the first level convolves.
        gates: `[B, H, W, L + 1]`, one a level, the global level last.
        kernels: L depthwise weights `[C, 1, k, k]`, k odd; k may exceed the map. FocalNets have 3, 5 (, 7).
        modulator_weight: of h, `[C, C, 1, 1]`.
        modulator_bias: of h, `[C]`, or None.
        normalize: divide the sum by L + 1 (the authors' `normalize_modulator`).
        backend: "auto", or one by name: "tiled" (any device), "compiled" (compiles at each new shape) or
            "reference" (the plainest code).

    Returns:
        The modulated queries `[B, H, W, C]`.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit as said above, or the backend is unknown.
        NotImplementedError: if the backend asked for cannot serve the call, with the reason.

    Examples:
        >>> import torch
        >>> from visionsel import ops
        >>> x = torch.randn(1, 14, 14, 32)
        >>> gates = torch.rand(1, 14, 14, 3)  # two levels and the global one
        >>> kernels = [torch.randn(32, 1, 3, 3), torch.randn(32, 1, 5, 5)]
        >>> ops.focal_modulation(x, x, gates, kernels, torch.randn(32, 32, 1, 1)).shape
        torch.Size([1, 14, 14, 32])
    """
    _check(query, context, gates, kernels, modulator_weight, modulator_bias)
    call = query, context, gates, list(kernels), modulator_weight, modulator_bias, normalize
    return compute("focal_modulation", BACKENDS, backend, *call)


def _check(
    query: Tensor,
    context: Tensor,
    gates: Tensor,
    kernels: Sequence[Tensor],
    modulator_weight: Tensor,
    modulator_bias: Tensor | None,
) -> None:
    """Raise on an invalid call."""
    for name, x in (("query", query), ("context", context), ("gates", gates)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, H, W, channels], got {x.ndim} dimensions: {tuple(x.shape)}")
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                "query, context and gates must share dtype and device; "
                f"query is {query.dtype} on {query.device}, {name} is {x.dtype} on {x.device}"
            )
    if not query.is_floating_point():
        raise ValueError(f"query, context and gates must be floating point, got {query.dtype}")
    if context.shape != query.shape:
        raise ValueError(f"context must have query's shape {tuple(query.shape)}, got {tuple(context.shape)}")
    expected = (*query.shape[:3], len(kernels) + 1)
    if gates.shape != expected:
        raise ValueError(
            f"gates must be {expected}: one for each of {len(kernels)} kernels, then one for the whole map; "
            f"got {tuple(gates.shape)}"
        )

    channels = query.shape[3]
    weights = {f"kernels[{level}]": kernel for level, kernel in enumerate(kernels)}
    for name, kernel in weights.items():
        shape = tuple(kernel.shape)
        if len(shape) != 4 or shape[:2] != (channels, 1) or shape[2] % 2 == 0 or shape[3] % 2 == 0:
            raise ValueError(f"{name} must be [{channels}, 1, k, k] with odd k, got {shape}")
    weights["modulator_weight"] = modulator_weight
    if modulator_weight.shape != (channels, channels, 1, 1):
        raise ValueError(
            f"modulator_weight must be {(channels, channels, 1, 1)}, got {tuple(modulator_weight.shape)}"
        )
    if modulator_bias is not None:
        weights["modulator_bias"] = modulator_bias
        if modulator_bias.shape != (channels,):
            raise ValueError(f"modulator_bias must be {(channels,)}, got {tuple(modulator_bias.shape)}")
    for name, weight in weights.items():
        if weight.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {weight.device}")
        # autocast brings inputs and weights to one dtype by itself
        if weight.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise ValueError(f"{name} must have query's dtype {query.dtype}, got {weight.dtype}")
