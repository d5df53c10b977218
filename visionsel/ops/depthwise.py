"""Depthwise convolutions that learn on the CPU: gradients of wide kernels, three columns of taps at a time.

oneDNN has a kernel of its own for the gradient of depthwise weights of up to three columns. Wider ones it
leaves to a general one, which takes several times as long, and scratch that grows with the channels whatever
the map. Columns of taps do not know each other: `weight.grad[..., j]` is that of a kernel of one column on
the input shifted by j, so a wide gradient is that of narrow kernels, side by side.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionsel.ops.checks import learns
from visionsel.ops.compilation import is_watched

__all__ = ["conv2d", "why_not"]

_COLUMNS = 3  # of taps that oneDNN's kernel takes
_DTYPES = (torch.float32, torch.bfloat16)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d`; where `why_not` allows it, with the faster gradient of the weight.

    Values are PyTorch's own, gradients equal to rounding.

    Args:
        x: `[B, in, H, W]`.
        weight: `[out, in / groups, kh, kw]`.
        bias: `[out]`, or None.
        stride, padding, dilation: down and right.
        groups: of channels.

    Returns:
        `[B, out, H', W']`. Gradients of every order flow to x, weight and bias.
    """
    if why_not(x, weight, bias, stride, padding, dilation, groups) is not None:
        return F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    out: Tensor = _Depthwise.apply(x, weight, bias, tuple(padding))
    return out


def why_not(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    """Why a call of `conv2d` is left to PyTorch; None if it is not."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "compilers and tracers are shown PyTorch's own convolution, which they know"
    if not learns(weight):
        return "the weight learns nothing"
    if x.ndim != 4 or weight.ndim != 4 or x.numel() == 0:
        return "it takes batches of maps that are not empty"
    if not (groups == x.shape[1] == weight.shape[0]) or tuple(stride) != (1, 1) or tuple(dilation) != (1, 1):
        return "it takes depthwise kernels with stride and dilation 1"
    width = weight.shape[3]
    if width <= _COLUMNS:
        return f"kernels of up to {_COLUMNS} columns are fast as they are"
    if not width - x.shape[3] <= padding[1] < width:
        return "the kernel is too wide for the map and its padding"
    for tensor in (x, weight, bias):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"it takes plain tensors, not {type(tensor).__name__}"
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return f"it takes dense tensors on the cpu, not {tensor.layout} on {tensor.device}"
    dtypes = {tensor.dtype for tensor in (x, weight, bias) if tensor is not None}
    if not dtypes.issubset(_DTYPES):
        return f"it takes float32 and bfloat16, not {dtypes}"
    if torch.is_autocast_enabled("cpu"):
        if torch.get_autocast_dtype("cpu") not in _DTYPES:
            return f"it takes float32 and bfloat16, and autocast casts to {torch.get_autocast_dtype('cpu')}"
    elif len(dtypes) > 1:
        return f"it takes one dtype for all, not {dtypes}"
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "oneDNN is missing or switched off"
    if is_watched():
        return "a transform of torch.func, forward-mode differentiation or a dispatch mode looks on"
    return None


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution; its gradient is made of operators with gradients of their own."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, padding = inputs
        ctx.save_for_backward(x, weight)
        ctx.padding = padding

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        return (
            _backward(grad, x, weight, ctx.padding, (True, False)) if for_x else None,
            _weight_gradient(grad, x, weight, ctx.padding) if for_weight else None,
            grad.sum((0, 2, 3)) if for_bias else None,
            None,
        )


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    # the layout that oneDNN's kernel is fast on, and that a map which is cut and padded keeps
    grad = grad.contiguous(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    parts: list[Tensor] = []
    for part in weight.detach().split(_COLUMNS, dim=3):
        left = padding[1] - _COLUMNS * len(parts)
        right = grad.shape[3] + part.shape[3] - 1 - x.shape[3] - left
        parts.append(_backward(grad, F.pad(x, (left, right)), part, (padding[0], 0), (False, True)))
    return torch.cat(parts, dim=3)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], wanted: tuple[bool, bool]
) -> Tensor:
    """The gradient of x, or of the weight."""
    settings = [1, 1], [*padding], [1, 1], False, [0, 0], weight.shape[0], [*wanted, False]
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *settings)[0 if wanted[0] else 1]
