"""Index tables that depend on shapes alone, built once and kept.

A plan is a tuple of tensors computed from integers (map size, kernel, ...). In eager mode it is worth
keeping: building one costs more launches than the attention that uses it. It is built afresh while a compiler
or a fake tensor mode is looking on, since it would be a symbol of that run.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def keep_plans(build: Callable[P, tuple[Tensor, ...]]) -> Callable[P, tuple[Tensor, ...]]:
    """Wrap a plan builder so that equal arguments give the tables made before; callers never write to them.

    `build` takes hashable arguments only, the device among them.
    """

    @functools.lru_cache(maxsize=128)
    def kept(*args: P.args, **kwargs: P.kwargs) -> tuple[Tensor, ...]:
        with torch.inference_mode(False):  # autograd cannot save an inference tensor for backward
            return build(*args, **kwargs)

    @functools.wraps(build)
    def lookup(*args: P.args, **kwargs: P.kwargs) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:
            return build(*args, **kwargs)
        return kept(*args, **kwargs)  # type: ignore[arg-type]  # an unhashable argument raises TypeError

    return lookup


def remainder(numbers: Tensor, size: int) -> Tensor:
    """`numbers % size`, which has no translation to ONNX where the size is traced."""
    return numbers - numbers // size * size
