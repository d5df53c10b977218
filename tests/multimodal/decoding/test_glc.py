"""GLC equals its plain restatement: no cache, one sample at a time, eager attention, all hidden states."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.multimodal.decoding.test_with_others import VIEW, Say
from tests.multimodal.modulation.literal import assert_left_as_it_was
from tests.multimodal.oracle import MaskOracle, chosen, visual_tokens
from tests.multimodal.runs import ByScore, apart, cache_name, run, tiny
from tests.multimodal.tiny import alone, grow, make_inputs
from visionsel.multimodal.decoding.glc import GLC, choose_layer, glimpse, layer_scores, refocus, text_regions
from visionsel.multimodal.decoding.vcd import VCD
from visionsel.multimodal.intervention import Stack
from visionsel.multimodal.modulation.var import VAR
from visionsel.multimodal.modulation.vhr import VHR

FAMILIES = ("llava", "qwen2_5_vl", "internvl", "gemma3")
TOLERANCE = 2e-5  # eager attention makes its softmax in float32
SAME = 1e-9  # the same sums in another order, in float64
NEW = 5
LAST = 3
PAPER = GLC(w=0.4, keep=12, stable=0.6)  # of 16 image tokens
CODE = GLC(w=0.4, keep=12, fidelity="code")


def decoder_of(model: Any) -> Any:
    return getattr(model.model, "language_model", None) or model.model.text_model


@dataclass
class Said:
    """One sample, said plainly: places of its region in the prompt without padding, and so on."""

    layer: int
    region: list[int]
    scores: list[float]
    tokens: list[int]
    logits: Tensor


def region_of(first: Any, last: Any, image: list[int], question: list[int], glc: GLC) -> list[int]:
    """ZoomText in numbers, of attention `[L][L]`."""
    asked = {j: sum(last[q][j] for q in question) / len(question) for j in image}
    best = sorted(image, key=lambda j: (-asked[j], j))[: glc.keep]
    early, late = ({j: sum(layer[i][j] for i in best) for j in best} for layer in (first, last))
    if glc.fidelity == "code":
        early, late = (
            {j: (x - min(all_.values())) / (max(all_.values()) - min(all_.values())) for j, x in all_.items()}
            for all_ in (early, late)
        )
        return sorted(
            j for j in best if (abs(late[j] - early[j]) > 1e8 * early[j] if early[j] else late[j] > 0)
        )
    early, late = ({j: x / sum(all_.values()) for j, x in all_.items()} for all_ in (early, late))
    shift = {j: abs(late[j] - early[j]) / (early[j] + glc.eps) for j in best}
    left = max(1, round((1 - glc.stable) * len(best)))
    return sorted(sorted(best, key=lambda j: (-shift[j], j))[:left])


def plainly(
    model: Any, sample: Mapping[str, Any], glc: GLC, gone: Mapping[int, set[int]] | None = None
) -> Said:
    """What GLC does with a sample; an eager model, everything anew for each token.

    Args:
        model: eager.
        sample: without padding.
        glc: the method.
        gone: for each layer the places that a pruner dropped before it; the caller hides them.
    """
    decoder, w, sample = decoder_of(model), glc.weight, dict(sample)
    image = visual_tokens(sample)[0].nonzero()[:, 0].tolist()
    question = list(range(image[-1] + 1, sample["input_ids"].shape[1]))
    away = [(gone or {}).get(layer, set()) for layer in range(LAST + 1)]
    there = [j for j in image if j not in away[LAST]]
    layer, region, scores, tokens, logits = -1, [], [], [], []
    ends: list[Tensor] = []
    for number in range(NEW):
        with decoder.norm.register_forward_pre_hook(lambda module, args: ends.append(args[0][0])):
            out = model(**sample, use_cache=False, output_attentions=True, output_hidden_states=True)
        states = [*(one[0] for one in out.hidden_states[1:-1]), ends[-1]]
        if number == 0:
            attention = [one[0].double().mean(0).tolist() for one in out.attentions]
            region = region_of(attention[0], attention[LAST], there, question, glc)
            for a, dropped in list(zip(attention, away, strict=True))[: LAST + (glc.fidelity == "paper")]:
                asking = [i for i in image if i not in dropped]
                whole = sum(a[i][j] for i in asking for j in there)
                scores.append(sum(a[i][j] for i in asking for j in region) / whole)
            layer = scores.index(max(scores)) if region else -1
        grounded = states[layer] if layer >= 0 else None
        if glc.fidelity == "paper":
            end = states[LAST][-1]
            end = end if grounded is None else (1 - w) * end + w * grounded[-1]
            logits.append(model.get_output_embeddings()(decoder.norm(end[None, None]))[0, 0])
        else:

            def enter(module: Any, args: tuple[Any, ...], grounded: Tensor | None = grounded) -> Any:
                return None if grounded is None else ((1 - w) * args[0] + w * grounded[None], *args[1:])

            with decoder.layers[LAST].register_forward_pre_hook(enter):
                logits.append(model(**sample, use_cache=False).logits[0, -1])
        tokens.append(int(logits[-1].argmax()))
        sample = grow(sample, torch.tensor([tokens[-1:]]))
    return Said(layer, region, scores, tokens, torch.stack(logits))


@contextmanager
def fused(model: Any, layers: Tensor, w: float) -> Iterator[None]:
    """A model whose last position gets known layers `[rows]` mixed in, one for each row."""
    decoder, states = decoder_of(model), {}

    def keep(number: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            states[number] = output[:, -1]

        return hook

    def mix(module: Any, args: tuple[Tensor]) -> Any:
        if len(states) <= LAST:  # text without images, beside the model
            return None
        hidden = args[0].clone()
        for row, layer in enumerate(layers.tolist()):
            if layer >= 0:
                hidden[row, -1] = (1 - w) * hidden[row, -1] + w * states[layer][row]
        states.clear()
        return (hidden,)

    with ExitStack() as stack:
        for number, layer in enumerate(decoder.layers):
            stack.enter_context(layer.register_forward_hook(keep(number)))
        stack.enter_context(decoder.norm.register_forward_pre_hook(mix))
        yield


def places(mask: Tensor, row: int, sample: Mapping[str, Any]) -> list[int]:
    """Where a row of a left-padded mask is True, padding not counted."""
    found = mask[row].nonzero()[:, 0] - (mask.shape[1] - sample["input_ids"].shape[1])
    return found.tolist()


# equal to the restatement


@pytest.mark.parametrize("glc", [PAPER, CODE], ids=["paper", "code"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_equals_samples_said_plainly(name: str, glc: GLC) -> None:
    model, inputs = tiny(name), make_inputs(name, batch=3, before=(3, 6, 4), after=(5, 4, 7))
    with glc(model) as found:
        answer = run(model, inputs, NEW)
    assert found.layer is not None
    eager, layers = tiny(name, "eager", torch.float64), set()
    for row in range(3):
        sample = alone(inputs, row)
        with torch.no_grad():
            said = plainly(eager, sample, glc)
        assert int(found.layer[row]) == said.layer
        assert places(found.regions, row, sample) == said.region
        assert found.scores[:, row].tolist() == pytest.approx(said.scores, abs=1e-6)
        assert answer.tokens[row, -NEW:].tolist() == said.tokens
        assert apart(answer.logits[:, row], said.logits) < TOLERANCE
        layers.add(said.layer)
    assert layers - {-1, LAST}, "some sample is changed"
    assert apart(answer.logits[0], run(model, inputs, 1).logits[0]) > 0.01


def test_it_equals_the_restatement_in_single_precision() -> None:
    model, inputs = tiny("llava", "sdpa", torch.float32), make_inputs("llava", dtype=torch.float32)
    with GLC(keep=9)(model) as found:
        answer = run(model, inputs, NEW)
    for row in range(2):
        with torch.no_grad():
            said = plainly(tiny("llava", "eager"), alone(inputs, row), GLC(keep=9))
        assert int(found.layer[row]) == said.layer
        assert apart(answer.logits[:, row], said.logits) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3_vl", "llava_next"])
def test_several_images_are_one_set_of_tokens(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name, batch=1, images=2)
    with PAPER(model) as found:
        answer = run(model, inputs, NEW)
    with torch.no_grad():
        said = plainly(tiny(name, "eager", torch.float64), inputs, PAPER)
    assert places(found.regions, 0, inputs) == said.region
    assert int(found.layer) == said.layer
    assert apart(answer.logits[:, 0], said.logits) < TOLERANCE


@pytest.mark.parametrize("order", ["pruner first", "GLC first"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_with_a_pruner_it_measures_what_is_left(name: str, order: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    pruner = ByScore({0: (0.8, 0.7), 2: (0.6, 0.7)})
    both = (pruner, PAPER) if order == "pruner first" else (PAPER, pruner)
    with Stack(*both)(model) as handles:
        answer = run(model, inputs, NEW)
    found = handles[both.index(PAPER)]
    eager = tiny(name, "eager", torch.float64)
    for row in range(2):
        sample = alone(inputs, row)
        stages = {0: pruner.ratios[0][row : row + 1], 2: pruner.ratios[2][row : row + 1]}
        keep = chosen(sample, stages)
        gone = {layer: set((~keep[2 * (layer // 2)][0]).nonzero()[:, 0].tolist()) for layer in range(4)}
        with torch.no_grad(), MaskOracle(eager, keep):
            said = plainly(eager, sample, PAPER, gone)
        assert places(found.regions, row, sample) == said.region
        assert int(found.layer[row]) == said.layer
        assert found.scores[:, row].tolist() == pytest.approx(said.scores, abs=1e-6)
        assert apart(answer.logits[:, row], said.logits) < TOLERANCE


# batches, beams, caches


@pytest.mark.parametrize(
    ("name", "glc"), [*((name, PAPER) for name in FAMILIES), ("internvl", CODE)], ids=str
)
def test_a_sample_in_a_padded_batch_is_as_alone_with_beams_too(name: str, glc: GLC) -> None:
    model, inputs = tiny(name), make_inputs(name)
    for beams in (1, 2):
        with glc(model) as found:
            both = run(model, inputs, NEW, num_beams=beams)
            layers, regions = found.layer, found.regions
            assert regions.shape == (2 * beams, inputs["input_ids"].shape[1])
            for row in range(2):
                one = run(model, alone(inputs, row), NEW, num_beams=beams)
                assert torch.equal(one.tokens[0, -NEW:], both.tokens[row, -NEW:])
                rows = slice(row * beams, (row + 1) * beams)
                assert apart(one.logits, both.logits[:, rows]) < SAME
                assert torch.equal(found.layer, layers[rows])


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_equal_a_model_whose_layer_is_known(name: str) -> None:
    model, sample = tiny(name), alone(make_inputs(name), 1)
    with PAPER(model) as found:
        answer = run(model, sample, NEW, num_beams=2)
    with fused(model, found.layer, PAPER.weight):
        expected = run(model, sample, NEW, num_beams=2, use_cache=False)
    assert torch.equal(answer.tokens, expected.tokens)
    assert apart(answer.logits, expected.logits) < SAME


def test_several_answers_are_sampled_from_the_layer_of_their_sample() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=3)
    options = {"do_sample": True, "num_return_sequences": 2}
    torch.manual_seed(5)
    with PAPER(model) as found:
        answer = run(model, inputs, NEW, **options)
    assert len(set(found.layer.tolist())) > 1
    torch.manual_seed(5)
    with fused(model, found.layer, PAPER.weight):
        expected = run(model, inputs, NEW, **options)
    assert torch.equal(answer.tokens, expected.tokens)
    assert apart(answer.logits, expected.logits) < SAME


def test_layers_follow_when_rows_of_the_cache_move() -> None:
    model, inputs = tiny("internvl"), make_inputs("internvl")
    name, step = cache_name(model), torch.tensor([[11], [45]])
    with torch.no_grad(), PAPER(model) as found:
        out = model(**inputs)
        assert len(set(found.layer.tolist())) == 2
        straight, moved = out[name], copy.deepcopy(out[name])
        moved.reorder_cache(torch.tensor([1, 0]))
        moved.batch_repeat_interleave(2)
        moved.batch_select_indices(torch.tensor([0, 3]))
        mask = pad(inputs["attention_mask"], (0, 1), value=1)
        expected = model(input_ids=step, attention_mask=mask, **{name: straight}).logits
        swapped = model(input_ids=step.flip(0), attention_mask=mask.flip(0), **{name: moved}).logits
    assert apart(swapped.flip(0), expected) < SAME


def test_each_cache_goes_on_with_the_layer_of_its_own_prompt() -> None:
    model = tiny("internvl")
    inputs = make_inputs("internvl")
    samples, name = [alone(inputs, row) for row in range(2)], cache_name(model)
    with torch.no_grad(), PAPER(model):
        caches = [model(**sample)[name] for sample in samples]
        later = [
            model(input_ids=torch.tensor([[11]]), **{name: copy.deepcopy(cache)}).logits for cache in caches
        ]
        for sample, logits in zip(samples, later, strict=True):
            cache = model(**sample)[name]
            assert torch.equal(model(input_ids=torch.tensor([[11]]), **{name: cache}).logits, logits)


def test_the_next_turn_goes_on_with_the_layer_of_the_first() -> None:
    model, inputs = tiny("qwen2_5_vl"), alone(make_inputs("qwen2_5_vl"), 1)
    with PAPER(model) as found:
        first = run(model, inputs, 3)
        layer = found.layer
        asked = grow(inputs, torch.cat([first.tokens[:, -3:], torch.tensor([[11, 45, 23]])], 1))
        asked = {key: asked[key] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
        kept = copy.deepcopy(first.cache)
        second = run(model, asked, 3, **{cache_name(model): first.cache})
    assert 0 <= int(layer) < LAST
    with fused(model, layer, PAPER.weight):
        expected = run(model, asked, 3, **{cache_name(model): kept})
    assert apart(second.logits, expected.logits) < SAME


def test_prompt_lookup_writes_what_greedy_decoding_writes() -> None:
    """Candidates are read many at a time, the first ones with the prompt, and each is fused."""
    model, inputs = tiny("internvl"), alone(make_inputs("internvl"), 1)
    with PAPER(model) as found:
        expected = run(model, inputs, 24)
        answer = run(model, inputs, 24, prompt_lookup_num_tokens=3)
    assert int(found.layer) < LAST
    assert torch.equal(answer.tokens, expected.tokens)
    assert len(answer.logits) < 24, "some candidates were right"


def test_candidates_that_come_with_the_prompt_are_no_question_and_all_fused() -> None:
    model, sample = tiny("internvl"), alone(make_inputs("internvl"), 1)
    said, name = torch.tensor([[11, 45]]), cache_name(model)
    with torch.no_grad(), PAPER(model) as found:
        out = model(**sample, logits_to_keep=1)
        layer, expected = int(found.layer), [out.logits]
        expected.append(model(input_ids=said, **{name: out[name]}).logits)
        logits = model(**grow(sample, said), logits_to_keep=3).logits
    assert int(found.layer) == layer < LAST
    assert apart(logits, torch.cat(expected, 1)) < SAME


def test_right_padding_is_not_the_end_of_the_prompt() -> None:
    model, sample = tiny("internvl"), alone(make_inputs("internvl"), 1)
    ids = sample["input_ids"]
    padded = {key: pad(v, (0, 3)) if v.shape == ids.shape else v for key, v in sample.items()}
    with torch.no_grad(), PAPER(model) as found:
        expected = model(**sample).logits[0]
        layer = int(found.layer)
        assert apart(model(**padded).logits[0, :-3], expected) < SAME
    assert int(found.layer) == layer < LAST
    with torch.no_grad():
        plain = model(**sample).logits[0]
    assert torch.equal(plain[:-1], expected[:-1]), "of the prompt only the end is fused"
    assert apart(plain[-1], expected[-1]) > 0.01


def test_attention_of_long_prompts_is_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    with PAPER(model) as found:
        expected = run(model, inputs, 2)
        scores = found.scores
        monkeypatch.setattr("visionsel.multimodal.decoding.glc.CHUNK", 3)
        assert apart(run(model, inputs, 2).logits, expected.logits) < SAME
        assert apart(found.scores, scores) < SAME


# what is left alone


@pytest.mark.parametrize("fidelity", ["paper", "code"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_weight_of_0_changes_no_bit_but_tells(name: str, fidelity: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    for options in ({}, {"num_beams": 2}):
        expected = run(model, inputs, 3, **options)
        with GLC(w=0.0, keep=12, stable=0.6, fidelity=fidelity)(model) as found:
            assert torch.equal(run(model, inputs, 3, **options).logits, expected.logits)
    with (PAPER if fidelity == "paper" else CODE)(model) as other:
        run(model, inputs, 1)
    assert torch.equal(other.layer, found.layer[::2])
    assert torch.equal(other.regions, found.regions[::2])


def test_text_alone_is_left_alone_in_a_batch_with_images_too() -> None:
    model = tiny("internvl")
    for images, glc in ((0, PAPER), (0, CODE), ((0, 1), PAPER), ((0, 1), CODE)):
        inputs = make_inputs("internvl", images=images)
        plain = run(model, inputs, 3)
        with glc(model) as found:
            answer = run(model, inputs, 3)
        assert int(found.layer[0]) == -1
        assert not found.regions[0].any()
        assert torch.equal(answer.logits[:, 0], plain.logits[:, 0])
        if images == 0:
            assert found.scores is None
            assert torch.equal(answer.logits, plain.logits)
        else:
            assert 0 <= int(found.layer[1]) < LAST
            assert apart(answer.logits[:, 1], plain.logits[:, 1]) > 0.01


@pytest.mark.parametrize("glc", [PAPER, CODE], ids=["paper", "code"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_the_model_is_left_as_it_was_by_an_exception_too(name: str, glc: GLC) -> None:
    assert_left_as_it_was(name, glc)


def test_a_context_goes_on_after_an_exception_inside_it() -> None:
    model, inputs = tiny("internvl"), make_inputs("internvl")

    def fail(*args: Any) -> None:
        raise KeyError("on purpose")

    with PAPER(model):
        expected = run(model, inputs, 3)
        with (
            decoder_of(model).layers[2].mlp.register_forward_hook(fail),
            pytest.raises(KeyError, match="on purpose"),
        ):
            run(model, inputs, 3)
        assert torch.equal(run(model, inputs, 3).logits, expected.logits)


# with others


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_of_two_views_the_main_one_is_fused(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name, batch=3)
    for methods in ((PAPER, VCD(view=VIEW)), (VCD(view=VIEW), PAPER)):
        with Stack(*methods)(model) as handles:
            both = run(model, inputs, NEW)
        layer = handles[methods.index(PAPER)].layer
        said = both.tokens[:, -NEW:]
        with PAPER(model) as found:
            main = run(model, inputs, NEW, logits_processor=[Say(said)])
        second = run(model, VIEW(inputs), NEW, logits_processor=[Say(said)])
        assert torch.equal(layer, found.layer)
        assert set(layer.tolist()) - {LAST}
        assert apart(both.logits[::2], main.logits) < SAME
        assert apart(both.logits[1::2], second.logits) < SAME


@pytest.mark.parametrize(
    "other", [VHR(layers=(1, 2)), VAR(layers=(1, 2), sink_dims=(3, 17), tau=1.5, rho=0.3)], ids=["vhr", "var"]
)
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_heads_and_rows_are_changed_below_and_then_fused(name: str, other: Any) -> None:
    model, inputs = tiny(name), make_inputs(name, batch=3)
    for methods in ((PAPER, other), (other, PAPER)):
        with Stack(*methods)(model) as handles:
            both = run(model, inputs, NEW)
        layer = handles[methods.index(PAPER)].layer
        assert set(layer.tolist()) - {LAST}
        with other(model), fused(model, layer, PAPER.weight):
            expected = run(model, inputs, NEW)
        with other(model), GLC(w=0, keep=PAPER.keep, stable=PAPER.stable)(model) as found:
            run(model, inputs, 1)
        assert torch.equal(found.layer, layer), "found where the other is at work"
        assert apart(both.logits, expected.logits) < SAME
    with PAPER(model):
        assert apart(run(model, inputs, 1).logits[0], both.logits[0]) > 0.001, "and that changes something"


# refused


def test_values_out_of_range_are_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"w": 1.1}, "w must be from 0"),
        ({"w": float("nan")}, "w must be from 0"),
        ({"keep": 0}, "keep must be a number of tokens"),
        ({"keep": 0.5}, "keep must be a number of tokens"),
        ({"stable": 1.0}, "stable must be a part"),
        ({"eps": 0.0}, "eps must be a positive number"),
        ({"fidelity": "release"}, '"paper" or "code"'),
    ]
    for arguments, match in wrong:
        with pytest.raises(ValueError, match=match):
            GLC(**arguments)
    assert (GLC().weight, GLC(fidelity="code").weight, GLC(w=0).weight) == (0.1, 0.2, 0.0)


def test_a_second_one_on_a_model_is_refused_and_the_first_goes_on() -> None:
    model, inputs = tiny("internvl"), make_inputs("internvl")
    with PAPER(model):
        expected = run(model, inputs, 2)
        with pytest.raises(ValueError, match="GLC is on this model already"):
            Stack(VHR(), CODE)(model).__enter__()
        assert torch.equal(run(model, inputs, 2).logits, expected.logits)


def test_a_prompt_that_ends_with_its_image_has_no_question() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=2, after=(3, 0))
    with PAPER(model), pytest.raises(ValueError, match="put the text after the image"):
        run(model, inputs, 1)


def test_a_prompt_read_elsewhere_is_refused() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    with torch.no_grad():
        out = model(**inputs)
        with PAPER(model), pytest.raises(NotImplementedError, match="not read under GLC"):
            model(input_ids=torch.tensor([[11], [12]]), **{cache_name(model): out[cache_name(model)]})


@pytest.mark.parametrize("order", ["pruner first", "GLC first"])
@pytest.mark.parametrize("layer", [0, LAST])
def test_a_pruned_prompt_is_refused_where_all_of_its_tokens_are_fused(order: str, layer: int) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    both = (ByScore({layer: (0.5,)}), CODE)
    with (
        Stack(*(both if order == "pruner first" else both[::-1]))(model),
        pytest.raises(NotImplementedError, match='use fidelity="paper"'),
    ):
        run(model, inputs, 2)
    with Stack(ByScore({layer: (1.0,)}), CODE)(model):
        everything = run(model, inputs, 2)
    with CODE(model):
        assert torch.equal(run(model, inputs, 2).logits, everything.logits)


# the rules


def ragged(n: int = 11) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of a question, among image tokens of two layers, and which tokens are real; all random."""
    generator = torch.Generator().manual_seed(3)
    query = torch.rand(4, 2, 3, n, generator=generator, dtype=torch.float64)
    first, last = torch.rand(2, 4, 2, n, n, generator=generator, dtype=torch.float64) ** 4
    valid = torch.arange(n) < torch.tensor([n, 7, 3, 1])[:, None]
    return query, first, last, valid


@pytest.mark.parametrize("glc", [PAPER, GLC(keep=4, stable=0.0), GLC(keep=6, fidelity="code")], ids=repr)
def test_the_region_of_random_attention_is_the_one_said_plainly(glc: GLC) -> None:
    query, first, last, valid = ragged()
    mask = text_regions(
        query_attention=query,
        first=first,
        last=last,
        keep=glc.keep,
        stable=glc.stable,
        valid=valid,
        fidelity=glc.fidelity,
    )
    for row in range(4):
        image = valid[row].nonzero()[:, 0].tolist()
        if glc.fidelity == "code" and len(image) == 1:
            assert not mask[row].any(), "one token is as important as all"
            continue
        late = last[row].mean(0)
        asking = torch.cat([late, query[row].mean((0, 1))[None]])  # the question as one more row
        expected = region_of(first[row].mean(0).tolist(), asking.tolist(), image, [len(late)], glc)
        assert mask[row].nonzero()[:, 0].tolist() == expected
    means = [one.mean(1) for one in (first, last)]
    again = text_regions(query.mean((1, 2)), *means, glc.keep, glc.stable, glc.eps, valid, glc.fidelity)
    assert torch.equal(mask, again)


def test_the_layer_is_the_one_whose_attention_goes_to_the_region() -> None:
    received = torch.tensor([[[1.0, 1, 2], [0, 0, 0]], [[3, 0, 1], [5, 1, 2]], [[3, 1, 0], [4, 0, 4]]])
    regions = torch.tensor([[True, False, False], [True, False, False]])
    scores = layer_scores(received=received, regions=regions)
    assert scores.tolist() == [[0.25, 0.0], [0.75, 0.625], [0.75, 0.5]]
    assert choose_layer(received=received, regions=regions).tolist() == [1, 1], "the first of equals"
    valid = torch.tensor([[True, True, True], [True, False, True]])
    assert layer_scores(received, regions, valid)[:, 1].tolist() == [0.0, pytest.approx(5 / 7), 0.5]
    assert choose_layer(received, regions & False).tolist() == [-1, -1]


def test_equals_go_to_the_lower_index() -> None:
    flat = torch.ones(1, 6)
    valid = torch.tensor([[False, True, True, True, True, False]])
    assert glimpse(flat, 2, valid).nonzero()[:, 1].tolist() == [1, 2]
    assert refocus(flat, flat, valid, 0.5).nonzero()[:, 1].tolist() == [1, 2]
    assert refocus(flat, flat, valid, 0.99).sum() == 1, "one stays"


def test_the_rule_of_the_release_leaves_what_had_least_at_first_and_nothing_where_it_still_has() -> None:
    every = torch.ones(3, 4, dtype=torch.bool)
    first = torch.tensor([[4.0, 1, 3, 2], [4, 3, 2, 1], [1, 1, 1, 1]])
    last = torch.tensor([[1.0, 2, 3, 4], [3, 4, 2, 1], [1, 2, 3, 4]])
    found = refocus(first=first, last=last, candidates=every, fidelity="code")
    assert found.tolist() == [[False, True, False, False], [False] * 4, [False] * 4]


def test_importance_counts_as_a_share_and_in_both_directions() -> None:
    first = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    last = 8 * torch.tensor(
        [[1.0, 1.1, 0.1, 1.8]]
    )  # there is more attention in all, and the same in the mean
    all_ = torch.ones(1, 4, dtype=torch.bool)
    assert refocus(first, last, all_, 0.5).tolist() == [[False, False, True, True]]


def test_tensors_that_do_not_fit_are_refused() -> None:
    query, first, last, valid = ragged()
    nan = torch.full_like(query, torch.nan)
    received = torch.rand(3, 4, 11)
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: text_regions(query[:, 0], first, last), r"query_attention must be \[B, N\]"),
        (lambda: text_regions(query, first[..., 1:], last), r"first must be \[B, N, N\]"),
        (lambda: text_regions(query, first, last[0, 0]), r"last must be \[B, N, N\]"),
        (lambda: text_regions(query, first, last, valid=valid.long()), "valid must be bool"),
        (lambda: text_regions(query, first, last, keep=0), "keep must be"),
        (lambda: text_regions(nan, first, last), "has NaN"),
        (lambda: text_regions(query, first, last * torch.nan), "has NaN"),
        (lambda: refocus(received[0], received[1], valid[:, 1:]), r"must be \[B, N\] each"),
        (lambda: choose_layer(received[0], valid), r"received must be \[layers, B, N\]"),
        (lambda: choose_layer(received * torch.nan, valid), "has NaN"),
    ]
    for call, match in wrong:
        with pytest.raises(ValueError, match=match):
            call()
    assert text_regions(query, first, last).any(), "and the others are not"
