"""`visionsel bench --explain`: which backend each operator takes on this machine, and why no other."""

from typing import Any

import torch

from visionsel import ops
from visionsel.ops.neighborhood.natten import why_not

__all__ = ["explain", "explain_tables"]

OPERATORS = ("neighborhood", "bilevel_routing", "halo", "focal_modulation")
REFERENCE = "the plainest code, which the others must equal; auto never takes it"


def explain(device: torch.device) -> dict[str, Any]:
    """What `backend="auto"` takes for float32 tensors on a device, and what speaks against each other one.

    Returns:
        `{"device", "torch", "calls": [{"operator", "call", "auto", "usable", "others": {name: why not}}]}`.
    """
    calls = _neighborhood(device)
    for operator in OPERATORS[1:]:
        usable = ops.backends(operator)
        calls.append(_call(operator, "any", usable[0], {"reference": REFERENCE}))
    return {"device": str(device), "torch": torch.__version__, "calls": calls}


def explain_tables(found: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """What was found, as a table."""
    rows = [
        [call["operator"], call["call"], call["auto"], other, reason]
        for call in found["calls"]
        for other, reason in call["others"].items()
    ]
    title = f"float32 on {found['device']}, torch {found['torch']}"
    return [(title, ["operator", "call", "auto takes", "not", "because"], rows)]


def _neighborhood(device: torch.device) -> list[dict[str, Any]]:
    """The calls that natten, the only backend that is chosen by the call, tells apart."""
    x = torch.zeros(1, 7, 7, 1, 32, device=device)
    leaf = x.clone().requires_grad_()
    bias = torch.zeros(1, 13, 13, device=device)
    calls = []
    for call, q, table in (("inference", x, None), ("training", leaf, None), ("with rel_pos_bias", x, bias)):
        reason = why_not(q, q, q, (7, 7), table, 1.0)
        if device.type == "cuda" and reason is None:
            others = {"tiled": "natten's fused kernels serve this call", "reference": REFERENCE}
            calls.append(_call("neighborhood", call, "natten", others))
            continue
        if device.type != "cuda":
            reason = "auto takes it on cuda alone" + (f"; {reason}" if reason else "")
        others = {"natten": str(reason), "reference": REFERENCE}
        calls.append(_call("neighborhood", call, "tiled", others))
    if any(call["auto"] == "natten" for call in calls):
        others = {"natten": "the compiler cannot see into it", "reference": REFERENCE}
        calls.append(_call("neighborhood", "under torch.compile", "tiled", others))
    return calls


def _call(operator: str, call: str, auto: str, others: dict[str, str]) -> dict[str, Any]:
    usable = ops.backends(operator)
    return {"operator": operator, "call": call, "auto": auto, "usable": usable, "others": others}
