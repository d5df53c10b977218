"""The shapes world as AMBER and MME ask: what captions cover and invent, and pairs of yes-or-no questions.

Questions are those that the world has, so that a model trained on it knows their words. Of AMBER's dimensions
these are existence and relation, of MME's subsets existence and position. Colours and numbers are asked for
openly in this world ("what color is the star?") and not by yes or no: no such questions are made of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from visionsel.data.shapes.drawing import SHAPES
from visionsel.data.shapes.language import CAPTION_PROMPT, OPPOSITES, RELATIONS, Question
from visionsel.data.shapes.scene import PARTNERS

__all__ = ["Scene", "amber_files", "mme_rows"]

Scene = tuple[str, Sequence[str], Sequence[Question]]
"""The name of an image, its shapes and its questions."""

_AMBER = {"exist": "discriminative-hallucination", "relation": "discriminative-relation"}


def amber_files(scenes: Sequence[Scene]) -> dict[str, Any]:
    """The contents of AMBER's files by their names.

    Of a caption `truth` are the shapes that are there, and `hallu` the absent partners of these: what a model
    has learned to expect. There are no synonyms and no safe words. Ids are those of captions first, then of
    the questions of each dimension.

    Args:
        scenes: images of the shapes world.

    Returns:
        `annotations.json`, `relation.json`, `query/query_all.json` (to be written as JSON) and the text of
        `safe_words.txt`.
    """
    annotations: list[dict[str, Any]] = []
    queries: list[dict[str, Any]] = []

    def add(image: str, query: str, annotation: Mapping[str, Any]) -> None:
        number = len(queries) + 1
        queries.append({"id": number, "image": image, "query": query})
        annotations.append({"id": number, **annotation})

    for image, shapes, _ in scenes:
        there = list(dict.fromkeys(shapes))
        expected = [PARTNERS[shape] for shape in there if shape in PARTNERS and PARTNERS[shape] not in there]
        add(image, CAPTION_PROMPT, {"type": "generative", "truth": there, "hallu": expected})
    for kind, name in _AMBER.items():
        for image, _, questions in scenes:
            for question in questions:
                if question.kind == kind:
                    add(image, question.text, {"type": name, "truth": question.answer})
    return {
        "annotations.json": annotations,
        "relation.json": {shape: [] for shape in SHAPES},
        "query/query_all.json": queries,
        "safe_words.txt": "",
    }


def mme_rows(scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    """Questions of MME: for each image of a subset one with the answer yes and one with no.

    `existence` asks for a shape that is there and for one that is not; `position` for a relation of two
    objects that holds, and for its opposite. Images that allow no such question are left out.

    Returns:
        rows of `question_id` (from 1), `subset`, `image`, `text` and `label`.
    """
    rows: list[dict[str, Any]] = []
    for subset, pair in (("existence", _existence), ("position", _position)):
        for image, _, questions in scenes:
            texts = pair(questions)
            if texts is not None:
                rows += [
                    {"subset": subset, "image": image, "text": text, "label": label}
                    for text, label in zip(texts, ("yes", "no"), strict=True)
                ]
    return [{"question_id": number, **row} for number, row in enumerate(rows, 1)]


def _existence(questions: Sequence[Question]) -> tuple[str, str] | None:
    asked = [question for question in questions if question.kind == "exist"]
    first = {answer: next((q.text for q in asked if q.answer == answer), None) for answer in ("yes", "no")}
    if first["yes"] is None or first["no"] is None:
        return None
    return first["yes"], first["no"]


def _position(questions: Sequence[Question]) -> tuple[str, str] | None:
    question = next((question for question in questions if question.kind == "relation"), None)
    if question is None:
        return None
    relation = next(name for name in RELATIONS if f" {name} " in question.text)
    other = question.text.replace(f" {relation} ", f" {OPPOSITES[relation]} ")
    return (question.text, other) if question.answer == "yes" else (other, question.text)
