"""Floor 1: selective attention as functions on tensors; no parameters, no modules.

Every operator has `backend="reference"`, the plainest code and the truth, and faster ones that equal it.
"""

from importlib import import_module

from visionsel.devices import choose_device
from visionsel.ops.bilevel_routing import bilevel_routing_attention
from visionsel.ops.choice import ORDER, usable
from visionsel.ops.focal_modulation import focal_modulation
from visionsel.ops.halo import halo_attention
from visionsel.ops.neighborhood import neighborhood_attention

__all__ = [
    "backends",
    "bilevel_routing_attention",
    "focal_modulation",
    "halo_attention",
    "neighborhood_attention",
]


def backends(operator: str) -> list[str]:
    """Names of the backends of an operator that are usable on this machine, best first.

    Args:
        operator: "neighborhood", "bilevel_routing", "halo" or "focal_modulation".

    Raises:
        ValueError: for another name.

    Examples:
        >>> from visionsel import ops
        >>> "reference" in ops.backends("neighborhood")
        True
    """
    if operator not in ORDER:
        raise ValueError(f"unknown operator {operator!r}; choose one of {', '.join(ORDER)}")
    package = import_module(f"visionsel.ops.{operator}")
    return usable(operator, package.BACKENDS, *package.example_calls(choose_device())["inference"])
