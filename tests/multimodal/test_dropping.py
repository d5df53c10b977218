"""Dropping tokens equals masking them, in every family and in every way to call a model.

Every equality here has failed silently somewhere: `test_an_engine_with_a_fault_is_found_out` puts faults in.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multimodal.oracle import MaskOracle, chosen, merged, visual_tokens
from tests.multimodal.runs import DTYPES, ByAttention, ByScore, Ratios, Run, apart, cache_name, run, tiny
from tests.multimodal.tiny import DYNAMIC, FAMILIES, QWEN, WITH_VIDEO, grow, make_inputs
from visionsel.multimodal import dropping
from visionsel.multimodal.attention import AttentionCall, Output, attention_rows
from visionsel.multimodal.cache import PrunedLayer, PrunedSlidingLayer
from visionsel.multimodal.dropping import Dropper
from visionsel.multimodal.families import find_family
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens
from visionsel.multimodal.session import open_session

# largest difference of logits, which reach 10 here
TOLERANCE = {
    torch.float64: 1e-10,  # measured 0: the last norm of these models rounds to float32
    torch.float32: 3e-5,  # measured 9e-6: a softmax over fewer columns adds in another order
}
DIFFERENT = 1e-2  # what dropping changes: measured 0.5 and more
BATCHES: dict[str, tuple[int, tuple[float, ...]]] = {  # samples, and what part of its tokens each keeps
    "one": (1, (0.4,)),
    "padded": (2, (0.4,)),
    "ragged": (2, (0.3, 0.6)),
}
STAGES = {"input": (0,), "layer 2": (2,), "stages": (0, 1, 3)}
SOME = ("llava", "qwen2_5_vl", "qwen3_vl", "gemma3")  # one of each kind of positions, masks and caches


def every(*but: str, fast: tuple[str, ...] = SOME) -> list[Any]:
    """All families but some; most are marked slow."""
    marks = [() if name in fast else pytest.mark.slow for name in FAMILIES]
    return [pytest.param(name, marks=m) for name, m in zip(FAMILIES, marks, strict=True) if name not in but]


@lru_cache
def inputs_of(name: str, batch: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return make_inputs(name, batch, dtype=dtype)


@lru_cache
def unpruned(name: str, attention: str, batch: int) -> Run:
    return run(tiny(name, attention), inputs_of(name, batch, DTYPES[attention]))


def assert_equal(found: Run, expected: Run) -> None:
    assert torch.equal(found.tokens, expected.tokens)
    assert apart(found.logits, expected.logits) <= TOLERANCE[found.logits.dtype]


def assert_it_equals_the_oracle(
    model: Any,
    ratios: Ratios,
    inputs: Mapping[str, Any],
    work: Callable[[], Run],
    without: Run | None = None,
) -> Run:
    """What is done with pruning and under the oracle is the same, and is another thing without either."""
    with ByScore(ratios)(model):
        found = work()
    with MaskOracle(model, chosen(inputs, ratios)):
        expected = work()
    without = without or work()
    assert_equal(found, expected)
    assert found.logits.shape != without.logits.shape or apart(found.logits, without.logits) > DIFFERENT
    return found


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *(pytest.param(name, "sdpa", id=f"{name}-sdpa") for name in FAMILIES),
        *(
            pytest.param(*name.values, "eager", marks=name.marks, id=f"{name.values[0]}-eager")
            for name in every()
        ),
    ],
)
def test_dropped_tokens_are_as_masked_ones_over_the_prompt_and_six_steps(
    name: str, attention: str, batch: str, stages: tuple[int, ...]
) -> None:
    samples, ratio = BATCHES[batch]
    model, inputs = tiny(name, attention), inputs_of(name, samples, DTYPES[attention])
    whole, ratios = unpruned(name, attention, samples), dict.fromkeys(stages, ratio)
    keep = chosen(inputs, ratios)

    with ByScore(dict.fromkeys(stages, (1.0,)))(model):
        untouched = run(model, inputs)
    assert torch.equal(untouched.logits, whole.logits)
    assert torch.equal(untouched.tokens, whole.tokens)
    assert not any(isinstance(layer, PrunedLayer | PrunedSlidingLayer) for layer in untouched.cache.layers)

    with ByScore(ratios)(model) as pruned:
        found = run(model, inputs)
    with MaskOracle(model, keep):
        expected = run(model, inputs)
    assert len(found.logits) == 7
    assert_equal(found, expected)
    assert apart(found.logits, whole.logits) > DIFFERENT

    real = inputs["attention_mask"].bool()
    assert [layer for layer, _ in pruned.kept] == list(stages)
    for layer, mask in pruned.kept:
        assert torch.equal(mask, keep[layer] & real)
    for number, layer in enumerate(found.cache.layers):
        entered = [int((mask & real).sum(1).amax()) for first, mask in keep.items() if first <= number]
        prompt = inputs["input_ids"].shape[1]
        assert layer.keys.shape[2] == (entered[-1] if entered else prompt) + 6
        assert layer.get_seq_length() == prompt + 6


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", every())
def test_merged_tokens_are_as_the_whole_prompt_with_replaced_hidden_states(name: str, layer: int) -> None:
    model, inputs = tiny(name), inputs_of(name)
    ratios = {layer: (0.3, 0.6), 3: (0.5,)}
    keep, visual = chosen(inputs, ratios), visual_tokens(inputs)
    merges = {
        layer: lambda hidden: merged(hidden, visual & keep[layer], visual),
        3: lambda hidden: merged(hidden, visual & keep[3], visual & keep[layer]),
    }
    with ByScore(ratios, merge=True)(model):
        found = run(model, inputs)
    with MaskOracle(model, keep, merges):
        expected = run(model, inputs)
    with ByScore(ratios)(model):
        unmerged = run(model, inputs)
    assert_equal(found, expected)
    assert apart(found.logits, unmerged.logits) > DIFFERENT


def test_the_oracle_at_the_input_is_a_prompt_that_never_had_these_tokens() -> None:
    model, inputs = tiny("llava"), inputs_of("llava", 1)
    keep = chosen(inputs, {0: (0.4,)})
    with MaskOracle(model, keep):
        expected = run(model, inputs)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    features = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
    embeddings = embeddings.masked_scatter(visual_tokens(inputs)[..., None], features)
    positions = keep[0][0].nonzero()[None, :, 0]
    shorter = {
        "inputs_embeds": embeddings[:, positions[0]],
        "attention_mask": torch.ones_like(positions),
        "position_ids": positions,
    }
    found = run(model, shorter)
    assert apart(found.logits, expected.logits) <= TOLERANCE[torch.float64]


# faults, each of which somebody's code has


def _renumbered(x: Tensor, index: Tensor, take: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return take(x, torch.arange(index.shape[1]).expand_as(index))


def _first_columns(self: Any, mask: Tensor | None, state: Any) -> Tensor | None:
    size = state.columns.shape[1]
    return mask if mask is None else mask[:, :, :size, :size]


def _first_columns_later(self: Any, number: int, state: Any, args: Any, kwargs: Any) -> Tensor | None:
    mask = kwargs["attention_mask"]
    return mask if mask is None else mask[..., : mask.shape[-1] - state.number]


def _one_step_late(self: Any, *args: Any) -> Tensor | None:
    mask: Tensor | None = _later_mask(self, *args)
    return mask if mask is None else mask.roll(1, -1)


_later_mask = Dropper._later_mask
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "positions are renumbered": (
        dropping,
        "_take_positions",
        partial(_renumbered, take=dropping._take_positions),
    ),
    "the mask of the prompt is cut, not gathered": (Dropper, "_prompt_mask", _first_columns),
    "later masks are cut, not gathered": (Dropper, "_later_mask", _first_columns_later),
    "later masks are off by one": (Dropper, "_later_mask", _one_step_late),
    "fillers of shorter samples are seen": (dropping, "_hide", lambda mask, real, rows=True: mask),
    "the cache has no logical length": (dropping, "mark_dropped", lambda layer, dropped: None),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", SOME)
def test_an_engine_with_a_fault_is_found_out(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, ratios = tiny(name), inputs_of(name), {0: (0.3, 0.6)}
    with MaskOracle(model, chosen(inputs, ratios)):
        expected = run(model, inputs)
    with ByScore(ratios)(model):
        assert_equal(run(model, inputs), expected)
    monkeypatch.setattr(*FAULTS[fault])
    with ByScore(ratios)(model):
        found = run(model, inputs)
    assert apart(found.logits, expected.logits) > DIFFERENT


# ways to generate


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", SOME)
def test_sampling_with_a_seed_draws_the_same_tokens(name: str, layer: int) -> None:
    model, inputs = tiny(name), inputs_of(name)

    def work() -> Run:
        torch.manual_seed(0)
        return run(model, inputs, do_sample=True, num_return_sequences=2, temperature=2.0)

    found = assert_it_equals_the_oracle(model, {layer: (0.4,)}, inputs, work)
    assert len(found.tokens) == 4


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", SOME)
def test_beams_find_the_same_even_when_they_write_more_than_the_prompt_has(name: str, layer: int) -> None:
    model, inputs = tiny(name), inputs_of(name)
    new = inputs["input_ids"].shape[1] + 3
    work = partial(run, model, inputs, new, num_beams=3)
    found = assert_it_equals_the_oracle(model, {layer: (0.4,)}, inputs, work)
    assert found.logits.shape[1] == 6


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", SOME)
def test_prompt_lookup_writes_what_greedy_decoding_writes(
    name: str, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, ratios = tiny(name), inputs_of(name, 1), {layer: (0.4,)}
    cropped: list[int] = []
    for kind in (PrunedLayer, PrunedSlidingLayer):

        def crop(self: Any, number: int, crop: Callable[..., None] = kind.crop) -> None:
            cropped.append(number)
            crop(self, number)

        monkeypatch.setattr(kind, "crop", crop)
    with ByScore(ratios)(model):
        greedy = run(model, inputs, new=24)
        found = run(model, inputs, new=24, prompt_lookup_num_tokens=3)
    with MaskOracle(model, chosen(inputs, ratios)):
        expected = run(model, inputs, new=24)
    assert torch.equal(found.tokens, greedy.tokens)
    assert torch.equal(found.tokens, expected.tokens)
    assert any(cropped), "no candidate was ever refused: the test shows nothing"


@pytest.mark.parametrize("reads", ["previous", "own"])
@pytest.mark.parametrize("name", every("paligemma"))  # which itself lets the prompt see the candidates
def test_candidates_that_come_with_the_prompt_do_not_change_what_is_kept(name: str, reads: str) -> None:
    """Prompt lookup sends its first candidates in one forward with the prompt."""
    model, inputs = tiny(name), make_inputs(name, 1, before=(9,), after=(6,))
    inputs["input_ids"][0, -2:] = inputs["input_ids"][0, :2]  # the beginning is looked up
    with ByAttention(0.3, 2, reads)(model) as pruned:
        greedy = run(model, inputs, 12)
        kept = pruned.kept[0][1]
        found = run(model, inputs, 12, prompt_lookup_num_tokens=3)
        candidates = pruned.kept[0][1].shape[1] - kept.shape[1]
    assert candidates == 3
    assert torch.equal(pruned.kept[0][1][:, :-candidates], kept)
    assert torch.equal(found.tokens, greedy.tokens)


def later_turn(model: Any, inputs: Mapping[str, Any], first: Run, new: int = 5) -> Run:
    """The user answers with four tokens; the cache is the one of the first turn."""
    grown = grow(dict(inputs), first.tokens[:, inputs["input_ids"].shape[1] :])
    grown = grow(grown, torch.tensor([[11, 12, 13, 14]]).expand(len(first.tokens), -1))
    text = {key: value for key, value in grown.items() if "pixel" not in key and "image" not in key}
    return run(model, {**text, cache_name(model): first.cache}, new)


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("name", every())
def test_a_second_turn_on_the_same_cache_is_as_under_the_oracle(name: str, stages: tuple[int, ...]) -> None:
    model, inputs, ratios = tiny(name), inputs_of(name), dict.fromkeys(stages, (0.3, 0.6))
    with ByScore(ratios)(model):
        within = later_turn(model, inputs, run(model, inputs, 4))
    with ByScore(ratios)(model):
        first = run(model, inputs, 4)
    with ByScore({1: (0.5,)})(model):  # another pruner: the prompt was pruned by the first
        afterwards = later_turn(model, inputs, first)
    with MaskOracle(model, chosen(inputs, ratios)):
        expected = later_turn(model, inputs, run(model, inputs, 4))
    assert_equal(within, expected)
    assert_equal(afterwards, expected)
    without = later_turn(model, inputs, run(model, inputs, 4))
    assert apart(within.logits, without.logits) > DIFFERENT


def test_a_third_turn_goes_on_from_the_second() -> None:
    model, inputs, ratios = tiny("qwen2_5_vl"), inputs_of("qwen2_5_vl"), {0: (0.3, 0.6), 2: (0.5,)}

    def work() -> Run:
        second = later_turn(model, inputs, run(model, inputs, 4))
        asked = {**inputs, "input_ids": second.tokens, "attention_mask": torch.ones_like(second.tokens)}
        asked["attention_mask"][:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
        asked["mm_token_type_ids"] = torch.zeros_like(second.tokens)
        return later_turn(model, asked, second)

    assert_it_equals_the_oracle(model, ratios, inputs, work)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", SOME)
def test_without_a_cache_every_step_reads_the_pruned_prompt_again(name: str, layer: int) -> None:
    model, inputs = tiny(name), inputs_of(name)
    work = partial(run, model, inputs, 4, use_cache=False)
    assert_it_equals_the_oracle(model, {layer: (0.3, 0.6)}, inputs, work)


# kinds of prompts


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", every())
def test_two_images_in_a_sample_are_pruned_together(name: str, layer: int) -> None:
    model, inputs = tiny(name), make_inputs(name, images=2)
    assert_it_equals_the_oracle(model, {layer: (0.3, 0.6)}, inputs, partial(run, model, inputs))


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", WITH_VIDEO)
def test_a_video_is_pruned_like_an_image(name: str, layer: int) -> None:
    model = tiny(name)
    for images in (0, 1):
        inputs = make_inputs(name, images=images, video=True)
        assert_it_equals_the_oracle(model, {layer: (0.3, 0.6)}, inputs, partial(run, model, inputs))


@pytest.mark.parametrize("name", DYNAMIC)
def test_images_of_several_sizes_keep_their_part_each(name: str) -> None:
    sizes = [(16, 16), (32, 16), (24, 40)] if name in QWEN else [(16, 16), (16, 40), (30, 24)]
    model, inputs = tiny(name), make_inputs(name, 3, (2, 9, 5), (4, 6, 3), image_sizes=sizes)
    assert len(set(visual_tokens(inputs).sum(1).tolist())) == 3
    assert_it_equals_the_oracle(model, {0: (0.5,), 2: (0.5,)}, inputs, partial(run, model, inputs))


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_the_mask_of_a_padded_prompt_is_not_made_where_its_tokens_never_reach_a_layer(
    name: str, layer: int
) -> None:
    model, inputs = tiny(name), inputs_of(name)
    assert not inputs["attention_mask"].all()
    sizes: list[int] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        sizes.append(0 if kwargs["attention_mask"] is None else kwargs["attention_mask"].shape[-1])

    decoder = find_family(model).decoder(model)
    seen: list[int] = []
    # before the hooks of the context: what the decoder made; after them: what the layer gets
    before = decoder.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    with ByScore({layer: (0.4,)})(model), torch.no_grad():
        after = decoder.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"].shape[-1]), with_kwargs=True
        )
        kept = model(**inputs).logits.shape[1]
        after.remove()
    before.remove()
    length = inputs["input_ids"].shape[1]
    assert (sizes, seen) == ([0], [kept]) if layer == 0 else (sizes, seen) == ([length], [length])


@pytest.mark.parametrize("name", every())
def test_a_prompt_of_text_alone_is_left_as_it_is(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name, images=0)
    with ByScore({0: (0.4,), 2: (0.5,)})(model):
        found = run(model, inputs, 3)
    assert torch.equal(found.logits, run(model, inputs, 3).logits)
    assert not any(isinstance(layer, PrunedLayer | PrunedSlidingLayer) for layer in found.cache.layers)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", every())
def test_a_longer_text_beside_an_image_changes_nothing_of_its_pruning(name: str, layer: int) -> None:
    model = tiny(name)
    inputs = make_inputs(name, before=(50, 6), after=(60, 4), images=(0, 1))
    work = partial(run, model, inputs, 3)
    with ByScore({layer: (0.4,)})(model) as pruned:
        work()
    assert int((visual_tokens(inputs) & pruned.kept[0][1]).sum()) == round(
        0.4 * int(visual_tokens(inputs).sum())
    )
    assert_it_equals_the_oracle(model, {layer: (0.4,)}, inputs, work)


@pytest.mark.parametrize("name", every())
def test_the_choice_for_a_sample_is_that_of_the_sample_alone(name: str) -> None:
    model, inputs, ratios = tiny(name), inputs_of(name), {0: (0.6,), 2: (0.5,)}
    padding = (inputs["attention_mask"] == 0).sum(1)
    row, start = int(padding.argmax()), int(padding.amax())
    alone = {key: value[row : row + 1] for key, value in inputs.items()}
    if name in QWEN:
        alone["pixel_values"] = inputs["pixel_values"].split(inputs["image_grid_thw"].prod(1).tolist())[row]
    for key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in alone:
            alone[key] = alone[key][:, start:]
    with ByScore(ratios)(model):
        both, one = run(model, inputs), run(model, alone)
    assert start > 0
    assert torch.equal(both.tokens[row, start:], one.tokens[0])
    assert apart(both.logits[:, row], one.logits[:, 0]) <= TOLERANCE[torch.float64]


# ways to call


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize("name", every())
def test_a_plain_forward_gives_the_logits_of_the_tokens_that_are_left(
    name: str, stages: tuple[int, ...]
) -> None:
    model, inputs, ratios = tiny(name), inputs_of(name), dict.fromkeys(stages, (0.3, 0.6))
    token = torch.tensor([[11, 12]]).expand(2, -1)
    with torch.no_grad():
        with ByScore(ratios)(model) as pruned:
            found = model(**inputs)
            cache = found.get(cache_name(model))
            mask = grow(inputs, token)["attention_mask"]
            text = {"attention_mask": mask, "position_ids": mask.cumsum(1)[:, -2:], cache_name(model): cache}
            later = model(input_ids=token, **text)
        with MaskOracle(model, chosen(inputs, ratios)):
            expected = model(**inputs)
            text[cache_name(model)] = expected.get(cache_name(model))
            expected_later = model(input_ids=token, **text)
    state = pruned.record.states[-1]
    assert found.logits.shape[1] == state.columns.shape[1] < inputs["input_ids"].shape[1]
    wanted = expected.logits.gather(1, state.columns[..., None].expand_as(found.logits))
    assert apart(found.logits[state.real], wanted[state.real]) <= TOLERANCE[torch.float64]
    assert apart(later.logits, expected_later.logits) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", SOME)
def test_a_plain_forward_may_be_padded_on_the_right(name: str, layer: int) -> None:
    model, inputs, ratios = tiny(name), dict(inputs_of(name)), {layer: (0.3, 0.6)}
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    for key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            rows = [row.roll(-n) for row, n in zip(inputs[key], padding, strict=True)]
            inputs[key] = torch.stack(rows)
    with torch.no_grad():
        with ByScore(ratios)(model) as pruned:
            found = model(**inputs).logits
        with MaskOracle(model, chosen(inputs, ratios)):
            expected = model(**inputs).logits
    state = pruned.record.states[-1]
    assert state is not None
    wanted = expected.gather(1, state.columns[..., None].expand_as(found))
    assert apart(found[state.real], wanted[state.real]) <= TOLERANCE[torch.float64]


def test_two_conversations_may_take_turns() -> None:
    model, ratios = tiny("qwen2_5_vl"), {0: (0.3, 0.6), 2: (0.5,)}
    one, other = inputs_of("qwen2_5_vl"), make_inputs("qwen2_5_vl", before=(8, 2), seed=5)
    with ByScore(ratios)(model):
        expected = later_turn(model, one, run(model, one, 4))
        first = run(model, one, 4)
        deltas = model.model.rope_deltas  # the model itself remembers one conversation
        run(model, other, 4)
        model.model.rope_deltas = deltas
        found = later_turn(model, one, first)
    assert_equal(found, expected)


@pytest.mark.parametrize("attention", DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_pruned_cache_outside_of_any_context_is_read_rightly_or_not_at_all(
    attention: str, batch: int
) -> None:
    model, inputs = tiny("llava", attention), inputs_of("llava", batch, DTYPES[attention])
    with ByScore({0: (0.3, 0.6)})(model):
        first = run(model, inputs, 2)
    with pytest.raises(RuntimeError, match="holds a pruned prompt"):
        later_turn(model, inputs, first)


@pytest.mark.parametrize("name", every())
def test_bfloat16_runs_and_is_near(name: str) -> None:
    model, inputs = tiny(name, "sdpa", torch.bfloat16), make_inputs(name, dtype=torch.bfloat16)
    ratios: Ratios = {0: (0.6,), 2: (0.3, 0.6)}
    with ByScore(ratios)(model):
        found = run(model, inputs)
    with MaskOracle(model, chosen(inputs, ratios)):
        expected = run(model, inputs)
    assert found.logits.dtype == torch.bfloat16
    assert bool(found.logits.isfinite().all())
    assert apart(found.logits[0].float(), expected.logits[0].float()) < 0.5
    assert apart(found.logits[0].float(), run(model, inputs, 1).logits[0].float()) > 0.5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_it_works_in_every_mode_of_gradients(mode: Callable[[], Any]) -> None:
    model, inputs, ratios = tiny("qwen3_vl"), inputs_of("qwen3_vl"), {0: (0.6,), 2: (0.3, 0.6)}
    with mode(), ByScore(ratios)(model):
        found = model(**inputs, logits_to_keep=1).logits[:, 0]
    with MaskOracle(model, chosen(inputs, ratios)):
        assert apart(found.detach(), run(model, inputs, 1).logits[0]) <= TOLERANCE[torch.float64]
    assert found.requires_grad == (mode is nullcontext)


@pytest.mark.parametrize("name", every())
def test_a_stage_that_truncates_makes_the_layers_before_it_forget(name: str) -> None:
    """Only the keys after the prompt: the prompt itself was read with all tokens."""
    model, inputs = tiny(name), inputs_of(name)
    ratios: Ratios = {1: (0.6,), 3: (0.3, 0.6)}
    keep = chosen(inputs, ratios)
    with ByScore(ratios, options={"truncate_earlier": True})(model):
        found = run(model, inputs)
        lengths = [layer.keys.shape[2] for layer in found.cache.layers]
    assert len(set(lengths)) == 1
    with MaskOracle(model, keep):
        first = run(model, inputs, 1)
    grown = grow(inputs, first.tokens[:, -1:])
    text = {key: value for key, value in grown.items() if "pixel" not in key and "image" not in key}
    with MaskOracle(model, {0: keep[3]}):
        expected = run(model, {**text, cache_name(model): first.cache}, 6)
    assert apart(found.logits[0], first.logits[0]) <= TOLERANCE[torch.float64]
    assert torch.equal(found.tokens, expected.tokens)
    assert apart(found.logits[1:], expected.logits) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("first", [3, 1])
def test_stages_may_truncate_in_any_order_of_entry(first: int) -> None:
    model, inputs = tiny("llava"), inputs_of("llava")
    truncating = {
        layer: ByScore({layer: (0.3, 0.6)}, options={"truncate_earlier": True})
        for layer in (first, 4 - first)
    }
    with truncating[first](model), truncating[4 - first](model) as pruned:
        found = run(model, inputs, 3)
    layers = [layer.dropped for layer in found.cache.layers]
    assert all(torch.equal(layer.columns, layers[3].columns) for layer in layers)
    for layer, dropped in zip(found.cache.layers, layers, strict=True):
        assert layer.keys.shape[2] == dropped.columns.shape[1] + 2
    keep = next(mask for layer, mask in pruned.kept if layer == 3)
    for row, (columns, real) in enumerate(zip(layers[0].columns, layers[0].real, strict=True)):
        assert columns[real].tolist() == keep[row].nonzero()[:, 0].tolist()
    with ByScore({1: (0.3, 0.6), 3: (0.3, 0.6)}, options={"truncate_earlier": True})(model):
        at_once = run(model, inputs, 3)
    assert_equal(found, at_once)


# selections that read attention


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("how", ["previous", "own", "tower"])
@pytest.mark.parametrize("name", every())
def test_a_selection_by_attention_is_the_same_for_all_beams_of_a_sample(
    name: str, how: str, beams: int
) -> None:
    """Since transformers 5.20 the tower sees each image once, before the decoder has its rows."""
    model, inputs = tiny(name), inputs_of(name)
    pruner = ByAttention(0.4, 2, None if how == "tower" else how, tower=how == "tower")
    with pruner(model) as pruned:
        found = run(model, inputs, num_beams=beams)
    (_, kept), padding = pruned.kept[0], inputs["attention_mask"] == 0
    for beam in range(1, beams):
        assert torch.equal(kept[::beams], kept[beam::beams])
    wanted = [round(0.4 * int(n)) for n in visual_tokens(inputs).sum(1)]
    assert (visual_tokens(inputs) & kept[::beams]).sum(1).tolist() == wanted
    with MaskOracle(model, {2: kept[::beams] | padding}):
        expected = run(model, inputs, num_beams=beams)
    assert_equal(found, expected)


def test_pruners_need_layers_of_their_own() -> None:
    model = tiny("llava")
    same: Pruner = ByScore({2: (0.4,)})
    with (
        same(model),
        pytest.raises(ValueError, match="two interventions drop tokens before layer 2"),
        same(model),
    ):
        pass


@pytest.mark.parametrize("name", every())
def test_what_a_layer_would_attend_to_is_known_after_tokens_were_dropped_before(name: str) -> None:
    model, inputs = tiny(name), inputs_of(name)
    foreseen: list[Tensor] = []
    calls: list[AttentionCall] = []

    @dataclass(frozen=True)
    class Foreseeing(Pruner):
        def stages(self, layers: int) -> list[Stage]:
            return [Stage(2, self.select, reads="own")]

        def select(self, tokens: VisualTokens) -> Tensor:
            foreseen.append(tokens.attention())
            return tokens.valid

    def watch(call: AttentionCall, kernel: Callable[[AttentionCall], Output]) -> Output:
        calls.append(call)
        return kernel(call)

    with open_session(model) as session, session.tap(2, watch):
        with ByScore({0: (0.3, 0.6)})(model) as pruned, Foreseeing()(model):
            run(model, inputs, 1)
        columns = pruned.record.states[2].columns
    assert len(calls) == 1
    rows = attention_rows(calls[0])[:, :, -1]  # prompts end at the right
    for sample, visual in enumerate(visual_tokens(inputs).gather(1, columns)):
        keep = pruned.record.states[2].real[sample] & visual
        wanted = rows[sample][:, keep]
        assert apart(foreseen[0][sample, :, : wanted.shape[1]], wanted) < 1e-12
        assert not foreseen[0][sample, :, wanted.shape[1] :].any()
