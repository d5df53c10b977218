"""ACT equals its rule on materialised weights, in batches, beams and with pruners."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multimodal.modulation.literal import Row, assert_left_as_it_was, literal, steps, wide
from tests.multimodal.oracle import MaskOracle
from tests.multimodal.runs import apart, run, tiny
from tests.multimodal.tiny import FAMILIES, alone, make_inputs
from visionsel.multimodal.intervention import Stack
from visionsel.multimodal.modulation import act as act_module
from visionsel.multimodal.modulation import rows
from visionsel.multimodal.modulation.act import ACT, calibrate
from visionsel.multimodal.pruning.fastv import FastV

SOME = ("llava", "qwen2_5_vl", "internvl", "gemma3")
EVERY = [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in FAMILIES]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
DIFFERENT = 1e-2  # what it changes: measured 0.1 and more
WHOLE = ACT(layers=(1, 2, 3))
CHOSEN = ACT(beta=0.1, threshold=0.08, heads={1: [0, 2], 3: [1]})


def said_plainly(model: Any, sample: dict[str, Any], act: ACT, **more: Any) -> Any:
    """The rule in numbers: sinks of each head over the prompt, and what becomes of a row."""
    length = sample["input_ids"].shape[1]
    heads: dict[int, Any] = dict(act.heads or dict.fromkeys(act.layers or (), range(4)))

    def sinks_of(logits: Tensor, weights: Tensor, layer: int) -> list[set[int]]:
        gone = more.get("gone", {}).get(layer, set())
        there = [q for q in range(length) if q not in gone]
        sinks: list[set[int]] = []
        for h, (scores, values) in enumerate(zip(logits.tolist(), weights.tolist(), strict=True)):
            found = []
            for k in there:
                seen = [values[q][k] for q in there if scores[q][k] > -torch.inf]
                if sum(seen) / len(seen) > act.threshold:
                    found.append(k)
            sinks.append(set(found[1:]) if h in heads[layer] else set())
        return sinks

    def rule(logits: Row, row: Row, place: int, visual: list[int], sinks: set[int]) -> Row:
        cut = sum(row[j] for j in sinks)
        rest = sum(weight for j, weight in enumerate(row) if j not in sinks)
        if cut == 0 or rest == 0:
            return row
        return [
            weight * act.beta if j in sinks else weight + (1 - act.beta) * cut * weight / rest
            for j, weight in enumerate(row)
        ]

    return literal(model, sample, tuple(heads), rule, sinks_of=sinks_of, **more)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("act", [WHOLE, CHOSEN], ids=["all heads", "chosen heads"])
@pytest.mark.parametrize("name", EVERY)
def test_it_equals_the_rule_on_weights_of_single_samples(name: str, act: ACT, dtype: torch.dtype) -> None:
    model, inputs = wide(name, dtype), make_inputs(name, dtype=dtype)
    length = inputs["input_ids"].shape[1]
    plain = run(model, inputs, 4)
    with act(model) as report:
        found = run(model, inputs, 4)
    assert apart(found.logits, plain.logits) > DIFFERENT
    assert any(bool(sinks.any()) for sinks in report.sinks.values())
    for row in range(2):
        sample = alone(inputs, row)
        with said_plainly(model, sample, act):
            prompt, last = steps(model, sample, found.tokens[row, length:])
        with torch.no_grad(), act(model):
            assert apart(model(**sample).logits[0], prompt) <= TOLERANCE[dtype]
        assert apart(found.logits[:, row], last) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", SOME)
def test_beams_equal_the_rule(name: str) -> None:
    model = wide(name)
    inputs = make_inputs(name)
    with WHOLE(model):
        both = run(model, inputs, 5, num_beams=3)
    for row in range(2):
        sample = alone(inputs, row)
        with said_plainly(model, sample, WHOLE):
            expected = run(model, sample, 5, num_beams=3, use_cache=False)
        assert torch.equal(both.tokens[row, -5:], expected.tokens[0, -5:])
        assert apart(both.logits[:, 3 * row : 3 * row + 3], expected.logits) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", SOME)
def test_with_fastv_the_tokens_that_are_left_are_calibrated(name: str) -> None:
    model, inputs = wide(name), make_inputs(name)
    length = inputs["input_ids"].shape[1]
    pruner = FastV(keep=0.5, layer=2)
    for interventions in ((pruner, WHOLE), (WHOLE, pruner)):
        with Stack(*interventions)(model) as handles:
            found = run(model, inputs, 4)
        pruned = handles[interventions.index(pruner)]
        for row in range(2):
            sample = alone(inputs, row)
            keep = pruned.kept[0][1][row : row + 1, -sample["input_ids"].shape[1] :]
            away = set((~keep[0]).nonzero()[:, 0].tolist())
            assert away
            gone = {2: away, 3: away}
            with said_plainly(model, sample, WHOLE, gone=gone), MaskOracle(model, {2: keep}):
                _, last = steps(model, sample, found.tokens[row, length:])
            assert apart(found.logits[:, row], last) <= TOLERANCE[torch.float64]


def test_sampling_is_repeated_by_its_seed() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    tokens = []
    with WHOLE(model):
        for _ in range(2):
            torch.manual_seed(5)
            tokens.append(run(model, inputs, 6, do_sample=True).tokens)
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", SOME)
def test_a_beta_of_1_is_nothing_done_bit_for_bit(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    expected = run(model, inputs, 4)
    with ACT(beta=1.0)(model):
        assert torch.equal(run(model, inputs, 4).logits, expected.logits)


def test_text_alone_is_calibrated_too() -> None:
    model, inputs = wide("llava"), make_inputs("llava", images=0, after=(9, 7))
    plain = run(model, inputs, 3)
    with ACT(layers=(1, 2), threshold=0.05)(model) as report:
        found = run(model, inputs, 3)
    assert report.sinks[1].any()
    assert apart(found.logits, plain.logits) > 1e-4


def test_prompt_lookup_writes_what_greedy_decoding_writes() -> None:
    model, inputs = wide("llava"), make_inputs("llava", batch=1)
    with WHOLE(model):
        expected = run(model, inputs, 24)
        found = run(model, inputs, 24, prompt_lookup_num_tokens=3)
    assert torch.equal(found.tokens, expected.tokens)


def test_a_long_prompt_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = wide("llava"), make_inputs("llava")
    with WHOLE(model):
        expected = run(model, inputs, 3)
        for module in (rows, act_module):
            monkeypatch.setattr(module, "CHUNK", 5)
        assert apart(run(model, inputs, 3).logits, expected.logits) <= TOLERANCE[torch.float64]


def test_sinks_keep_a_part_and_the_others_share_the_rest() -> None:
    attention = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)[None, None, None]
    sinks = torch.tensor([[[False, True, False, False]]])
    found = calibrate(attention, sinks, 0.4).flatten()
    expected = [0.5 * (1 + 0.12 / 0.8), 0.08, 0.2 * (1 + 0.12 / 0.8), 0.1 * (1 + 0.12 / 0.8)]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    assert torch.equal(calibrate(attention, sinks | True, 0.4), attention)


@pytest.mark.parametrize("name", SOME)
def test_the_model_is_left_as_it_was_by_an_exception_too(name: str) -> None:
    assert_left_as_it_was(name, WHOLE)


def test_what_is_out_of_range_is_refused() -> None:
    for settings, match in (
        ({"beta": 1.1}, "beta must be in"),
        ({"threshold": float("nan")}, "threshold must be in"),
        ({"heads": {1: [0]}, "layers": (1,)}, "give heads or layers"),
    ):
        with pytest.raises(ValueError, match=match):
            ACT(**settings)
    for act, match in (
        (ACT(heads={1: [4]}), r"heads \[4\] of layer 1 do not exist: choose among 0 to 3"),
        (ACT(heads={9: [0]}), "0 to 3"),
        (ACT(layers=(4,)), "0 to 3"),
    ):
        with pytest.raises(ValueError, match=match):
            act(tiny("llava")).__enter__()
    assert hash(ACT(heads={1: [0]})) == hash(ACT(heads={1: (0,)}))
