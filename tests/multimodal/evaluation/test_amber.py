"""AMBER against hand-computed examples, and against its released procedure restated with its list indices."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionsel.multimodal.evaluation import amber, amber_table

RELATION = {
    "road": ["path", "street", "ground"],
    "ground": ["floor"],
    "woman": ["person", "girl"],
    "girl": ["woman", "child"],
    "sky": [],
    "cloud": ["smoke"],
    "dog": ["puppy", "animal"],
    "cat": ["animal"],
    "light": [],
}
METRICS = "chair_num=0.001\nchair_score=0\nqa_ans_no_num = 0.5\nha_qa_no_num=1\n"


def make(
    annotations: list[dict[str, Any]], safe: frozenset[str] = frozenset({"light"}), **start: float
) -> amber.Amber:
    return amber.Amber({row["id"]: row for row in annotations}, RELATION, safe, start or None)


CAPTIONS = make(
    [
        {"id": 1, "type": "generative", "truth": ["road", "woman", "sky"], "hallu": ["dog", "cloud"]},
        {"id": 2, "type": "generative", "truth": ["girl", "woman"], "hallu": []},
    ]
)
QUESTIONS = make(
    [
        {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 4, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 5, "type": "discriminative-attribute-state", "truth": "yes"},
        {"id": 6, "type": "discriminative-attribute-number", "truth": "no"},
        {"id": 7, "type": "relation", "truth": "no"},
        {"id": 8, "type": "discriminative-relation", "truth": "yes"},
    ]
)


def test_captions_by_hand() -> None:
    found = amber.generative(
        {
            # two streets (one object), a light (safe), two puppies and smoke (expected, so invented), a cat
            1: "A street, and a street light. Two puppies look at the smoke, and so does a cat.",
            # "woman" stands for the girl first, as in the release, so the woman is not covered
            2: "A woman.",
        },
        CAPTIONS,
    )
    assert found == {
        "chair": 3 / 7,
        "cover": 2 / 5,
        "hal": 1 / 2,
        "cog": 2 / 2,
        "length": (17 + 2) / 2,
        "captions": 2,
        "nouns": 7,
        "invented": {"cat": 1, "puppy": 1, "smoke": 1},
    }


def test_nouns_and_synonyms_are_replaceable() -> None:
    said = {1: "kitten car"}
    found = amber.generative(
        said,
        CAPTIONS,
        nouns=lambda text: ["cat", "animal", "car"] if text == said[1] else [],
        similar=lambda noun, word: (noun, word) in {("cat", "puppy"), ("animal", "sky")},
    )
    # a car is in no list; the cat is like a puppy, which is expected; the animal stands for an expected dog,
    # and is like the sky, which is there
    assert (found["nouns"], found["invented"]) == (2, {"cat": 1})
    assert (found["cover"], found["cog"]) == (1 / 3, 1 / 2)


def test_default_nouns_are_words_of_the_vocabulary_in_any_number_and_case() -> None:
    text = "Women and GIRLS walk their dogs on grounds; the groundwork is light-hearted."
    assert amber.known_nouns(text, CAPTIONS.words) == ["woman", "girl", "dog", "ground"]


def released(nouns: list[str], truth: list[str], hallu: list[str], similar: Any) -> tuple[int, int, int]:
    """Invented nouns, covered objects and covered expectations, with one list of flags as in the release.

    The list has the related words of all objects, with the number of the object, and after them a place for
    each object's own name, which becomes 1.
    """

    def prepare(names: list[str]) -> tuple[list[str], list[int]]:
        words = [word for name in names for word in RELATION[name]]
        owners = [number for number, name in enumerate(names) for _ in RELATION[name]]
        return words + names, owners + [0] * len(names)

    def flag(place: int, flags: list[int], size: int) -> None:
        first = len(flags) - size
        flags[flags[place] + first if place < first else place] = 1

    (safe_words, safe), (other_words, other) = prepare(truth), prepare(hallu)
    invented = 0
    for noun in nouns:
        if noun == "light":
            continue
        if noun in safe_words:
            flag(safe_words.index(noun), safe, len(truth))
            continue
        if noun in other_words:
            flag(other_words.index(noun), other, len(hallu))
        alike = [place for place, word in enumerate(other_words) if similar(noun, word)]
        if alike:
            flag(alike[0], other, len(hallu))
        alike = [place for place, word in enumerate(safe_words) if similar(noun, word)]
        if alike:
            flag(alike[0], safe, len(truth))
        else:
            invented += 1
    return invented, sum(safe[len(safe) - len(truth) :]), sum(other[len(other) - len(hallu) :])


WORDS = sorted({*RELATION, *(word for words in RELATION.values() for word in words)})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([*WORDS, "the", "of"]), max_size=8),
    st.permutations(sorted(RELATION)),
    st.integers(1, 8),
    st.integers(0, 4),
    st.none() | st.sets(st.tuples(st.sampled_from(WORDS), st.sampled_from(WORDS)), max_size=25),
)
def test_any_caption_is_scored_as_the_release_does(
    words: list[str], names: list[str], there: int, expected: int, pairs: set[tuple[str, str]] | None
) -> None:
    truth, hallu = names[:there], names[there : there + expected]
    data = make([{"id": 1, "type": "generative", "truth": truth, "hallu": hallu}])

    def alike(a: str, b: str) -> bool:
        return a == b or (pairs is not None and (a, b) in pairs)

    found = amber.generative({1: " ".join(words)}, data, similar=None if pairs is None else alike)
    nouns = [word for word in words if word in WORDS]
    invented, covered, cognition = released(nouns, truth, hallu, alike)
    assert found["chair"] == invented / max(1, len(nouns))
    assert found["cover"] == covered / len(truth)
    assert found["cog"] == cognition / max(1, len(hallu))
    assert found["hal"] == float(invented > 0)


def test_answers_by_hand_no_is_the_positive_class() -> None:
    said = {3: "No", 4: "Yes", 5: "No", 6: "no", 7: "No", 8: "Yes"}
    found = amber.discriminative(said, QUESTIONS)
    # of "no": 4 questions, 2 found; three answers are exactly No, 2 of them right; "no" is neither
    assert {key: found[key] for key in ("accuracy", "precision", "recall", "f1")} == {
        "accuracy": 3 / 6,
        "precision": 2 / 3,
        "recall": 2 / 4,
        "f1": pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2)),
    }
    assert (found["yes_ratio"], found["other"], found["questions"]) == (2 / 6, 1, 6)
    assert found["existence"]["recall"] == 0.5
    assert found["existence"]["precision"] == 1
    assert (found["attribute"]["accuracy"], found["attribute"]["precision"]) == (0, 0)
    assert (found["state"]["questions"], found["number"]["other"]) == (1, 1)
    assert (found["relation"]["accuracy"], found["relation"]["f1"]) == (1, 1)
    assert "action" not in found
    parsed = amber.score(said, QUESTIONS, first_word=True)["discriminative"]
    assert (parsed["other"], parsed["number"]["accuracy"]) == (0, 1)
    only = amber.score(said, QUESTIONS, "relation")
    assert only["discriminative"]["questions"] == 2
    assert "generative" not in only


def test_the_first_word_is_the_answer() -> None:
    answers = ["yes", "No.", "NO, it is", " Yes there", "Not", "", "maybe yes"]
    assert [amber.parse(answer) for answer in answers] == ["Yes", "No", "No", "Yes", "Not", "", "maybe yes"]


def test_counts_start_where_the_metrics_file_says() -> None:
    data = make(list(QUESTIONS.annotations.values()), qa_ans_no_num=0.5, ha_qa_no_num=1.0)
    found = amber.discriminative({3: "No", 4: "No"}, data)
    assert found["precision"] == 2 / 2.5
    assert found["existence"]["recall"] == 2 / 3
    data = make(list(CAPTIONS.annotations.values()), chair_num=0.5, chair_score=1.0)
    assert amber.generative({1: "a dog"}, data)["chair"] == 2 / 1.5


def write(folder: Path, **changes: Any) -> Path:
    rows = [*CAPTIONS.annotations.values(), *QUESTIONS.annotations.values()]
    content = {"annotations.json": rows, "relation.json": RELATION}
    for name, value in content.items():
        (folder / name).write_text(json.dumps(changes.get(name.partition(".")[0], value)))
    (folder / "safe_words.txt").write_text("orange\nlight\n")
    (folder / "metrics.txt").write_text(METRICS)
    return folder


def test_files_are_read_as_they_are_released(tmp_path: Path) -> None:
    data = amber.read(write(tmp_path))
    assert data.safe_words == {"orange", "light"}
    assert data.start == {"chair_num": 0.001, "chair_score": 0, "qa_ans_no_num": 0.5, "ha_qa_no_num": 1}
    assert amber.generative({2: "a cat"}, data)["chair"] == 1 / 1.001
    (tmp_path / "said.json").write_text('[{"id": 3, "response": "No"}, {"id": 1, "response": "sky"}]')
    said = amber.read_responses(tmp_path / "said.json")
    assert set(amber.score(said, data)) == {"generative", "discriminative"}
    (tmp_path / "said.json").write_text('{"id": 3, "response": "No"}\n{"id": 3, "response": "Yes"}\n')
    with pytest.raises(ValueError, match="1 responses have the id of another"):
        amber.read_responses(tmp_path / "said.json")
    (tmp_path / "metrics.txt").write_text("chair_num=import os")
    with pytest.raises(ValueError, match="line 1 is not 'name=number'"):
        amber.read(tmp_path)
    (tmp_path / "metrics.txt").unlink()
    assert amber.read(tmp_path).start is None
    (tmp_path / "safe_words.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"safe_words.txt"):
        amber.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [{"id": 1, "type": "x", "truth": "no"}]}, "entry 1 has the unknown type 'x'"),
        ({"annotations": [{"id": 1, "type": "relation", "truth": "No"}]}, "entry 1 needs lists in 'truth'"),
        ({"annotations": [{"id": 1, "type": "generative", "truth": ["sky"]}]}, "entry 1 needs lists"),
        ({"annotations": [{"id": 1, "type": "relation", "truth": "no"}] * 2}, "1 entries have the id"),
        ({"relation": ["sky"]}, "relation.json is no table of words"),
    ],
)
def test_files_that_are_not_ambers_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        amber.read(write(tmp_path, **changes))


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match="1 ids are not annotated, such as 9"):
        amber.generative({9: "a dog"}, CAPTIONS)
    with pytest.raises(ValueError, match="there is nothing to score"):
        amber.discriminative({1: "Yes"}, CAPTIONS)
    with pytest.raises(ValueError, match="id 1 must be a string, got None"):
        amber.generative({1: None}, CAPTIONS)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="unknown part 'da'"):
        amber.score({3: "No"}, QUESTIONS, "da")


def test_the_table_shows_cover_length_and_yes_beside_the_scores() -> None:
    scores = {
        "both": amber.score(
            {1: "a sky", 3: "No"}, make([*CAPTIONS.annotations.values(), QUESTIONS.annotations[3]])
        ),
        "captions": amber.score({1: "a dog"}, CAPTIONS),
    }
    head, first, second = amber_table(scores).splitlines()
    assert head.split()[1:8] == ["CHAIR", "Cover", "Hal", "Cog", "words", "accuracy", "F1(no)"]
    assert head.split()[8:] == ["existence", "attribute", "relation", "yes", "other"]
    assert first.split()[1:] == [
        *("0.000", "0.333", "0.000", "0.000", "2.0", "1.000", "1.000"),
        *("1.000", "-", "-", "0.000", "0"),
    ]
    assert second.split()[1:] == ["1.000", "0.000", "1.000", "0.500", "2.0", *["-"] * 7]
    with pytest.raises(ValueError, match="no method"):
        amber_table({})
