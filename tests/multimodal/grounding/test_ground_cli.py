"""`visionsel ground`, as a shell would call it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visionsel.cli import main
from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.data.shapes.masks import decode_rle
from visionsel.embedded import load_lvlm
from visionsel.multimodal.grounding.grounder import Grounder

SCENE = ShapesWorld("balanced", 11, 2)[1]  # a yellow and a blue square


@pytest.fixture(scope="module")
def grounder() -> Grounder:
    return Grounder(*load_lvlm(), "embedded", "mean")


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grounder: Grounder) -> Path:
    monkeypatch.setattr(
        "visionsel.generation.load_lvlm", lambda name, device, dtype: (grounder.model, grounder.processor)
    )
    SCENE.image.save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def ground(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert main(["ground", *map(str, arguments), "--heatmap", "mean", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_word_of_an_answer_has_its_place(
    scene: Path, grounder: Grounder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "grounded.png"
    found = ground(capsys, scene, CAPTION_PROMPT, "-o", out)
    expected = grounder.ask(SCENE.image, CAPTION_PROMPT)
    assert found["answer"] == expected.answer
    assert found["image"] == {"width": 64, "height": 64}
    for word, record in zip(expected.words, found["words"], strict=True):
        assert (record["text"], record["name"], tuple(record["span"])) == (word.text, word.name, word.span)
        assert record["prob"] == pytest.approx(word.prob, rel=1e-5)
        assert record["score"] == pytest.approx(word.score, rel=1e-5)
        np.testing.assert_array_equal(decode_rle(record["segmentation"]), word.mask)
        assert tuple(record["box"]) == word.box
        assert record["points"] == word.points.tolist()
    assert sum(record["name"] == "square" for record in found["words"]) == 2
    with Image.open(out) as picture:
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected.plot(scale=8)))
    assert list(out.parent.iterdir()) == [out]
    assert main(["ground", str(scene), CAPTION_PROMPT, "--heatmap", "mean"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == expected.answer
    assert [line.split()[0] for line in lines[3:]] == [word.text for word in expected.words]


def test_an_expression_or_all_objects_are_found(
    scene: Path, grounder: Grounder, capsys: pytest.CaptureFixture[str]
) -> None:
    (record,) = ground(capsys, scene, "the blue square", "--refer", "--refine", "mask")["words"]
    other = Grounder(grounder.model, grounder.processor, "embedded", "mean", "mask")
    np.testing.assert_array_equal(
        decode_rle(record["segmentation"]), other.refer(SCENE.image, "the blue square").mask
    )
    assert record["text"] == "the blue square"
    detected = ground(capsys, scene, CAPTION_PROMPT, "--detect")
    expected = grounder.detect(SCENE.image, CAPTION_PROMPT)
    assert [record["name"] for record in detected["words"]] == [word.name for word in expected.words]
    assert [tuple(record["box"]) for record in detected["words"]] == [word.box for word in expected.words]
    assert main(["ground", str(scene), "is there a ring?", "--heatmap", "mean"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == "no"
    assert "no object is named" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SCENE"], "what is the question?"),
        (["missing.png", "hello"], "there is no image missing.png"),
        (["TEXT", "hello"], "cannot identify image file"),
        (["SCENE", " "], "the question is ' '"),
        (["SCENE", "hello", "--heatmap", "nothing"], "no method is called 'nothing'; there are"),
        (["SCENE", "hello", "--segmenter", "sam:vit_b"], "checkpoint"),
        (["SCENE", "hello", "--prompts", "lines"], "prompts must be one of points, box"),
        (["SCENE", "hello", "--refine", "promac"], "use it with refer, not with ask"),
        (["SCENE", "hello", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    ],
)
def test_what_cannot_be_grounded_is_said_in_one_line(
    arguments: list[str], message: str, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.png"
    text.write_text("not an image")
    names = {"SCENE": scene, "TEXT": text}
    command = [str(names.get(argument, argument)) for argument in arguments]
    if "--heatmap" not in command:
        command += ["--heatmap", "mean"]
    assert main(["ground", *command, "-o", str(tmp_path / "out.png")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out.png").exists()


def test_weights_can_be_of_another_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    SCENE.image.save(tmp_path / "scene.png")
    seen: list[torch.dtype] = []
    model = type(load_lvlm()[0])
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda self, **options: seen.append(self.dtype) or generate(self, **options)
    )
    command = ["generate", str(tmp_path / "scene.png"), CAPTION_PROMPT, "--device", "cpu"]
    assert main([*command, "--dtype", "bfloat16", "--max-new-tokens", "2"]) == 0
    assert seen == [torch.bfloat16]
    assert main([*command, "--dtype", "int8"]) == 1
    assert "dtype must be one of torch such as bfloat16" in capsys.readouterr().err
