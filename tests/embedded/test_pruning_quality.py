"""The table of pruners against budgets, on a few scenes."""

import builtins
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from visionsel.embedded import load_lvlm
from visionsel.embedded.pruning_quality import COLUMNS, MEASURES, evaluate_pruning, plot_rows, write_rows
from visionsel.multimodal import pruning
from visionsel.multimodal.intervention import method_name
from visionsel.multimodal.pruning.fastv import FastV
from visionsel.multimodal.pruning.prumerge import PruMerge
from visionsel.multimodal.pruning.pyramiddrop import PyramidDrop
from visionsel.multimodal.pruning.random import RandomPrune

SCORES = [*MEASURES, "refer_iou"]


@pytest.fixture(scope="module")
def lvlm() -> tuple[Any, Any]:
    return load_lvlm()


@pytest.fixture(scope="module", autouse=True)
def _four_methods() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "PRUNERS", [RandomPrune, FastV, PyramidDrop, PruMerge])
        yield


@pytest.fixture(scope="module")
def rows(lvlm: tuple[Any, Any]) -> list[dict[str, Any]]:
    return evaluate_pruning(*lvlm, keep=(0.1, 1.0), size=3, batch_size=20, trials=3)


def test_every_method_has_a_row_a_budget_behind_the_model_without_pruning(rows: list[dict[str, Any]]) -> None:
    assert [(row["method"], row["keep"]) for row in rows] == [
        ("none", 1.0),
        *[(name, keep) for name in ("random", "fastv", "pyramiddrop") for keep in (1.0, 0.1)],
        ("prumerge", None),
        ("prumerge+", None),
    ]
    assert all(list(row) == COLUMNS for row in rows)
    assert all(0 <= row[score] <= 1 for row in rows for score in SCORES)
    assert all(row["full_tokens"] == 64 and row["cpu_seconds"] > 0 for row in rows)


def test_keeping_everything_gives_the_measures_of_the_model_exactly(rows: list[dict[str, Any]]) -> None:
    none, *others = rows
    assert none["equivalent_tokens"] == 64
    assert none["flops_ratio"] == none["cache_ratio"] == 1
    assert none["first_layer"] is None
    for row in others:
        if row["keep"] == 1:
            assert [row[score] for score in SCORES] == [none[score] for score in SCORES], row["method"]
            assert row["equivalent_tokens"] == 64
            assert row["cache_ratio"] == 1
            assert (row["flops_ratio"] > 1) == (row["method"] == "pyramiddrop")  # which makes its own keys


def test_keeping_little_costs_less_and_shows(rows: list[dict[str, Any]]) -> None:
    none = rows[0]
    for row in rows:
        if row["keep"] != 1 and row["method"] != "prumerge+":  # which keeps most of so few tokens
            assert row["equivalent_tokens"] < 40
            assert row["flops_ratio"] < 0.7
            assert row["cache_ratio"] < 0.7
            assert [row[score] for score in SCORES] != [none[score] for score in SCORES]
    by_name = {row["method"]: row for row in rows if row["keep"] != 1}
    assert by_name["random"]["equivalent_tokens"] == 6
    assert by_name["random"]["first_layer"] == 0
    assert by_name["fastv"]["first_layer"] == by_name["pyramiddrop"]["first_layer"] == 1
    assert by_name["prumerge+"]["equivalent_tokens"] > by_name["prumerge"]["equivalent_tokens"]


@dataclass(frozen=True)
class Trained(RandomPrune):
    """One that needs what no default can give."""

    net: str | None = None

    def __post_init__(self) -> None:
        if self.net is None:
            raise ValueError("Trained needs net=")


def test_a_method_that_needs_more_is_left_out_unless_it_gets_it_or_is_asked_for(
    lvlm: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "PRUNERS", [Trained])
    name, said = method_name(Trained), []
    rows = evaluate_pruning(*lvlm, keep=(0.5,), size=1, trials=0, progress=said.append)
    assert [row["method"] for row in rows] == ["none"]
    assert f"{name} is left out: Trained needs net=" in said
    rows = evaluate_pruning(*lvlm, keep=(0.5,), size=1, trials=0, settings={name: {"net": "here"}})
    assert [row["method"] for row in rows] == ["none", name]
    with pytest.raises(ValueError, match="Trained needs net="):
        evaluate_pruning(*lvlm, methods=[name], size=1)


def test_measuring_leaves_the_model_as_it_was(lvlm: tuple[Any, Any]) -> None:
    model, processor = lvlm
    state = {key: value.clone() for key, value in model.state_dict().items()}
    once = evaluate_pruning(model, processor, ["random"], (0.5,), size=2, batch_size=20)
    again = evaluate_pruning(model, processor, ["random"], (0.5,), size=2, batch_size=20)
    assert [{**row, "cpu_seconds": 0} for row in once] == [{**row, "cpu_seconds": 0} for row in again]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_cannot_be_measured_is_refused(lvlm: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="no method is called fast, slow; there are random, fastv"):
        evaluate_pruning(*lvlm, methods=["fast", "slow"])
    with pytest.raises(ValueError, match="budget must be a ratio"):
        evaluate_pruning(*lvlm, keep=[0.5, 0.0])
    with pytest.raises(ValueError, match="size must be at least 1"):
        evaluate_pruning(*lvlm, size=0)
    with pytest.raises(ValueError, match="seed must be"):
        evaluate_pruning(*lvlm, seed=-1)


def test_a_table_is_written_whole_or_not_at_all(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = write_rows(rows, tmp_path / "rows.csv")
    before = path.read_text()
    assert before.splitlines()[0] == ",".join(COLUMNS)
    assert len(before.splitlines()) == len(rows) + 1
    with pytest.raises(ValueError, match="surprise"):
        write_rows([*rows, {"surprise": 1}], path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_plot_names_the_extra_that_is_missing(
    rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_import = builtins.__import__

    def without(name: str, *arguments: Any, **others: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return true_import(name, *arguments, **others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "visionsel\[train\]"'):
        plot_rows(rows, tmp_path / "plot.png")
