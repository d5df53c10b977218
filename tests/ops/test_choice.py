"""Which backend computes a call, and what is said about it."""

from importlib import import_module
from typing import Any

import pytest
import torch

from visionsel import ops
from visionsel.cli import main
from visionsel.cli_explain import explain
from visionsel.ops import (
    bilevel_routing_attention,
    choice,
    focal_modulation,
    halo_attention,
    neighborhood_attention,
)
from visionsel.ops.choice import Backend


def taken(monkeypatch: pytest.MonkeyPatch, operator: str, name: str) -> list[str]:
    """The backends that one of the operator's example calls goes to with `auto`."""
    seen: list[str] = []

    def spy(name: str, backend: Backend) -> Backend:
        def run(*given: Any) -> Any:
            seen.append(name)
            return backend.run(*given)

        return Backend(run, backend.why_not, backend.left_out)

    module = import_module(f"visionsel.ops.{operator}")
    spies = {key: spy(key, backend) for key, backend in module.BACKENDS.items()}
    monkeypatch.setattr(module, "BACKENDS", spies)
    call: Any = module.example_calls(torch.device("cpu"))[name]
    if operator == "neighborhood":
        neighborhood_attention(*call)
    elif operator == "bilevel_routing":
        q, k, v, windows, scale, routing, weight = call
        topk = routing.shape[-1]
        bilevel_routing_attention(q, k, v, windows, topk, scale, routing=routing, routing_weight=weight)
    elif operator == "halo":
        halo_attention(*call[:5], *call[6:])
    else:
        focal_modulation(*call[:6], normalize=call[6])
    return seen


def test_backends_are_explained_as_they_are_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explain(torch.device("cpu"))
    assert (found["device"], found["torch"]) == ("cpu", torch.__version__)
    for call in found["calls"]:
        with monkeypatch.context() as patch:
            assert taken(patch, call["operator"], call["call"]) == [call["auto"]], call
        assert set(call["others"]) | {call["auto"]} >= set(call["usable"])
    found_calls = {(call["operator"], call["call"]): call["others"] for call in found["calls"]}
    biased = found_calls["neighborhood", "inference with rel_pos_bias"]
    assert biased["natten"] == "natten has no relative position bias since 0.20"
    assert "plainest" in biased["reference"]
    assert main(["bench", "--explain", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"float32 on cpu, torch {torch.__version__}"
    assert lines[2].split() == ["operator", "call", "auto", "takes", "not", "because"]
    assert main(["bench", "--explain", "--json", "--markdown"]) == 1
    assert "choose one" in capsys.readouterr().err


@pytest.mark.parametrize("operator", choice.ORDER)
def test_the_backends_of_every_machine_are_listed_best_first(operator: str) -> None:
    plain = ["tiled", "reference"]
    assert [name for name in ops.backends(operator) if name in plain] == plain
    assert all(callable(getattr(ops, name)) for name in ops.__all__)  # the functions, not their packages


def test_an_operator_that_there_is_not_is_told() -> None:
    with pytest.raises(ValueError, match="unknown operator 'window'; choose one of neighborhood, bilevel_"):
        ops.backends("window")


def test_auto_takes_the_first_that_can_serve_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = {
        "natten": Backend(lambda *call: "natten", lambda *call: "no bias" if call[1] else None),  # type: ignore[arg-type, return-value]
        "tiled": Backend(lambda *call: "tiled"),  # type: ignore[arg-type, return-value]
        "reference": Backend(lambda *call: "reference"),  # type: ignore[arg-type, return-value]
    }
    monkeypatch.setitem(choice.ORDER, "neighborhood", {"cpu": ("natten", "tiled", "reference")})
    x = torch.zeros(1)
    assert choice.compute("neighborhood", backends, "auto", x, False) == "natten"
    assert choice.compute("neighborhood", backends, "auto", x, True) == "tiled"
    assert choice.usable("neighborhood", backends, x, True) == ["tiled", "reference"]
    assert choice.against("neighborhood", backends, x, True)["natten"] == "no bias"
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert choice.compute("neighborhood", backends, "auto", x, False) == "tiled"
    with pytest.raises(NotImplementedError, match="'natten' cannot serve this call: no bias"):
        choice.compute("neighborhood", backends, "natten", x, True)
    with pytest.raises(ValueError, match="unknown backend 'fast'; choose one of auto, natten, tiled"):
        choice.compute("neighborhood", backends, "fast", x, False)


def test_auto_leaves_out_what_is_not_measured_and_says_so() -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return x

    def half_only(x: torch.Tensor) -> str | None:
        return None if x.dtype == torch.bfloat16 else "not timed in float32"

    backends = {"triton": Backend(run, left_out=half_only), "tiled": Backend(run), "reference": Backend(run)}
    order = ("triton", "tiled", "reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(choice.ORDER, "halo", {"cpu": order})
        x = torch.zeros(1)
        assert choice.taken_by_auto("halo", backends, x) == "tiled"
        assert choice.usable("halo", backends, x) == [*order]  # by name it serves
        assert choice.against("halo", backends, x)["triton"] == "not timed in float32"
        assert choice.compute("halo", backends, "triton", x) is x
        assert choice.taken_by_auto("halo", backends, x.bfloat16()) == "triton"


@pytest.mark.parametrize("operator", ["neighborhood", "bilevel_routing"])
def test_kernels_on_a_gpu_are_taken_in_half_precision(operator: str) -> None:
    kernels = import_module(f"visionsel.ops.{operator}").BACKENDS["triton"]
    assert kernels.left_out(torch.zeros(1, dtype=torch.float16)) is None
    assert "not measured in float32" in str(kernels.left_out(torch.zeros(1)))
    order = choice.ORDER[operator]["cuda"]
    assert order.index("triton") < order.index("tiled")
