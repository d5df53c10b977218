"""Scaling heads is what it says, under any kernel, in any company."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from tests.multimodal.modulation.plainly import generate, matrices
from tests.multimodal.oracle import chosen
from tests.multimodal.runs import DTYPES, ByScore, apart, run, tiny
from tests.multimodal.test_session import everything_on, fail
from tests.multimodal.tiny import FAMILIES, alone, make_inputs
from visionsel.multimodal.intervention import Stack, parse
from visionsel.multimodal.modulation.grounding_heads import GroundingHeads
from visionsel.multimodal.modulation.heads import output_projection

HEADS = {0: [1], 2: [0, 3]}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_strengthened_heads_equal_the_restatement_over_prompt_and_steps(name: str, attention: str) -> None:
    dtype = DTYPES[attention]
    model, inputs = tiny(name, attention), make_inputs(name, dtype=dtype)
    with GroundingHeads(HEADS, 1.6)(model) as strengthened:
        found = run(model, inputs, 4)
    assert {layer: mask.nonzero()[:, 0].tolist() for layer, mask in strengthened.items()} == HEADS
    with matrices(model):
        for row in range(2):
            tokens, logits = generate(model, alone(inputs, row), HEADS, 1.6, 4)
            assert found.tokens[row, -4:].tolist() == tokens
            assert apart(found.logits[:, row], logits) < (1e-9 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl", "qwen3_vl"])
def test_strengthened_heads_and_a_pruner_hold_together_with_beams_too(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    stages = {1: (0.5,)}
    both = Stack(ByScore(stages), GroundingHeads(HEADS))
    with both(model):
        found = run(model, inputs, 4)
        beams = run(model, inputs, 4, num_beams=3)
        for row in range(2):
            single = run(model, alone(inputs, row), 4, num_beams=3)
            assert torch.equal(single.tokens[0, -4:], beams.tokens[row, -4:])
    keep = chosen(inputs, stages)
    with matrices(model):
        for row in range(2):
            sample = alone(inputs, row)
            shut = {1: keep[1][row : row + 1, -sample["input_ids"].shape[1] :]}
            _, logits = generate(model, sample, HEADS, 1.6, 4, shut)
            assert apart(found.logits[:, row], logits) < 1e-9


def test_strength_one_changes_no_bit_and_nothing_is_left_behind() -> None:
    model, inputs = tiny("qwen3_vl"), make_inputs("qwen3_vl")
    expected = run(model, inputs, 4)
    before = everything_on(model)
    with GroundingHeads(HEADS, 1)(model):
        assert everything_on(model) != before
        assert torch.equal(run(model, inputs, 4).logits, expected.logits)
    with ExitStack() as faults:
        faults.callback(model.model.language_model.norm.register_forward_hook(fail).remove)
        with pytest.raises(KeyError, match="on purpose"), GroundingHeads(HEADS)(model):
            run(model, inputs, 2)
    assert everything_on(model) == before
    assert torch.equal(run(model, inputs, 4).logits, expected.logits)


def test_contexts_of_two_multiply_what_both_chose() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    with GroundingHeads({1: [0, 1]}, 2.0)(model), GroundingHeads({1: [1]}, 1.5)(model):
        found = run(model, inputs, 3)
    with GroundingHeads({1: [0]}, 2.0)(model), GroundingHeads({1: [1]}, 3.0)(model):
        assert torch.equal(run(model, inputs, 3).logits, found.logits)


@pytest.mark.parametrize(
    ("heads", "match"),
    [
        ({4: [0]}, "choose among 0 to 3"),
        ({0: [4]}, "not different heads of layer 0: choose among 0 to 3"),
        ({0: [1, 1]}, "not different heads of layer 0"),
        ({}, "no layers are given"),
    ],
)
def test_heads_that_do_not_exist_are_refused(heads: dict[int, list[int]], match: str) -> None:
    model = tiny("llava")
    before = everything_on(model)
    with pytest.raises(ValueError, match=match):
        GroundingHeads(heads)(model).__enter__()
    assert everything_on(model) == before


@pytest.mark.parametrize("strength", [0, -1.6, float("nan"), float("inf")])
def test_a_strength_that_is_no_positive_number_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="strength must be a positive number"):
        GroundingHeads(HEADS, strength)(tiny("llava")).__enter__()


@pytest.mark.parametrize("name", ["o_proj", "out_proj", "dense", "c_proj", "wo"])
def test_the_output_projection_is_found_by_any_of_its_names(name: str) -> None:
    layer = nn.Module()
    layer.self_attn = nn.Module()
    with pytest.raises(NotImplementedError, match="no output projection among o_proj"):
        output_projection(layer)
    setattr(layer.self_attn, name, nn.Linear(2, 2))
    assert output_projection(layer) is getattr(layer.self_attn, name)


def test_heads_can_be_written_in_a_line() -> None:
    line = "grounding_heads:heads={0: [1], 2: [0, 3]},strength=1.3"
    assert parse(line, [GroundingHeads]) == GroundingHeads(HEADS, 1.3)
