"""Argument checks that the operators share: early, and with the rule in the message."""

import torch
from torch import Tensor


def pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    """Return `(height, width)` of an argument given as one number or two.

    Raises:
        ValueError: if it is not one or two positive integers.
    """
    whole = (int, torch.SymInt)  # a number that torch.export keeps symbolic
    both = (value, value) if isinstance(value, whole) else tuple(value)
    if len(both) != 2 or not all(isinstance(v, whole) and v >= 1 for v in both):
        raise ValueError(f"{name} must be a positive int or a pair of them (height, width), got {value!r}")
    return both[0], both[1]


def check_attention_maps(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check that query, key and value are maps `[B, H, W, heads, head_dim]` of one dtype and device.

    Height and width of the query may differ from those of key and value, and the head_dim of the value from
    theirs; each operator says what it allows beyond this.

    Raises:
        ValueError: naming the first argument that does not fit, its shape and what was expected.
    """
    for name, x in (("q", query), ("k", key), ("v", value)):
        if x.ndim != 5:
            raise ValueError(
                f"{name} must be [B, H, W, heads, head_dim], got {x.ndim} dimensions: {tuple(x.shape)}"
            )
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"q, k and v must share dtype and device; q is {query.dtype} on {query.device}, "
                f"{name} is {x.dtype} on {x.device}"
            )
    if not query.is_floating_point():
        raise ValueError(f"q, k and v must be floating point, got {query.dtype}")
    if query.shape[0] != key.shape[0] or query.shape[3:] != key.shape[3:]:
        raise ValueError(
            "q and k must agree in batch, heads and head_dim, "
            f"got q {tuple(query.shape)} and k {tuple(key.shape)}"
        )
    if key.shape[:4] != value.shape[:4]:
        raise ValueError(
            f"k and v must agree in all but head_dim, got k {tuple(key.shape)} and v {tuple(value.shape)}"
        )


def learns(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def in_autocast_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three as autocast would cast them for a matrix product; as they are where it is off."""
    device = query.device.type
    if not (has_autocast(device) and torch.is_autocast_enabled(device)):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


@torch.compiler.assume_constant_result
def has_autocast(device_type: str) -> bool:
    """Whether there is an autocast for a type of device; the compiler of torch 2.11 cannot ask."""
    return torch.amp.is_autocast_available(device_type)
