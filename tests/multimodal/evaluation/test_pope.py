"""POPE: the released rule for answers, scores, and how questions are chosen."""

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionsel.data.shapes import ShapesWorld
from visionsel.multimodal.evaluation import pope


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        ("yes", "yes"),
        ("yes.", "yes"),
        ("Yes, there is a dog.", "yes"),
        ("no", "no"),
        ("No.", "no"),
        ("No, there is no dog.", "no"),
        ("There is not a dog in the image.", "no"),
        ("", "yes"),  # by the released rule
        (".", "yes"),
        ("NO", "yes"),
        ("There isn't one", "yes"),
        ("Nothing", "yes"),
        ("I see a dog. No cat.", "yes"),  # only the first sentence counts
        ("Well,no", "yes"),  # the comma goes, and "Wellno" is a word
        ("I do not know", "no"),
        ("no\n", "yes"),  # words are parted by blanks only
    ],
)
def test_answers_are_read_by_the_released_rule(answer: str, meaning: str) -> None:
    assert pope.parse(answer) == meaning


def test_scores_worked_out_by_hand() -> None:
    answers = ["yes", "Yes.", "no", "yes", "No, there is none.", ""]
    labels = ["yes", "yes", "yes", "no", "no", "no"]
    scores = pope.score(answers, labels)
    assert scores == {
        "accuracy": 3 / 6,
        "precision": 2 / 4,
        "recall": 2 / 3,
        "f1": pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3)),
        "yes_ratio": 4 / 6,
        "questions": 6,
        "true_positive": 2,
        "false_positive": 2,
        "true_negative": 1,
        "false_negative": 1,
    }


def test_a_model_that_always_agrees_is_half_right_and_shows_it_in_the_share_of_yes() -> None:
    scores = pope.score(["yes"] * 4, ["yes", "no"] * 2)
    assert (scores["accuracy"], scores["recall"], scores["yes_ratio"]) == (0.5, 1, 1)
    assert scores["f1"] == pytest.approx(2 / 3)
    never = pope.score(["no"] * 4, ["yes", "no"] * 2)
    assert (never["precision"], never["f1"], never["yes_ratio"]) == (0, 0, 0)


ANSWERS = st.one_of(st.sampled_from(["yes", "no", "No.", "", "not"]), st.text(max_size=20))


@given(st.lists(st.tuples(ANSWERS, st.sampled_from(["yes", "no"])), min_size=1), st.randoms())
@settings(deadline=None, max_examples=60)
def test_scores_are_shares_and_order_is_nothing(rows: list[tuple[str, str]], dice: random.Random) -> None:
    scores = pope.score(*map(list, zip(*rows, strict=True)))
    assert all(0 <= scores[name] <= 1 for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"))
    dice.shuffle(rows)
    assert pope.score(*map(list, zip(*rows, strict=True))) == scores
    right = [label for _, label in rows]
    assert pope.score(right, right)["accuracy"] == 1


# person is in most images; a fork comes with a cup twice and with a bowl once
OBJECTS = {
    "1.jpg": ["person", "cup", "fork"],
    "2.jpg": ["cup", "fork", "bowl"],
    "3.jpg": ["person", "car", "bus", "dog"],
    "4.jpg": ["person", "dog", "person", "cat"],
    "5.jpg": ["cat", "kite"],  # too few: neither asked about nor counted
}


def negatives(rows: list[dict[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["label"] == "no":
            found.setdefault(row["image"], []).append(row["object"])
    return found


def test_popular_negatives_are_the_most_frequent_that_are_absent() -> None:
    # person 3; cup, fork, dog 2; bowl, car, bus, cat 1, in the order of appearance
    assert negatives(pope.questions(OBJECTS, "popular")) == {
        "1.jpg": ["dog", "bowl", "car"],
        "2.jpg": ["person", "dog", "car"],
        "3.jpg": ["cup", "fork", "bowl"],
        "4.jpg": ["cup", "fork", "bowl"],
    }


def test_adversarial_negatives_come_most_often_with_the_object_before_them() -> None:
    found = negatives(pope.questions(OBJECTS, "adversarial"))
    # person with dog 2, then cup, fork, car, bus, cat; cup with fork 2, person, bowl; fork likewise
    assert found["1.jpg"][:2] == ["dog", "bowl"]
    assert found["2.jpg"][0] == "person"  # with a cup
    assert found["3.jpg"][0] == "cup"
    assert found["4.jpg"][0] == "cup"
    assert found["4.jpg"][1] == "car"  # with a dog: person is there, then car, bus, cat


def test_questions_alternate_and_ask_as_the_released_files_do() -> None:
    rows = pope.questions({"a": ["apple", "dog", "orange"], "b": ["umbrella", "cat", "cow"]}, seed=1)
    assert [row["label"] for row in rows] == ["yes", "no"] * 6
    assert [row["object"] for row in rows[::2]] == ["apple", "dog", "orange", "umbrella", "cat", "cow"]
    assert rows[0] == {
        "image": "a",
        "object": "apple",
        "label": "yes",
        "text": "Is there an apple in the image?",
    }
    assert rows[2]["text"] == "Is there a dog in the image?"


SCENES = st.dictionaries(
    st.text(min_size=1, max_size=3), st.lists(st.sampled_from("abcdef"), max_size=5), max_size=6
).map(lambda scenes: {**scenes, "w": ["u", "v", "w"], "z": ["x", "y", "z"]})


@given(SCENES, st.sampled_from(pope.KINDS), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_every_image_with_three_objects_gets_three_true_questions_and_three_false_ones(
    scenes: dict[str, list[str]], kind: str, seed: int
) -> None:
    rows = pope.questions(scenes, kind, seed)
    assert rows == pope.questions(scenes, kind, seed)
    used = {image: list(dict.fromkeys(names)) for image, names in scenes.items() if len(set(names)) > 2}
    assert list(dict.fromkeys(row["image"] for row in rows)) == list(used)
    counts = Counter(name for names in used.values() for name in names)
    for start in range(0, len(rows), 6):
        six = rows[start : start + 6]
        image = six[0]["image"]
        assert {row["image"] for row in six} == {image}
        assert [row["object"] for row in six[::2]] == used[image][:3]
        absent = [row["object"] for row in six[1::2]]
        assert len(set(absent)) == 3
        assert not set(absent) & set(used[image])
        assert set(absent) <= set(counts)
        if kind == "popular":
            left = [counts[name] for name in counts if name not in used[image]]
            assert [counts[name] for name in absent] == sorted(left, reverse=True)[:3]


def test_random_negatives_are_uniform_and_depend_on_the_seed() -> None:
    scenes = {f"{i}": ["a", "b", "c"] for i in range(600)} | {"other": ["d", "e", "f", "g"]}
    rows = pope.questions(scenes, seed=3)
    assert rows != pope.questions(scenes, seed=4)
    counts = Counter(row["object"] for row in rows[:3600] if row["label"] == "no")
    assert set(counts) == set("defg")
    assert all(400 < count < 500 for count in counts.values())  # 450 each


def test_the_shapes_world_is_asked_about_by_the_same_functions() -> None:
    samples = list(ShapesWorld("train", 5, 60))
    objects = {f"{i}": [o.shape for o in sample.objects] for i, sample in enumerate(samples)}
    rows = pope.questions(objects, "adversarial")
    assert len(rows) % 6 == 0
    for row in rows:
        assert (row["object"] in objects[row["image"]]) == (row["label"] == "yes")
    scores = pope.score([row["label"] for row in rows], [row["label"] for row in rows])
    assert (scores["accuracy"], scores["yes_ratio"]) == (1, 0.5)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: pope.parse(None), TypeError, "an answer must be a string, got NoneType"),
        (lambda: pope.score([], []), ValueError, "there must be one; got 0 answers"),
        (lambda: pope.score(["yes"], []), ValueError, "1 answers and 0 labels"),
        (lambda: pope.score("yes", ["yes"]), ValueError, "got one string"),
        (lambda: pope.score(["yes"], ["Yes"]), ValueError, "a label must be 'yes' or 'no', got 'Yes'"),
        (lambda: pope.questions(OBJECTS, "hard"), ValueError, "choose one of random, popular, adversarial"),
        (lambda: pope.questions({"a": "abc"}), ValueError, "must be a list of names, got one string"),
        (lambda: pope.questions({"a": ["b", "c", "d"]}), ValueError, "image 'a' has all objects but 0"),
    ],
)
def test_what_cannot_be_asked_or_scored_is_refused(call: Any, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        call()
