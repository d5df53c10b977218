"""Floor 1: selective attention as functions on tensors; no parameters, no modules.

Every operator has `backend="reference"`, the plainest code and the truth, and faster ones that equal it.
"""

from collections.abc import Callable

from visionsel.ops.bilevel_routing import bilevel_routing_attention
from visionsel.ops.bilevel_routing import usable_backends as _bilevel_routing_backends
from visionsel.ops.focal_modulation import focal_modulation
from visionsel.ops.focal_modulation import usable_backends as _focal_modulation_backends
from visionsel.ops.halo import halo_attention
from visionsel.ops.halo import usable_backends as _halo_backends
from visionsel.ops.neighborhood import neighborhood_attention
from visionsel.ops.neighborhood import usable_backends as _neighborhood_backends

__all__ = [
    "backends",
    "bilevel_routing_attention",
    "focal_modulation",
    "halo_attention",
    "neighborhood_attention",
]

_BACKENDS: dict[str, Callable[[], list[str]]] = {
    "neighborhood": _neighborhood_backends,
    "bilevel_routing": _bilevel_routing_backends,
    "halo": _halo_backends,
    "focal_modulation": _focal_modulation_backends,
}


def backends(operator: str) -> list[str]:
    """Names of the backends of an operator that are usable on this machine, best first.

    Args:
        operator: "neighborhood", "bilevel_routing", "halo" or "focal_modulation".

    Raises:
        ValueError: for another name.

    Examples:
        >>> from visionsel import ops
        >>> ops.backends("neighborhood")[-1]
        'reference'
    """
    if operator not in _BACKENDS:
        raise ValueError(f"unknown operator {operator!r}; choose one of {', '.join(_BACKENDS)}")
    return _BACKENDS[operator]()
