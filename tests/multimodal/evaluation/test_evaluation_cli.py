"""`visionsel evaluate chair` and `visionsel evaluate pope`, as a shell would call them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import load_fixture
from visionsel.cli import main
from visionsel.data.shapes import write_shapes
from visionsel.multimodal.evaluation import chair, pope


@pytest.fixture
def coco(tmp_path: Path) -> dict[str, str]:
    """Two images as COCO annotates them, and what a model says about them."""
    content = {
        "instances": {
            "categories": [{"id": 18, "name": "dog"}],
            "annotations": [{"image_id": 1, "category_id": 18}],
        },
        "references": {"annotations": [{"image_id": 2, "caption": "A man rides a horse."}]},
    }
    for name, value in content.items():
        (tmp_path / name).write_text(json.dumps(value))
    (tmp_path / "model.jsonl").write_text(
        '{"image_id": 1, "caption": "A dog with a ball."}\n'
        '{"image_id": "2", "caption": "A woman on a horse."}\n'
    )
    return {name: str(tmp_path / name) for name in (*content, "model.jsonl")}


def test_captions_are_scored_against_annotations_and_what_people_say(
    coco: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "chair", coco["model.jsonl"], "--instances", coco["instances"]]
    arguments += ["--references", coco["references"]]
    assert main([*arguments, "--json"]) == 0
    (scores,) = json.loads(capsys.readouterr().out).values()
    captions = ["A dog with a ball.", "A woman on a horse."]
    assert scores == chair.score(captions, [{"dog"}, {"person", "horse"}])
    assert scores["chair_i"] == 0.25
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[1:5] == ["CHAIR_I", "CHAIR_S", "recall", "words"]
    assert out.splitlines()[1].split()[1:5] == ["0.250", "0.500", "1.000", "5.0"]
    assert "parser: nouns" in out
    assert "sports ball 1" in out


def test_a_table_of_ones_own_and_another_parser(
    coco: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own").write_text("dog\nhorse\n")
    arguments = ["evaluate", "chair", coco["model.jsonl"], "--instances", coco["instances"], "--references"]
    arguments += [coco["references"], "--synonyms", str(tmp_path / "own"), "--parser", "pattern", "--json"]
    assert main(arguments) == 0
    (scores,) = json.loads(capsys.readouterr().out).values()
    assert (scores["mentions"], scores["recall"], scores["parser"]) == (2, 1, "pattern")


def test_a_folder_of_the_shapes_world_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_shapes(tmp_path / "shapes", size=4, test_size=2)
    references = root / "annotations" / "captions_balanced.json"
    rows = json.loads(references.read_text())["annotations"]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["evaluate", "chair", str(captions), "--synonyms", "shapes", "--json"]
    instances = str(root / "annotations" / "instances_balanced.json")
    assert main([*arguments, "--instances", instances]) == 0
    (scores,) = json.loads(capsys.readouterr().out).values()
    assert (scores["chair_s"], scores["captions"]) == (0, len(rows))
    assert scores["recall"] > 0.9


def test_what_is_missing_is_said(coco: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    captions = coco["model.jsonl"]
    assert main(["evaluate", "chair", captions]) == 1
    assert "give the objects of the images: --instances" in capsys.readouterr().err
    assert main(["evaluate", "chair", captions, "--instances", coco["instances"]]) == 1
    assert "no annotations of 1 images, such as 2" in capsys.readouterr().err
    arguments = ["evaluate", "chair", captions, "--references", coco["references"]]
    assert main([*arguments, "--instances", coco["instances"], "--parser", "x"]) == 1
    assert "unknown parser 'x'" in capsys.readouterr().err


def test_answers_are_scored_against_the_released_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = load_fixture("hallucination")["questions"]["popular"]
    asked = tmp_path / "coco_pope_popular.json"
    asked.write_text("".join(json.dumps(row) + "\n" for row in questions))
    answers = [
        {"question_id": row["question_id"], "answer": "Yes." if i % 3 else "No, there is not."}
        for i, row in enumerate(questions)
    ]
    said = tmp_path / "answers.jsonl"
    said.write_text("".join(json.dumps(row) + "\n" for row in reversed(answers)))
    assert main(["evaluate", "pope", str(said), "--questions", str(asked), "--json"]) == 0
    (scores,) = json.loads(capsys.readouterr().out).values()
    assert scores == pope.score([a["answer"] for a in answers], [q["label"] for q in questions])
    assert scores["yes_ratio"] == pytest.approx(2 / 3)
    (tmp_path / "other.jsonl").write_text(said.read_text())
    arguments = ["evaluate", "pope", str(said), str(tmp_path / "other.jsonl"), "--questions", str(asked)]
    assert main(arguments) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["yes", "0.667", "0.667"]
    said.write_text(json.dumps(answers[0]) + "\n")
    assert main(["evaluate", "pope", str(said), "--questions", str(asked)]) == 1
    assert "answers.jsonl: answers and questions differ in 59 question_id" in capsys.readouterr().err


def test_tuning_is_passed_on_and_what_was_tried_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Tuning:
        def table(self) -> str:
            return "strength=2 is best"

    def measure(*_: object, tune: bool, tables: Callable[[str, Tuning], None], **__: object) -> list[dict]:
        if tune:
            tables("vhr", Tuning())
        return [{"method": "vhr", "tune": tune}]

    monkeypatch.setattr("visionsel.generation.load_lvlm", lambda *_: (None, None))
    monkeypatch.setattr("visionsel.embedded.hallucination_quality.evaluate_hallucination", measure)
    for flags, tuned in (([], False), (["--tune"], True)):
        assert main(["evaluate", "hallucination", "--json", *flags]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out) == [{"method": "vhr", "tune": tuned}]
        assert ("vhr\nstrength=2 is best\n" in captured.err) == tuned
