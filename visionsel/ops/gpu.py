"""What Triton kernels can serve, on which GPUs, the sizes that they need, and how PyTorch comes to know them.

For the backends "triton".
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from visionsel.ops.compilation import is_exporting, is_transformed, is_watched

__all__ = [
    "capable",
    "installed",
    "interpreted",
    "no_second_derivative",
    "operator",
    "padded",
    "power_of_two",
    "refusal",
    "unmeasured",
]

FOUND = importlib.util.find_spec("triton") is not None


def refusal(query: Tensor, value: Tensor, most: int = 256) -> str | None:
    """What the kernels lack for maps `[B, H, W, heads, head_dim]` of this kind; None if nothing.

    Args:
        query, value: the maps.
        most: the largest head dim that the kernels are tested with on a GPU, in this precision.
    """
    device = query.device
    if is_exporting():
        return "exported programs hold no Triton kernels, since they run anywhere"
    if is_transformed():
        return "the Triton kernels know no transforms of torch.func"
    if device.type != "cuda" and not interpreted():
        return f"the Triton kernels run on cuda, the tensors are on {device.type}"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the Triton kernels compute in float32, float16 or bfloat16, the tensors are {query.dtype}"
    if max(query.shape[4], value.shape[4]) > most:
        return (
            f"the Triton kernels take head dims up to {most} in {query.dtype}, "
            f"got {query.shape[4]} of q and k and {value.shape[4]} of v"
        )
    if not installed():
        return "triton is not installed: pip install triton; it comes with PyTorch for CUDA on Linux"
    if device.type == "cuda" and not capable(device.index):
        return "the Triton kernels need a GPU of compute capability 8.0 (Ampere) or later"
    return None


def unmeasured(query: Tensor, *others: Any) -> str | None:
    """Why "auto" leaves a call to other backends though the kernels could serve it; None if it does not."""
    if query.dtype == torch.float32:
        return "the speed of the Triton kernels is not measured in float32 yet; ask for them by name"
    return None


def installed() -> bool:
    """Whether there is a triton to import."""
    return FOUND


def interpreted() -> bool:
    """Whether triton runs its kernels step by step in Python, on any device: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def capable(index: int | None) -> bool:
    """Whether a CUDA device has the instructions and the shared memory of the kernels."""
    return torch.cuda.get_device_capability(index) >= (8, 0)


def operator(
    name: str,
    compute: Callable[..., Any],
    empty: Callable[..., Any],
    backward: Callable[..., Any],
    keep: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """`compute`, a function that launches kernels, with its derivative, known to PyTorch as an operator.

    In eager mode it is called past PyTorch's dispatcher, whose way through an operator written in Python and
    its derivative takes the host as long as launching the kernels. A compiler, a mode (of fake tensors, of
    selective checkpointing), a profiler, a tracer or a kind of tensor of its own sees the operator.

    Args:
        name: "visionsel::...", the operator's.
        compute: of tensors, None and numbers by position; annotated, as `torch.library.custom_op` needs it.
        empty: of the same; tensors like those that `compute` returns.
        backward: of a context and the gradients of what it returns; as `register_autograd` takes it.
        keep: of a context, inputs and output: saves what `backward` needs.

    Returns:
        The function to call; its `operator` is what PyTorch has.
    """
    known = torch.library.custom_op(name, mutates_args=())(compute)
    known.register_fake(empty)
    known.register_autograd(backward, setup_context=keep)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = compute(*inputs)
            if keep is not None:
                keep(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or _is_watched(inputs):
            return known(*inputs)
        return Direct.apply(*inputs) if torch.is_grad_enabled() else compute(*inputs)

    call.operator = known  # type: ignore[attr-defined]
    return call


def _is_watched(inputs: tuple[Any, ...]) -> bool:
    """Whether somebody wants to see which operators a call is made of."""
    if is_watched() or torch.autograd._profiler_enabled() or torch.jit.is_tracing():
        return True
    return any(isinstance(x, Tensor) and type(x) not in (Tensor, torch.nn.Parameter) for x in inputs)


def no_second_derivative(ctx: Any, *_: Any) -> None:
    """The backward of a backward kernel.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError("the Triton kernels have no second derivatives; use backend='tiled'")


def padded(size: int) -> int:
    """The power of two that holds so many, at least 16 as matrix products on the tensor cores need."""
    return max(16, power_of_two(size))


def power_of_two(size: int) -> int:
    """The smallest that holds so many."""
    return 1 << (size - 1).bit_length()
