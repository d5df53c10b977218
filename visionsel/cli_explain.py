"""`visionsel bench --explain`: which backend each operator takes on this machine, and why no other."""

from importlib import import_module
from typing import Any

import torch

from visionsel.ops.choice import ORDER, against, taken_by_auto, usable

__all__ = ["explain", "explain_tables"]


def explain(device: torch.device) -> dict[str, Any]:
    """What `backend="auto"` takes for float32 tensors on a device, and what speaks against each other one.

    Returns:
        `{"device", "torch", "calls": [{"operator", "call", "auto", "usable", "others": {name: why not}}]}`.
    """
    calls = []
    for operator in ORDER:
        package = import_module(f"visionsel.ops.{operator}")
        for name, call in package.example_calls(device).items():
            of_call = operator, package.BACKENDS, *call
            calls.append(
                {
                    "operator": operator,
                    "call": name,
                    "auto": taken_by_auto(*of_call),
                    "usable": usable(*of_call),
                    "others": against(*of_call),
                }
            )
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
