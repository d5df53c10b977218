"""MME's subsets on hallucination against hand-computed scores and the layouts of the release."""

from pathlib import Path
from typing import Any

import pytest

from visionsel.multimodal.evaluation import mme, mme_table


def rows_of(subset: str, *labels: str) -> list[dict[str, Any]]:
    return [
        {"subset": subset, "image": f"{number // 2}.jpg", "text": "?", "label": label}
        for number, label in enumerate(labels)
    ]


def test_scores_by_hand() -> None:
    rows = rows_of("existence", "yes", "no", "yes", "no") + rows_of("color", "no", "yes")
    answers = ["Yes", "No", "Yes.", "yes, there is", "The", "yes"]
    found = mme.score(answers, rows)
    assert found["existence"] == {"score": 125, "accuracy": 0.75, "accuracy_plus": 0.5, "images": 2}
    assert found["color"] == {"score": 50, "accuracy": 0.5, "accuracy_plus": 0, "images": 1}
    assert (found["total"], found["maximum"], found["other"]) == (175, 400, 1)
    assert (found["accuracy"], found["yes_ratio"], found["questions"]) == (4 / 6, 4 / 6, 6)
    assert "count" not in found


def test_a_model_that_always_says_yes_scores_fifty_and_a_perfect_one_eight_hundred() -> None:
    rows = [row for subset in mme.SUBSETS for row in rows_of(subset, "yes", "no", "yes", "no")]
    assert mme.score(["yes"] * len(rows), rows)["total"] == 4 * 50
    perfect = mme.score([row["label"] for row in rows], rows)
    assert (perfect["total"], perfect["maximum"]) == (800, 800)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        *(("Yes", "yes"), ("NO", "no"), ("Yes, there is no dog", "yes"), (" yes", "yes"), (" no.", "no")),
        # what the first four characters hold, be it a word or not
        *(("Not sure", "no"), ("I know", "other"), ("Know", "no"), ("snow", "no"), ("eyes", "yes")),
        *(("", "other"), ("   no", "other"), ("There is no dog", "other"), ("A: yes", "other")),
    ],
)
def test_answers_are_read_as_released(answer: str, said: str) -> None:
    assert mme.parse(answer) == said


def write_release(folder: Path) -> Path:
    """Texts beside the images, in folders of their own, and in a table, with the line ends that occur."""
    for name in ("existence", "count/images", "count/questions_answers_YN"):
        (folder / name).mkdir(parents=True)
    (folder / "existence" / "b.jpg").touch()
    (folder / "existence" / "a.png").touch()
    (folder / "existence" / "b.txt").write_text("Is there a dog? Yes or no.\tYes\nIs there a cat?\tNo\n\n")
    (folder / "existence" / "a.txt").write_bytes(b"Is there a car?\tYes\r\nIs there a bus?\tNo\r\n")
    (folder / "count" / "images" / "c.jpg").touch()
    (folder / "count" / "questions_answers_YN" / "c.txt").write_text("One?\tno\nTwo?\tyes")
    (folder / "color.txt").write_text("d.jpg\tRed?\tYes\nd.jpg\tBlue?\tNo\n")
    return folder


def test_the_released_layouts_are_read(tmp_path: Path) -> None:
    rows = mme.read_questions(write_release(tmp_path))
    assert [(row["subset"], row["image"], row["text"], row["label"]) for row in rows] == [
        ("existence", "existence/a.png", "Is there a car?", "yes"),
        ("existence", "existence/a.png", "Is there a bus?", "no"),
        ("existence", "existence/b.jpg", "Is there a dog? Yes or no.", "yes"),
        ("existence", "existence/b.jpg", "Is there a cat?", "no"),
        ("count", "count/images/c.jpg", "One?", "no"),
        ("count", "count/images/c.jpg", "Two?", "yes"),
        ("color", "d.jpg", "Red?", "yes"),
        ("color", "d.jpg", "Blue?", "no"),
    ]
    assert [row["question_id"] for row in rows] == list(range(1, 9))
    assert len(mme.read_questions(tmp_path, ["count"])) == 2


def test_results_are_written_and_read_back(tmp_path: Path) -> None:
    rows = rows_of("existence", "yes", "no") + rows_of("count", "no", "yes")
    folder = mme.write_results(rows, tmp_path / "results", ["Yes\n it\tis", "", "no", "yes"])
    assert (folder / "existence.txt").read_text() == "0.jpg\t?\tYes\tYes it is\n0.jpg\t?\tNo\t\n"
    answers, again = mme.read_results(folder)
    assert answers == ["Yes it is", "", "no", "yes"]
    assert [{key: row[key] for key in rows[0]} for row in again] == rows
    assert mme.score(answers, again)["total"] == 50 + 200
    assert mme.read_questions(folder) == again
    mme.write_results(rows, folder)
    with pytest.raises(ValueError, match=r"existence.txt: line 1 has 3 cells parted by tabs, not 4"):
        mme.read_results(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.jpg\tRed?\n", "color.txt: line 1 has 2 cells parted by tabs, not 3 or 4"),
        ("a.jpg\tRed?\tmaybe\na.jpg\tRed?\tNo\n", "line 1: the answer must be Yes or No, got 'maybe'"),
        ("a.jpg\tRed?\tYes\n", "line 1: the image 'a.jpg' has one question, not two"),
        (
            "a.jpg\tRed?\tYes\nb.jpg\tRed?\tNo\n",
            "the image 'a.jpg' needs two questions; beside it is 'b.jpg'",
        ),
    ],
)
def test_malformed_questions_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "color.txt").write_text(line)
    with pytest.raises(ValueError, match=message):
        mme.read_questions(tmp_path)


def test_what_is_missing_or_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has none of existence.txt, .*, nor folders of these names"):
        mme.read_questions(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"color.txt$"):
        mme.read_results(tmp_path)
    with pytest.raises(ValueError, match="unknown subset 'colour'"):
        mme.read_questions(tmp_path, ["colour"])
    rows = rows_of("color", "yes", "no")
    with pytest.raises(ValueError, match="got 1 answers and 2 questions"):
        mme.score(["yes"], rows)
    with pytest.raises(ValueError, match="got one string"):
        mme.score("yes", rows)
    with pytest.raises(ValueError, match=r"color: the image '0.jpg' needs two questions"):
        mme.score(["yes"], rows[:1])
    with pytest.raises(ValueError, match=r"color: the image '0.jpg' needs two questions"):
        mme.score(["yes"] * 2, [rows[0], {**rows[1], "image": "1.jpg"}])
    with pytest.raises(TypeError, match="must be a string"):
        mme.parse(None)  # type: ignore[arg-type]


def test_the_table_has_a_column_for_each_subset() -> None:
    found = mme.score(
        ["yes", "no", "no", "?"], rows_of("existence", "yes", "no") + rows_of("color", "no", "yes")
    )
    head, line = mme_table({"greedy": found}).splitlines()
    assert head.split() == ["method", *mme.SUBSETS, "total", "of", "accuracy", "yes", "other"]
    assert line.split() == ["greedy", "200.0", "-", "-", "50.0", "250.0", "400", "0.750", "0.250", "1"]
