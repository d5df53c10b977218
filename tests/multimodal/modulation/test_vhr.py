"""VHR equals its plain restatement, whatever the batch, the cache and other interventions."""

import copy
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multimodal.modulation.plainly import (
    best_heads,
    found_heads,
    generate,
    matrices,
    without_images,
)
from tests.multimodal.oracle import chosen
from tests.multimodal.runs import DTYPES, ByAttention, ByScore, apart, cache_name, run, tiny
from tests.multimodal.test_session import everything_on, fail
from tests.multimodal.tiny import FAMILIES, WITH_VIDEO, alone, make_inputs
from visionsel.multimodal.intervention import Stack
from visionsel.multimodal.modulation.image_free import divergence
from visionsel.multimodal.modulation.vhr import VHR, select, t_vhd
from visionsel.multimodal.session import open_session

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5}  # two orders of sums, over five forwards
FOUR = ("llava", "qwen2_5_vl", "internvl", "qwen3_vl")
LAYERS = (1, 2, 3)


def numbers(heads: dict[int, Tensor], row: int) -> dict[int, list[int]]:
    """The heads of a row by number."""
    return {layer: mask[row].nonzero()[:, 0].tolist() for layer, mask in heads.items()}


@lru_cache
def restated(name: str, dtype: torch.dtype, layers: tuple[int, ...], new: int) -> list[Any]:
    """For both samples heads, tokens and logits."""
    model, inputs = tiny(name, "sdpa", dtype), make_inputs(name, dtype=dtype)
    out = []
    with matrices(model):
        for row in range(2):
            sample = alone(inputs, row)
            heads = found_heads(model, sample, 2.0, layers)
            out.append((heads, *generate(model, sample, heads, 2.0, new)))
    return out


# equal to the restatement


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_vhr_equals_its_restatement_with_the_images_deleted(name: str, dtype: torch.dtype) -> None:
    model, inputs = tiny(name, "sdpa", dtype), make_inputs(name, dtype=dtype)
    with VHR(layers=LAYERS)(model) as vhr:
        found = run(model, inputs, 5)
    for row, (heads, tokens, logits) in enumerate(restated(name, dtype, LAYERS, 5)):
        assert numbers(vhr.heads, row) == heads
        assert found.tokens[row, -5:].tolist() == tokens
        assert apart(found.logits[:, row], logits) < TOLERANCES[dtype]
    assert apart(run(model, inputs, 5).logits, found.logits) > 0.01, "it does change what the model says"


@pytest.mark.parametrize("name", FOUR)
def test_under_the_eager_kernel_it_is_the_same(name: str) -> None:
    dtype = DTYPES["eager"]
    model, inputs = tiny(name, "eager"), make_inputs(name, dtype=dtype)
    with VHR(layers=LAYERS)(model) as vhr:
        found = run(model, inputs, 5)
    for row, (heads, _, logits) in enumerate(restated(name, dtype, LAYERS, 5)):
        assert numbers(vhr.heads, row) == heads
        assert apart(found.logits[:, row], logits) < TOLERANCES[dtype]


@pytest.mark.parametrize("name", FOUR)
def test_by_default_all_layers_of_a_short_decoder_are_reinforced_half_of_the_heads_each(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    with VHR()(model) as vhr:
        found = run(model, inputs, 3)
    assert sorted(vhr.heads) == [0, 1, 2, 3]
    for row, (heads, _, logits) in enumerate(restated(name, torch.float64, (0, 1, 2, 3), 3)):
        assert numbers(vhr.heads, row) == heads
        assert {len(ones) for ones in heads.values()} == {2}
        assert apart(found.logits[:, row], logits) < 1e-9


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_in_a_padded_batch_and_with_beams_is_as_alone(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    with VHR(layers=LAYERS)(model) as vhr:
        together = run(model, inputs, 4)
        batch = [numbers(vhr.heads, row) for row in range(2)]
        beams = run(model, inputs, 4, num_beams=3)
        assert [numbers(vhr.heads, row) for row in range(6)] == [batch[0]] * 3 + [batch[1]] * 3
        for row in range(2):
            sample = alone(inputs, row)
            single = run(model, sample, 4)
            assert numbers(vhr.heads, 0) == batch[row]
            assert apart(single.logits[:, 0], together.logits[:, row]) < 1e-9
            assert torch.equal(run(model, sample, 4, num_beams=3).tokens[0, -4:], beams.tokens[row, -4:])


@pytest.mark.parametrize("name", FAMILIES)
def test_all_images_and_videos_of_a_sample_are_taken_out(name: str) -> None:
    model = tiny(name)
    inputs = make_inputs(name, batch=1, images=2, video=name in WITH_VIDEO)
    with VHR(layers=LAYERS)(model) as vhr:
        found = run(model, inputs, 3)
    with matrices(model):
        heads = found_heads(model, inputs, 2.0, LAYERS)
        assert numbers(vhr.heads, 0) == heads
        assert apart(found.logits[:, 0], generate(model, inputs, heads, 2.0, 3)[1]) < 1e-9


@pytest.mark.parametrize("name", FOUR)
def test_right_padding_and_a_plain_forward_find_the_same_heads(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    sample = alone(inputs, 0)
    padded = dict(sample)
    for key, value in sample.items():
        if value.shape == sample["input_ids"].shape:
            padded[key] = torch.nn.functional.pad(value, (0, 3))
    with torch.no_grad(), VHR(layers=LAYERS)(model) as vhr:
        model(**sample)
        expected, logits = numbers(vhr.heads, 0), model(**sample).logits
        assert apart(model(**padded).logits[:, :-3], logits) < 1e-9
        assert numbers(vhr.heads, 0) == expected


def test_drafted_tokens_are_no_part_of_the_prompt() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=1, after=(9,))
    inputs["input_ids"][0, -2:] = inputs["input_ids"][0, -9:-7]  # so that there is something to look up
    with VHR(layers=LAYERS)(model) as vhr:
        expected = run(model, inputs, 6)
        heads = numbers(vhr.heads, 0)
        found = run(model, inputs, 6, prompt_lookup_num_tokens=2)
        assert numbers(vhr.heads, 0) == heads
    assert torch.equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("name", FOUR)
def test_alpha_one_changes_no_bit(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    expected = run(model, inputs, 4)
    with VHR(alpha=1)(model) as vhr:
        found = run(model, inputs, 4)
    assert torch.equal(found.logits, expected.logits)
    assert all(bool(mask.any(1).all()) for mask in vhr.heads.values())


def test_sampling_with_a_seed_gives_the_same_twice_and_as_without_at_alpha_one() -> None:
    model, inputs = tiny("qwen2_5_vl"), make_inputs("qwen2_5_vl")

    def sampled(alpha: float) -> Tensor:
        torch.manual_seed(3)
        with VHR(alpha)(model):
            return run(model, inputs, 5, do_sample=True).tokens

    torch.manual_seed(3)
    plain = run(model, inputs, 5, do_sample=True).tokens
    assert torch.equal(sampled(1.0), plain)
    assert torch.equal(sampled(2.0), sampled(2.0))


# prompts and caches


def test_rows_without_an_image_and_prompts_without_any_are_left_alone() -> None:
    model = tiny("llava")
    inputs = make_inputs("llava", images=(1, 0))
    whole = run(model, inputs, 4)
    with VHR(layers=LAYERS)(model) as vhr:
        found = run(model, inputs, 4)
        assert all(bool(mask[0].any()) and not bool(mask[1].any()) for mask in vhr.heads.values())
        text = without_images(alone(make_inputs("llava"), 0))
        blind = run(model, text, 4)
        assert not any(bool(mask.any()) for mask in vhr.heads.values())
    assert torch.equal(found.logits[:, 1], whole.logits[:, 1])
    assert not torch.equal(found.logits[:, 0], whole.logits[:, 0])
    assert torch.equal(blind.logits, run(model, text, 4).logits)


def test_each_cache_goes_on_with_the_heads_of_its_own_prompt() -> None:
    model, name = tiny("llava"), cache_name(tiny("llava"))
    inputs, others = make_inputs("llava", batch=1), make_inputs("llava", batch=1, seed=5)

    def turn(first: Any, tokens: Tensor) -> Tensor:
        grown = torch.cat([first.tokens, tokens], 1)
        return run(model, {"input_ids": grown, name: first.cache}, 3).logits

    more = torch.tensor([[7, 8, 9]])
    with VHR(layers=LAYERS)(model) as vhr:
        first = run(model, inputs, 2)
        kept = copy.deepcopy(first)
        expected = turn(first, more)
        run(model, others, 2)
        assert torch.equal(turn(kept, more), expected)
        assert vhr.heads is not kept.cache.reinforced_heads


def test_a_cache_whose_prompt_was_read_outside_is_refused() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=1)
    first = run(model, inputs, 2)
    more = {"input_ids": first.tokens, cache_name(model): first.cache}
    with pytest.raises(RuntimeError, match="read the prompt within the context"), VHR()(model):
        run(model, more, 2)


def test_a_prompt_of_images_alone_is_refused() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=1, before=(0,), after=(0,))
    with pytest.raises(ValueError, match="add some text"), VHR()(model):
        run(model, inputs, 2)


# with other interventions


@pytest.mark.parametrize("name", FOUR)
def test_with_a_pruner_in_either_order_it_is_right(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    stages = {0: (0.7, 0.4), 2: (0.5,)}
    pruner, vhr = ByScore(stages), VHR(layers=LAYERS)
    with Stack(pruner, vhr)(model) as (_, one):
        found = run(model, inputs, 4)
    with Stack(vhr, pruner)(model) as (other, pruned):
        again = run(model, inputs, 4)
    assert [layer for layer, _ in pruned.kept] == [0, 2]
    assert all(torch.equal(mask, other.heads[layer]) for layer, mask in one.heads.items())
    assert torch.equal(again.logits, found.logits)
    keep = chosen(inputs, stages)
    with matrices(model):
        for row in range(2):
            sample = alone(inputs, row)
            shut = {
                layer: mask[row : row + 1, -sample["input_ids"].shape[1] :] for layer, mask in keep.items()
            }
            heads = found_heads(model, sample, 2.0, LAYERS, shut)
            assert numbers(one.heads, row) == heads
            _, logits = generate(model, sample, heads, 2.0, 4, shut)
            assert apart(found.logits[:, row], logits) < 1e-9


def test_pruners_that_read_attention_and_vhr_hold_together_with_beams() -> None:
    model, inputs = tiny("qwen3_vl"), make_inputs("qwen3_vl")
    both = Stack(ByAttention(0.6, 1), ByAttention(0.5, 2, "own"), VHR(layers=LAYERS))
    with both(model) as (*_, vhr):
        beams = run(model, inputs, 4, num_beams=3)
        heads = [numbers(vhr.heads, 3 * row) for row in range(2)]
        for row in range(2):
            single = run(model, alone(inputs, row), 4, num_beams=3)
            assert numbers(vhr.heads, 0) == heads[row]
            assert torch.equal(single.tokens[0, -4:], beams.tokens[row, -4:])


def test_a_second_prompt_beside_the_main_one_has_its_own_heads() -> None:
    model, inputs, others = tiny("llava"), make_inputs("llava"), make_inputs("llava", seed=9)
    with open_session(model) as session, VHR(layers=LAYERS)(model) as vhr, torch.no_grad():
        expected = model(**others).logits
        model(**inputs)
        heads = dict(vhr.heads)
        with session.beside():
            found = model(**others).logits
        assert torch.equal(found, expected)
        assert all(vhr.heads[layer] is heads[layer] for layer in LAYERS)


def test_a_second_vhr_on_a_model_is_refused() -> None:
    model = tiny("llava")
    with VHR()(model), pytest.raises(ValueError, match="VHR is on this model already"):
        VHR(layers=[1])(model).__enter__()
    with VHR()(model):
        pass


# what it leaves


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attentions_that_are_asked_for_are_those_of_the_model(attention: str) -> None:
    model = tiny("llava", attention)
    inputs = make_inputs("llava", dtype=model.dtype)
    with torch.no_grad():
        plain = model(**inputs, output_attentions=attention == "eager", output_hidden_states=True)
        with VHR(alpha=1)(model):
            out = model(**inputs, output_attentions=attention == "eager", output_hidden_states=True)
    assert all(map(torch.equal, out.hidden_states, plain.hidden_states))
    assert len(out.hidden_states) == len(plain.hidden_states)
    if attention == "eager":
        assert len(out.attentions) == len(plain.attentions) == 4
        assert all(map(torch.equal, out.attentions, plain.attentions))


@pytest.mark.parametrize("where", ["nowhere", "a layer", "the text without images", "the block"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_the_model_is_left_as_it_was(name: str, where: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    whole = run(model, inputs, 3)
    before = everything_on(model)
    with ExitStack() as faults:
        if where != "nowhere":
            faults.enter_context(pytest.raises(KeyError, match="on purpose"))
        with VHR()(model):
            assert everything_on(model) != before
            if where == "a layer":
                layer = model.model.language_model.layers[2]
                faults.callback(layer.mlp.register_forward_hook(fail).remove)
            if where == "the text without images":
                patch = faults.enter_context(pytest.MonkeyPatch.context())
                patch.setattr("visionsel.multimodal.modulation.vhr.select", fail)
            run(model, inputs, 3)
            if where == "the block":
                fail()
    assert everything_on(model) == before
    assert torch.equal(run(model, inputs, 3).logits, whole.logits)


def test_a_context_goes_on_after_an_exception_inside_it() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    with VHR()(model):
        expected = run(model, inputs, 3)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("visionsel.multimodal.modulation.vhr.select", fail)
            with pytest.raises(KeyError, match="on purpose"):
                run(model, inputs, 3)
        assert torch.equal(run(model, inputs, 3).logits, expected.logits)


# bad input


@pytest.mark.parametrize("layers", [[4], [-1], [1, 1], [True], []])
def test_layers_that_do_not_exist_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="choose among 0 to 3"):
        VHR(layers=layers)(tiny("llava")).__enter__()


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_is_no_positive_number_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be a positive number"):
        VHR(alpha)(tiny("llava")).__enter__()


# the rule itself


def test_the_rule_is_the_restated_one_on_random_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = 0
    for heads in (2, 4, 5, 8, 32):
        sides = torch.randn(2, 16, heads, 6, generator=generator, dtype=torch.float64)
        sides[1] *= torch.rand(16, heads, 1, generator=generator, dtype=torch.float64).exp() ** 3
        found = select(sides[0], sides[1])
        assert found.shape == (16, heads)
        for row in range(16):
            assert found[row].nonzero()[:, 0].tolist() == best_heads(sides[0, row], sides[1, row])
            plain = divergence(sides[0, row], sides[1, row])
            seen += not torch.equal(plain > plain.median(), found[row])
    assert seen > 5, "the filter matters in some"


def test_the_lower_half_stays_and_a_loud_outlier_goes() -> None:
    without = torch.zeros(1, 6, 2)
    with_image = torch.tensor([1.0, 2, 3, 4, 5, 6])[None, :, None] * torch.tensor([1.0, 0])
    assert select(with_image, without).tolist() == [[False, False, False, True, True, True]]
    without[0, 5, 0] = 40  # louder without the image, and far from what it says with it
    assert divergence(with_image, without).argmax() == 5
    assert select(with_image, without).tolist() == [[False, False, True, True, True, False]]
    equal = torch.ones(2, 4, 3)
    assert not bool(select(equal, 2 * equal).any()), "none is above the median"
    assert select(torch.ones(1, 1, 2), torch.zeros(1, 1, 2)).tolist() == [[False]]


def test_the_sigma_is_that_of_a_sample() -> None:
    """Values off by 1.2 of the sigma of a population and 0.98 of that of a sample."""
    with_image = torch.zeros(1, 3, 1, dtype=torch.float64)
    without = torch.tensor([0.0, 0.5, 1.2], dtype=torch.float64)[None, :, None]
    off = without[0, :, 0] - without.mean()
    assert off[2] > off.square().mean().sqrt()
    assert off[2] > off.square().sum().div(2).sqrt()
    assert select(with_image, without).tolist() == [[False, True, False]]
    without = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)[None, :, None]
    with_image = torch.zeros(1, 5, 1, dtype=torch.float64)
    off = without[0, :, 0] - without.mean()
    assert off[4] < off.square().mean().sqrt()
    assert select(with_image, without).tolist() == [[False] * 5]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers_are_refused(value: float) -> None:
    good, bad = torch.ones(1, 4, 2), torch.full((1, 4, 2), value)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            select(*pair)


def test_outputs_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 4, 2\] and \[1, 4, 3\]"):
        select(torch.ones(1, 4, 2), torch.ones(1, 4, 3))
    with pytest.raises(ValueError, match=r"\[B, heads, D\]"):
        select(torch.ones(4, 2), torch.ones(4, 2))


def test_t_vhd_sums_the_highest_heads_of_each_layer() -> None:
    layers = {1: torch.tensor([[1.0, 5, 2]]), 3: torch.tensor([[7.0, 0, 3]])}
    assert t_vhd(layers, 2).tolist() == [17.0]
    assert t_vhd(list(layers.values()), 1).tolist() == [12.0]
    with pytest.raises(ValueError, match="from 1 to 3"):
        t_vhd(layers, 4)
    with pytest.raises(ValueError, match="no layer"):
        t_vhd({}, 1)
