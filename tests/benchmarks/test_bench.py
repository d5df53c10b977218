"""`visionsel bench`: the programs on small things, and what is said about backends."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch

import benchmarks
from benchmarks import models, ops, paired
from visionsel import cli_explain
from visionsel.cli import main
from visionsel.ops import halo


def small_case(batch: int) -> dict[str, Any]:
    return {"halo 8x8, 1 head": ops.halo(8, 1, batch)}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One case, one model of a stage a block, and one call a round."""
    monkeypatch.setattr(ops, "cases", small_case)
    monkeypatch.setattr(models, "OURS", ("selectformer_nano",))
    monkeypatch.setattr(models, "TIMMS", ())
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name: create(name, depths=(1, 1, 1, 1)))
    monkeypatch.setattr(paired, "_repeats", lambda function: 1)


@pytest.fixture
def _small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 36 tokens."""
    for name in ("pruning", "grounding"):
        monkeypatch.setattr(import_module(f"benchmarks.{name}"), "GRID", 6)


def bench(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    assert main(["bench", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_operators_are_timed_and_shown_as_text_markdown_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "ops.json"
    found = bench(capsys, "ops", "--rounds", 3, "--batch", 2, "--threads", 1, "-o", out)
    assert found == json.loads(out.read_text())
    assert found["machine"]["threads"] == torch.get_num_threads() == 1
    names = [(timing["case"], timing["name"]) for timing in found["timings"]]
    cases = [f"halo 8x8, 1 head, {mode}" for mode in ("forward", "training")]
    assert names == [(case, name) for case in cases for name in ("reference", "auto")]
    for timing in found["timings"]:
        assert 0 < timing["speedup_min"] <= timing["speedup"] <= timing["speedup_max"]
        assert timing["max_difference"] < 1e-4
    assert found["timings"][0]["speedup"] == 1
    page = tmp_path / "ops.md"
    assert main(["bench", "ops", "--rounds", "1", "-o", str(page)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["case", "what", "ms", "cpu", "ms", "speed-up", "spread"]
    assert len(lines) == 5
    assert captured.err == f"[1/1] halo 8x8, 1 head\nwritten to {page}\n"
    assert page.read_text().splitlines()[0] == "| case | what | ms | cpu ms | speed-up | spread |"
    assert [line.split("  ")[0] for line in lines[1:5]] == [
        row.split(" | ")[0][2:] for row in page.read_text().splitlines()[2:]
    ]


def test_models_are_compared_with_their_plain_selves(capsys: pytest.CaptureFixture[str]) -> None:
    found = bench(capsys, "--threads", 1, "models", "--rounds", 1)
    assert found["machine"]["threads"] == 1
    cases = [f"selectformer_nano 224, {mode}" for mode in ("forward", "training")]
    assert [timing["case"] for timing in found["timings"][::2]] == cases
    plain = models.pair("selectformer_nano")["reference"]
    assert {module.backend for module in plain.modules() if hasattr(module, "backend")} == {"reference"}


def test_a_wrong_answer_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = halo.tiled
    monkeypatch.setitem(halo._BACKENDS, "tiled", lambda *given: wrong(*given) + 0.1)
    assert main(["bench", "ops"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "visionsel bench ops: halo 8x8, 1 head, forward: auto differs from reference by" in captured.err


SIZE = ("--hidden", 64, "--layers", 2, "--text-tokens", 4, "--rounds", 1)


@pytest.mark.usefixtures("_small_images")
def test_pruners_are_timed_beside_what_they_save(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pruning", *SIZE, "--visual-tokens", 36, "--tower-layers", 1]
    command += ["--methods", "fastv", "--keep", 0.75, "--new-tokens", 1]
    found = bench(capsys, *command)
    assert [(row["method"], row["keep"]) for row in found["rows"]] == [
        ("hooks", 1.0),
        ("hooks + attention", 1.0),
        ("fastv", 0.75),
    ]
    assert found["rows"][2]["equivalent_tokens"] == pytest.approx(0.75 * 36)
    assert found["rows"][2]["flops_ratio"] < found["rows"][0]["flops_ratio"] == 1
    assert found["options"]["hidden"] == 64
    assert main(["bench", *map(str, command), "--markdown"]) == 0
    title, _, header, _, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("36 image tokens, without pruning: prefill of the decoder")
    assert header.startswith("| method | keep | tokens | FLOPs | cache | decoder CPU | wall |")
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| hooks", "1", "36.0"],
        ["| hooks + attention", "1", "36.0"],
        ["| fastv", "0.75", "27.0"],
    ]
    assert main(["bench", "pruning", *map(str, SIZE), "--methods", "magic"]) == 1
    assert "no method is called magic; there are random, " in capsys.readouterr().err


@pytest.mark.usefixtures("_small_images")
def test_the_recorder_is_timed_and_weighed_by_the_program_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert benchmarks.run("grounding", [*map(str, SIZE), "--images", "1", "--new-tokens", "2"]) == 0
    captured = capsys.readouterr()
    found = json.loads((tmp_path / "runs" / "bench" / "grounding.json").read_text())
    names = ["generate", "online", "online 1 layer", "replay", "replay 1 layer"]
    assert [timing["name"] for timing in found["timings"]] == names
    assert found["bytes"]["online"] == found["bytes"]["replay"] == 2 * found["bytes"]["replay 1 layer"]
    assert found["bytes"]["online"] == 2 * 1 * 2 * 36 * 4  # layers, heads, new tokens, columns, bytes
    assert found["bytes"]["all attention of the prompt"] == 2 * 40**2 * 4
    assert "held in the end, of 36 columns:" in captured.out
    assert captured.err.endswith("written to runs/bench/grounding.json\n")


def test_without_a_name_all_programs_run_with_their_own_defaults(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ops", "models", "pruning", "grounding"):
        fake = ModuleType(f"benchmarks.{name}")
        fake.measure = lambda say, device, **given: given  # type: ignore[attr-defined]
        fake.tables = lambda found: []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"benchmarks.{name}", fake)
    found = bench(capsys)
    assert list(found) == ["ops", "models", "pruning", "grounding"]
    assert found["ops"] == {"rounds": 7, "batch": 1}
    assert found["models"] == {"rounds": 5, "batch": 1}
    assert found["pruning"]["visual_tokens"] == [576, 2880]
    assert found["grounding"]["images"] == 5


@pytest.mark.parametrize("module", [None, ModuleType("benchmarks.ops")], ids=["none", "another"])
def test_benchmarks_that_are_not_there_are_said(
    module: ModuleType | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.ops", module)
    assert main(["bench", "ops"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "the package benchmarks of visionsel was not found" in captured.err


def taken(monkeypatch: pytest.MonkeyPatch, operator: str, bias: bool = False) -> list[str]:
    """The backends that a call with `auto` goes to."""
    seen: list[str] = []

    def spy(name: str, backend: Any) -> Any:
        def call(*given: Any) -> Any:
            seen.append(name)
            return backend(*given)

        return call

    module = import_module(f"visionsel.ops.{operator}")
    if operator == "bilevel_routing":  # it has no table of them
        for name in ("tiled", "reference"):
            monkeypatch.setattr(module, name, spy(name, getattr(module, name)))
    else:
        monkeypatch.setattr(module, "_BACKENDS", {k: spy(k, v) for k, v in module._BACKENDS.items()})
    case = {
        "neighborhood": ops.neighborhood(7, 1, 1, 1),
        "bilevel_routing": ops.bilevel_routing(7, 1, 2, 1),
        "halo": ops.halo(8, 1, 1),
        "focal_modulation": ops.focal_modulation(7, 8, 1),
    }[operator]
    call, inputs = case
    if operator == "neighborhood" and not bias:
        ops.ops.neighborhood_attention(*inputs[:3], 7)
    else:
        call(*inputs, backend="auto")
    return seen


def test_backends_are_explained_as_they_are_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(capsys, "--explain", "--device", "cpu")
    assert (found["device"], found["torch"]) == ("cpu", torch.__version__)
    for call in found["calls"]:
        bias = call["call"] == "with rel_pos_bias"
        with monkeypatch.context() as patch:
            assert taken(patch, call["operator"], bias) == [call["auto"]], call
        assert set(call["others"]) | {call["auto"]} >= set(call["usable"])
    natten = [call["others"]["natten"] for call in found["calls"] if call["operator"] == "neighborhood"]
    assert len(natten) == 3
    assert natten[2] == "auto takes it on cuda alone; natten has no relative position bias since 0.20"
    assert main(["bench", "--explain", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"float32 on cpu, torch {torch.__version__}"
    assert lines[2].split() == ["operator", "call", "auto", "takes", "not", "because"]
    assert main(["bench", "--explain", "--json", "--markdown"]) == 1
    assert "choose one" in capsys.readouterr().err


def test_natten_is_taken_where_its_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def why_not(q: Any, k: Any, v: Any, kernel: Any, bias: Any, scale: float) -> str | None:
        return None if bias is None else "no bias"

    zeros = torch.zeros
    monkeypatch.setattr(cli_explain, "why_not", why_not)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(size))
    calls = {call["call"]: call for call in cli_explain._neighborhood(torch.device("cuda"))}
    assert [calls[name]["auto"] for name in ("inference", "training")] == ["natten", "natten"]
    assert calls["with rel_pos_bias"]["others"]["natten"] == "no bias"
    assert calls["under torch.compile"]["others"]["natten"] == "the compiler cannot see into it"
