"""Functions on tensors by `torch.compile`, each kind of call compiled once.

The compiler counts how often it had to compile one piece of code anew: after eight times (shapes, dtypes,
training or not) it gives up, which with `fullgraph=True` is an error and without it is slow in silence. Here
every kind of call has its own copy of the code, so that this never happens.
"""

import functools
import sysconfig
from collections.abc import Callable, Hashable
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.utils import _python_dispatch

__all__ = [
    "call_compiled",
    "is_exporting",
    "is_transformed",
    "is_watched",
    "no_compiler",
    "sizes_are_fixed",
    "why_not",
]


def call_compiled(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)`, compiled at the first call of its kind, which takes seconds.

    A kind is all that the compiled code depends on: values of numbers, shapes, strides, dtypes and devices of
    tensors, whether gradients are needed, autocast, the number of threads. The last 256 kinds are kept.
    Backward runs once: the compiler reuses what it stored (no `retain_graph`, no gradient of a gradient).

    Where another compiler or tracer looks on, and for empty tensors, it is the plain call.

    Args:
        function: a plain function on tensors and constants, without side effects.
        args: its arguments by position: tensors, lists of tensors, and constants that can be hashed.
    """
    if torch.compiler.is_compiling():
        return function(*args)
    tensors = [x for arg in args for x in (arg if isinstance(arg, list) else [arg]) if isinstance(x, Tensor)]
    traced = torch.jit.is_tracing() or type(torch.empty(0)) is not Tensor
    if traced or any(x.numel() == 0 for x in tensors):
        return function(*args)
    # code for one tensor given twice is not that for two
    same = tuple(next(i for i, y in enumerate(tensors) if y is x) for x in tensors)
    return _compiled(function, (_kind(args), same, _state(tensors[0].device.type)))(*args)


def no_compiler(device_type: str) -> str | None:
    """Why `torch.compile` cannot make code for a type of device on this machine; None if it can."""
    if torch.compiler.is_compiling():
        return None  # whoever compiles the whole found one
    if device_type == "cpu":
        return _no_cpp_compiler()
    if device_type == "cuda":
        return _no_triton()
    return f"torch.compile is used on cpu and cuda, the tensors are on {device_type}"


def why_not(query: Tensor, *others: Any) -> str | None:
    """Why a backend "compiled" cannot serve a call; None if it can."""
    return no_compiler(query.device.type)


def sizes_are_fixed(x: Tensor) -> bool:
    """Whether height and width of `[B, H, W, ...]` are plain numbers, not symbols of a trace."""
    return not torch.compiler.is_compiling() or (
        has_static_value(x.shape[1]) and has_static_value(x.shape[2])
    )


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Whether torch.export looks on; under `torch.compile` of torch 2.11 its own function says yes too."""
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result
def is_transformed() -> bool:
    """Whether a transform of `torch.func` is at work, whose tensors and gradients look like any other."""
    return torch._C._functorch.maybe_current_level() is not None


def is_watched() -> bool:
    """Whether something follows PyTorch's operators that would not know what an eager call is made of here.

    A transform of `torch.func`, forward-mode differentiation or a dispatch mode.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _python_dispatch._get_current_dispatch_mode() is not None
    )


@functools.lru_cache(maxsize=256)
def _compiled(function: Callable[..., Tensor], kind: Hashable) -> Callable[..., Tensor]:
    original: Any = function
    # the compiler keeps its results, and counts them, by code object
    copy = FunctionType(
        original.__code__.replace(),
        original.__globals__,
        original.__name__,
        original.__defaults__,
        original.__closure__,
    )
    return torch.compile(copy, dynamic=False, fullgraph=True)


def _kind(value: Any) -> Hashable:
    """What compiled code depends on of an argument."""
    if isinstance(value, Tensor):
        layout = value.shape, value.stride(), value.dtype, value.device
        return type(value), layout, value.requires_grad, value.is_inference()
    if isinstance(value, list | tuple):
        return tuple(_kind(item) for item in value)
    return value


def _state(device_type: str) -> Hashable:
    """What compiled code depends on beside its arguments."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_num_threads(),
    )


@functools.cache
def _no_cpp_compiler() -> str | None:
    """Why no C++ can be compiled here, by the search that `torch.compile` makes."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # here, since its import is slow

    try:
        get_cpp_compiler()
    except RuntimeError:
        return "no C++ compiler was found: install g++ (clang++ on macOS, cl on Windows) or name yours in CXX"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return f"the headers of Python are missing, {header}: install python3-dev or its like"
    return None


@functools.cache
def _no_triton() -> str | None:
    from torch.utils._triton import has_triton

    if not has_triton():
        return "triton, which compiles for GPUs, is not installed or does not serve this one"
    return None
