"""`visionsel generate` and `visionsel evaluate pruning`, as a shell would call them."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from visionsel.cli import main
from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.embedded.files import WEIGHTS
from visionsel.embedded.lvlm_quality import generate_answers
from visionsel.embedded.pruning_quality import COLUMNS
from visionsel.multimodal import pruning
from visionsel.multimodal.pruning.fastv import FastV
from visionsel.multimodal.pruning.random import RandomPrune
from visionsel.multimodal.pruning.uniform import UniformPrune


@pytest.fixture(autouse=True)
def _three_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "PRUNERS", [RandomPrune, UniformPrune, FastV])


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    ShapesWorld("balanced", 3, 1)[0].image.save(path)
    return path


def test_generate_prints_the_models_answer_and_what_it_cost(
    scene: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(scene), CAPTION_PROMPT, "--device", "cpu"]) == 0
    answer, _, *table = capsys.readouterr().out.splitlines()
    with Image.open(scene) as image:
        assert answer == generate_answers(*load_lvlm(), [image.convert("RGB")], [CAPTION_PROMPT])[0]
    assert table[1].split() == ["image", "tokens", "(mean", "of", "4", "layers)", "64.0", "64.0", "1.000"]
    assert table[-1] == "image tokens of each layer: 64 (0-3)"


def test_generate_prunes_by_one_or_several_methods_and_draws_it(
    scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "kept.png"
    command = ["generate", str(scene), CAPTION_PROMPT, "--model", str(WEIGHTS / "lvlm"), "--device", "cpu"]
    pruners = ["--prune", "random:keep=0.5,seed=1", "fastv:keep=8,layer=2"]
    assert main([*command, *pruners, "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["report"]["visual_tokens"] == [32, 32, 8, 8]
    assert result["report"]["cache_ratio"] < result["report"]["flops_ratio"] + 0.1 < 0.7
    with Image.open(scene) as image, RandomPrune(0.5, seed=1)(model := load_lvlm()[0]), FastV(8, 2)(model):
        answers = generate_answers(model, load_lvlm()[1], [image.convert("RGB")], [CAPTION_PROMPT])
    assert result["answer"] == answers[0].strip()
    with Image.open(out) as picture:
        assert picture.width > 384


def test_an_answer_is_cut_where_asked(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(scene), CAPTION_PROMPT, "--max-new-tokens", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["answer"].split()) <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png", "hello"], "no image at missing.png"),
        (["TEXT", "hello"], "is not an image"),
        (
            ["SCENE", "hello", "--prune", "fastw"],
            "no method is called 'fastw'; there are random, uniform, fastv",
        ),
        (["SCENE", "hello", "--prune", "fastv:kep=1"], "cannot read 'fastv:kep=1'"),
        (["SCENE", "hello", "--prune", "fastv:keep=2.0"], "ratio in (0, 1]"),
        (["SCENE", "hello", "--prune", "fastv:layer=4"], "layer 4 does not exist"),
        (
            ["SCENE", "hello", "--prune", "fastv", "random:keep=0.5,layer=2"],
            "two interventions drop tokens before layer 2",
        ),
        (["SCENE", "hello", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    ],
)
def test_what_cannot_be_answered_is_said_in_one_line(
    arguments: list[str], message: str, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.png"
    text.write_text("not an image")
    names = {"SCENE": scene, "TEXT": text}
    assert main(["generate", *(str(names.get(a, a)) for a in arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_evaluate_pruning_prints_and_writes_a_table_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, plot = tmp_path / "new" / "pruning.csv", tmp_path / "pruning.png"
    command = ["evaluate", "pruning", "--methods", "random", "fastv", "--keep", "0.25", "1", "--size", "2"]
    assert main([*command, "--csv", str(table), "--plot", str(plot)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].split()[:5] == ["method", "keep", "tokens", "FLOPs", "cache"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["none", "1", "64.0"],
        ["random", "1", "64.0"],
        ["random", "0.25", "16.0"],
        ["fastv", "1", "64.0"],
        ["fastv", "0.25", "28.0"],
    ]
    assert "[5/5] fastv 0.25" in captured.err
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert [row["method"] for row in rows] == ["none", "random", "random", "fastv", "fastv"]
    assert list(table.parent.iterdir()) == [table]
    with Image.open(plot) as picture:
        assert picture.width > picture.height > 400


def test_evaluate_pruning_refuses_what_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "pruning", "--methods", "magic"]) == 1
    assert "no method is called magic; there are random, uniform, fastv" in capsys.readouterr().err
    assert main(["evaluate", "pruning", "--keep", "1.5"]) == 1
    assert "budget must be a ratio in (0, 1]" in capsys.readouterr().err
