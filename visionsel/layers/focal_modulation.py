"""Focal modulation as a layer (Yang et al. 2022, arXiv 2203.11926, section 3.2).

Its parameters have the names of the authors' code.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from visionsel.ops.focal_modulation import focal_modulation

__all__ = ["FocalModulation"]


def weights_suffice(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` would do nothing but apply its weights as a plain `kind` does.

    Not so once somebody has put an adapter or a parametrization in its place, quantized or sharded it, or
    hung hooks on it (pruning, weight norm, offloading, Grad-CAM): then it has to be called.
    """
    return (
        type(module) is kind
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and not module._backward_pre_hooks
        and not module._backward_hooks
        and "forward" not in module.__dict__
    )


def plain_kernels(focal_layers: nn.ModuleList, h: nn.Module) -> list[Tensor] | None:
    """The depthwise kernels, or None if the operator may not stand in for the levels and for `h`."""
    kernels: list[Any] = []
    for level in focal_layers:
        if not (
            isinstance(level, nn.Sequential) and weights_suffice(level, nn.Sequential) and len(level) == 2
        ):
            return None
        conv, act = level
        if (
            not weights_suffice(conv, nn.Conv2d)
            or not weights_suffice(act, nn.GELU)
            or act.approximate != "none"
        ):
            return None
        kernels.append(conv.weight)
    return kernels if weights_suffice(h, nn.Conv2d) else None


@register_notrace_module
class FocalModulation(nn.Module):
    """Focal modulation on maps of any size: `[B, H, W, dim]` -> `[B, H, W, dim]`.

    Args:
        dim: channels.
        focal_window: kernel size of the first level (3 in the T, S and B models, 5 in `focalnet_large_fl3`).
        focal_level: levels besides the global one (2 in the "srf" models, 3 in "lrf" and isotropic ones).
        focal_factor: by how much the kernel grows from level to level.
        bias: of the projection before the modulation and of the modulator; the depthwise kernels have none.
        use_post_norm: a LayerNorm before the output projection (the authors' `use_postln_in_modulation`).
        normalize_modulator: divide the sum of the levels by their number.
        proj_drop: dropout after the output projection.
        backend: of `visionsel.ops.focal_modulation`.
        device, dtype: of the parameters.

    Raises:
        ValueError: if a number is out of range, or the kernels would be even.

    Examples:
        >>> import torch
        >>> from visionsel.layers import FocalModulation
        >>> FocalModulation(dim=32)(torch.randn(1, 20, 23, 32)).shape
        torch.Size([1, 20, 23, 32])
    """

    def __init__(
        self,
        dim: int,
        focal_window: int = 3,
        focal_level: int = 2,
        focal_factor: int = 2,
        bias: bool = True,
        use_post_norm: bool = False,
        normalize_modulator: bool = False,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("dim", dim, 1),
            ("focal_window", focal_window, 1),
            ("focal_level", focal_level, 0),
            ("focal_factor", focal_factor, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        kernel_sizes = [focal_window + focal_factor * level for level in range(focal_level)]
        if any(size % 2 == 0 for size in kernel_sizes):
            raise ValueError(
                f"focal_window {focal_window} and focal_factor {focal_factor} give kernels {kernel_sizes}; "
                "all must be odd: choose an odd window and an even factor"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim = dim
        self.focal_level = focal_level
        self.normalize_modulator = normalize_modulator
        self.backend = backend
        self.f = nn.Linear(dim, 2 * dim + focal_level + 1, bias=bias, **dd)
        self.h = nn.Conv2d(dim, dim, 1, bias=bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.focal_layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim, bias=False, **dd), nn.GELU()
            )
            for size in kernel_sizes
        )
        self.ln = nn.LayerNorm(dim, **dd) if use_post_norm else nn.Identity()

    def _modulate(self, x: Tensor) -> Tensor:
        """By the operator, unless a submodule has become more than its weights."""
        kernels = plain_kernels(self.focal_layers, self.h)
        if kernels is None:
            return self._modulate_by_modules(x)
        channels = (self.dim, self.dim, self.focal_level + 1)
        if weights_suffice(self.f, nn.Linear):
            # three projections into memory of their own: slices of one have gaps and would be copied
            weights = self.f.weight.split(channels)
            biases = (None, None, None) if self.f.bias is None else self.f.bias.split(channels)
            query, context, gates = (F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
        else:
            query, context, gates = self.f(x).split(channels, dim=-1)
        return focal_modulation(
            query,
            context,
            gates,
            kernels,
            self.h.weight,
            self.h.bias,
            normalize=self.normalize_modulator,
            backend=self.backend,
        )

    def _modulate_by_modules(self, x: Tensor) -> Tensor:
        """The same by calling every submodule; what TorchScript compiles."""
        x = self.f(x).permute(0, 3, 1, 2)
        query, context, gates = x.split([self.dim, self.dim, self.focal_level + 1], dim=1)
        gathered = torch.zeros_like(query)
        for level, layer in enumerate(self.focal_layers):
            context = layer(context)
            gathered = gathered + context * gates[:, level : level + 1]
        overall = F.gelu(context.mean((2, 3), keepdim=True))
        gathered = gathered + overall * gates[:, self.focal_level :]
        if self.normalize_modulator:
            gathered = gathered / (self.focal_level + 1)
        return (query * self.h(gathered)).permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` -> `[B, H, W, dim]`."""
        if torch.jit.is_scripting():
            x = self._modulate_by_modules(x)
        else:
            x = self._modulate(x)
        return self.proj_drop(self.proj(self.ln(x)))
