"""Which backend computes a call: the one that is named, or for "auto" the first that can serve it.

`ORDER` has a list for each operator and type of device, as `visionsel bench ops` came out on the CPU, and as
the kernels were timed on a GPU (H200, bfloat16). `tiled` serves every call, so those behind it are taken by
name alone: `BEHIND` says why they stand there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["BEHIND", "ORDER", "Backend", "against", "compute", "taken_by_auto", "usable"]

ORDER: dict[str, dict[str, tuple[str, ...]]] = {
    "neighborhood": {
        "cuda": ("natten", "triton", "tiled", "flex", "compiled", "reference"),
        "cpu": ("tiled", "compiled", "flex", "reference", "natten", "triton"),
    },
    "bilevel_routing": {
        "cuda": ("triton", "tiled", "flex", "compiled", "reference"),
        "cpu": ("tiled", "compiled", "flex", "reference", "triton"),
    },
    "halo": {
        "cuda": ("tiled", "triton", "compiled", "reference"),
        "cpu": ("tiled", "compiled", "reference", "triton"),
    },
    "focal_modulation": {
        "cuda": ("tiled", "compiled", "reference"),
        "cpu": ("tiled", "compiled", "reference"),
    },
}
"""Backends of an operator on a type of device ("cpu" also for those that have no list), best first."""

REFERENCE = "the plainest code, which the others must equal; auto never takes it"
_BY_NAME = "it compiles for seconds at each new shape; ask for it by name"
_UNMEASURED = "its speed is not measured on this type of device yet; ask for it by name"
_SLOWER = "on a GPU it was slower than triton's kernels, and it compiles for seconds at each new shape"
BEHIND: dict[str, dict[str, str]] = {
    "cuda": {
        "tiled": "a fused kernel serves this call",
        "triton": _UNMEASURED,
        "flex": _SLOWER,
        "compiled": _BY_NAME,
        "reference": REFERENCE,
    },
    "cpu": {
        "natten": "on the CPU it is slower than the reference",
        "triton": "on the CPU its kernels are interpreted, which is for tests",
        "flex": _BY_NAME,
        "compiled": _BY_NAME,
        "reference": REFERENCE,
    },
}
"""Why "auto" does not take a backend that could serve the call, by type of device."""

OPAQUE = ("natten",)
"""Backends that torch.compile cannot see into; they would break its graph."""


def serves_every_call(*call: Any) -> str | None:
    """No reason against."""
    return None


@dataclass(frozen=True)
class Backend:
    """One way to compute an operator.

    Attributes:
        run: takes the checked arguments of the operator.
        why_not: takes the same; the reason why `run` cannot serve them, or None.
        left_out: takes the same; the reason why "auto" leaves them to those behind it, or None.
    """

    run: Callable[..., Tensor]
    why_not: Callable[..., str | None] = serves_every_call
    left_out: Callable[..., str | None] = serves_every_call


def compute(operator: str, backends: Mapping[str, Backend], name: str, *call: Any) -> Tensor:
    """The operator's result by the backend `name`, or for "auto" by the one that suits the call.

    Args:
        operator: a key of `ORDER`.
        backends: the operator's, by name.
        name: one of these, or "auto".
        call: checked arguments of the operator; the first is a tensor on its device.

    Raises:
        ValueError: for an unknown name.
        NotImplementedError: if the named backend cannot serve the call, with the reason.
    """
    if name == "auto":
        name = taken_by_auto(operator, backends, *call)
    elif name not in backends:
        raise ValueError(f"unknown backend {name!r}; choose one of auto, {', '.join(backends)}")
    elif reason := backends[name].why_not(*call):
        raise NotImplementedError(f"backend {name!r} cannot serve this call: {reason}")
    return backends[name].run(*call)


def taken_by_auto(operator: str, backends: Mapping[str, Backend], *call: Any) -> str:
    """The first backend in the operator's order that can serve the call and is not left out of it."""
    for name in _order(operator, call[0].device.type):
        if name == "tiled":
            return name
        if name in OPAQUE and torch.compiler.is_compiling():
            continue
        if backends[name].why_not(*call) is None and backends[name].left_out(*call) is None:
            return name
    raise AssertionError(f"tiled is missing in the order of {operator}")


def usable(operator: str, backends: Mapping[str, Backend], *call: Any) -> list[str]:
    """Names of the backends that can serve a call, best first."""
    order = _order(operator, call[0].device.type)
    return [name for name in order if backends[name].why_not(*call) is None]


def against(operator: str, backends: Mapping[str, Backend], *call: Any) -> dict[str, str]:
    """What speaks against each backend that "auto" does not take for a call, best first."""
    device = call[0].device.type
    taken = taken_by_auto(operator, backends, *call)
    behind = BEHIND[device if device in BEHIND else "cpu"]
    return {
        name: backends[name].why_not(*call) or backends[name].left_out(*call) or behind[name]
        for name in _order(operator, device)
        if name != taken
    }


def _order(operator: str, device_type: str) -> tuple[str, ...]:
    orders = ORDER[operator]
    return orders[device_type] if device_type in orders else orders["cpu"]
