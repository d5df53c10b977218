"""`visionsel generate`, `evaluate pruning` and `evaluate hallucination`, as a shell would call them."""

import csv
import errno
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from visionsel.cli import main
from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import hallucination_quality, load_lvlm
from visionsel.embedded.files import WEIGHTS
from visionsel.embedded.lvlm_quality import generate_answers
from visionsel.embedded.pruning_quality import COLUMNS
from visionsel.generation import generate_answer
from visionsel.multimodal import pruning
from visionsel.multimodal.decoding import VCD, Disturbance, RandomTransform, TwoView
from visionsel.multimodal.modulation import PAI, VHR
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
    captured = capsys.readouterr()
    assert captured.err == ""
    result = json.loads(captured.out)
    assert result["report"]["visual_tokens"] == [32, 32, 8, 8]
    assert result["report"]["cache_ratio"] < result["report"]["flops_ratio"] + 0.1 < 0.7
    with Image.open(scene) as image, RandomPrune(0.5, seed=1)(model := load_lvlm()[0]), FastV(8, 2)(model):
        answers = generate_answers(model, load_lvlm()[1], [image.convert("RGB")], [CAPTION_PROMPT])
    assert result["answer"] == answers[0].strip()
    with Image.open(out) as picture:
        assert picture.width > 384


def test_generate_modulates_decodes_and_prunes_at_once(
    scene: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(scene), CAPTION_PROMPT, "--device", "cpu", "--prune", "random:keep=0.5"]
    methods = ["--modulate", "vhr:alpha=3.0", "pai:alpha=0.9,layers=(1,2,3)", "--decode", "vcd:alpha=2.0"]
    assert main([*command, *methods, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["report"]["visual_tokens"] == [32, 32, 32, 32]
    model, processor = load_lvlm()
    with (
        Image.open(scene) as image,
        RandomPrune(0.5)(model),
        VHR(3.0)(model),
        PAI(0.9, (1, 2, 3))(model),
        VCD(2.0)(model),
    ):
        answers = generate_answers(model, processor, [image.convert("RGB")], [CAPTION_PROMPT])
    assert result["answer"] == answers[0].strip()


@pytest.mark.parametrize(
    "methods",
    [
        ["--modulate", "grounding_heads:heads={1:[0,3],2:[1]},strength=1.0", "--modulate", "pai:alpha=0"],
        ["--decode", "ritual:alpha=0"],
        ["--decode", "m3id:decay=0"],
    ],
)
def test_methods_without_strength_leave_the_answer(
    methods: list[str], scene: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(scene), CAPTION_PROMPT, "--device", "cpu"]
    assert main(command) == 0
    plain = capsys.readouterr().out
    assert main([*command, *methods]) == 0
    assert capsys.readouterr().out == plain


def test_decoders_get_the_tokenizer_and_the_statistics_of_the_processor(
    scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    views: list[Any] = []
    monkeypatch.setattr(TwoView, "__post_init__", lambda self: views.append(self.view))
    model, processor = load_lvlm()
    ours = [Disturbance.of(processor.tokenizer), RandomTransform.of(model, processor=processor)]
    assert ours[1] != RandomTransform.of(model)
    model.name_or_path = ""  # as that of a model which was not loaded
    for name in ("icd", "ritual"):
        generate_answer(model, processor, scene, CAPTION_PROMPT, max_new_tokens=1, decode=name)
    assert views == ours


def test_an_answer_is_cut_where_asked(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(scene), CAPTION_PROMPT, "--max-new-tokens", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["answer"].split()) <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png", "hello"], "no image at missing.png"),
        (["TEXT", "hello"], "text.png is not an image that Pillow can read"),
        (["SCENE", " "], "the prompt is empty; say something, such as 'describe the image.'"),
        (["SCENE", "hello", "--dtype", "int8"], "bfloat16, float16 or float32, or auto; got 'int8'"),
        (["SCENE", "hello", "--dtype", "float33"], "dtype must be one of torch such as bfloat16"),
        (["SCENE", "hello", "--model", "embeded"], "at 'embeded'; near it is embedded: "),
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
        (
            ["SCENE", "hello", "--modulate", "fastv"],
            "no method is called 'fastv'; there are vhr, var, act, pai",
        ),
        (["SCENE", "hello", "--modulate", "vhr:alpha=0"], "alpha must be a positive number"),
        (["SCENE", "hello", "--modulate", "vhr", "vhr"], "VHR is on this model already"),
        (["SCENE", "hello", "--decode", "vhr"], "no method is called 'vhr'; there are vcd, icd, m3id"),
        (["SCENE", "hello", "--decode", "vcd:beta=2"], "beta is a ratio of probabilities"),
        (["SCENE", "hello", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (
            ["SCENE", "hello", "--model", "/no/such/folder"],
            "no vision-language model of transformers is at '/no/such/folder'",
        ),
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
    assert captured.err.startswith("visionsel generate: ")
    assert len(captured.err.splitlines()) == 1


def test_what_is_wrong_is_found_before_a_model_is_loaded(
    scene: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*named: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("visionsel.generation.load_lvlm", load)
    for arguments in (["missing.png", "hello"], [str(scene), ""], [str(scene), "hello", "--decode", "magic"]):
        assert main(["generate", *arguments]) == 1
        assert "loaded" not in capsys.readouterr().err
    assert main(["evaluate", "pope", "--data", "shapes", "--limit", "1", "--prune", "magic"]) == 1
    assert "no method is called 'magic'" in capsys.readouterr().err


def test_an_answer_is_printed_though_its_picture_cannot_be_written(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(scene), CAPTION_PROMPT, "--device", "cpu", "--json"]
    assert main([*command, "--out", str(scene / "kept.png")]) == 1
    captured = capsys.readouterr()
    answer = json.loads(captured.out)["answer"]
    assert answer
    assert captured.err == f"visionsel generate: cannot write {scene / 'kept.png'}: {scene} is no folder\n"

    def fill(self: Image.Image, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill)
    out = tmp_path / "kept.png"
    assert main([*command, "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["answer"] == answer
    assert captured.err == f"visionsel generate: cannot write {out}: No space left on device\n"
    assert list(tmp_path.iterdir()) == [scene]


def test_a_table_is_printed_though_it_cannot_be_written(
    scene: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "pruning", "--methods", "random", "--keep", "1", "--size", "1", "--device", "cpu"]
    assert main([*command, "--csv", str(scene / "table.csv"), "--json"]) == 1
    captured = capsys.readouterr()
    assert [row["method"] for row in json.loads(captured.out)] == ["none", "random"]
    error = f"visionsel evaluate pruning: cannot write {scene / 'table.csv'}: {scene} is no folder"
    assert captured.err.splitlines()[-1] == error


def test_evaluate_pruning_prints_and_writes_a_table_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, plot = tmp_path / "new" / "pruning.csv", tmp_path / "pruning.png"
    command = ["evaluate", "pruning", "--methods", "random", "fastv", "--keep", "0.25", "1", "--size", "2"]
    command += ["--device", "cpu"]
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


def test_evaluate_hallucination_prints_and_writes_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "new" / "hallucination.csv"
    command = ["evaluate", "hallucination", "--methods", "pai", "vcd", "--size", "2", "--device", "cpu"]
    assert main([*command, "--csv", str(table)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    header = ["method", "CHAIR_I", "CHAIR_S", "recall", "words", "mentions", "accuracy", "F1", "yes"]
    assert lines[0].split() == header
    assert [line.split()[0] for line in lines[1:]] == ["greedy", "sampling", "pai", "vcd"]
    assert all(len(line.split()) == len(header) for line in lines)
    assert "[4/4] vcd" in captured.err
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == hallucination_quality.COLUMNS
    assert list(table.parent.iterdir()) == [table]
    assert [line.split()[4] for line in lines[1:]] == [f"{float(row['length']):.1f}" for row in rows]

    assert main([*command, "--seeds", "0", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["seeds"] for row in rows] == ["0 1"] * 4
    assert main([*command, "--seeds", "0", "1"]) == 0
    greedy = capsys.readouterr().out.splitlines()[1]
    mean, low, high = (f"{rows[0][f'chair_i{end}']:.3f}" for end in ("", "_low", "_high"))
    assert greedy.split()[:3] == ["greedy", mean, f"({low}-{high})"]


def test_evaluate_hallucination_refuses_what_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "hallucination", "--methods", "magic"]) == 1
    assert "no method is called magic; there are vhr, var" in capsys.readouterr().err
    assert main(["evaluate", "hallucination", "--seeds", "1", "1"]) == 1
    assert "seeds must be different numbers" in capsys.readouterr().err
