"""`visionsel evaluate chair|pope|amber|mme` with a model that answers, as a shell would call it."""

import json
from pathlib import Path
from typing import Any

import pytest

from visionsel.cli import main
from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld, write_shapes
from visionsel.embedded import load_lvlm
from visionsel.embedded.lvlm_quality import generate_answers
from visionsel.multimodal import VHR
from visionsel.multimodal.evaluation import chair, pope, shapes_synonyms


@pytest.fixture(autouse=True)
def _one_model(monkeypatch: pytest.MonkeyPatch, lvlm: tuple[Any, Any]) -> None:
    monkeypatch.setattr("visionsel.generation.load_lvlm", lambda name, device, dtype: lvlm)


@pytest.fixture(scope="module")
def lvlm() -> tuple[Any, Any]:
    return load_lvlm()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "world", size=4, test_size=4)


def results(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def failure(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["evaluate", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_pope_on_shapes_with_a_method(lvlm: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    spec = "vhr:alpha=3,layers=(1,2,3)"
    found = results(
        capsys, "pope", "--data", "shapes:balanced", "--limit", 3, "--seed", 5, "--modulate", spec
    )
    assert list(found) == ["greedy", "sampling T=1", spec], "no method without baselines, unless asked for"
    asked = [(s.image, q) for s in ShapesWorld("balanced", 5, 3) for q in s.questions if q.kind == "exist"]
    with VHR(alpha=3.0, layers=(1, 2, 3))(lvlm[0]):
        answers = generate_answers(*lvlm, [image for image, _ in asked], [q.text for _, q in asked])
    assert found[spec] == pope.score(answers, [q.answer for _, q in asked])


def test_chair_with_baselines_is_kept_continued_and_scored_again(
    lvlm: tuple[Any, Any], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    instances = root / "annotations" / "instances_anti.json"
    out = tmp_path / "ritual.jsonl"
    data = ["chair", "--instances", instances, "--synonyms", "shapes"]
    asking = ["--images", root / "images", "--prompt", CAPTION_PROMPT, "--limit", 3, "--batch-size", 2]
    asking += ["--decode", "ritual:alpha=1", "--temperature", 1, "--max-new-tokens", 40]
    found = results(capsys, *data, *asking, "--out", out)
    assert list(found) == ["greedy", "sampling T=0.5", "ritual:alpha=1 T=1"]
    world = ShapesWorld("anti", 3 << 30, 3)
    captions = generate_answers(*lvlm, [s.image for s in world], [CAPTION_PROMPT] * 3)
    there = [{thing.shape for thing in sample.objects} for sample in world]
    assert found["greedy"] == chair.score(captions, there, shapes_synonyms())
    files = sorted(path.name for path in tmp_path.iterdir())
    names = ["ritual.greedy.jsonl", "ritual.jsonl", "ritual.sampling-0.5.jsonl"]
    assert files == sorted(name + end for name in names for end in ("", ".settings.json"))
    # scoring the files gives the same, and a cut file is completed
    again = results(capsys, *data[:1], *(tmp_path / name for name in names), *data[1:])
    assert [again[str(tmp_path / name)] for name in names] == [
        found[name] for name in ("greedy", "ritual:alpha=1 T=1", "sampling T=0.5")
    ]
    before = out.read_bytes()
    out.write_bytes(before[:-20])
    assert main(["evaluate", *map(str, [*data, *asking, "--out", out])]) == 0
    captured = capsys.readouterr()
    assert out.read_bytes() == before
    head, *lines = captured.out.splitlines()
    assert head.split()[1:] == ["CHAIR_I", "CHAIR_S", "recall", "words", "accuracy", "F1", "yes"]
    assert [line.split("  ")[0] for line in lines[:3]] == list(found)
    assert "[1/3] ritual:alpha=1 T=1" in captured.err
    error = failure(capsys, *data, *asking, "--seed", 1, "--out", out)
    assert "ritual.jsonl was made with other settings: seed 0, now 1" in error


def test_a_method_that_does_not_fit_is_found_before_baselines_are_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asking = ["pope", "--data", "shapes", "--limit", 1, "--out", tmp_path / "out.jsonl"]
    error = failure(capsys, *asking, "--modulate", "var", "pai")
    assert "VAR and PAI both change the attention of layers [2]" in error
    assert not list(tmp_path.iterdir())


def test_plain_runs_are_their_own_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["chair", "--data", "shapes", "--limit", 1, "--baselines", "--max-new-tokens", 4]
    assert list(results(capsys, *shapes)) == ["sampling T=1", "greedy"]
    assert list(results(capsys, *shapes, "--temperature", 0.5)) == ["greedy", "sampling T=0.5"]


def test_amber_and_mme_of_files_and_of_shapes(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["--images", root / "images"]
    out = tmp_path / "amber.jsonl"
    data = ["--data", root / "amber" / "balanced"]
    (found,) = results(capsys, "amber", *data, *images, "--limit", 2, "--out", out).values()
    assert found["generative"]["captions"] == 2
    assert found["discriminative"]["accuracy"] > 0.8
    assert found["discriminative"]["other"] == 0
    again = results(capsys, "amber", out, *data, "--first-word")
    assert again == {str(out): found}
    (strict,) = results(capsys, "amber", out, *data, "--part", "discriminative").values()
    assert strict["discriminative"]["other"] == strict["discriminative"]["questions"]  # "yes" is not "Yes"
    out, data = tmp_path / "mme.jsonl", ["--data", root / "mme" / "balanced"]
    (found,) = results(capsys, "mme", *data, *images, "--out", out).values()
    assert (found["maximum"], found["existence"]["images"]) == (400, 4)
    assert results(capsys, "mme", out, *data) == {str(out): found}
    shapes = ["--data", "shapes", "--limit", 2, "--part", "generative"]
    (scores,) = results(capsys, "amber", *shapes).values()
    assert set(scores) == {"generative"}
    shapes = ["--data", "shapes", "--limit", "2", "--prune", "random:keep=0.5", "--no-baselines"]
    assert main(["evaluate", "mme", *shapes]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[-4:] == ["of", "accuracy", "yes", "other"]
    assert [line.split()[0] for line in lines] == ["random:keep=0.5"]


def test_what_is_missing_or_does_not_go_together_is_said(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, asked = root / "images", root / "pope" / "balanced_random.json"
    assert "--images is missing; or give FILE" in failure(capsys, "pope", "--questions", asked)
    assert "--questions is missing; or give FILE" in failure(capsys, "pope", "--images", images)
    assert "--questions is missing\n" in failure(capsys, "pope", tmp_path / "x.jsonl")
    error = failure(capsys, "pope", "--images", tmp_path, "--questions", asked)
    assert "no image at" in error
    assert "shapes_balanced_" in error
    assert "no folder of images at" in failure(capsys, "pope", "--images", asked, "--questions", asked)
    error = failure(capsys, "pope", "--images", images, "--questions", asked, "--prompt", "Yes or no?")
    assert "needs {} where the question stands" in error
    asked = tmp_path / "asked.json"
    asked.write_text('{"image": "a.png", "text": "Is there a dog in the image?"}\n')
    error = failure(capsys, "pope", "--images", images, "--questions", asked)
    assert "asked.json: line 1 needs 'label'" in error
    coco = ["--instances", root / "annotations" / "instances_val.json", "--synonyms", "shapes"]
    error = failure(capsys, "chair", "--images", tmp_path, *coco)
    assert "has none of the 4 annotated images, such as shapes_val_000000.png" in error
    assert "query_all.json" in failure(capsys, "amber", "--data", root, "--images", images)
    assert "has none of existence.txt" in failure(capsys, "mme", "--data", root, "--images", images)
    assert "give FILE to score, or --data" in failure(capsys, "mme")
    shapes = ["--data", "shapes"]
    assert "unknown distribution 'x'" in failure(capsys, "mme", "--data", "shapes:x")
    assert "size must be at least 1" in failure(capsys, "mme", *shapes, "--limit", 0)
    assert "leave out --images" in failure(capsys, "chair", *shapes, "--images", images)
    assert "leave out --questions" in failure(capsys, "pope", *shapes, "--questions", asked)
    assert "--modulate is for asking a model" in failure(capsys, "mme", tmp_path, "--modulate", "vhr")
    assert "no method is called 'x'" in failure(capsys, "pope", *shapes, "--limit", 1, "--decode", "x")
    assert "is shapes or shapes:DISTRIBUTION" in failure(capsys, "chair", "--data", root)
    assert "unknown part 'x' of AMBER" in failure(capsys, "amber", *shapes, "--limit", 1, "--part", "x")
