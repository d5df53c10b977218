"""Linear layers and convolutions whose weights are kept as oneDNN lays them out: float32, CPU, inference.

oneDNN's kernels read weights in blocks of their own. PyTorch hands it plain ones, which it lays out anew at
each call, as long as a small map takes to be multiplied. Here that is done once, and the copy is kept beside
the weight for as long as that lives: it takes the weight's memory once more.

The operators are those that inductor uses, without public names; they are called in this file only. As in
`visionsel.ops.linear`, where they cannot serve a call, callers compute as PyTorch does.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

import visionsel.ops.linear as plain
from visionsel.ops.checks import learns

__all__ = ["packed_convolution", "packed_linear", "unavailable", "why_not", "why_not_convolution"]

_SAMPLE = 64  # numbers of a weight that are compared with those it had


@dataclass(frozen=True)
class _Packed:
    """A weight in oneDNN's layout, and what it looked like then."""

    tensor: Tensor
    version: int
    pointer: int
    sample: Tensor
    made_for: tuple[Any, ...]


# of each weight, by the part of its outputs
_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, part: tuple[int, int] | None = None
) -> Tensor:
    """`x @ weight.T + bias` by a packed weight; ask `why_not` before.

    Args:
        x: `[..., in]`.
        weight: a parameter `[out, in]`, or `[out, in, 1, 1]`.
        bias: `[out]`, of the part if there is one, or None.
        part: the first output and the one behind the last; None for all.

    Returns:
        `[..., out]`, without a gradient.
    """
    first, stop = part or (0, weight.shape[0])
    packed = _find(weight, (first, stop), (), lambda: _reorder_linear(weight.detach()[first:stop].flatten(1)))
    out = plain.product(x.reshape(-1, weight.shape[1]), packed, bias)
    return out.view(*x.shape[:-1], stop - first)


def packed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`torch.nn.functional.conv2d` by a packed weight; ask `why_not_convolution` before.

    oneDNN chooses the layout for a shape of the input, so a weight is packed for the latest one: for another
    it is packed anew, which costs what a plain call does.

    Args:
        x: `[B, in, H, W]`, channels-last in memory.
        weight: a parameter `[out, in / groups, kh, kw]`.
        bias: `[out]`, or None.
        stride, padding, dilation: down and right.
        groups: of channels.

    Returns:
        `[B, out, H', W']`, channels-last in memory, without a gradient.
    """
    settings = list(padding), list(stride), list(dilation), groups
    made_for = (tuple(x.shape), tuple(padding), tuple(stride), tuple(dilation), groups)
    packed = _find(
        weight, None, made_for, lambda: _reorder_convolution(weight.detach(), *settings, list(x.shape))
    )
    operator: Any = torch.ops.mkldnn._convolution_pointwise
    return operator(x, packed, bias, *settings, "none", [], "")


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why a linear layer cannot run with a packed weight; None if it can."""
    if (reason := plain.why_not(x, weight, bias)) is not None:
        return reason
    if not _works():
        return _no_operators()
    if learns(x, weight, bias):
        return "packed weights have no gradient, and autograd records this call"
    if type(weight) is not nn.Parameter:
        return "it takes parameters: another tensor would have to be packed at each call"
    if weight.is_inference():
        return "weights made in inference mode do not count their changes"
    if x.numel() == 0 or weight.numel() == 0:
        return "oneDNN has no empty products"
    if not (weight.is_contiguous() or _is_channels_last(weight)):
        return "it takes weights that lie in memory without gaps"
    return None


def why_not_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why a convolution cannot run with a packed weight; None if it can."""
    if not _is_channels_last(x):
        return "it takes batches of maps that lie channels-last in memory"
    return why_not(x, weight, bias)


def unavailable() -> str | None:
    """Why this PyTorch cannot keep packed weights; None if it can."""
    return plain.unavailable() or (None if _works() else _no_operators())


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _no_operators() -> str:
    return f"PyTorch {torch.__version__} has no operators of the known form that pack weights for oneDNN"


def _find(weight: Tensor, part: Any, made_for: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
    """The packed weight, made anew if the weight has changed since."""
    of_weight = _kept.get(weight)
    if of_weight is None:
        of_weight = _kept[weight] = {}
    found: _Packed | None = of_weight.get(part)
    if (
        found is not None
        and found.version == weight._version
        and found.pointer == weight.data_ptr()
        and found.made_for == made_for
        # what is written through `.data` counts no version
        and torch.equal(_sample(weight), found.sample)
    ):
        return found.tensor
    # a tensor made in inference mode could not be used outside
    with torch.inference_mode(False), torch.no_grad():
        looks = weight._version, weight.data_ptr(), _sample(weight).clone()
        packed = make()
    of_weight[part] = _Packed(packed, *looks, made_for)
    return packed


def _sample(weight: Tensor) -> Tensor:
    """Some of its numbers, from all over."""
    weight = weight.detach()
    step = max(1, weight.numel() // _SAMPLE)
    # by the order of memory, which need not be that of the axes
    return weight.as_strided((weight.numel() // step,), (step,))


def _reorder_linear(weight: Tensor) -> Tensor:
    operator: Any = torch.ops.mkldnn._reorder_linear_weight
    return operator(weight.contiguous())


def _reorder_convolution(weight: Tensor, *settings: Any) -> Tensor:
    operator: Any = torch.ops.mkldnn._reorder_convolution_weight
    return operator(weight, *settings)


@functools.cache
def _works() -> bool:
    """Whether the operators are there and compute as expected."""
    kernel = torch.arange(6, dtype=torch.float32, device="cpu").view(2, 3, 1, 1)
    x = torch.ones(1, 3, 1, 1, device="cpu").contiguous(memory_format=torch.channels_last)
    bias = torch.ones(2, device="cpu")
    try:
        one = plain.product(x.flatten(1), _reorder_linear(kernel.flatten(1)), bias)
        settings = [0, 0], [1, 1], [1, 1], 1
        packed = _reorder_convolution(kernel, *settings, [1, 3, 1, 1])
        two = torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *settings, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):  # not there, not for this processor, other arguments
        return False
    return bool(one.tolist() == two.flatten(1).tolist() == [[4, 13]])
