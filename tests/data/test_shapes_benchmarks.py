"""AMBER's and MME's questions of the shapes world: true, in pairs, and in the released formats."""

import json
import re
from pathlib import Path

import pytest

from visionsel.data.shapes import PARTNERS, ShapesWorld, check_shapes, write_shapes
from visionsel.data.shapes.benchmarks import amber_files, mme_rows
from visionsel.multimodal.evaluation import amber, mme

WORLD = [
    (str(number), [thing.shape for thing in sample.objects], sample.questions)
    for number, sample in enumerate(ShapesWorld("anti", 1, 40))
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "world", size=12, test_size=12)


def test_captions_expect_the_absent_partner_and_questions_are_the_worlds_own() -> None:
    content = amber_files(WORLD)
    queries, annotations = content["query/query_all.json"], content["annotations.json"]
    assert [row["id"] for row in queries] == list(range(1, len(annotations) + 1))
    for (name, shapes, _), query, row in zip(WORLD, queries, annotations, strict=False):
        assert (query["image"], row["type"]) == (name, "generative")
        assert set(row["truth"]) == set(shapes)
        assert set(row["hallu"]) == {PARTNERS[shape] for shape in shapes if shape in PARTNERS} - set(shapes)
        assert row["hallu"]  # there is always one in "anti"
    asked = {
        (row["image"], row["query"]): note["truth"] for row, note in zip(queries, annotations, strict=True)
    }
    own = {
        (name, question.text): question.answer
        for name, _, questions in WORLD
        for question in questions
        if question.kind in ("exist", "relation")
    }
    assert {key: truth for key, truth in asked.items() if isinstance(truth, str)} == own
    data = amber.Amber({row["id"]: row for row in annotations}, content["relation.json"])
    right = {
        row["id"]: str(row["truth"]).capitalize() for row in annotations if isinstance(row["truth"], str)
    }
    scores = amber.discriminative(right, data)
    assert (scores["accuracy"], scores["relation"]["f1"], scores["existence"]["f1"]) == (1, 1, 1)
    assert "attribute" not in scores


def test_questions_come_in_pairs_of_yes_and_no_about_the_same_things() -> None:
    rows = mme_rows(WORLD)
    known = {(name, q.text): q.answer for name, _, questions in WORLD for q in questions}
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["image"] == second["image"]
        assert first["subset"] == second["subset"]
        assert (first["label"], second["label"]) == ("yes", "no")
        if first["subset"] == "position":
            one, two = (re.search("left of|right of|above|below", row["text"]) for row in (first, second))
            assert one
            assert two
            assert opposite[one[0]] == two[0]
            assert first["text"].replace(one[0], "") == second["text"].replace(two[0], "")
        answers = [known.get((row["image"], row["text"])) for row in (first, second)]
        assert answers in (["yes", "no"], ["yes", None], [None, "no"])
        assert first["subset"] == "position" or None not in answers
    images = {subset: {row["image"] for row in rows if row["subset"] == subset} for subset in mme.SUBSETS}
    assert len(images["existence"]) == len(WORLD)
    assert 10 < len(images["position"]) < len(WORLD)
    assert not images["count"]


def test_the_written_files_are_read_and_true(root: Path) -> None:
    assert check_shapes(root) == []
    for split in ("val", "anti"):
        data = amber.read(root / "amber" / split)
        queries = amber.read_queries(root / "amber" / split / "query" / "query_all.json")
        assert [row["id"] for row in queries] == list(data.annotations)
        rows = mme.read_questions(root / "mme" / split)
        assert len(rows) >= 24
        assert all((root / "images" / row["image"]).is_file() for row in [*queries, *rows])


def test_the_checker_finds_a_lie_in_either(root: Path) -> None:
    path = root / "amber" / "anti" / "annotations.json"
    content = json.loads(path.read_text())
    content[0]["hallu"] = []
    content[-1]["truth"] = "no" if content[-1]["truth"] == "yes" else "yes"
    before = path.read_text()
    path.write_text(json.dumps(content))
    assert [problem.split("amber")[1][-11:] for problem in check_shapes(root)] == ["is not true"] * 2
    path.write_text(before)
    path = root / "mme" / "anti" / "existence.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0].replace("Yes", "No"), *lines[1:-1]]))
    problems = check_shapes(root)
    assert len(problems) == 2
    assert "'No' is not true" in problems[0]
    assert "has no other question beside it" in problems[1]
