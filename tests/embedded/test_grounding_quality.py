"""The table of heatmap methods on the shapes world: its measures, its baselines, and that attention works."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from visionsel.cli import main
from visionsel.data.shapes import CAPTION_PROMPT, SHAPES, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.embedded.grounding_quality import COLUMNS, MEASURES, evaluate_grounding
from visionsel.multimodal.grounding.grounder import Grounder

BASELINES = ["random points", "centre point", "random box"]


SEEDS = (5, 7)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def lvlm() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return load_lvlm()


@pytest.fixture(scope="module")
def rows(lvlm: tuple[Any, Any]) -> list[dict[str, Any]]:
    return evaluate_grounding(*lvlm, ["mean:layers=(2,)"], size=1, seeds=SEEDS)


def test_a_row_has_the_measures_of_every_expression(
    lvlm: tuple[Any, Any], rows: list[dict[str, Any]]
) -> None:
    assert [row["method"] for row in rows] == [*BASELINES, "mean:layers=(2,)"]
    assert [list(row) for row in rows] == [COLUMNS] * 4
    row = rows[-1]
    assert row["setting"].startswith("Mean(layers=(2,)")
    assert (row["kind"], row["seeds"], row["size"]) == ("attention", "5 7", 1)
    grounder = Grounder(*lvlm, "embedded", "mean:layers=(2,)", names=SHAPES)
    means: dict[str, list[float]] = {name: [] for name in ("g_iou", "c_iou", "exact", "pointing", "energy")}
    expressions = 0
    for seed in SEEDS:
        shared, united, on, hits, energy = [], [], [], [], []
        for scene in ShapesWorld("balanced", seed, 1):
            for one in scene.expressions:
                word, truth = grounder.refer(scene.image, one.text), scene.objects[one.object].mask
                shared.append((word.mask & truth).sum())
                united.append((word.mask | truth).sum())
                y, x = np.unravel_index(word.heatmap.argmax(), (64, 64))
                on.append(truth[y, x])
                ys, xs = np.nonzero(truth)
                hits.append(min((ys - y) ** 2 + (xs - x) ** 2) <= 4)
                energy.append(word.heatmap[truth].sum() / word.heatmap.sum())
        means["g_iou"].append(np.mean(np.divide(shared, united)))
        means["c_iou"].append(sum(shared) / sum(united))
        means["exact"].append(np.mean(on))
        means["pointing"].append(np.mean(hits))
        means["energy"].append(np.mean(energy))
        expressions += len(shared)
    assert row["expressions"] == expressions
    for name, values in means.items():
        assert row[name] == pytest.approx(np.mean(values), abs=1e-5)
        assert row[f"{name}_low"] == pytest.approx(min(values), abs=1e-5)
        assert row[f"{name}_high"] == pytest.approx(max(values), abs=1e-5)


def test_recall_counts_the_objects_that_descriptions_name(
    lvlm: tuple[Any, Any], rows: list[dict[str, Any]]
) -> None:
    grounder = Grounder(*lvlm, "embedded", "mean:layers=(2,)", names=SHAPES)
    thresholds = np.arange(0.5, 0.96, 0.05)
    recalls = []
    for seed in SEEDS:
        scene = ShapesWorld("balanced", seed, 1)[0]
        seen = grounder.detect(scene.image, CAPTION_PROMPT, crops=False)
        found: dict[str, list[float]] = {}
        for thing in scene.objects:  # no two of a shape share a box in these scenes
            boxes = [word.box for word in seen.words if word.name == thing.shape]
            best = max((_iou(box, thing.box) for box in boxes), default=0.0)
            found.setdefault(thing.shape, []).append(np.mean(best >= thresholds - 1e-9))
        recalls.append(np.mean([np.mean(hits) for hits in found.values()]))
    assert rows[-1]["ar"] == pytest.approx(np.mean(recalls), abs=1e-6)
    assert 0 < rows[-1]["ap_50"] <= 1


def _iou(first: Any, second: Any) -> float:
    cells = [{(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in (first, second)]
    return len(cells[0] & cells[1]) / len(cells[0] | cells[1])


def test_the_command_prints_and_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "new" / "grounding.csv"
    command = ["evaluate", "grounding", "--methods", "mean", "--size", "1", "--seeds", "3", "--device", "cpu"]
    assert main([*command, "--csv", str(table)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split() == ["method", *MEASURES.values()]
    assert [line[: len(name)] for line, name in zip(lines[1:], [*BASELINES, "mean"], strict=True)] == [
        *BASELINES,
        "mean",
    ]
    assert "[4/4] mean" in captured.err
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert lines[-1].split()[1] == f"{float(rows[-1]['g_iou']):.3f}"
    assert main([*command, "--json"]) == 0
    assert [row["method"] for row in json.loads(capsys.readouterr().out)] == [*BASELINES, "mean"]
    assert main([*command[:3], "magic"]) == 1
    assert "no method is called magic; there are" in capsys.readouterr().err
    assert main([*command[:4], "--seeds", "1", "1"]) == 1
    assert "seeds must be different numbers" in capsys.readouterr().err


@pytest.mark.slow
def test_attention_finds_what_expressions_mean_and_chance_does_not(lvlm: tuple[Any, Any]) -> None:
    methods = ["vl_sam", "mean:layers=(2,)", "mask_head"]
    rows = {row["method"]: row for row in evaluate_grounding(*lvlm, methods, size=10, seeds=[9])}
    assert rows["random points"]["g_iou"] <= 0.25
    assert rows["vl_sam"]["g_iou"] >= 0.6
    assert rows["mean:layers=(2,)"]["pointing"] >= 0.85
    assert rows["mask_head"]["g_iou"] >= 0.75
    assert rows["mask_head"]["pointing"] >= 0.85
    assert [rows[name]["kind"] for name in methods] == ["attention", "attention", "learned"]
