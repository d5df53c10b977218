"""Linear layers in float32 on the CPU by oneDNN, for processors where it is the faster library.

PyTorch on x86 leaves the float32 products of `F.linear` to MKL and brings oneDNN along for convolutions. On
some processors, AMD's among them, MKL reaches half of what oneDNN does; on others they are equal. Which one
is ahead is measured when it matters, not guessed from the processor's name: see `onednn_is_faster`.

oneDNN's product is an operator of PyTorch that inductor uses, without a public name and without a gradient:
it is called in this file only, and a PyTorch that lacks it computes everything by `F.linear`.
"""

import functools
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionsel.ops.checks import learns
from visionsel.ops.compilation import is_watched

__all__ = ["linear", "onednn_is_faster", "product", "taken_by_auto", "unavailable", "why_not"]

_BACKENDS = ("auto", "onednn", "default")

# how much faster oneDNN must be to be taken: a tie keeps PyTorch's own, whatever the noise of the clock
_MARGIN = 1.1
# multiplications of one timed product, unless 32 rows have more: a millisecond on one core
_WORK = 2**26

_found: dict[tuple[int, int, int, bool, int], bool] = {}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """`x @ weight.T + bias`, as `torch.nn.functional.linear`, equal to it up to float32 rounding.

    Args:
        x: `[..., in]`, any number of leading axes, which may be empty.
        weight: `[out, in]`.
        bias: `[out]`, or None.
        backend: "auto" takes oneDNN where it can serve the call and `onednn_is_faster`, but never under
            `torch.use_deterministic_algorithms`, since the choice rests on a clock; "onednn"; or "default",
            which is `F.linear`.

    Returns:
        `[..., out]`. Gradients of every order flow to all three arguments.

    Raises:
        ValueError: for shapes that do not fit, and an unknown backend.
        NotImplementedError: if oneDNN is asked for and cannot serve the call (see `why_not`).

    Examples:
        >>> import torch
        >>> from visionsel.ops.linear import linear
        >>> linear(torch.randn(2, 49, 64), torch.randn(192, 64)).shape
        torch.Size([2, 49, 192])
    """
    if backend not in _BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(_BACKENDS)}")
    if backend == "default":
        return F.linear(x, weight, bias)
    reason = why_not(x, weight, bias)
    if reason is not None:
        if backend == "onednn":
            raise NotImplementedError(f"backend 'onednn' cannot serve this call: {reason}")
        return F.linear(x, weight, bias)
    _check(x, weight, bias)
    if x.numel() == 0 or weight.numel() == 0:  # oneDNN has no empty products
        return F.linear(x, weight, bias)
    if backend == "auto" and not taken_by_auto(x, weight, bias):
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, weight.shape[1])
    if learns(x, weight, bias):
        out = _Product.apply(flat, weight, bias)
    else:
        out = product(flat, weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def taken_by_auto(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether "auto" takes oneDNN for a call of `linear`.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        bias: `[out]`, or None.
    """
    if why_not(x, weight, bias) is not None or torch.are_deterministic_algorithms_enabled():
        return False
    return x.numel() > 0 and onednn_is_faster(x.numel() // weight.shape[1], weight, bias is not None)


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why oneDNN cannot serve a call of `linear`; None if it can."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "compilers and tracers are shown PyTorch's own linear, which they know"
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"it takes plain tensors, {name} is a {type(tensor).__name__}"
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or tensor.layout != torch.strided:
            return (
                "it takes dense float32 tensors on the cpu, "
                f"{name} is {tensor.dtype}, {tensor.layout} on {tensor.device}"
            )
    if torch.is_autocast_enabled("cpu"):
        return "autocast computes in half precision"
    if is_watched():
        return "a transform of torch.func, forward-mode differentiation or a dispatch mode looks on"
    return unavailable()


def unavailable() -> str | None:
    """Why this PyTorch has no oneDNN for linear layers; None if it has."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN (torch.backends.mkldnn.is_available() is False)"
    if not torch.backends.mkldnn.enabled:
        return "oneDNN is switched off (torch.backends.mkldnn.enabled is False)"
    if _operator() is None:
        return f"PyTorch {torch.__version__} has no torch.ops.mkldnn._linear_pointwise of the known form"
    return None


def onednn_is_faster(rows: int, weight: Tensor, bias: bool = False) -> bool:
    """Whether this machine multiplies `rows` rows of numbers by a weight faster through oneDNN.

    Measured once in a process for each size (`rows` rounded up to a power of two, `in`, `out`), with or
    without bias, and number of threads: both products in turn, six times each, compared by the shortest time
    of each. That takes some milliseconds, since long inputs are stood for by shorter ones. oneDNN must be 1.1
    times as fast. Where the two are that close, the answer may differ between processes, and with it the
    rounding of results.

    Args:
        rows: of the input, all leading axes together; 1 or more.
        weight: `[out, in]`, float32 on the CPU; its values do not matter.
        bias: whether one is added, for which PyTorch's own makes a pass over the output.

    Returns:
        False also where there is no oneDNN or nothing to multiply.
    """
    if unavailable() is not None or weight.numel() == 0:
        return False
    out_features, in_features = weight.shape
    rows = min(1 << (rows - 1).bit_length(), max(32, _WORK // weight.numel()))
    key = (rows, in_features, out_features, bias, torch.get_num_threads())
    if key not in _found:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            x = torch.ones(rows, in_features, dtype=torch.float32, device="cpu")
            added = x.new_ones(out_features) if bias else None
            ours, theirs = _seconds([product, F.linear], x, weight.detach(), added)
        _found[key] = ours * _MARGIN < theirs
    return _found[key]


def _seconds(
    ways: list[Callable[[Tensor, Tensor, Tensor | None], Tensor]],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> list[float]:
    """The shortest of six runs of each, in turn; what else runs on the machine only lengthens them."""
    shortest = [float("inf")] * len(ways)
    for _ in range(6):
        for i, way in enumerate(ways):
            start = perf_counter()
            way(x, weight, bias)
            shortest[i] = min(shortest[i], perf_counter() - start)
    return shortest


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise on shapes that do not fit."""
    if weight.ndim != 2:
        raise ValueError(f"weight must be [out, in], got {weight.ndim} dimensions: {tuple(weight.shape)}")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"the last axis of x must be weight's {weight.shape[1]} input features, got {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")


@functools.cache
def _operator() -> Callable[..., Tensor] | None:
    """PyTorch's linear by oneDNN, if there is one and it multiplies as expected."""
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operator is None:
        return None
    x = torch.arange(6, dtype=torch.float32, device="cpu").view(2, 3)
    try:
        right = operator(x, x, x[0, :2].contiguous(), "none", [], "").tolist() == [[5, 15], [14, 51]]
    except (RuntimeError, TypeError):  # not for this processor, or with other arguments
        return None
    return operator if right else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` of `[N, in]` and `[out, in]` by oneDNN, without a gradient."""
    operator: Any = _operator()
    return operator(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """`product` with its gradient, which is made of products with gradients of their own."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        for_x, for_weight, _ = ctx.needs_input_grad
        # what a frozen weight's gradient would need is not kept
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _Product.apply(grad, weight.t(), None) if for_x else None,
            # oneDNN would copy both operands of this one, which costs what it gains
            grad.t() @ x if for_weight else None,
            grad.sum(0) if for_bias else None,
        )
