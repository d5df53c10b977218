"""Relative attention equals a quotient of rows that eager attention gives."""

import pytest
import torch

from tests.multimodal.grounding.heatmaps.eager import (
    HEADS,
    NAMES,
    NEW,
    TOLERANCE,
    captions,
    case,
    padded,
    questions,
)
from visionsel.multimodal.grounding import Replay
from visionsel.multimodal.grounding.heatmaps.relative import Relative, relative


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_quotient_of_two_means(name: str) -> None:
    one, other = case(name), case(name, after=(2, 7))
    for layers, row in (((1, 2, 3), "predict"), ((2,), "prompt")):
        expected = []
        for b in range(2):
            below = sum(
                other.attention(layer, head, "prompt", b, 0) for layer in layers for head in range(HEADS)
            )
            above = [
                sum(one.attention(layer, head, row, b, t) for layer in layers for head in range(HEADS))
                for t in range(NEW)
            ]
            expected.append([values / below for values in above])
        method = Relative(row=row) if len(layers) == 3 else Relative(layers, row)
        found = method(one.replay, other.replay)
        torch.testing.assert_close(
            found, padded(expected), rtol=1e-4, atol=1e-5
        )  # quotients of small numbers


def test_one_reference_serves_several_answers() -> None:
    one, other = case("llava"), case("llava", after=(2, 7))
    twice = Replay(one.model, one.inputs, one.tokens.repeat_interleave(2, 0))
    found, expected = Relative()(twice, other.replay), Relative()(one.replay, other.replay)
    torch.testing.assert_close(found, expected.repeat_interleave(2, 0), **TOLERANCE)


def test_columns_that_the_reference_does_not_see_are_zero() -> None:
    found = relative(torch.tensor([[0.2, 0.4, 0.0]]), torch.tensor([[0.1, 0.0, 0.5]]))
    torch.testing.assert_close(found, torch.tensor([[2.0, 0.0, 0.0]]))


def test_a_reference_must_be_there_and_of_the_same_images() -> None:
    one, other = case("llava"), case("llava", images=(1, 2))
    with pytest.raises(ValueError, match="Write a general description of the image"):
        Relative()(one.replay)
    with pytest.raises(ValueError, match=r"of other images: image tokens \[16, 32\] beside \[32, 16\]"):
        Relative()(one.replay, other.replay)


def test_the_layer_of_the_authors_is_taken_for_their_models() -> None:
    replay = case("llava").replay
    assert Relative()._layers(replay) == [1, 2, 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionsel.multimodal.grounding.heatmaps.relative.PUBLISHED_LAYERS", {("llava", 4): 2})
        assert Relative()._layers(replay) == [2]
        assert Relative(layers=(0,))._layers(replay) == [0]


def test_it_points_at_what_a_trained_model_names_or_is_asked_about() -> None:
    said, asked = captions(), questions()
    assert said.hits(Relative()(said.replay, said.reference)) >= 0.7  # measured 0.76
    assert asked.hits(Relative(row="prompt")(asked.replay, asked.reference)) >= 0.75
