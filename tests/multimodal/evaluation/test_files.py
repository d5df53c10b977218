"""Files of captions, questions and answers as they are released."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import load_fixture
from visionsel.multimodal.evaluation import files, pope, read_synonyms


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", pope.KINDS)
def test_the_released_questions_are_read_as_they_are(tmp_path: Path, kind: str) -> None:
    released = load_fixture("hallucination")["questions"][kind]
    path = write_lines(tmp_path / f"coco_pope_{kind}.json", released)
    rows = files.read_questions(path)
    assert [{key: row[key] for key in released[0]} for row in rows] == released
    assert [row["label"] for row in rows] == ["yes", "no"] * 30
    assert rows[0]["object"] == "snowboard"
    for row in rows:  # ours are worded as theirs
        objects = {"a": [row["object"], "b", "c"], "d": ["d", "e", "f"]}
        assert pope.questions(objects)[0]["text"] == row["text"]
    # written by us they are what they were
    assert files.write_questions(rows, tmp_path / "copy.json").read_text() == path.read_text()


def test_questions_with_the_slip_of_the_generator_or_another_text_are_read(tmp_path: Path) -> None:
    rows = [
        {"image": "a", "text": "Is there an orange in the imange?", "label": "yes"},
        {"image": "a", "text": "Do you see a dog?", "label": "no"},
    ]
    assert [row["object"] for row in files.read_questions(write_lines(tmp_path / "q", rows))] == [
        "orange",
        "",
    ]


def test_captions_are_read_from_lines_and_from_a_list(tmp_path: Path) -> None:
    rows = [row for rows in load_fixture("hallucination")["captions"].values() for row in rows]
    lines = write_lines(tmp_path / "captions.jsonl", rows)
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    assert files.read_captions(lines) == rows == files.read_captions(tmp_path / "captions.json")


def test_a_line_separator_inside_a_caption_parts_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text('{"image_id": 1, "caption": "a dog\u2028and\x85a cat"}\n\n')
    assert files.read_captions(path) == [{"image_id": 1, "caption": "a dog\u2028and\x85a cat"}]


def test_answers_find_their_questions_by_number_or_by_order() -> None:
    asked = [{"question_id": i, "label": "yes"} for i in (1, 2, 3)]
    by_number = [{"question_id": i, "answer": str(i)} for i in (3, 1, 2)]
    assert files.match_answers(by_number, asked) == ["1", "2", "3"]
    assert files.match_answers([{"answer": a} for a in "abc"], asked) == ["a", "b", "c"]
    for answers, says in [
        ([{"answer": "a"}], "1 answers to 3 questions"),
        (by_number[:2], "differ in 1 question_id, such as 2"),
        ([*by_number, by_number[0]], "some question_id stands twice"),
    ]:
        with pytest.raises(ValueError, match=says):
            files.match_answers(answers, asked)


@pytest.mark.parametrize(
    ("read", "text", "says"),
    [
        (files.read_captions, "", "is empty"),
        (files.read_captions, '{"image_id": 1, "caption": "a"}\nnonsense\n', "line 2 is not JSON"),
        (files.read_captions, "[1, 2", "the list is not JSON"),
        (
            files.read_captions,
            '\n{"image_id": 1}\n',
            r"line 2 needs 'caption' \(str\); it has the keys image_id",
        ),
        (files.read_captions, '[{"image_id": true, "caption": ""}]', "entry 1 needs 'image_id'"),
        (files.read_captions, "[3]", "entry 1 needs 'image_id' .*; it has 3"),
        (files.read_captions, '{"image_id": 1, "caption": null}', "line 1 needs 'caption' .*'caption': None"),
        (files.read_answers, '{"text": "yes"}', r"line 1 needs 'answer' \(str\)"),
        (
            files.read_questions,
            '{"image": "a", "text": "b", "label": "maybe"}',
            "question 1 has the label 'maybe'",
        ),
        (files.read_coco, "[]", "has no 'annotations'"),
        (files.read_coco, "{", "is not JSON"),
    ],
)
def test_files_that_are_something_else_are_refused_with_their_line(
    tmp_path: Path, read: Any, text: str, says: str
) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        read(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        read(tmp_path / "none")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG")
    for read in (files.read_captions, files.read_coco, read_synonyms):
        with pytest.raises(ValueError, match=r"picture\.png.*utf-8"):
            read(path)
