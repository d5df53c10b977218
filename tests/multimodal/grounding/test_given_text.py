"""Texts read as if the model had said them: which tokens stand for what, and `Grounder.ground_text`."""

from typing import Any

import numpy as np
import pytest

from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.multimodal.grounding.given_text import text_spans
from visionsel.multimodal.grounding.grounder import Grounder

SCENE = ShapesWorld("balanced", 11, 2)[1]


@pytest.fixture(scope="module")
def grounder() -> Grounder:
    return Grounder(*load_lvlm(), "embedded", "mean")


def test_places_count_in_the_text_as_it_is_given(grounder: Grounder) -> None:
    tokenizer = grounder.processor.tokenizer
    text = "A red  Zeppelin and a STAR"  # other letters, two blanks, an unknown word
    spans = text_spans(tokenizer, text)
    assert [text[slice(*span)] for span in spans] == ["A", "red", "Zeppelin", "and", "a", "STAR"]

    class Slow:
        """Keeps no offsets."""

        is_fast = False
        all_special_ids = tokenizer.all_special_ids
        decode = staticmethod(tokenizer.decode)

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return tokenizer(*arguments, **options)

    assert text_spans(Slow(), "a red star")[1:] == [(1, 5), (5, 10)]  # blanks go with what follows
    with pytest.raises(ValueError, match="use a fast tokenizer"):
        text_spans(Slow(), text)


def test_a_given_answer_is_grounded_as_the_models_own(grounder: Grounder) -> None:
    own = grounder.ask(SCENE.image, CAPTION_PROMPT)
    spans = [word.span for word in own.words]
    given = grounder.ground_text(SCENE.image, CAPTION_PROMPT, own.answer, spans)
    for first, second in zip(own.words, given, strict=True):
        assert (first.text, first.span) == (second.text, second.span)
        assert first.prob == pytest.approx(second.prob, rel=1e-4)
        np.testing.assert_allclose(first.heatmap, second.heatmap, atol=1e-5)
        np.testing.assert_array_equal(first.mask, second.mask)
    start, end = spans[1][0], spans[3][1]
    (phrase,) = grounder.ground_text(SCENE.image, CAPTION_PROMPT, own.answer, [(start, end)])
    assert phrase.name == phrase.text == own.answer[start:end]
    mean = np.mean([word.heatmap for word in own.words[1:4]], 0)
    np.testing.assert_allclose(phrase.heatmap, mean, atol=1e-5)
    assert phrase.prob == pytest.approx(np.prod([word.prob for word in own.words[1:4]]), rel=1e-4)


def test_spans_that_are_not_in_the_text_are_refused(grounder: Grounder) -> None:
    for span in ((0, 11), (3, 3), (-1, 2)):
        with pytest.raises(ValueError, match="is not in a text of 10 characters"):
            grounder.ground_text(SCENE.image, CAPTION_PROMPT, "a red star", [span])
    assert grounder.ground_text(SCENE.image, CAPTION_PROMPT, "a red star", []) == []
