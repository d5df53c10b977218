"""Attention that is read from queries and keys, under any kernel, is the attention of the eager kernel."""

import sys
from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.multimodal.runs import apart, run, tiny
from tests.multimodal.tiny import FAMILIES, LAYERS, make_inputs
from visionsel.multimodal.attention import AttentionCall, Output, attention_rows, tapped
from visionsel.multimodal.cache import cache_of
from visionsel.multimodal.session import open_session

TOLERANCE = {  # of weights, which are at most 1
    torch.float64: 1e-12,  # measured 2e-15
    torch.float32: 5e-6,  # measured 2e-6: hidden states under the two kernels differ too
}


def eager_weights(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> dict[nn.Module, list[Tensor]]:
    """What the eager kernels of a model attend with, by the module that calls them.

    Their softmax is in float32; here it has the precision of the model.
    """
    found: dict[nn.Module, list[Tensor]] = defaultdict(list)
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    for name in {type(module).__module__ for module in model.modules()}:
        kernel = getattr(sys.modules[name], "eager_attention_forward", None)
        if kernel is not None:

            def record(module: nn.Module, *args: Any, kernel: Any = kernel, **kwargs: Any) -> Output:
                output: Output = kernel(module, *args, **kwargs)
                assert output[1] is not None
                found[module].append(output[1])
                return output

            monkeypatch.setattr(sys.modules[name], "eager_attention_forward", record)
    return found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_the_decoder_are_the_eager_ones_in_the_prompt_and_after(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny(name, "sdpa", dtype), make_inputs(name, dtype=dtype)
    rows: dict[int, list[Tensor]] = defaultdict(list)
    with ExitStack() as stack:
        session = stack.enter_context(open_session(model))
        for layer in range(LAYERS):

            def keep(call: AttentionCall, kernel: Any, layer: int = layer) -> Output:
                rows[layer].append(attention_rows(call))
                output: Output = kernel(call)
                return output

            stack.enter_context(session.tap(layer, keep))
        found = run(model, inputs, 3)

    eager = tiny(name, "eager", dtype)
    weights = eager_weights(monkeypatch, eager)
    expected = run(eager, inputs, 3)
    assert torch.equal(found.tokens, expected.tokens)
    decoder, real = session.family.decoder(eager), inputs["attention_mask"].bool()
    for layer in range(LAYERS):
        wanted = weights[decoder.layers[layer].self_attn]  # type: ignore[union-attr, index]
        assert len(wanted) == len(rows[layer]) == 3
        prompt = [
            one[0].transpose(1, 2)[real] for one in (rows[layer], wanted)
        ]  # rows of padding are nobody's
        assert apart(*prompt) <= TOLERANCE[dtype]
        assert all(row.dtype == dtype for row in rows[layer])
        for step in (1, 2):
            assert apart(rows[layer][step], wanted[step]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_queries_and_keys_of_the_tower_attend_as_the_eager_tower(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny(name, "sdpa", dtype), make_inputs(name, dtype=dtype)
    with open_session(model) as session:
        layers = len(session.family.tower_layers(model))
        assert [session.observe_tower(layer) for layer in range(layers)] == list(range(layers))
        assert session.observe_tower(-1) == layers - 1
        assert session.observe_tower(None) == session.family.feature_layer(model)
        run(model, inputs, 1)
        assert session.scope is not None
        observed = session.scope.encoded["image"].layers
    assert set(observed) == set(range(layers))

    eager = tiny(name, "eager", dtype)
    weights = eager_weights(monkeypatch, eager)
    run(eager, inputs, 1)
    family = session.family
    for number, layer in enumerate(family.tower_layers(eager)):
        wanted = weights[family.tower_attention(layer)]
        found = [
            (query.double() @ key.double().transpose(-1, -2) * scale).softmax(-1)
            for query, key, scale in observed[number]
        ]
        crops = [crop for call in wanted for crop in call]
        assert sum(len(call) for call in found) == len(crops)
        for mine, theirs in zip([crop for call in found for crop in call], crops, strict=True):
            assert apart(mine, theirs) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_probe_gives_the_queries_and_keys_that_the_layer_makes(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name)
    calls: list[AttentionCall] = []
    probes: list[AttentionCall] = []
    lengths: list[int] = []

    def keep(call: AttentionCall, kernel: Any) -> Output:
        calls.append(call)
        output: Output = kernel(call)
        return output

    with open_session(model) as session, session.tap(2, keep):

        def probe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            probes.append(session.probe(2, args[0], kwargs))
            cache = cache_of(kwargs)
            lengths.append(0 if cache is None or len(cache.layers) < 3 else cache.get_seq_length(2))

        hook = session.layers[2].register_forward_pre_hook(probe, with_kwargs=True)
        found = run(model, inputs, 1)
        hook.remove()
    assert len(calls) == len(probes) == 1, "a probe runs no other tap"
    assert lengths == [0], "a probe caches nothing"
    for attribute in ("query", "key", "value", "mask"):
        mine, theirs = getattr(probes[0], attribute), getattr(calls[0], attribute)
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    assert probes[0].scale == calls[0].scale
    assert torch.equal(found.logits, run(model, inputs, 1).logits)


# rows, from tensors


def call_of(
    mask: Tensor | None = None, query: int = 5, dtype: torch.dtype = torch.float64, **more: Any
) -> Any:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64).to(dtype)
        for heads, length in ((4, query), (2, 7), (2, 7))
    )
    return AttentionCall(nn.Identity(), q, k, v, mask, more, lambda *args, **kwargs: (q, None))


def plain(call: AttentionCall, seen: Tensor, cap: float | None = None) -> Tensor:
    """Softmax over what is seen, head by head; seen bool `[B, q, k]`."""
    rows = torch.zeros(2, 4, call.query.shape[2], 7, dtype=torch.float64)
    for b, head, place in torch.cartesian_prod(*map(torch.arange, rows.shape[:3])).tolist():
        logits = call.key[b, head // 2].double() @ call.query[b, head, place].double() * call.scale
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        which = seen[b, place]
        if which.any():
            rows[b, head, place, which] = logits[which].softmax(0)
    return rows


def some_seen() -> Tensor:
    seen = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    seen[0, 2] = False  # a row that sees nothing
    return seen


@pytest.mark.parametrize("kind", ["bool", "additive", "additive half"])
def test_rows_under_a_mask_are_a_plain_softmax(kind: str) -> None:
    seen = some_seen()
    mask = seen[:, None]
    if kind != "bool":
        dtype = torch.float16 if "half" in kind else torch.float64
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    call = call_of(mask)
    assert apart(attention_rows(call), plain(call, seen)) < 1e-12


def test_rows_without_a_mask_are_causal_from_the_last_key() -> None:
    place = torch.arange(7)
    causal = (place <= place[2:, None]).expand(2, -1, -1)
    call = call_of(is_causal=True)
    assert apart(attention_rows(call), plain(call, causal)) < 1e-12
    everything = torch.ones(2, 5, 7, dtype=torch.bool)
    assert apart(attention_rows(call_of(is_causal=False)), plain(call, everything)) < 1e-12
    one = call_of(query=1, is_causal=True)
    assert apart(attention_rows(one), plain(one, everything[:, :1])) < 1e-12


def test_rows_of_flash_kernels_know_padding_and_windows() -> None:
    place, real = torch.arange(7), torch.ones(2, 7, dtype=torch.int64)
    real[1, :3] = 0
    seen = (place <= place[2:, None]) & (place > place[2:, None] - 3) & real[:, None].bool()
    call = call_of(real, is_causal=True, sliding_window=3)
    assert apart(attention_rows(call), plain(call, seen)) < 1e-12


def test_rows_know_a_soft_cap_and_another_scale() -> None:
    call = call_of(some_seen()[:, None], softcap=2.0, scaling=0.7)
    assert call.scale == 0.7
    assert apart(attention_rows(call), plain(call, some_seen(), cap=2.0)) < 1e-12


def test_chosen_rows_are_those_rows_for_each_sample() -> None:
    call = call_of(some_seen()[:, None])
    chosen = torch.tensor([[4, 0, 0], [1, 2, 3]])
    every = attention_rows(call)
    for sample in range(2):
        assert torch.equal(attention_rows(call, chosen)[sample], every[sample][:, chosen[sample]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_float32_at_least(dtype: torch.dtype) -> None:
    call = call_of(some_seen()[:, None], dtype=dtype)
    rows = attention_rows(call)
    assert rows.dtype == torch.float32
    assert apart(rows, plain(call, some_seen())) < 1e-6


def test_a_mask_of_an_unknown_form_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="a mask with 3 axes; expected none, 2 or 4"):
        attention_rows(call_of(torch.ones(2, 5, 7)))


# taps


def test_a_tap_changes_what_a_layer_attends_to_and_later_taps_come_first() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    order: list[str] = []

    def named(name: str) -> Any:
        def attend(call: AttentionCall, kernel: Any) -> Output:
            order.append(name)
            output, weights = kernel(call)
            return output * 2, weights

        return attend

    whole = run(model, inputs, 1)
    with open_session(model) as session:
        with session.tap(1, named("first")), session.tap(1, named("second")):
            changed = run(model, inputs, 1)
        assert torch.equal(run(model, inputs, 1).logits, whole.logits)
    assert order == ["second", "first"]
    hook = model.model.language_model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: (args[0] * 4,)
    )
    assert apart(changed.logits, run(model, inputs, 1).logits) < 1e-12
    hook.remove()


def test_kernels_without_tensor_masks_are_refused_and_nothing_is_left() -> None:
    model = tiny("llava")
    config = model.model.language_model.config
    before = dict(vars(config))
    config._attn_implementation = "flex_attention"
    try:
        with (
            pytest.raises(NotImplementedError, match=r'set_attn_implementation\("sdpa"\)'),
            tapped({}, [config]),
        ):
            pass
        assert config._attn_implementation == "flex_attention"
    finally:
        config._attn_implementation = "sdpa"
    assert vars(config) == before


def test_eager_models_still_return_their_attention() -> None:
    model, inputs = tiny("llava", "eager"), make_inputs("llava", dtype=torch.float32)
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True).attentions
        with open_session(model) as session:
            session.tap_decoder()
            found = model(**inputs, output_attentions=True).attentions
    assert len(found) == LAYERS
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
