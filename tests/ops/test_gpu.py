"""What the Triton kernels of the operators say they cannot serve."""

from importlib import import_module
from typing import Any

import pytest
import torch

from visionsel.ops import gpu


@pytest.mark.parametrize("operator", ["neighborhood", "bilevel_routing", "halo"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float16}, None),
        ({"dtype": torch.float64}, "float32, float16 or bfloat16, the tensors are torch.float64"),
        ({"dim": 257}, "in torch.float32, got 257 of q and k"),
        ({"interpreted": False}, "run on cuda, the tensors are on cpu"),
        ({"installed": False}, "pip install triton; it comes with PyTorch for CUDA on Linux"),
    ],
)
def test_the_reason_against_a_call_is_told(
    operator: str, changes: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("interpreted", "installed"):
        monkeypatch.setattr(gpu, name, lambda name=name: changes.get(name, True))
    package = import_module(f"visionsel.ops.{operator}")
    rest = package.example_calls(torch.device("cpu"))["inference"][3:]
    x = torch.zeros(1, 8, 8, 1, changes.get("dim", 8), dtype=changes.get("dtype", torch.float32))
    told = package.BACKENDS["triton"].why_not(x, x, x, *rest)
    assert told is None if reason is None else reason in str(told)


def test_exported_and_transformed_programs_hold_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "interpreted", lambda: True)
    x = torch.zeros(1, 8, 8, 1, 8)
    assert gpu.refusal(x, x) is None
    told = []
    torch.func.grad(lambda y: (told.append(gpu.refusal(y, y)), y.sum())[1])(x)
    assert "torch.func" in str(told[0])
    monkeypatch.setattr(gpu, "is_exporting", lambda: True)
    assert "exported programs" in str(gpu.refusal(x, x))
