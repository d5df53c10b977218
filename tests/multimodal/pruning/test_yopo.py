"""Yopo against a plain restatement: no cache, explicit attention, nothing dropped, all by masks."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tests.multimodal import tiny
from visionsel.multimodal.attention import AttentionCall
from visionsel.multimodal.cache import cache_of
from visionsel.multimodal.intervention import Stack
from visionsel.multimodal.pruning.fastv import FastV
from visionsel.multimodal.pruning.pruner import Pruner
from visionsel.multimodal.pruning.random import RandomPrune
from visionsel.multimodal.pruning.yopo import Yopo, calibrate
from visionsel.multimodal.pruning.yopo_compute import blinded

STEPS = 2
INACTIVE = {1: [0, 1], 2: [1, 2], 3: [3]}  # a whole group, and heads inside groups of two
SETTINGS = {
    "window": Yopo(window=3),
    "code": Yopo(window=3, fidelity="code"),
    "heads": Yopo(window=None, inactive=INACTIVE),
    "neurons": Yopo(window=None, mlp_ratio=4),
    "stop": Yopo(window=None, layer_stop=2),
    "all": Yopo(window=3, inactive=INACTIVE, mlp_ratio=2.5, layer_stop=3),
}
GRID = torch.cartesian_prod(torch.arange(4), torch.arange(4))
PLACES: dict[str, list[Tensor]] = {  # row and column of the image tokens of each sample, in order
    "llava": [GRID] * 2,
    "gemma3": [GRID] * 2,
    "qwen2_5_vl": [
        torch.cartesian_prod(torch.arange(h // 8), torch.arange(w // 8)) for h, w in ((32, 40), (24, 32))
    ],
}


@lru_cache
def model_of(name: str, attention: str = "sdpa") -> Any:
    return tiny.make_model(name, attention)


def generate(model: Any, inputs: dict[str, Any], steps: int = STEPS, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens, and logits `[steps, B, V]` in the precision of the model."""
    logits: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, out: logits.append(out[:, -1]))
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=steps, do_sample=False, **options)
    handle.remove()
    return tokens, torch.stack(logits)


@contextmanager
def restated(
    model: Any,
    inputs: dict[str, Any],
    yopo: Yopo,
    places: Sequence[Tensor],
    kept: Sequence[tuple[int, Tensor]] = (),
) -> Iterator[None]:
    """The rules, on whole sequences: rows and columns of attention, and neurons, are zeroed or hidden.

    `places` has row and column of each image token, or -1 where it has none; `kept` says which tokens of the
    prompt go on from a layer.
    """
    decoder = model.model.language_model
    image, real = inputs["input_ids"] == tiny.IMAGE, inputs["attention_mask"].bool()
    batch, prompt = image.shape
    place = torch.full((batch, prompt, 2), -1)
    for b in range(batch):
        place[b, image[b]] = places[b]
    radius = (yopo.window or 1) // 2

    apart = (place[:, :, None] - place[:, None]).abs().amax(-1)
    pair = (place[..., 0] >= 0)[:, :, None] & (place[..., 0] >= 0)[:, None]

    @lru_cache
    def allowed(layer: int, mask: Tensor | None, size: int) -> Tensor:
        if mask is None:
            see = torch.ones(size, size, dtype=torch.bool).tril().repeat(batch, 1, 1)
        else:
            see = mask[:, 0].expand(batch, -1, -1).clone()
        if yopo.window:
            see[:, :prompt, :prompt] &= ~(pair & (apart > radius))
            if yopo.fidelity == "code":
                see[:, :prompt, :prompt] |= pair & (apart <= radius)
        gone = torch.zeros(batch, size, dtype=torch.bool)
        if yopo.layer_stop is not None and layer >= yopo.layer_stop:
            gone[:, :prompt] |= image
        for first, entered in kept:
            if layer >= first:
                gone[:, :prompt] |= ~entered
        return see & ~gone[:, None] | torch.eye(size, dtype=torch.bool) & gone[:, None]

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **arguments: Any
    ) -> Any:
        layer, size = module.layer_idx, query.shape[2]
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        logits = query @ key.transpose(2, 3) * arguments["scaling"]
        logits = logits.masked_fill(~allowed(layer, mask, size)[:, None], -torch.inf)
        weights = logits.softmax(-1).nan_to_num(0)
        visual = torch.nn.functional.pad(image, (0, size - prompt))
        chosen = torch.zeros(query.shape[1], dtype=torch.bool)
        chosen[list((yopo.inactive or {}).get(layer, ()))] = True
        weights = weights.masked_fill(chosen[:, None, None] & visual[:, None, None], 0)
        output = (weights @ value).masked_fill(chosen[:, None, None] & visual[:, None, :, None], 0)
        return output.transpose(1, 2), None

    def narrow(mlp: Any) -> Callable[[Tensor], Tensor]:
        def forward(hidden: Tensor) -> Tensor:
            inner = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
            neuron = torch.arange(inner.shape[-1])
            visual = torch.nn.functional.pad(image, (0, hidden.shape[1] - prompt))
            out = visual[..., None] & (neuron >= int(len(neuron) / yopo.mlp_ratio))
            return mlp.down_proj(inner.masked_fill(out, 0))

        return forward

    assert real.any()
    AttentionInterface.register("restated", attend)
    AttentionMaskInterface.register("restated", sdpa_mask)
    before, decoder.config._attn_implementation = decoder.config._attn_implementation, "restated"
    for layer in decoder.layers:
        layer.mlp.forward = narrow(layer.mlp)
    try:
        yield
    finally:
        decoder.config._attn_implementation = before
        for layer in decoder.layers:
            del layer.mlp.forward
        AttentionInterface._global_mapping.pop("restated")
        AttentionMaskInterface._global_mapping.pop("restated")


def compare(
    name: str,
    yopo: Yopo,
    places: Sequence[Tensor] | None = None,
    pruner: Pruner | None = None,
    inputs: dict[str, Any] | None = None,
) -> None:
    """Tokens and logits of generation under Yopo, and maybe a pruner, are those of the restatement."""
    model, inputs = model_of(name), tiny.make_inputs(name) if inputs is None else inputs
    kept: list[tuple[int, Tensor]] = []
    with Stack(*([pruner] if pruner else []), yopo)(model) as handles:
        tokens, logits = generate(model, inputs)
        if pruner is not None:
            kept = handles[0].kept
    with restated(model, inputs, yopo, PLACES[name] if places is None else places, kept):
        expected_tokens, expected = generate(model, inputs, use_cache=False)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    assert torch.equal(tokens, expected_tokens)
    _, plain = generate(model, inputs)
    assert (plain - expected).abs().max() > 1e-3  # it does something


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", PLACES)
def test_generation_in_a_padded_batch_equals_the_plain_restatement(name: str, setting: str) -> None:
    compare(name, SETTINGS[setting])


@pytest.mark.parametrize("setting", ["window", "all"])
def test_tokens_of_two_images_do_not_see_each_other_through_windows(setting: str) -> None:
    # far apart in rows is as good as on another grid
    places = [torch.cat([GRID, GRID + 100])] * 2
    compare("llava", SETTINGS[setting], places, inputs=tiny.make_inputs("llava", images=2))


def test_newline_tokens_are_outside_of_windows_and_tiles_are_one_grid() -> None:
    inputs = tiny.make_inputs("llava_next")
    with Yopo(window=3)(model_of("llava_next")) as pruned, torch.no_grad():
        model_of("llava_next")(**inputs)
        scope = pruned.record.scope
    places = []
    for b in range(2):
        [picture] = scope.pictures[b]
        place = torch.full((picture.layout.n, 2), -1)
        for number, view in enumerate(picture.layout.views):
            for row, column in torch.cartesian_prod(*map(torch.arange, view.index.shape)).tolist():
                place[view.index[row, column]] = torch.tensor([row + 100 * number, column])
        assert (place[:, 0] < 0).any()
        places.append(place)
    compare("llava_next", SETTINGS["window"], places)


@pytest.mark.parametrize(
    ("setting", "layer"), [("window", 0), ("all", 0), ("code", 1), ("heads", 1), ("all", 2)]
)
def test_it_composes_with_pruners_below(setting: str, layer: int) -> None:
    pruner = FastV(keep=0.4, layer=layer) if layer == 2 else RandomPrune(keep=0.4, layer=layer)
    inputs = tiny.make_inputs("qwen2_5_vl")
    compare("qwen2_5_vl", SETTINGS[setting], pruner=pruner, inputs=inputs)  # rows of different lengths


@pytest.mark.parametrize("setting", SETTINGS)
def test_eager_attention_gives_the_same(setting: str) -> None:
    inputs = tiny.make_inputs("llava", dtype=torch.float32)
    single = copy.deepcopy(model_of("llava")).float()
    single.set_attn_implementation("eager")
    with SETTINGS[setting](single):
        _, logits = generate(single, inputs)
    model, double = model_of("llava"), inputs | {"pixel_values": inputs["pixel_values"].double()}
    with SETTINGS[setting](model):
        _, expected = generate(model, double)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_with_everything_off_nothing_changes_and_with_everything_on_all_families_run(name: str) -> None:
    model, inputs = model_of(name), tiny.make_inputs(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tokens, logits = generate(model, inputs)
    with Yopo(window=None)(model):
        same_tokens, same = generate(model, inputs)
    assert torch.equal(same, logits)
    assert torch.equal(same_tokens, tokens)
    with SETTINGS["all"](model) as pruned:
        _, changed = generate(model, inputs)
    assert changed.isfinite().all()
    assert (changed - logits).abs().max() > 1e-3
    [(layer, kept)] = pruned.kept
    visual = inputs["input_ids"] == tiny.IMAGE
    assert layer == 3
    assert torch.equal(kept, inputs["attention_mask"].bool() & ~visual)
    assert torch.equal(generate(model, inputs)[1], logits)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for module in model.modules():
        assert "forward" not in vars(module)


def test_windows_as_wide_as_the_grid_change_nothing() -> None:
    model, inputs = model_of("llava"), tiny.make_inputs("llava")
    _, logits = generate(model, inputs)
    with Yopo(window=7)(model):
        torch.testing.assert_close(generate(model, inputs)[1], logits, rtol=0, atol=1e-10)


def test_beams_and_several_answers_are_those_of_each_sample_alone() -> None:
    model, inputs = model_of("llava"), tiny.make_inputs("llava")
    options = {"num_beams": 3, "num_return_sequences": 2}
    with SETTINGS["all"](model), torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False, **options)
        for b in range(2):
            alone = {key: value[b : b + 1] for key, value in inputs.items()}
            found = model.generate(**alone, max_new_tokens=4, do_sample=False, **options)
            assert torch.equal(found, tokens[2 * b : 2 * b + 2])


def test_a_copied_cache_and_a_second_turn_know_the_image_tokens() -> None:
    model, inputs = model_of("llava"), tiny.make_inputs("llava", batch=1)
    more = torch.randint(2, 90, (1, 4), generator=torch.Generator().manual_seed(3))
    whole = tiny.grow(inputs, more)
    other = tiny.make_inputs("llava", batch=1, before=(9,), seed=5)
    # heads at image tokens are not silenced in later turns, for there are none
    with Yopo(window=3, inactive=INACTIVE)(model), torch.no_grad():
        expected = model(**whole).logits[:, -1]
        first = model(**inputs, use_cache=True)
        cache = copy.deepcopy(cache_of(first))
        model(**other)  # another prompt in between
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        text = {"input_ids": more, "attention_mask": whole["attention_mask"], name: cache}
        found = model(**text).logits[:, -1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        with pytest.raises(ValueError, match="has a Yopo already"), Yopo()(model):
            pass
    with Yopo(window=None, inactive=INACTIVE)(model), torch.no_grad():
        vars(cache).pop("visionsel_visual")
        with pytest.raises(NotImplementedError, match="read outside of this context"):
            model(**text)


def test_a_prompt_without_images_is_left_alone() -> None:
    model, inputs = model_of("llava"), tiny.make_inputs("llava", images=0)
    _, logits = generate(model, inputs)
    with SETTINGS["all"](model):
        assert torch.equal(generate(model, inputs)[1], logits)


def test_image_tokens_go_through_the_first_neurons_only() -> None:
    model, inputs = model_of("llava"), tiny.make_inputs("llava")
    layer = model.model.language_model.layers[1]
    with Yopo(window=None, mlp_ratio=3)(model), torch.no_grad():
        shapes: list[tuple[int, ...]] = []
        handle = layer.mlp.gate_proj.register_forward_hook(
            lambda m, args, out: shapes.append(tuple(out.shape))
        )
        model(**inputs)
        handle.remove()
    text = int((inputs["input_ids"] != tiny.IMAGE).sum())
    assert shapes == [(text, tiny.TEXT["intermediate_size"])]  # the whole layer saw the text alone


def test_heads_under_a_flash_kernel_take_two_passes_with_the_same_result() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 7, 8, generator=generator, dtype=torch.float64)
    widths: list[int] = []

    def run(call: AttentionCall) -> tuple[Tensor, None]:
        widths.append(call.value.shape[-1])
        keys, values = (x.repeat_interleave(2, 1) for x in (call.key, call.value))
        return ((query @ keys.transpose(2, 3)).softmax(-1) @ values).transpose(1, 2), None

    keys = torch.rand(2, 7, generator=generator) < 0.5
    heads = torch.tensor([True, False, True, True])
    found = []
    for kernel in ("sdpa", "flash_attention_2"):
        module = torch.nn.Identity()
        module.config = type("Config", (), {"_attn_implementation": f"visionsel0:{kernel}"})()
        found.append(blinded(AttentionCall(module, query, key, value, None, {}, run), run, keys, heads)[0])
    assert widths == [16, 8, 8]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_calibration_counts_votes_of_samples_on_eager_attention() -> None:
    model = model_of("llava")
    batches = [tiny.make_inputs("llava", seed=seed) for seed in range(2)]
    threshold, votes = 3.0, 0.4
    eager = copy.deepcopy(model).float()
    eager.set_attn_implementation("eager")
    active = torch.zeros(tiny.LAYERS, 4)
    for batch in batches:
        for b in range(2):
            alone = {key: value[b : b + 1] for key, value in batch.items()}
            alone["pixel_values"] = alone["pixel_values"].float()
            with torch.no_grad():
                rows = eager(**alone, output_attentions=True).attentions
            image = alone["input_ids"][0] == tiny.IMAGE
            last = int(image.nonzero()[-1])
            for layer, attention in enumerate(rows):
                for head in range(4):
                    to_image = attention[0, head, last + 1 :, image].sum()
                    ratio = to_image / attention[0, head, last + 1 :, ~image].sum()
                    active[layer, head] += ratio > threshold
    expected = {
        layer: heads
        for layer in (2, 3)
        if (heads := [head for head in range(4) if active[layer, head] <= votes * 4])
    }
    assert 0 < sum(map(len, expected.values())) < 8
    yopo = calibrate(model, batches, threshold, votes, window=5, layer_stop=3)
    assert yopo == Yopo(window=5, inactive=expected, layer_stop=3)
    assert calibrate(model, batches, threshold=0.0).inactive == {}
    everything = calibrate(model, batches, threshold=1e9).inactive
    assert everything == {2: [0, 1, 2, 3], 3: [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 4}, "window must be an odd number"),
        ({"window": -1}, "window must be an odd number"),
        ({"mlp_ratio": 0.5}, "mlp_ratio must be a number from 1 up"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio must be a number from 1 up"),
        ({"fidelity": "exact"}, 'fidelity must be "paper" or "code"'),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Yopo(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer_stop": 4}, "layer 4 does not exist"),
        ({"layer_stop": 0}, "layer 0 does not exist"),
        ({"inactive": {4: [0]}}, "layer 4 does not exist"),
        ({"inactive": {1: [4]}}, "choose from 0 to 3"),
    ],
)
def test_layers_and_heads_that_do_not_exist_are_refused_at_entry(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message), Yopo(**arguments)(model_of("llava")):
        pass


def test_what_cannot_be_done_is_refused_at_entry_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make_model("llava")
    mlp = model.model.language_model.layers[2].mlp
    mlp.up_proj = torch.nn.Sequential(mlp.up_proj)
    with pytest.raises(NotImplementedError, match="plain linear"), Yopo(mlp_ratio=2)(model):
        pass
    assert all("forward" not in vars(module) for module in model.modules())
    config = model.model.language_model.config
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(NotImplementedError, match="cannot mask windows"), Yopo()(model):
        pass
    with pytest.raises(ValueError, match="no samples"):
        calibrate(model_of("llava"), [])
    with pytest.raises(ValueError, match="votes in"):
        calibrate(model_of("llava"), [], votes=1.0)
