"""Texts of the shapes world. Their truth is checked on files, in test_shapes_files.py."""

import re
from collections import Counter

import pytest

from visionsel.data import shapes
from visionsel.data.shapes import (
    CAPTION_PROMPT,
    COLORS,
    DISTRIBUTIONS,
    PARTNERS,
    SHAPES,
    ShapesWorld,
    answer_to_box,
    box_to_answer,
    language,
    split_words,
    vocabulary,
)

KINDS = {"exist", "color", "absent", "count", "where", "what", "relation", "refer"}
SEVERAL = [sample for name in DISTRIBUTIONS for sample in ShapesWorld(name, 21, 300, 32)]


def test_shape_and_colour_names_are_single_lower_case_words() -> None:
    assert len(SHAPES) == len(set(SHAPES)) == 10
    assert len(COLORS) == len(set(COLORS)) == 8
    assert all(re.fullmatch("[a-z]+", word) for word in (*SHAPES, *COLORS))


def test_captions_say_the_colour_directly_before_each_shape() -> None:
    for sample in SEVERAL:
        for caption in sample.captions:
            words = caption.split()
            said = [(words[i - 1], word) for i, word in enumerate(words) if word in SHAPES]
            assert Counter(said) == Counter((o.color, o.shape) for o in sample.objects)
        first = sample.captions[0].split()
        assert [word for word in first if word in SHAPES] == [o.shape for o in sample.objects]


def test_the_vocabulary_is_complete_and_has_nothing_that_is_never_said() -> None:
    said = set(split_words(CAPTION_PROMPT))
    for sample in [*SEVERAL, *ShapesWorld("train", 1, 300, 32, caption_noise=1.0)]:
        texts = [*sample.captions, *(e.text for e in sample.expressions)]
        texts += [text for q in sample.questions for text in (q.text, q.answer)]
        said.update(word for text in texts for word in split_words(text))
    assert said == set(vocabulary())
    assert len(vocabulary()) == len(set(vocabulary()))


def test_every_kind_of_question_is_asked_and_each_once() -> None:
    kinds = Counter(q.kind for sample in SEVERAL for q in sample.questions)
    assert set(kinds) == KINDS
    assert min(kinds.values()) > 200
    for sample in SEVERAL:
        texts = [q.text for q in sample.questions]
        assert len(texts) == len(set(texts))
        assert 6 <= len(texts) <= 30


def test_yes_and_no_are_equally_frequent() -> None:
    for kind in ("exist", "relation"):
        answers = Counter(q.answer for sample in SEVERAL for q in sample.questions if q.kind == kind)
        assert set(answers) == {"yes", "no"}
        assert abs(answers["yes"] - answers["no"]) < 0.08 * answers.total()


def test_negatives_are_chosen_as_they_say() -> None:
    frequency = Counter(o for s in ShapesWorld("train", 22, 1500, 32) for o in {o.shape for o in s.objects})
    kinds = Counter()
    for sample in SEVERAL:
        present = {o.shape for o in sample.objects}
        for q in sample.questions:
            if q.kind != "exist" or q.answer == "yes":
                assert q.negative == ""
                continue
            kinds[q.negative] += 1
            shape = re.fullmatch(r"is there an? (\w+) in the image\?", q.text)[1]
            assert shape not in present
            if q.negative == "popular":  # ties of the law: within the noise of 1500 images
                best = max(frequency[other] for other in SHAPES if other not in present)
                assert frequency[shape] >= 0.8 * best
            if q.negative == "adversarial":
                assert PARTNERS.get(shape) in present or shape in {PARTNERS.get(other) for other in present}
    assert set(kinds) == {"random", "popular", "adversarial"}
    assert min(kinds.values()) > 200


def test_expressions_use_relations_where_a_name_is_not_enough() -> None:
    kinds = Counter(e.kind for sample in SEVERAL for e in sample.expressions)
    assert set(kinds) == {"name", "relation", "place"}
    described = total = needed = 0
    for sample in SEVERAL:
        total += len(sample.objects)
        described += len({e.object for e in sample.expressions})
        named = {e.object for e in sample.expressions if e.kind == "name"}
        needed += sum(e.kind == "relation" and e.object not in named for e in sample.expressions)
    assert described / total > 0.97
    assert needed > 20


def test_a_box_read_back_from_its_answer_contains_it_closely() -> None:
    for sample in ShapesWorld("balanced", 23, 60):
        for o in sample.objects:
            x0, y0, x1, y1 = answer_to_box(box_to_answer(o.box, 64), 64)
            assert x0 <= o.box[0] < x0 + 2
            assert y0 <= o.box[1] < y0 + 2
            assert x1 - 2 < o.box[2] <= x1
            assert y1 - 2 < o.box[3] <= y1
    assert box_to_answer((0, 0, 64, 64), 64) == "0 0 31 31"
    assert answer_to_box("3 10 9 17", 64) == (6, 20, 20, 36)


@pytest.mark.parametrize("answer", ["", "1 2 3", "1 2 3 32", "a b c d", "1 2 3 4 5", "-1 2 3 4"])
def test_what_is_no_box_is_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="a box is four numbers from 0 to 31"):
        answer_to_box(answer, 64)


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_caption_noise_mentions_absent_partners_as_often_as_configured(noise: float) -> None:
    chances = phantoms = 0
    for sample in ShapesWorld("train", 24, 1200, 32, co_occurrence=0.4, caption_noise=noise):
        present = {o.shape for o in sample.objects}
        absent = [b for a, b in PARTNERS.items() if a in present and b not in present]
        chances += len(absent)
        phantoms += len(sample.phantoms)
        for phantom in sample.phantoms:
            size, color, shape = phantom.split()[1:]
            assert size == "small"
            assert color in COLORS
            assert shape in absent
            assert all(phantom in caption for caption in sample.captions)
    assert chances > 300
    assert phantoms / chances == pytest.approx(noise, abs=0.08)


def test_caption_noise_touches_captions_only() -> None:
    clean, noisy = ShapesWorld("train", 25, 100), ShapesWorld("train", 25, 100, caption_noise=1.0)
    differing = 0
    for one, other in zip(clean, noisy, strict=True):
        assert (one.pixels == other.pixels).all()
        assert one.questions == other.questions
        assert one.expressions == other.expressions
        differing += one.captions != other.captions
        assert (one.captions != other.captions) == bool(other.phantoms)
    assert differing > 5


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_there_is_no_noise_unless_it_is_switched_on(distribution: str) -> None:
    assert not any(sample.phantoms for sample in ShapesWorld(distribution, 26, 100, 32))


def test_articles_fit() -> None:
    assert language.with_article("orange ring") == "an orange ring"
    assert language.with_article("ring") == "a ring"
    for sample in SEVERAL:
        for text in [
            *sample.captions,
            *(q.text for q in sample.questions),
            *(q.answer for q in sample.questions),
        ]:
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)


def test_what_is_public_is_there() -> None:
    assert all(hasattr(shapes, name) for name in shapes.__all__)
