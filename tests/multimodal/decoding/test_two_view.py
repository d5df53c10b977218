"""Two-view decoding equals its restatement, keeps to its formulas and leaves no trace."""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from tests.multimodal.decoding.restated import (
    CONFUSION,
    FAMILIES,
    Formula,
    Inputs,
    Recomputed,
    answer,
    confused,
    logits_of,
    single,
    without_image,
)
from tests.multimodal.oracle import MaskOracle, chosen
from tests.multimodal.runs import ByAttention, ByScore, apart, cache_name, run, tiny
from tests.multimodal.test_session import everything_on
from tests.multimodal.tiny import FAMILIES as ALL
from tests.multimodal.tiny import IMAGE, grow, make_inputs
from visionsel.multimodal.decoding import (
    ICD,
    M3ID,
    VCD,
    DiffusionNoise,
    Disturbance,
    RandomTransform,
    RemoveImages,
    Ritual,
    TwoView,
    agree,
    contrast,
    guidance,
)
from visionsel.multimodal.decoding import two_view as module
from visionsel.multimodal.intervention import Intervention, Stack
from visionsel.multimodal.session import open_session

NEW = 5
ROWS = range(2)


class Method(NamedTuple):
    """A preset, and what it is to do."""

    preset: Intervention
    view: Callable[[Any, Inputs], Inputs]
    formula: Formula
    beta: float


def half(z: Tensor, y: Tensor, t: int) -> Tensor:
    return 1.5 * z - 0.5 * y


def vcd(z: Tensor, y: Tensor, t: int) -> Tensor:
    return 2 * z - y


def m3id(z: Tensor, y: Tensor, t: int) -> Tensor:
    g = math.exp(-0.3 * t)
    return z + (1 - g) / g * (z - y)


def guided(z: Tensor, y: Tensor, t: int) -> Tensor:
    p, q = z.softmax(-1).log(), y.softmax(-1).log()
    return 1.5 * (p - q) + q


def noisy(model: Any, one: Inputs) -> Inputs:
    return DiffusionNoise(700)(one)


METHODS = {
    "vcd": Method(VCD(view=DiffusionNoise(700)), noisy, vcd, 0.1),
    "vcd, unconstrained": Method(VCD(0.5, 0, DiffusionNoise(700)), noisy, half, 0),
    "icd": Method(ICD(view=Disturbance(CONFUSION)), lambda model, one: confused(one), vcd, 0.1),
    "m3id": Method(M3ID(decay=0.3), lambda model, one: without_image(one), m3id, 0.1),
    "guidance": Method(
        TwoView(RemoveImages((IMAGE,)), guidance(1.5)), lambda model, one: without_image(one), guided, 0.1
    ),
    "ritual": Method(
        Ritual(), lambda model, one: RandomTransform.of(model)(one), lambda z, y, t: z + 3 * y, 0.1
    ),
}


def tokens_of(out: Any, new: int = NEW) -> list[list[int]]:
    return (out if torch.is_tensor(out) else out.sequences)[:, -new:].tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_equals_samples_read_anew_for_every_token(name: str, method: str) -> None:
    preset, view, formula, beta = METHODS[method]
    model, inputs = tiny(name), make_inputs(name)
    plain = run(model, inputs, NEW)
    with preset(model):
        found = run(model, inputs, NEW)
        options = {"do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        scores = torch.stack(model.generate(**inputs, **options, max_new_tokens=NEW).scores)
    main, other = found.logits[::2], found.logits[1::2]
    for row in ROWS:
        one = single(name, inputs, row)
        tokens, z, y, combined = answer(model, one, view(model, one), formula, beta, NEW)
        assert tokens == found.tokens[row, -NEW:].tolist()
        assert apart(main[:, row], z) < 1e-10
        assert apart(other[:, row], y) < 1e-10
        assert torch.equal(scores[:, row].isinf(), combined.isinf())
        # generate() makes its scores float32
        assert apart(scores[:, row].nan_to_num(neginf=0), combined.nan_to_num(neginf=0)) < 2e-5
    assert apart(plain.logits[0], other[0]) > 1e-3, "the second view is another one"


@pytest.mark.parametrize("name", FAMILIES)
def test_it_equals_the_restatement_in_single_precision(name: str) -> None:
    model = tiny(name, "sdpa", torch.float32)
    inputs = make_inputs(name, dtype=torch.float32)
    preset, view, formula, beta = METHODS["vcd"]
    with preset(model):
        found = run(model, inputs, NEW)
    for row in ROWS:
        one = single(name, inputs, row)
        tokens, z, y, _ = answer(model, one, view(model, one), formula, beta, NEW)
        assert tokens == found.tokens[row, -NEW:].tolist()
        assert apart(found.logits[::2, row], z) < 2e-5
        assert apart(found.logits[1::2, row], y) < 2e-5


@pytest.mark.parametrize("method", ["vcd", "m3id"])
@pytest.mark.parametrize("name", ALL)
def test_every_family_has_its_second_view(name: str, method: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    with METHODS[method].preset(model) as views:
        found = run(model, inputs, NEW)
    assert views.inputs is not None
    for number in range(NEW):
        given = grow(views.inputs, found.tokens[:, -NEW:][:, :number])
        if name == "paligemma":  # what is generated is no prefix, also of a prompt without an image
            given["token_type_ids"][:, views.inputs["input_ids"].shape[1] :] = 1
        assert apart(found.logits[2 * number + 1], logits_of(model, given)) < 1e-10


def same_text(name: str) -> Inputs:
    """Two samples that differ in their images only."""
    inputs = make_inputs(name, before=(4,), after=(5,), image_sizes=[(32, 40)])
    for key in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            inputs[key] = inputs[key][:1].repeat(2, 1)
    return inputs


@pytest.mark.parametrize("texts", ["different", "the same"])
@pytest.mark.parametrize("method", ["vcd", "m3id"])
@pytest.mark.parametrize("name", FAMILIES)
def test_beams_equal_a_second_view_read_anew(name: str, method: str, texts: str) -> None:
    preset, view, formula, beta = METHODS[method]
    model = tiny(name)
    inputs = same_text(name) if texts == "the same" else make_inputs(name)
    options = {"num_beams": 3, "max_new_tokens": NEW, "do_sample": False}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    samples = [view(model, single(name, inputs, row)) for row in ROWS]
    reference = Recomputed(model, samples, inputs["input_ids"].shape[1], formula, beta, beams=True)
    expected = model.generate(**inputs, **options, logits_processor=[reference])
    with preset(model):
        found = model.generate(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert apart(found.sequences_scores, expected.sequences_scores) < 2e-5
    assert apart(found.sequences_scores, model.generate(**inputs, **options).sequences_scores) > 1e-3


@pytest.mark.parametrize("answers", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_with_a_seed_equals_a_second_view_read_anew(name: str, answers: int) -> None:
    preset, view, formula, _ = METHODS["vcd, unconstrained"]
    model, inputs = tiny(name), make_inputs(name)
    options = {"do_sample": True, "max_new_tokens": NEW, "num_return_sequences": answers, "top_k": 0}
    samples = [view(model, single(name, inputs, row)) for row in ROWS]
    reference = Recomputed(model, samples, inputs["input_ids"].shape[1], formula, 0, beams=False)
    torch.manual_seed(3)
    expected = model.generate(**inputs, **options, logits_processor=[reference])
    torch.manual_seed(3)
    with preset(model):
        found = model.generate(**inputs, **options)
    assert torch.equal(found, expected)
    torch.manual_seed(3)
    assert not torch.equal(found, model.generate(**inputs, **options))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_position_off_by_one_would_be_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny(name), make_inputs(name)
    with METHODS["vcd"].preset(model):
        right = run(model, inputs, NEW)
        first = module._SecondView._first

        def shifted(self: Any, rows: int) -> Tensor:
            logits = first(self, rows)
            self._place = self._place + 1
            return logits

        monkeypatch.setattr(module._SecondView, "_first", shifted)
        wrong = run(model, inputs, NEW)
    assert torch.equal(wrong.logits[:2], right.logits[:2])
    assert apart(wrong.logits[3], right.logits[3]) > 1e-4


# formulas


def test_the_contrast_by_hand() -> None:
    z, y = torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([[3.0, 0.0, 1.0]])
    combine = contrast(0.5)
    assert combine is not None
    assert combine(z, y, 4).tolist() == [[1.5, 1.5, -2.0]]


def test_the_agreement_by_hand() -> None:
    z, y = torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([[3.0, 0.0, 1.0]])
    combine = agree(3.0)
    assert combine is not None
    assert combine(z, y, 4).tolist() == [[11.0, 1.0, 2.0]]


def test_the_guidance_by_hand() -> None:
    z, y = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log() + 3
    combine = guidance(2.0)
    assert combine is not None
    assert combine(z, y, 0).exp()[0].tolist() == pytest.approx([1.0, 0.5, 0.0])
    assert guidance(1.0) is None
    with pytest.raises(ValueError, match="gamma must be above 0, got 0"):
        guidance(0)


def test_the_growing_contrast_of_m3id_by_hand() -> None:
    z, y = torch.tensor([2.0, -1.0, -torch.inf]), torch.tensor([1.0, 1.0, 0.0])
    method = M3ID(decay=math.log(2))
    assert method._combine(z, y, 0).tolist() == [2.0, -1.0, -torch.inf], "g = 1: no correction"
    # g = 1/4: three times the difference is added
    assert method._combine(z, y, 2).tolist() == pytest.approx([5.0, -7.0, -torch.inf])


def test_the_plausibility_constraint_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.05, 0.04]]).log()
    assert module.implausible(logits, 0.09).tolist() == [[False, False, False, True]]
    assert module.implausible(logits + 7, 0.3).tolist() == [[False, False, True, True]]
    assert module.implausible(logits, 1).tolist() == [[False, True, True, True]]
    assert not module.implausible(logits, 0).any()


def test_the_defaults_are_the_published_ones() -> None:
    assert VCD() == VCD(alpha=1.0, beta=0.1, view=None)
    assert ICD() == ICD(alpha=1.0, beta=0.1, view=None)
    assert M3ID() == M3ID(decay=0.02, beta=0.1)
    assert Ritual() == Ritual(alpha=3.0, beta=0.1, view=None)


# what changes nothing

NEUTRAL: list[Intervention] = [VCD(0.0), ICD(0.0, view=Disturbance(CONFUSION)), M3ID(0.0), Ritual(0.0)]


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}])
@pytest.mark.parametrize("method", NEUTRAL, ids=repr)
def test_neutral_values_change_no_bit(method: Intervention, options: dict[str, Any]) -> None:
    model, inputs = tiny("qwen2_5_vl"), make_inputs("qwen2_5_vl")
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_scores": True} | options

    def work() -> Any:
        torch.manual_seed(0)
        return model.generate(**inputs, **options)

    expected = work()
    with method(model):
        found = work()
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))


def test_two_equal_views_agree_on_the_greedy_answer_and_cancel_in_the_contrast() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    plain = run(model, inputs, NEW)
    for method in (Ritual(view=dict), VCD(view=dict)):
        with method(model):
            found = run(model, inputs, NEW)
        assert torch.equal(found.tokens, plain.tokens)
        assert apart(found.logits[::2], found.logits[1::2]) < 1e-10


# how it is used


def test_each_call_of_generate_begins_anew_and_tells_its_second_view() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    other = make_inputs("llava", seed=5)
    with METHODS["vcd"].preset(model):
        expected = [tokens_of(model.generate(**one, max_new_tokens=4), 4) for one in (inputs, other)]
    with METHODS["vcd"].preset(model) as views:
        assert views.inputs is None
        found = [tokens_of(model.generate(**one, max_new_tokens=4), 4) for one in (inputs, other)]
        assert torch.equal(views.inputs["pixel_values"], DiffusionNoise(700)(other)["pixel_values"])
    assert found == expected


def test_the_view_gets_what_the_user_passed_and_no_options() -> None:
    model, inputs = tiny("qwen2_5_vl"), make_inputs("qwen2_5_vl")
    seen: list[Inputs] = []

    def view(given: Inputs) -> Inputs:
        seen.append(given)
        return given

    with VCD(view=view)(model):
        model.generate(**inputs, max_new_tokens=2, num_beams=3, use_cache=True)
    assert set(seen[0]) == set(inputs)
    assert all(seen[0][key] is inputs[key] for key in inputs)


def test_the_view_may_ask_the_model_itself() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    plain = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    asked: list[Tensor] = []

    def view(given: Inputs) -> Inputs:
        asked.append(model.generate(**given, max_new_tokens=2, do_sample=False))
        return DiffusionNoise(700)(given)

    with METHODS["vcd"].preset(model):
        expected = model.generate(**inputs, max_new_tokens=4)
    with VCD(view=view)(model):
        found = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(asked[0], plain)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_may_answer_without_a_cache(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    with METHODS["vcd"].preset(model):
        expected = run(model, inputs, 4)
        found = run(model, inputs, 4, use_cache=False)
    assert torch.equal(found.tokens, expected.tokens)
    assert apart(found.logits, expected.logits) < 1e-10


def test_a_mask_that_is_not_given_is_made_of_the_padding() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    with METHODS["m3id"].preset(model):
        expected = model.generate(**inputs, max_new_tokens=4)
        del inputs["attention_mask"]
        found = model.generate(inputs.pop("input_ids"), **inputs, max_new_tokens=4)
    assert torch.equal(found, expected)


class Forbid(LogitsProcessor):
    """Rules out one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.token] = -torch.inf
        return scores


@pytest.mark.parametrize("method", ["vcd", "m3id", "ritual"])
def test_what_the_user_forbids_stays_forbidden(method: str) -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=1)
    with METHODS[method].preset(model):
        first = int(model.generate(**inputs, max_new_tokens=1)[0, -1])
        options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_scores": True}
        for extra in ({"logits_processor": [Forbid(first)]}, {"suppress_tokens": [first]}):
            out = model.generate(**inputs, **options, **extra)
            assert first not in out.sequences[0, -3:].tolist()
            assert not any(score.isnan().any() for score in out.scores)


# with other interventions


@pytest.mark.parametrize("method", ["vcd", "m3id"])
@pytest.mark.parametrize("name", FAMILIES)
def test_pruners_drop_tokens_in_both_views_and_tell_of_the_main_one(name: str, method: str) -> None:
    model, inputs, stages = tiny(name), make_inputs(name), {0: (0.6,), 2: (0.5,)}
    preset = METHODS[method].preset
    keep = chosen(inputs, stages)
    with ByScore(stages)(model) as pruned, preset(model):
        found = run(model, inputs, NEW)
        tokens, report = found.tokens, pruned.report().to_dict()
    kept = dict(pruned.kept)
    for layer in keep:
        assert torch.equal(kept[layer], keep[layer] & inputs["attention_mask"].bool())
    with ByScore(stages)(model) as alone:
        single_view = run(model, inputs, NEW)
        assert alone.report().to_dict() == report
    assert apart(found.logits[0], single_view.logits[0]) == 0
    if method == "vcd":  # both prompts are as long
        with MaskOracle(model, keep), preset(model):
            expected = run(model, inputs, NEW)
        assert torch.equal(tokens, expected.tokens)
        assert apart(found.logits, expected.logits) < 1e-10
    else:  # the second prompt has nothing to drop
        samples = [without_image(single(name, inputs, row)) for row in ROWS]
        reference = Recomputed(model, samples, inputs["input_ids"].shape[1], m3id, 0.1, beams=False)
        with ByScore(stages)(model):
            expected = model.generate(**inputs, max_new_tokens=NEW, logits_processor=[reference])
        assert torch.equal(tokens, expected)


def test_a_pruner_chooses_by_what_each_view_shows() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    pruner, view = ByAttention(0.4, 2), DiffusionNoise(900)
    with pruner(model):
        main, other = (run(model, one, 1).logits[0] for one in (inputs, view(inputs)))
    with Stack(pruner, VCD(view=view))(model):
        found = run(model, inputs, 3)
    assert torch.equal(found.logits[0], main)
    assert apart(found.logits[1], other) < 1e-10


def test_what_edits_attention_acts_on_the_main_view_only() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    view = DiffusionNoise(700)
    whole, noised = run(model, inputs, 1).logits[0], run(model, view(inputs), 1).logits[0]
    watched: list[int] = []

    def half(call: Any, go_on: Any) -> Any:
        output, weights = go_on(call)
        return output / 2, weights

    with open_session(model) as session, session.tap(1, half), VCD(view=view)(model):
        end = session.watch(lambda scope: watched.append(scope.length))
        found = run(model, inputs, 3)
        end()
        assert not session.aside
    assert apart(found.logits[0], whole) > 1e-3
    assert apart(found.logits[1], noised) < 1e-10
    assert watched == [inputs["input_ids"].shape[1], 1, 1], "the second view is not watched"


def test_the_positions_of_the_main_prompt_stay_on_the_model() -> None:
    model, inputs = tiny("qwen2_5_vl"), make_inputs("qwen2_5_vl")
    run(model, inputs, 3)
    deltas = model.model.rope_deltas.clone()
    assert deltas.any()
    with M3ID()(model):
        run(model, inputs, 3)
    assert torch.equal(model.model.rope_deltas, deltas)


# no trace


@pytest.mark.parametrize("name", FAMILIES)
def test_leaving_the_context_leaves_the_model_as_it_was(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    plain = run(model, inputs, 3)
    before = everything_on(model)
    with ByAttention(0.5, 1)(model), METHODS["vcd"].preset(model):
        assert "generate" in vars(model)
        run(model, inputs, 3)
    assert everything_on(model) == before
    assert torch.equal(run(model, inputs, 3).logits, plain.logits)


def fail(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("on purpose")


@pytest.mark.parametrize("where", ["the view", "the combination", "the second view's forward", "the block"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_an_exception_leaves_the_model_as_it_was(
    name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny(name), make_inputs(name)
    plain = run(model, inputs, 3)
    before = everything_on(model)
    view = fail if where == "the view" else DiffusionNoise()
    combine = fail if where == "the combination" else contrast(1.0)
    if where == "the second view's forward":
        monkeypatch.setattr(module._SecondView, "_next", fail)
    both = Stack(ByScore({1: (0.5,)}), TwoView(view, combine))
    with pytest.raises(KeyError, match="on purpose"), both(model):
        fail(run(model, inputs, 3))
    assert everything_on(model) == before
    assert torch.equal(run(model, inputs, 3).logits, plain.logits)


def test_a_context_goes_on_after_an_exception_inside_it() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    with METHODS["vcd"].preset(model):
        expected = run(model, inputs, 3)
        with pytest.raises(KeyError, match="on purpose"):
            run(model, inputs, 3, stopping_criteria=[fail])
        assert torch.equal(run(model, inputs, 3).logits, expected.logits)


def test_somebody_elses_generate_is_put_back_and_used() -> None:
    model, inputs = copy.copy(tiny("llava")), make_inputs("llava")
    calls: list[int] = []
    stock = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return stock(*args, **kwargs)

    model.generate = generate
    with METHODS["vcd"].preset(model):
        found = model.generate(**inputs, max_new_tokens=3)
    assert model.generate is generate
    assert calls == [1]
    with METHODS["vcd"].preset(tiny("llava")):
        assert torch.equal(found, tiny("llava").generate(**inputs, max_new_tokens=3))


# what cannot be done


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 chooses tokens in its own way"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5 chooses tokens in its own way"),
        ({"custom_generate": fail}, "custom_generate=.* chooses tokens in its own way"),
        ({"assistant_model": "a model"}, "assistant_model='a model' chooses tokens in its own way"),
        ({"inputs_embeds": torch.zeros(1, 1, 64)}, "pass input_ids"),
    ],
)
def test_options_that_do_not_go_together_are_refused(option: dict[str, Any], match: str) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    with VCD()(model), pytest.raises(NotImplementedError, match=match):
        model.generate(**inputs, **option, max_new_tokens=2)


def test_an_assistant_in_the_models_own_configuration_is_seen() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    model.generation_config.prompt_lookup_num_tokens = 2
    try:
        with VCD()(model), pytest.raises(NotImplementedError, match="prompt_lookup_num_tokens=2"):
            model.generate(**inputs, max_new_tokens=2)
    finally:
        model.generation_config.prompt_lookup_num_tokens = None


def test_a_cache_of_earlier_turns_is_refused() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    cache = run(model, inputs, 2).cache
    with VCD()(model), pytest.raises(NotImplementedError, match="run the whole conversation as one prompt"):
        model.generate(**inputs, **{cache_name(model): cache}, max_new_tokens=2)


def test_two_decoding_methods_at_once_are_refused() -> None:
    model = tiny("llava")
    before = everything_on(model)
    with VCD()(model), pytest.raises(ValueError, match=r"two decoding methods at once: TwoView\(view=Diff"):
        M3ID()(model).__enter__()
    with pytest.raises(ValueError, match="two decoding methods at once"):
        Stack(VCD(), Ritual())(model).__enter__()
    assert everything_on(model) == before
    with M3ID()(model):
        pass


@pytest.mark.parametrize(
    ("view", "match"),
    [
        (lambda inputs: None, "a dict with input_ids, got NoneType"),
        (lambda inputs: {"pixel_values": inputs["pixel_values"]}, "a dict with input_ids"),
        (lambda inputs: {"input_ids": inputs["input_ids"][:1]}, "as many samples as it gets: 2, got 1"),
    ],
)
def test_views_that_are_none_are_refused(view: Any, match: str) -> None:
    model = tiny("llava")
    with VCD(view=view)(model), pytest.raises(ValueError, match=match):
        model.generate(**make_inputs("llava"), max_new_tokens=2)


def test_icd_without_a_tokenizer_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"pass view=Disturbance.of\(processor.tokenizer\)"):
        ICD()(tiny("llava")).__enter__()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: VCD(alpha=-1), "alpha must be 0 or more, got -1"),
        (lambda: ICD(alpha=-1), "alpha must be 0 or more, got -1"),
        (lambda: Ritual(alpha=-1), "alpha must be 0 or more, got -1"),
        (lambda: M3ID(decay=-1), "decay must be 0 or more, got -1"),
        (lambda: VCD(beta=2), r"from 0 \(off\) to 1, got 2"),
        (lambda: TwoView(dict, None, beta=-0.1), r"from 0 \(off\) to 1, got -0.1"),
    ],
)
def test_values_out_of_range_are_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_models_that_are_no_vision_language_models_are_refused() -> None:
    with pytest.raises(ValueError, match="no supported vision-language model"):
        VCD()(torch.nn.Linear(2, 2)).__enter__()


def test_the_image_token_is_what_the_tests_take_out() -> None:
    model = tiny("llava")
    with M3ID()(model) as views:
        run(model, make_inputs("llava"), 2)
    assert not (views.inputs["input_ids"] == IMAGE).any()
