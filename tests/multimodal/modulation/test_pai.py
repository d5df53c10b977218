"""PAI equals its equation on materialised weights, of the rows that tokens are predicted from."""

import copy
from typing import Any

import pytest
import torch

from tests.multimodal.modulation.literal import Row, Rule, assert_left_as_it_was, literal, steps, wide
from tests.multimodal.oracle import MaskOracle
from tests.multimodal.runs import apart, cache_name, run, tiny
from tests.multimodal.tiny import FAMILIES, PAD, alone, grow, make_inputs
from visionsel.multimodal.intervention import Stack
from visionsel.multimodal.modulation.pai import PAI, amplify
from visionsel.multimodal.modulation.var import VAR
from visionsel.multimodal.pruning.fastv import FastV

SOME = ("llava", "qwen2_5_vl", "internvl", "gemma3")
EVERY = [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in FAMILIES]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
DIFFERENT = 1e-2  # what it changes: measured 0.1 and more
PAPER = PAI(alpha=0.5)


def rule_of(pai: PAI, last: int) -> Rule:
    """The equation in numbers.

    Args:
        pai: the method.
        last: the place of the last token of the prompt.
    """

    def rule(logits: Row, row: Row, place: int, visual: list[int], sinks: set[int]) -> Row:
        if place < last or not visual:
            return row
        raised = [
            logit + pai.alpha * abs(logit) if j in visual else logit
            for j, logit in enumerate(logits[: place + 1])
        ]
        parts = torch.tensor(raised, dtype=torch.float64).softmax(0).tolist()
        return [*parts, *[0.0] * (len(row) - place - 1)]

    return rule


def said_plainly(model: Any, sample: dict[str, Any], pai: PAI, **more: Any) -> Any:
    return literal(model, sample, (2, 3), rule_of(pai, sample["input_ids"].shape[1] - 1), **more)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("name", EVERY)
def test_it_equals_the_equation_on_logits_of_single_samples(name: str, dtype: torch.dtype) -> None:
    model, inputs = wide(name, dtype), make_inputs(name, dtype=dtype)
    length = inputs["input_ids"].shape[1]
    plain = run(model, inputs, 4)
    with PAPER(model) as report:
        found = run(model, inputs, 4)
    assert apart(found.logits, plain.logits) > DIFFERENT
    assert report.changed == dict.fromkeys((2, 3), 2 * 4 * 4), "samples, heads and tokens"
    for row in range(2):
        sample = alone(inputs, row)
        with said_plainly(model, sample, PAPER):
            prompt, last = steps(model, sample, found.tokens[row, length:])
        with torch.no_grad(), PAPER(model):
            assert apart(model(**sample).logits[0], prompt) <= TOLERANCE[dtype]
        assert apart(found.logits[:, row], last) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", SOME)
def test_a_padded_batch_is_its_samples_with_beams_too(name: str) -> None:
    model, inputs = wide(name), make_inputs(name)
    for options in ({}, {"num_beams": 3}):
        with PAPER(model):
            both = run(model, inputs, 5, **options)
            ones = [run(model, alone(inputs, row), 5, **options) for row in range(2)]
        for row in range(2):
            assert torch.equal(ones[row].tokens[0, -5:], both.tokens[row, -5:])
        assert apart(torch.cat([one.logits for one in ones], 1), both.logits) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", SOME)
def test_beams_equal_the_equation(name: str) -> None:
    model = wide(name)
    sample = alone(make_inputs(name), 0)
    with PAPER(model):
        found = run(model, sample, 6, num_beams=3)
    with said_plainly(model, sample, PAPER):
        expected = run(model, sample, 6, num_beams=3, use_cache=False)
    assert torch.equal(found.tokens, expected.tokens)
    assert apart(found.logits, expected.logits) <= TOLERANCE[torch.float64]


def test_sampling_is_repeated_by_its_seed() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    tokens = []
    with PAPER(model):
        for _ in range(2):
            torch.manual_seed(5)
            tokens.append(run(model, inputs, 6, do_sample=True).tokens)
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", SOME)
def test_an_alpha_of_0_is_nothing_done_bit_for_bit(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    expected = run(model, inputs, 4)
    with PAI(alpha=0.0)(model):
        assert torch.equal(run(model, inputs, 4).logits, expected.logits)


def test_text_alone_is_left_alone() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", images=0)
    expected = run(model, inputs, 4)
    with PAPER(model):
        assert torch.equal(run(model, inputs, 4).logits, expected.logits)


def test_negative_logits_rise_too_and_what_is_hidden_stays_hidden() -> None:
    logits = torch.tensor([1.0, 2.0, -2.0, -torch.inf])[None, None, None]
    visual = torch.tensor([[False, True, True, True]])
    assert amplify(logits, visual, 0.5).flatten().tolist() == [1.0, 3.0, -1.0, -torch.inf]


def test_a_prompt_that_ends_with_its_image_is_changed_at_its_end() -> None:
    model, inputs = wide("llava"), make_inputs("llava", batch=1, after=(0,))
    with torch.no_grad():
        plain = model(**inputs).logits[0]
        with PAPER(model):
            found = model(**inputs).logits[0]
        with said_plainly(model, inputs, PAPER):
            expected = model(**inputs, use_cache=False).logits[0]
    assert apart(found, expected) <= TOLERANCE[torch.float64]
    assert apart(found[-1], plain[-1]) > DIFFERENT
    assert torch.equal(found[:-1], plain[:-1])


def test_padding_on_the_right_does_not_count_as_the_end() -> None:
    model, inputs = wide("llava"), make_inputs("llava", batch=1)
    padded = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], torch.full((1, 3), PAD)], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.zeros(1, 3, dtype=torch.long)], 1),
    }
    with torch.no_grad(), PAPER(model):
        expected = model(**inputs).logits[0, -1]
        assert apart(model(**padded).logits[0, -4], expected) <= TOLERANCE[torch.float64]


def test_prompt_lookup_writes_what_greedy_decoding_writes() -> None:
    """Candidates are read many at a time, and each row is the last one of its step."""
    model, inputs = wide("llava"), make_inputs("llava", batch=1)
    with PAPER(model):
        expected = run(model, inputs, 24)
        found = run(model, inputs, 24, prompt_lookup_num_tokens=3)
    assert torch.equal(found.tokens, expected.tokens)
    assert len(found.logits) < 24, "some candidates were right"


@pytest.mark.parametrize("name", EVERY)
def test_with_fastv_the_tokens_that_are_left_are_raised(name: str) -> None:
    model, inputs = wide(name), make_inputs(name)
    length = inputs["input_ids"].shape[1]
    pruner = FastV(keep=0.5, layer=2)
    for interventions in ((pruner, PAPER), (PAPER, pruner)):
        with Stack(*interventions)(model) as handles:
            found = run(model, inputs, 4)
        pruned = handles[interventions.index(pruner)]
        for row in range(2):
            sample = alone(inputs, row)
            keep = pruned.kept[0][1][row : row + 1, -sample["input_ids"].shape[1] :]
            away = set((~keep[0]).nonzero()[:, 0].tolist())
            assert away
            with (
                said_plainly(model, sample, PAPER, gone={2: away, 3: away}),
                MaskOracle(model, {2: keep}),
            ):
                _, last = steps(model, sample, found.tokens[row, length:])
            assert apart(found.logits[:, row], last) <= TOLERANCE[torch.float64]


def test_in_the_next_turn_the_end_of_the_question_is_raised() -> None:
    model, inputs = wide("qwen2_5_vl"), make_inputs("qwen2_5_vl", batch=1)
    with PAPER(model) as report:
        first = run(model, inputs, 3)
        before = report.changed[2]
        asked = grow(inputs, torch.cat([first.tokens[:, -3:], torch.tensor([[11, 45, 23]])], 1))
        asked = {key: asked[key] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
        run(model, asked, 2, **{cache_name(model): copy.deepcopy(first.cache)})
        assert report.changed[2] - before == 4 * 2, "heads and tokens"


def test_with_var_on_other_layers_each_does_its_own_and_on_the_same_they_are_refused() -> None:
    model, inputs = wide("llava"), make_inputs("llava")
    var = VAR(sink_dims=(3, 9, 20, 30, 41, 57), tau=2.0, min_image_attention=0.1, layers=(1,))
    with Stack(PAPER, var)(model) as (raised, moved):
        both = run(model, inputs, 3)
    assert raised.changed[2]
    assert moved.changed[1]
    with Stack(var, PAPER)(model):
        assert apart(run(model, inputs, 3).logits, both.logits) == 0
    with pytest.raises(ValueError, match=r"PAI and VAR both change the attention of layers \[2\]"):
        Stack(PAPER, VAR())(model).__enter__()


@pytest.mark.parametrize("name", SOME)
def test_the_model_is_left_as_it_was(name: str) -> None:
    assert_left_as_it_was(name, PAPER)


def test_what_is_out_of_range_is_refused() -> None:
    for alpha in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha must be a number from 0 up"):
            PAI(alpha=alpha)
    with pytest.raises(ValueError, match="0 to 3"):
        PAI(layers=(4,))(tiny("llava")).__enter__()
