"""A convolution that is PyTorch's own in all but speed on the CPU."""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

import visionsel.ops.packed as packing
from visionsel.ops.depthwise import conv2d

__all__ = ["Conv2d"]


@register_notrace_module
class Conv2d(nn.Conv2d):
    """`nn.Conv2d` whose wide depthwise kernels learn faster (`visionsel.ops.depthwise`), on the CPU.

    With `packed`, which `visionsel.accelerate` sets, its weight is kept in oneDNN's layout for inference.
    Where neither can serve, it computes as `nn.Conv2d`.
    """

    packed = False

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, H, W]` -> `[B, out_channels, H', W']`."""
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        else:
            return _convolve(x, self)


def _convolve(x: Tensor, layer: Conv2d) -> Tensor:
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return layer._conv_forward(x, layer.weight, layer.bias)
    settings = layer.stride, layer.padding, layer.dilation, layer.groups
    if layer.packed:
        if x.ndim == 4 and not layer.weight.is_contiguous():
            # channels-last weights give channels-last maps
            x = x.contiguous(memory_format=torch.channels_last)
        if packing.why_not_convolution(x, layer.weight, layer.bias) is None:
            return packing.packed_convolution(x, layer.weight, layer.bias, *settings)
    return conv2d(x, layer.weight, layer.bias, *settings)
