"""`visionsel bench`: the programs on small things, and what is said about backends."""

import json
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch

import benchmarks
from benchmarks import attention, cases, models, ops, paired, roofline, tables
from visionsel.cli import main
from visionsel.ops import halo
from visionsel.ops.choice import Backend

HALO = cases.Halo(8, 16, 1)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One case, one model of a stage a block, and one call a round."""
    monkeypatch.setattr(cases, "at_224", lambda batch: [cases.Halo(8, 16, 1, batch)])
    for program in (ops, attention):
        monkeypatch.setattr(program, "limits", partial(roofline.limits, scale=16))
    monkeypatch.setattr(models, "OURS", {"selectformer_nano": "reference"})
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
    named = [f"{HALO.name}, {mode}" for mode in ("forward", "training")]
    assert names == [(case, name) for case in named for name in ("timm", "auto")]
    for timing in found["timings"]:
        for clock in ("speedup", "cpu_speedup"):
            assert 0 < timing[f"{clock}_min"] <= timing[clock] <= timing[f"{clock}_max"]
        assert len(timing["seconds"]) == len(timing["cpu_seconds"]) == 3
        assert timing["max_difference"] < 1e-4
    assert found["timings"][0]["speedup"] == 1
    assert [(share["case"], share["name"]) for share in found["shares"]] == names[:2]
    assert found["options"]["batch"] == 2
    assert {"processor", "cores", "gpu", "versions", "date"} <= set(found["machine"])
    page = tmp_path / "ops.md"
    assert main(["bench", "ops", "--rounds", "1", "-o", str(page)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == [*"case what ms CPU ms speed-up spread speed-up, CPU time spread".split()]
    assert [line.split("  ")[0] for line in lines[1:5]] == [case for case, _ in names]
    assert captured.err.splitlines() == [
        "limits of the machine",
        f"[1/1] {HALO.name}",
        f"written to {page}",
    ]
    text = page.read_text()
    assert text.startswith("# Operators\n")
    assert f"torch {found['machine']['versions']['torch']}" in text
    assert text.count(f"| {HALO.name}, forward | ") == 4  # times, and shares of the machine's limits


def test_operators_alone_stand_beside_attention_to_all_tokens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [
        cases.Neighborhood(14, 1),
        cases.Neighborhood(14, 1, bias=False),
        cases.BilevelRouting((14, 12), 1, 2, num_windows=7),
        HALO,
        cases.Focal(8, 32),
    ]
    monkeypatch.setattr(cases, "at_224", lambda batch: small)
    found = bench(capsys, "attention", "--rounds", 1, "--backends", "auto", "reference")
    routing = "bilevel routing 14x14, 7x7 windows, topk 2"
    names = [f"{name}, {mode}" for name in _names(small, routing) for mode in ("forward", "training")]
    assert list(dict.fromkeys(one["case"] for one in found["timings"])) == names
    for name in names:
        own = [one["name"] for one in found["timings"] if one["case"] == name]
        assert own[:3] == ["attention to all", "tiled", "auto"]
    shares = {(one["case"], one["name"]): one["share"] for one in found["shares"]}
    assert set(shares) >= {(f"{name}, forward", "auto") for name in _names(small, routing)}
    assert all(0 < share < 1 for share in shares.values())
    work = attention.at_224()[0].work()
    assert (work.flops, work.exps, work.numbers) == (4 * 196 * 49 * 32, 196 * 49, 4 * 196 * 32)
    monkeypatch.setattr(attention, "MOST", 100)
    found = bench(capsys, "attention", "--rounds", 1, "--operators", "neighborhood")
    assert {one["name"] for one in found["timings"]} == {"tiled", "auto"}
    assert {one["why"] for one in found["left_out"]} == {"more than 100 tokens"}
    wrong = halo.tiled
    monkeypatch.setitem(halo.BACKENDS, "reference", Backend(lambda *given: wrong(*given) + 0.1))
    assert main(["bench", "attention", "--operators", "halo", "--backends", "reference"]) == 1
    assert f"{HALO.name}, forward: reference differs from tiled by" in capsys.readouterr().err


def _names(small: list[cases.Case], routing: str) -> list[str]:
    return [routing if isinstance(case, cases.BilevelRouting) else case.name for case in small]


def test_models_are_compared_with_their_plain_selves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # traced, but not written in C++, which takes a minute
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(models, "no_compiler", lambda device: None)
    found = bench(capsys, "--threads", 1, "models", "--rounds", 1, "--compile")
    assert found["machine"]["threads"] == 1
    named = [f"selectformer_nano 224, {mode}" for mode in ("forward", "training")]
    assert [one["case"] for one in found["timings"] if one["name"] == "reference"] == named
    assert [one["case"] for one in found["timings"] if one["name"] == "auto"] == named
    assert [one["case"] for one in found["timings"] if one["name"] == "torch.compile"] == named[:1]
    monkeypatch.setattr(models, "no_compiler", lambda device: f"none for {device}")
    monkeypatch.setattr(models, "train", models.forward)
    options = {"rounds": 1, "batch": 1, "models": None, "backends": ["auto"], "device": "cpu"}
    found = models.measure(compile=True, **options)
    assert found["left_out"] == [{"case": named[0], "name": "torch.compile", "why": "none for cpu"}]
    assert {one["name"] for one in found["timings"]} == {"reference", "auto", "accelerated", "packed"}
    made, left_out = models.pair("selectformer_nano", ["auto", "triton"])
    assert list(made) == ["reference", "auto", "accelerated", "packed"]
    assert left_out == {"triton": "not every operator of the model has such a backend"}
    plain = made["reference"]
    assert {module.backend for module in plain.modules() if hasattr(module, "backend")} == {"reference"}


def test_growth_and_memory_are_measured_of_the_operators_that_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = bench(capsys, "memory", "--operators", "halo", "--backends", "auto", "reference")
    assert [one["name"] for one in found["peaks"]] == 2 * ["timm", "auto", "reference"]
    found = bench(capsys, "growth", "--operators", "halo", "--sides", 8, 16, "--rounds", 1)
    assert [(curve["operator"], curve["tokens"]) for curve in found["curves"]] == 2 * [("halo", [64, 256])]
    assert main(["bench", "memory", "--backends", "magic"]) == 1
    assert "is called magic; there are auto, " in capsys.readouterr().err


def test_a_wrong_answer_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = halo.tiled
    monkeypatch.setitem(halo.BACKENDS, "tiled", Backend(lambda *given: wrong(*given) + 0.1))
    assert main(["bench", "ops"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"visionsel bench ops: {HALO.name}, forward: auto differs from timm by" in captured.err


PROGRAMS = ("ops", "attention", "models", "growth", "memory", "pruning", "grounding")
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
    for name in PROGRAMS:
        fake = ModuleType(f"benchmarks.{name}")
        fake.measure = lambda say, device, **given: given  # type: ignore[attr-defined]
        fake.tables = lambda found: []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"benchmarks.{name}", fake)
    found = bench(capsys)
    assert list(found) == [*PROGRAMS] == [*tables.TITLES]
    every = {"operators": [*cases.OPERATORS], "backends": ["auto"]}
    assert found["ops"] == {"rounds": 7, "batch": 1, "dtype": "float32", **every}
    models_options = {"rounds": 5, "batch": 1, "models": None, "backends": ["auto"], "compile": False}
    assert found["models"] == models_options
    assert found["growth"] == {"rounds": 5, "sides": [56, 112, 224], **every}
    assert found["memory"] == {"batch": 1, **every}
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
