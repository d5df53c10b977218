"""The measures of the vision-language model, on captions, answers and attention made by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from visionsel.data.shapes import PARTNERS, SHAPES, Question, ShapesWorld
from visionsel.embedded.lvlm import build_processor
from visionsel.embedded.lvlm_quality import caption_scores, pointing_game, question_scores


def scene(*things: str) -> SimpleNamespace:
    """`scene("red star", "blue ring")`, with the true caption."""
    objects = [SimpleNamespace(color=t.split()[0], shape=t.split()[1]) for t in things]
    return SimpleNamespace(objects=objects, captions=["a " + " and a ".join(things)])


def test_captions_are_counted_by_shapes() -> None:
    samples = [scene("red star", "blue bar"), scene("green circle"), scene("white heart")]
    captions = [
        "a red star and a green ring",  # right, the partner invented, the bar missed
        "a green circle",
        "a white square and a red heart and a white heart",  # a square invented, a heart of the wrong colour
    ]
    scores = caption_scores(captions, samples)
    assert PARTNERS["star"] == "ring"
    assert scores["precision"] == pytest.approx(3 / 5)
    assert scores["recall"] == pytest.approx(3 / 4)
    assert scores["f1"] == pytest.approx(6 / 9)
    assert scores["chair_i"] == pytest.approx(2 / 5)
    assert scores["chair_s"] == pytest.approx(2 / 3)
    assert scores["partner_share"] == pytest.approx(1 / 2)
    assert scores["color_accuracy"] == pytest.approx(3 / 4)
    assert scores["exact"] == pytest.approx(1 / 3)


def test_nothing_said_is_no_error() -> None:
    scores = caption_scores([""], [scene("red star")])
    assert scores["recall"] == scores["f1"] == scores["chair_i"] == scores["chair_s"] == 0


def test_answers_are_counted_by_kind() -> None:
    questions = [
        Question("", "yes", "exist"),
        Question("", "yes", "exist"),
        Question("", "no", "exist", "random"),
        Question("", "no", "exist", "adversarial"),
        Question("", "red", "color"),
        Question("", "0 0 3 3", "refer"),
        Question("", "0 0 3 3", "refer"),
    ]
    scores = question_scores(["yes", "no", "no", "yes", " red ", "0 0 3 1", "red"], questions)
    assert scores["exist"] == pytest.approx(2 / 4)
    assert scores["exist_random"] == pytest.approx((1 + 0.5) / 2)
    assert scores["exist_adversarial"] == pytest.approx((0 + 0.5) / 2)
    assert scores["color"] == 1
    assert scores["refer"] == pytest.approx((0.5 + 0) / 2)
    assert scores["refer_at_half"] == 0


class Pointer:
    """Stands for a model: its attention at each position peaks at the patches that a function names."""

    device = "cpu"

    def __init__(self, processor, peaks) -> None:
        self.config = SimpleNamespace(_attn_implementation="sdpa", image_token_id=processor.image_token_id)
        self.peaks = peaks  # of the sample's number and the position: one patch a layer

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name

    def __call__(self, input_ids, output_attentions, **inputs):
        assert output_attentions
        assert self.config._attn_implementation == "eager"
        count = input_ids.shape[1]
        layers = [torch.full((len(input_ids), 3, count, count), 1e-3) for _ in range(2)]
        for b, ids in enumerate(input_ids):
            image = (ids == self.config.image_token_id).nonzero()[:, 0]
            for position in range(int(image[-1]), count - 1):
                for layer, patch in zip(layers, self.peaks(b, int(ids[position + 1])), strict=True):
                    layer[b, :, position, image[patch]] = 0.5
        return SimpleNamespace(attentions=layers)


def test_the_pointing_game_counts_peaks_on_the_object_that_is_named_next() -> None:
    processor = build_processor()
    samples = list(ShapesWorld("balanced", 11, 12))
    tokens = dict(zip(processor.tokenizer.convert_tokens_to_ids(list(SHAPES)), SHAPES, strict=True))

    def peaks(b: int, following: int) -> tuple[int, int]:
        """The patch that the named object covers most, and one that it does not touch."""
        named = [o for o in samples[b].objects if o.shape == tokens.get(following)]
        if not named:
            return 0, 0
        cover = named[0].mask.reshape(8, 8, 8, 8).mean((1, 3))
        return int(cover.argmax()), int(cover.argmin())

    model = Pointer(processor, peaks)
    measured = pointing_game(model, processor, samples, batch_size=12)
    assert measured["layers"] == [1.0, 0.0]
    assert np.allclose(measured["heads"], [[1.0] * 3, [0.0] * 3])
    assert measured["best"] == 1.0
    assert 0.5 < measured["center"] <= 1.0
    assert 0.02 < measured["chance"] < 0.15
    assert model.config._attn_implementation == "sdpa"


def test_the_attention_implementation_comes_back_after_an_error() -> None:
    processor = build_processor()
    model = Pointer(processor, lambda b, following: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pointing_game(model, processor, list(ShapesWorld("balanced", 0, 1)))
    assert model.config._attn_implementation == "sdpa"
