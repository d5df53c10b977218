"""VAR equals its equations on materialised weights, in batches, beams and turns; and finds sinks."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from tests.multimodal.modulation.literal import Mark, Row, Rule, assert_left_as_it_was, literal, steps, wide
from tests.multimodal.oracle import MaskOracle
from tests.multimodal.runs import apart, cache_name, run, tiny
from tests.multimodal.test_session import everything_on
from tests.multimodal.tiny import FAMILIES, alone, grow, make_inputs, make_model
from visionsel.multimodal.intervention import Stack
from visionsel.multimodal.modulation import rows
from visionsel.multimodal.modulation.var import VAR, redistribute, select
from visionsel.multimodal.modulation.vhr import VHR
from visionsel.multimodal.pruning.fastv import FastV
from visionsel.multimodal.pruning.pyramiddrop import PyramidDrop
from visionsel.multimodal.session import Session, open_session
from visionsel.multimodal.sinks import discover_sink_dims, massiveness, published_sink_dims

SOME = ("llava", "qwen2_5_vl", "internvl", "gemma3")
EVERY = [pytest.param(name, marks=() if name in SOME else pytest.mark.slow) for name in FAMILIES]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
DIFFERENT = 1e-2  # what it changes: measured 0.1 and more
# on random models of width 64, such that there are sinks of both kinds, and rows of both kinds
SINKS: dict[str, Any] = {"sink_dims": (3, 9, 20, 30, 41, 57), "tau": 2.0}
PAPER = VAR(p=0.6, rho=0.6, min_image_attention=0.2, layers=(1, 2, 3), **SINKS)
CODE = VAR(p=0.3, rho=0.3, min_image_attention=0.2, layers=(1, 2, 3), fidelity="code", **SINKS)


def rule_of(var: VAR) -> Rule:
    """Section 4 of the paper, and what the release makes of it, in numbers."""

    def rule(logits: Row, row: Row, place: int, visual: list[int], sinks: set[int]) -> Row:
        if not visual or place <= visual[-1] or not sinks & set(visual):
            return row
        others = [j for j in visual if j not in sinks]
        seen, shown = sum(row[j] for j in visual), sum(row[j] for j in others)
        if seen < var.min_image_attention or shown == 0:
            return row
        if var.fidelity == "paper":
            if shown / seen < var.rho:
                return row
            stays = 1 - var.p
        else:
            if (seen - shown) / seen > var.rho:
                return row
            stays = var.p
        new = [weight * stays if j in sinks else weight for j, weight in enumerate(row)]
        budget = sum(row[j] * (1 - stays) for j in sinks)
        for j in others:
            new[j] = row[j] + budget * row[j] / shown
        return new

    return rule


def mark_of(var: VAR, length: int) -> Mark:
    """phi of the paper; in the release tokens after the prompt are none."""

    def mark(hidden: Tensor, place: int) -> bool:
        assert var.sink_dims is not None
        values = hidden.tolist()
        size = (sum(x * x for x in values) / len(values) + 1e-6) ** 0.5
        phi = max(abs(values[d]) / size for d in var.sink_dims)
        return phi >= var.tau if var.fidelity == "paper" else phi > var.tau and place < length

    return mark


def said_plainly(model: Any, sample: dict[str, Any], var: VAR, **more: Any) -> Any:
    assert var.layers is not None
    return literal(
        model, sample, var.layers, rule_of(var), mark_of(var, sample["input_ids"].shape[1]), **more
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["64", "32"])
@pytest.mark.parametrize("var", [PAPER, CODE], ids=["paper", "code"])
@pytest.mark.parametrize("name", EVERY)
def test_it_equals_the_equations_on_weights_of_single_samples(
    name: str, var: VAR, dtype: torch.dtype
) -> None:
    model, inputs = wide(name, dtype), make_inputs(name, dtype=dtype)
    length = inputs["input_ids"].shape[1]
    plain = run(model, inputs, 4)
    with var(model) as report:
        found = run(model, inputs, 4)
    assert apart(found.logits, plain.logits) > DIFFERENT
    assert set(report.changed) == {1, 2, 3}
    assert 0 < sum(report.changed.values()) < 204, "not all of 3 layers, 4 heads and 17 tokens or more"
    number = 0
    for row in range(2):
        sample = alone(inputs, row)
        with said_plainly(model, sample, var) as changed:
            prompt, last = steps(model, sample, found.tokens[row, length:])
        number += len(changed)
        with torch.no_grad(), var(model):
            assert apart(model(**sample).logits[0], prompt) <= TOLERANCE[dtype]
        assert apart(found.logits[:, row], last) <= TOLERANCE[dtype]
    assert number > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SOME)
def test_a_padded_batch_is_its_samples(name: str, attention: str) -> None:
    model = tiny(name, attention)
    inputs = make_inputs(name, dtype=model.dtype)
    with PAPER(model):
        both = run(model, inputs, 5)
        for row in range(2):
            one = run(model, alone(inputs, row), 5)
            assert torch.equal(one.tokens[0, -5:], both.tokens[row, -5:])
            assert apart(one.logits[:, 0], both.logits[:, row]) <= TOLERANCE[model.dtype]


@pytest.mark.parametrize("var", [PAPER, CODE], ids=["paper", "code"])
@pytest.mark.parametrize("name", SOME)
def test_beams_have_the_sinks_of_their_own_tokens(name: str, var: VAR) -> None:
    model, inputs = wide(name), make_inputs(name)
    options = {"num_beams": 3, "output_scores": True}
    with var(model):
        found = [run(model, alone(inputs, row), 6, **options) for row in range(2)]
        both = run(model, inputs, 6, **options)
    for row in range(2):
        sample = alone(inputs, row)
        with said_plainly(model, sample, var):
            expected = run(model, sample, 6, **options, use_cache=False)
        assert torch.equal(found[row].tokens, expected.tokens)
        assert torch.equal(both.tokens[row, -6:], expected.tokens[0, -6:])
        assert apart(found[row].logits, expected.logits) <= TOLERANCE[torch.float64]


def test_sampling_is_repeated_by_its_seed() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    tokens = []
    with PAPER(model):
        for _ in range(2):
            torch.manual_seed(5)
            tokens.append(run(model, inputs, 6, do_sample=True, num_return_sequences=2).tokens)
    assert tokens[0].shape[0] == 4
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", SOME)
def test_nothing_moved_is_nothing_done_bit_for_bit(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    expected = run(model, inputs, 4)
    for var in (VAR(p=0.0, **SINKS), VAR(p=1.0, fidelity="code", **SINKS)):
        with var(model) as report:
            found = run(model, inputs, 4)
        assert torch.equal(found.logits, expected.logits)
        assert not report.changed
    with VAR(rho=0.0, min_image_attention=0.0, sink_dims=(3,), tau=7.9)(model) as report:
        assert torch.equal(run(model, inputs, 4).logits, expected.logits), "no sinks"
    assert set(report.changed.values()) == {0}


# where paper and release differ


def weights() -> tuple[Tensor, Tensor, Tensor]:
    """One row over two text tokens, the first a sink, and four image tokens, the first a sink."""
    attention = torch.tensor([0.3, 0.1, 0.18, 0.12, 0.2, 0.1], dtype=torch.float64)[None, None, None]
    visual = torch.tensor([[False, False, True, True, True, True]])
    sinks = torch.tensor([[True, False, True, False, False, False]])
    return attention, visual, sinks


def test_a_part_of_the_attention_of_all_sinks_goes_to_the_rest_of_the_image_in_proportion() -> None:
    attention, visual, sinks = weights()
    found = redistribute(attention, visual, sinks, p=0.6)[0, 0, 0]
    budget = 0.6 * (0.3 + 0.18)
    expected = [
        0.12,
        0.1,
        0.072,
        0.12 * (1 + budget / 0.42),
        0.2 * (1 + budget / 0.42),
        0.1 * (1 + budget / 0.42),
    ]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12)
    assert abs(float(found.sum()) - 1) < 1e-12


def test_rows_are_chosen_by_what_they_see_of_the_image() -> None:
    attention, visual, sinks = weights()  # 0.6 on the image, 70 % of it on no sinks
    assert bool(select(attention, visual, sinks, rho=0.69))
    assert not bool(select(attention, visual, sinks, rho=0.71))
    assert not bool(select(attention, visual, sinks, rho=0.5, min_image_attention=0.61))
    assert not bool(select(attention, visual, sinks & ~visual, rho=0.5)), "no sink in the image"
    assert not bool(select(attention, visual, sinks | visual, rho=0.0)), "nobody to give to"
    kept = redistribute(attention, visual, sinks | visual, 0.6)
    assert torch.equal(kept, attention)


def prompt_logits(**settings: Any) -> Tensor:
    """Of VAR in one layer."""
    with torch.no_grad(), VAR(layers=(2,), min_image_attention=0.1, **SINKS, **settings)(tiny("llava")):
        logits: Tensor = tiny("llava")(**make_inputs("llava")).logits
    return logits


def test_the_release_moves_what_the_paper_leaves() -> None:
    expected = prompt_logits(p=0.3)
    assert apart(prompt_logits(p=0.7, fidelity="code"), expected) < 1e-12
    assert apart(prompt_logits(p=0.3, fidelity="code"), expected) > DIFFERENT


def test_the_release_reads_rho_as_the_most_that_sinks_may_have() -> None:
    expected = prompt_logits(p=0.5, rho=0.8)
    assert apart(prompt_logits(p=0.5, rho=0.2, fidelity="code"), expected) < 1e-12
    assert apart(prompt_logits(p=0.5, rho=0.8, fidelity="code"), expected) > DIFFERENT


def test_the_release_changes_the_last_layer_too() -> None:
    model = tiny("llava")
    with VAR(**SINKS)(model) as paper, VAR(**SINKS, layers=(1,))(model):
        assert paper.layers == (2,)
    with VAR(**SINKS, fidelity="code")(model) as code:
        assert code.layers == (2, 3)


def test_the_release_asks_for_more_than_tau() -> None:
    hidden = torch.zeros(1, 1, 16, dtype=torch.float64)
    hidden[..., 3] = 1.0
    tau = float(massiveness(hidden, (3,)))
    assert bool(VAR(tau=tau)._sinks(hidden, (3,)))
    assert not bool(VAR(tau=tau, fidelity="code")._sinks(hidden, (3,)))


def test_generated_tokens_are_sinks_in_the_paper_alone() -> None:
    model, inputs = tiny("qwen2_5_vl"), make_inputs("qwen2_5_vl")
    length = inputs["input_ids"].shape[1]
    marked = {}
    for fidelity in ("paper", "code"):
        with VAR(**SINKS, layers=(1, 2, 3), fidelity=fidelity)(model) as report:
            run(model, inputs, 8)
        later = [mark[:, length:] for mark in report.sinks.values()]
        assert all(mark.shape == (2, 7) for mark in later)
        marked[fidelity] = sum(int(mark.sum()) for mark in later)
    assert marked["code"] == 0 < marked["paper"]


def test_the_release_has_the_dimensions_of_one_model_for_all() -> None:
    with pytest.raises(ValueError, match=r"\(1415, 2533\) do not exist: .* 0 to 63; discover_sink_dims"):
        VAR(fidelity="code")(tiny("llava")).__enter__()


# sink dimensions


@pytest.mark.parametrize("name", FAMILIES)
def test_sink_dimensions_are_where_the_first_token_is_large(name: str) -> None:
    model = tiny(name)
    found = discover_sink_dims(model, number=3)
    assert len(set(found)) == 3
    assert list(found) == sorted(found)
    before = everything_on(model)
    with VAR()(model) as report:
        assert report.sink_dims == discover_sink_dims(model)
    assert everything_on(model) == before


def test_planted_sink_dimensions_are_found() -> None:
    model = make_model("llava")
    with torch.no_grad():
        model.get_input_embeddings().weight[1, [5, 33]] = torch.tensor([400.0, -300.0], dtype=torch.float64)
    assert discover_sink_dims(model) == (5, 33)
    assert discover_sink_dims(model, token=17) != (5, 33)


@pytest.mark.parametrize(
    ("width", "layers", "heads", "dims"), [(4096, 32, 32, (1415, 2533)), (5120, 40, 40, (2100, 4743))]
)
def test_published_dimensions_are_taken_for_their_models(
    width: int, layers: int, heads: int, dims: tuple[int, ...]
) -> None:
    shape: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    assert published_sink_dims(LlamaConfig(**shape, vocab_size=32064, max_position_embeddings=4096)) == dims
    assert published_sink_dims(LlamaConfig(**shape, vocab_size=128256, max_position_embeddings=8192)) is None
    assert published_sink_dims(LlamaConfig(**shape, vocab_size=32064, max_position_embeddings=2048)) is None


# in company


@pytest.mark.parametrize(
    "pruner",
    [FastV(keep=0.5, layer=2), PyramidDrop(layers=(1, 2, 3), keep=(0.9, 0.6, 0.4))],
    ids=["fastv", "pyramid"],
)
@pytest.mark.parametrize("name", EVERY)
def test_with_a_pruner_the_tokens_that_are_left_share_it(name: str, pruner: Any) -> None:
    model, inputs = wide(name), make_inputs(name)
    length = inputs["input_ids"].shape[1]
    for interventions in ((pruner, PAPER), (PAPER, pruner)):
        with Stack(*interventions)(model) as handles:
            found = run(model, inputs, 4)
        pruned = handles[interventions.index(pruner)]
        report = handles[interventions.index(PAPER)]
        assert report.changed[2] + report.changed[3] > 0
        for row in range(2):
            sample = alone(inputs, row)
            start = length - sample["input_ids"].shape[1]
            keep = {layer: mask[row : row + 1, start:] for layer, mask in pruned.kept}
            gone: dict[int, set[int]] = {}
            for layer in range(4):
                masks = [mask[0] for stage, mask in keep.items() if stage <= layer]
                gone[layer] = set((~masks[-1]).nonzero()[:, 0].tolist()) if masks else set()
            assert gone[3]
            with said_plainly(model, sample, PAPER, gone=gone), MaskOracle(model, keep):
                _, last = steps(model, sample, found.tokens[row, length:])
            assert apart(found.logits[:, row], last) <= TOLERANCE[torch.float64]


def test_the_next_turn_goes_on_with_the_sinks_of_the_first() -> None:
    model, inputs = wide("qwen2_5_vl"), make_inputs("qwen2_5_vl", batch=1)
    more = torch.tensor([[11, 45, 23]])

    def two_turns(**options: Any) -> Tensor:
        first = run(model, inputs, 3)
        asked = grow(inputs, torch.cat([first.tokens[:, -3:], more], 1))
        if options:
            return run(model, asked, 2, **options).logits
        asked = {key: asked[key] for key in ("input_ids", "attention_mask", "mm_token_type_ids")}
        return run(model, asked, 2, **{cache_name(model): copy.deepcopy(first.cache)}).logits

    with PAPER(model):
        found = two_turns()
        assert apart(found, two_turns(use_cache=False)) <= TOLERANCE[torch.float64]
    with PAPER(model):
        assert torch.equal(two_turns(), found)


@pytest.mark.parametrize("var", [PAPER, CODE], ids=["paper", "code"])
def test_prompt_lookup_writes_what_greedy_decoding_writes(var: VAR) -> None:
    """Candidates are read many at a time, and what is rejected is no sink any more."""
    model, inputs = wide("llava"), make_inputs("llava", batch=1)
    with var(model):
        expected = run(model, inputs, 24)
        found = run(model, inputs, 24, prompt_lookup_num_tokens=3)
    assert torch.equal(found.tokens, expected.tokens)
    assert len(found.logits) < 24, "some candidates were right"


def test_rows_of_a_long_text_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = wide("llava"), make_inputs("llava", after=(9, 5))
    with PAPER(model) as report:
        expected, changed = run(model, inputs, 3), report.changed
        monkeypatch.setattr(rows, "CHUNK", 2)
        found = run(model, inputs, 3)
        assert report.changed == changed
    assert apart(found.logits, expected.logits) <= TOLERANCE[torch.float64]


def test_a_prompt_read_elsewhere_is_refused() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    first = run(model, inputs, 2)
    ids = torch.cat([first.tokens, first.tokens[:, -1:]], 1)
    with (
        pytest.raises(NotImplementedError, match=r"was not read under VAR.*inside the context"),
        PAPER(model),
    ):
        model.generate(input_ids=ids, max_new_tokens=2, **{cache_name(model): first.cache})


@pytest.mark.parametrize("name", SOME)
def test_a_prompt_that_is_read_beside_is_not_changed_and_changes_nothing(name: str) -> None:
    model, inputs, other = wide(name), make_inputs(name), make_inputs(name, batch=3, seed=4)
    token = torch.tensor([[11], [45]])
    with torch.no_grad():
        plain = model(**other).logits

        def two_steps(session: Session | None) -> Tensor:
            first = model(**inputs, use_cache=True)
            if session is not None:
                with session.beside():
                    assert torch.equal(model(**other).logits, plain)
            later = {"attention_mask": grow(inputs, token)["attention_mask"]}
            cache = {cache_name(model): first[cache_name(model)]}
            if name == "qwen2_5_vl":
                places = later["attention_mask"].cumsum(-1)[:, -1:] - 1
                later["position_ids"] = places.expand(4, 2, 1)
            logits: Tensor = model(input_ids=token, **later, **cache).logits
            return logits

        with open_session(model) as session, PAPER(model):
            assert torch.equal(two_steps(session), two_steps(None))


@pytest.mark.parametrize("name", SOME)
def test_beside_vhr_it_does_what_it_does_alone(name: str) -> None:
    model, inputs = wide(name), make_inputs(name)
    with PAPER(model):
        expected = run(model, inputs, 4)
    neutral = VHR(alpha=1.0, layers=(1, 2, 3))
    for interventions in ((neutral, PAPER), (PAPER, neutral)):
        with Stack(*interventions)(model):
            assert apart(run(model, inputs, 4).logits, expected.logits) == 0


def test_text_alone_is_left_alone() -> None:
    model = tiny("llava")
    inputs = make_inputs("llava", images=0)
    expected = run(model, inputs, 4)
    with VAR(rho=0.0, min_image_attention=0.0, layers=(0, 1, 2, 3), sink_dims=(3,), tau=0.01)(model):
        assert torch.equal(run(model, inputs, 4).logits, expected.logits)


def test_weights_that_are_asked_for_are_the_changed_ones() -> None:
    model = tiny("llava", "eager")
    inputs = make_inputs("llava", dtype=model.dtype)
    with torch.no_grad():
        plain = model(**inputs, output_attentions=True).attentions
        with PAPER(model) as report:
            found = model(**inputs, output_attentions=True).attentions
    rows = ((found[1] - plain[1]).abs().amax(-1) > 1e-6).sum()
    assert int(rows) == report.changed[1] > 0
    assert torch.allclose(found[1].sum(-1), plain[1].sum(-1), atol=1e-5)


def test_two_methods_on_one_layer_are_refused() -> None:
    model = tiny("llava")
    before = everything_on(model)
    with pytest.raises(ValueError, match=r"both change the attention of layers \[2, 3\]"):
        Stack(PAPER, VAR(**SINKS, layers=(0, 2, 3)))(model).__enter__()
    assert everything_on(model) == before


@pytest.mark.parametrize("name", SOME)
def test_the_model_is_left_as_it_was_by_an_exception_too(name: str) -> None:
    assert_left_as_it_was(name, PAPER)


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: VAR(p=1.2), r"p must be in \[0, 1\], got 1.2"),
    (lambda: VAR(rho=-0.1), r"rho must be in \[0, 1\]"),
    (lambda: VAR(min_image_attention=float("nan")), r"min_image_attention must be in \[0, 1\]"),
    (lambda: VAR(tau=0.0), "tau must be more than 0"),
    (lambda: VAR(fidelity="release"), 'fidelity must be "paper" or "code"'),
    (lambda: VAR(sink_dims=()), "sink_dims is empty"),
    (lambda: VAR(sink_dims=(64,))(tiny("llava")).__enter__(), r"\(64,\) do not exist"),
    (lambda: VAR(layers=(4,), **SINKS)(tiny("llava")).__enter__(), "0 to 3"),
    (lambda: discover_sink_dims(tiny("llava"), number=0), "number must be in 1 to 64"),
]


@pytest.mark.parametrize(("make", "match"), WRONG)
def test_what_is_out_of_range_is_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_layers_may_come_in_a_list() -> None:
    assert hash(VAR(layers=[1, 2])) == hash(VAR(layers=(1, 2)))  # type: ignore[arg-type]
