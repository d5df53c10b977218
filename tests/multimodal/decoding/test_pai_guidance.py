"""PAI's guidance equals its restatement, and what PAI does to attention stays in the main view."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multimodal.decoding.restated import (
    FAMILIES,
    Recomputed,
    answer,
    logits_of,
    single,
    without_image,
)
from tests.multimodal.decoding.test_with_others import Say
from tests.multimodal.modulation.test_pai import said_plainly
from tests.multimodal.runs import apart, run, tiny
from tests.multimodal.test_session import everything_on
from tests.multimodal.tiny import alone, grow, make_inputs
from visionsel.multimodal.decoding import DECODERS, M3ID, DiffusionNoise, PAIGuidance, RemoveImages
from visionsel.multimodal.intervention import Stack, parse
from visionsel.multimodal.modulation import PAI, Paint

NEW = 5
ROWS = range(2)
STRONG = PAIGuidance(gamma=1.7)


def guided(z: Tensor, y: Tensor, t: int) -> Tensor:
    p, q = z.softmax(-1).log(), y.softmax(-1).log()
    return 1.7 * (p - q) + q


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float64) for name in FAMILIES), ("llava", torch.float32)]
)
def test_a_padded_batch_equals_samples_read_anew_for_every_token(name: str, dtype: torch.dtype) -> None:
    model, inputs = tiny(name, dtype=dtype), make_inputs(name, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    with STRONG(model) as views:
        found = run(model, inputs, NEW)
    assert "pixel_values" not in views.inputs
    for row in ROWS:
        one = single(name, inputs, row)
        tokens, z, y, _ = answer(model, one, without_image(one), guided, 0.1, NEW)
        assert tokens == found.tokens[row, -NEW:].tolist()
        assert apart(found.logits[::2, row], z) < tolerance
        assert apart(found.logits[1::2, row], y) < tolerance


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_beams_equal_a_second_view_read_anew(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    options = {"num_beams": 3, "max_new_tokens": NEW, "do_sample": False}
    samples = [without_image(single(name, inputs, row)) for row in ROWS]
    reference = Recomputed(model, samples, inputs["input_ids"].shape[1], guided, 0.1, beams=True)
    expected = model.generate(**inputs, **options, logits_processor=[reference])
    with STRONG(model):
        assert torch.equal(model.generate(**inputs, **options), expected)


@pytest.mark.parametrize(("name", "edit"), [("llava", PAI(alpha=0.8)), ("qwen2_5_vl", Paint())])
def test_raised_attention_is_raised_in_the_main_view_only(name: str, edit: Any) -> None:
    """Of the prompt without its image, and of a view that has one and where it could be raised."""
    model, inputs = tiny(name), make_inputs(name)
    for view in (None, DiffusionNoise(700)):
        for both in (Stack(edit, PAIGuidance(1.7, view=view)), Stack(PAIGuidance(1.7, view=view), edit)):
            with both(model):
                found = run(model, inputs, 3)
            tokens = found.tokens[:, -3:]
            with edit(model):
                main = run(model, inputs, 3, logits_processor=[Say(tokens)]).logits
            assert torch.equal(found.logits[::2], main)
            assert apart(main, run(model, inputs, 3, logits_processor=[Say(tokens)]).logits) > 1e-2
            for row in ROWS:
                one = single(name, inputs, row)
                one = without_image(one) if view is None else single(name, view(inputs), row)
                for number in range(3):
                    other = logits_of(model, grow(one, tokens[row : row + 1, :number]))
                    assert apart(found.logits[2 * number + 1, row], other[0]) < 1e-10


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_both_halves_of_pai_are_what_they_are_said_plainly(name: str) -> None:
    """Attention as a matrix in the main view; the second one as it is; nothing cached."""
    model, inputs, pai = tiny(name), make_inputs(name), PAI(alpha=0.5)
    with Stack(pai, STRONG)(model):
        tokens = run(model, inputs, 4).tokens[:, -4:]
    for row in ROWS:
        main = alone(inputs, row)
        other, given = without_image(single(name, inputs, row)), main
        for number in range(4):
            with said_plainly(model, main, pai):
                z = model(**given, use_cache=False).logits[:, -1]
            scores = guided(z, logits_of(model, other), number)
            scores = scores.masked_fill(z < z.max() + math.log(0.1), -torch.inf)
            token = scores.argmax(-1, keepdim=True)
            assert int(token) == int(tokens[row, number])
            given, other = grow(given, token), grow(other, token)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}])
def test_a_gamma_of_1_changes_no_bit(options: dict[str, Any]) -> None:
    model, inputs = tiny("qwen2_5_vl"), make_inputs("qwen2_5_vl")
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True} | options

    def work() -> Any:
        torch.manual_seed(0)
        return model.generate(**inputs, **options)

    expected = work()
    with PAIGuidance(gamma=1.0)(model) as views:
        found = work()
        assert views.inputs is None, "no second view is made"
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))


def test_the_view_may_be_another_one() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    found = []
    for view in (None, RemoveImages.of(model), DiffusionNoise(900)):
        with PAIGuidance(gamma=1.7, view=view)(model):
            found.append(run(model, inputs, NEW).logits)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_defaults_are_the_published_ones_and_text_makes_one() -> None:
    assert PAIGuidance() == PAIGuidance(gamma=1.1, beta=0.1, view=None)
    assert parse("pai_guidance:gamma=2", DECODERS) == PAIGuidance(gamma=2)


def test_leaving_the_context_leaves_the_model_as_it_was() -> None:
    model, inputs = tiny("qwen2_5_vl"), make_inputs("qwen2_5_vl")
    plain = run(model, inputs, 3)
    before = everything_on(model)
    with Stack(PAI(), PAIGuidance())(model):
        run(model, inputs, 3)
    assert everything_on(model) == before
    with pytest.raises(ValueError, match="two decoding methods at once"):
        Stack(PAIGuidance(), M3ID())(model).__enter__()
    assert everything_on(model) == before
    assert torch.equal(run(model, inputs, 3).logits, plain.logits)


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.inf, math.nan])
def test_what_is_out_of_range_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma must be a number above 0, got"):
        PAIGuidance(gamma=gamma)
    with pytest.raises(ValueError, match=r"from 0 \(off\) to 1, got 2"):
        PAIGuidance(beta=2)
