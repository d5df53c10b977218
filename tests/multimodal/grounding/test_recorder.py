"""Recorded rows are those of eager attention, whichever way they are recorded."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.multimodal.runs import ByScore, cache_name, tiny
from tests.multimodal.test_session import Failing, everything_on
from tests.multimodal.tiny import FAMILIES, IMAGE, LAYERS, PAD, grow, make_inputs, make_model
from visionsel.multimodal import VCD, VHR, PyramidDrop
from visionsel.multimodal.grounding import AttentionRecorder

F32 = torch.float32  # eager attention makes NaN of padding in float64
EAGER = 2e-6  # float32, sums in another order
KERNEL = 1e-5  # float32 through four layers of another kernel, with weights larger than usual
SAME = 1e-7  # float32 rows
NEW = 5
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}


def at_images(rows: Tensor, ids: Tensor) -> Tensor:
    """Columns of the image tokens of `[layers, B, heads, T, L]`, filled up with 0, sample by sample."""
    places = [(row == IMAGE).nonzero()[:, 0] for row in ids]
    out = torch.zeros(*rows.shape[:-1], max(map(len, places)))
    for sample, place in enumerate(places):
        out[:, sample, ..., : len(place)] = rows[:, sample][..., place]
    return out


def record(model: Any, inputs: dict[str, Any], mode: str, options: Any = None, **chosen: Any) -> Any:
    with AttentionRecorder(model, mode=mode, **chosen) as recorder:
        model.generate(**inputs, **GREEDY | (options or {}))
    return recorder


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_those_that_eager_attention_gives_while_tokens_are_generated(name: str) -> None:
    model, inputs = make_model(name, "eager", F32), make_inputs(name, images=(2, 1), dtype=F32)
    given = model.generate(**inputs, **GREEDY, output_attentions=True, return_dict_in_generate=True)
    length = inputs["input_ids"].shape[1]
    steps = [torch.stack([layer[:, :, -1, :length] for layer in step]) for step in given.attentions]
    expected = torch.stack(steps, 3)  # [layers, B, heads, T, L]
    assert (inputs["attention_mask"] == 0).any()
    for kernel, mode in (("eager", "replay"), ("eager", "online"), ("eager", "eager"), ("sdpa", "replay")):
        model.set_attn_implementation(kernel)
        before = everything_on(model)
        recorder = record(model, inputs, mode, columns="prompt")
        assert everything_on(model) == before
        tolerance = EAGER if kernel == "eager" else KERNEL
        torch.testing.assert_close(recorder.attentions, expected, rtol=0, atol=tolerance)
    sdpa, inputs = tiny(name), make_inputs(name, images=(2, 1))  # float64: more can be asked for
    both = [record(sdpa, inputs, mode, columns="prompt").attentions for mode in ("replay", "online")]
    torch.testing.assert_close(*both, rtol=0, atol=SAME)


def test_layers_heads_and_image_columns_are_those_asked_for() -> None:
    model, inputs = tiny("llava_next"), make_inputs("llava_next", images=(2, 1))
    expected = record(model, inputs, "replay", columns="prompt").attentions
    images = record(model, inputs, "replay", layers=[-1, 1], heads=[3, 0])
    assert (images.layers, images.heads) == ([3, 1], [3, 0])
    some = at_images(expected[[3, 1]][:, :, [3, 0]], inputs["input_ids"])
    torch.testing.assert_close(images.attentions, some, rtol=0, atol=SAME)
    online = record(model, inputs, "online", layers=[-1, 1], heads=[3, 0])
    torch.testing.assert_close(online.attentions, images.attentions, rtol=0, atol=SAME)
    assert torch.equal(online.positions, images.positions)
    number = (inputs["input_ids"] == IMAGE).sum(1).tolist()
    assert images.attentions.shape[-1] == number[0] > number[1]
    assert (images.positions[1] >= 0).sum() == number[1]
    assert not images.attentions[:, 1, ..., number[1] :].any()


@pytest.mark.parametrize("mode", ["replay", "online", "eager"])
def test_keys_out_of_a_sliding_window_are_0_and_the_others_stay_in_place(mode: str) -> None:
    model = make_model("gemma3", "eager", F32)
    model.config.text_config.sliding_window = 24  # less than the prompt, and the answer moves it on
    for layer in model.model.language_model.layers:
        if layer.self_attn.is_sliding:
            layer.self_attn.sliding_window = 24
    inputs = make_inputs("gemma3", before=(9, 12), after=(6, 4), dtype=F32)
    new = 12
    tokens = model.generate(**inputs, **GREEDY | {"max_new_tokens": new})[:, -new:]
    with torch.no_grad():  # all at once, without a cache: nothing is lost, so that columns are places
        whole = model(**grow(inputs, tokens), use_cache=False, output_attentions=True).attentions
    length = inputs["input_ids"].shape[1]
    expected = torch.stack([layer[:, :, length - 1 : -1, :length] for layer in whole]).float()
    found = record(model, inputs, mode, {"max_new_tokens": new}, columns="prompt").attentions
    torch.testing.assert_close(found, expected, rtol=0, atol=EAGER)
    gone = length + new - 2 - 23  # the last row is that of token L + new - 2, which sees 24 with itself
    assert not found[0, :, :, -1, :gone].any()  # layer 0 slides
    assert found[0, :, :, -1, gone].all()
    assert found[1, 1, :, -1, :gone].any()


def test_beams_and_several_answers_are_recorded_as_if_alone() -> None:
    model, inputs = tiny("qwen2_5_vl"), make_inputs("qwen2_5_vl", images=(2, 1))
    eager = tiny("qwen2_5_vl", "eager", torch.float64)
    options = {"num_beams": 3, "num_return_sequences": 2}
    with AttentionRecorder(model) as recorder:
        sequences = model.generate(**inputs, **GREEDY | options)
    assert torch.equal(recorder.replay.sequences, sequences)
    length = inputs["input_ids"].shape[1]
    assert not torch.equal(sequences[0], sequences[1])
    for row in range(4):  # each answer by itself: the whole of it, eager, without a cache
        sample = row // 2
        start = int((inputs["attention_mask"][sample] == 0).sum())
        single = {name: inputs[name][sample : sample + 1, start:] for name in ("input_ids", "attention_mask")}
        images = slice(0, 2) if sample == 0 else slice(2, 3)
        single["image_grid_thw"] = inputs["image_grid_thw"][images]
        patches = inputs["image_grid_thw"].prod(1).cumsum(0).tolist()
        single["pixel_values"] = inputs["pixel_values"][: patches[1]]
        if sample:
            single["pixel_values"] = inputs["pixel_values"][patches[1] :]
        single["mm_token_type_ids"] = (single["input_ids"] == IMAGE).int()
        with torch.no_grad():
            grown = grow(single, sequences[row : row + 1, length:])
            whole = eager(**grown, use_cache=False, output_attentions=True).attentions
        last = length - start - 1
        rows = torch.stack([layer[:, :, last:-1, : last + 1] for layer in whole])
        expected = at_images(rows, single["input_ids"])
        number = expected.shape[-1]
        found = recorder.attentions[:, row : row + 1]
        torch.testing.assert_close(found[..., :number], expected, rtol=0, atol=EAGER)
        assert not found[..., number:].any()


@pytest.mark.parametrize("mode", ["replay", "online", "eager"])
def test_rows_behind_the_end_of_an_answer_are_0(mode: str) -> None:
    model, inputs = tiny("llava", "eager"), make_inputs("llava", dtype=F32)
    full = record(model, inputs, mode)
    tokens = model.generate(**inputs, **GREEDY)
    end = int(tokens[0, inputs["input_ids"].shape[1] + 1])
    assert end not in tokens[1].tolist()
    recorder = record(model, inputs, mode, {"eos_token_id": end, "pad_token_id": PAD})
    assert recorder.attentions.shape[3] == NEW
    assert not recorder.attentions[:, 0, :, 2:].any()
    torch.testing.assert_close(
        recorder.attentions[:, 0, :, :2], full.attentions[:, 0, :, :2], rtol=0, atol=EAGER
    )
    torch.testing.assert_close(recorder.attentions[:, 1], full.attentions[:, 1], rtol=0, atol=EAGER)


def test_sampling_static_caches_and_drafts_are_recorded_by_replay() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=1)
    greedy = record(model, inputs, "replay").attentions
    static = record(model, inputs, "replay", {"cache_implementation": "static"})
    torch.testing.assert_close(static.attentions, greedy, rtol=0, atol=SAME)
    drafted = record(model, inputs, "replay", {"prompt_lookup_num_tokens": 2})
    torch.testing.assert_close(drafted.attentions, greedy, rtol=0, atol=SAME)
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 2.0}
    several = []
    for mode in ("replay", "online"):
        torch.manual_seed(0)
        several.append(record(model, inputs, mode, options).attentions)
    assert several[0].shape[1] == 3
    assert not torch.equal(several[0][:, 0], several[0][:, 1])
    torch.testing.assert_close(*several, rtol=0, atol=SAME)


@pytest.mark.parametrize(
    "method", [ByScore({0: (0.7, 0.4), 2: (0.5,)}), PyramidDrop(layers=(1, 2), keep=(0.5, 0.25))], ids=str
)
def test_under_a_pruner_dropped_columns_are_0(method: Any) -> None:
    model, inputs = make_model("llava", "eager", F32), make_inputs("llava", images=(2, 1), dtype=F32)
    ids = inputs["input_ids"]
    with method(model) as pruned, AttentionRecorder(model, columns="prompt", mode="online") as recorder:
        given = model.generate(**inputs, **GREEDY, output_attentions=True, return_dict_in_generate=True)
    real = inputs["attention_mask"].bool()
    entered = [real.clone() for _ in range(LAYERS)]
    for layer, mask in pruned.kept:
        for later in range(layer, LAYERS):
            entered[later] &= mask
    for layer in range(LAYERS):
        for step, attention in enumerate(given.attentions):
            rows = attention[layer][:, :, -1]
            expected = torch.zeros(*rows.shape[:2], ids.shape[1], dtype=rows.dtype)
            for sample in range(2):
                places = entered[layer][sample].nonzero()[:, 0]
                keys = rows[sample, :, : rows.shape[-1] - step]  # of the prompt; fillers are on the left
                expected[sample][:, places] = keys[:, -len(places) :]
            found = recorder.attentions[layer, :, :, step]
            torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=EAGER)
    with method(model), AttentionRecorder(model), pytest.raises(NotImplementedError, match="a pruner drops"):
        model.generate(**inputs, **GREEDY)


def test_the_replay_is_of_the_model_that_answered() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    plain = record(model, inputs, "replay").attentions
    with VHR(3.0, (0, 1))(model):
        inside = record(model, inputs, "replay").attentions
        torch.testing.assert_close(record(model, inputs, "online").attentions, inside, rtol=0, atol=SAME)
    assert float((plain - inside).abs().amax()) > 1e-3
    outside, method = pytest.raises(RuntimeError, match="enter the recorder inside"), VHR(3.0, (0, 1))
    with outside, AttentionRecorder(model), method(model):
        model.generate(**inputs, **GREEDY)


def test_of_two_views_the_main_one_is_recorded() -> None:
    model, inputs = tiny("qwen3_vl"), make_inputs("qwen3_vl")
    with VCD(alpha=2.0)(model):
        replayed, online = record(model, inputs, "replay"), record(model, inputs, "online")
        tokens = model.generate(**inputs, **GREEDY)
    assert torch.equal(replayed.replay.sequences, tokens)
    assert not torch.equal(model.generate(**inputs, **GREEDY), tokens)
    torch.testing.assert_close(online.attentions, replayed.attentions, rtol=0, atol=SAME)


def test_the_last_answer_counts_and_nothing_stays_on_the_model() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    other = make_inputs("llava", seed=4)
    before = everything_on(model)
    recorder = AttentionRecorder(model)
    with recorder:
        model.generate(**other, **GREEDY)
        model.generate(inputs["input_ids"], **{k: v for k, v in inputs.items() if k != "input_ids"}, **GREEDY)
        with pytest.raises(RuntimeError, match="when the block of the recorder has ended"):
            _ = recorder.attentions
        with pytest.raises(RuntimeError, match="open already"), recorder:
            pass
    assert torch.equal(recorder.attentions, record(model, inputs, "replay").attentions)
    with recorder:
        pass
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        _ = recorder.attentions
    with pytest.raises(KeyError, match="on purpose"), AttentionRecorder(model, mode="online"):
        model.generate(**inputs, **GREEDY, logits_processor=[Failing()])
    assert everything_on(model) == before


class Foreign(nn.Module):
    """A model of other code: its attention is its own, and it has no interface."""

    def __init__(self, returns: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(model_type="foreign", num_attention_heads=2, image_token_id=9)
        self.generation_config = SimpleNamespace(eos_token_id=None, pad_token_id=None)
        self.layers = nn.ModuleList([ForeignLayer(returns) for _ in range(2)])
        self.embed = nn.Embedding(10, 8)

    def get_decoder(self) -> nn.Module:
        return self

    def generate(self, input_ids: Tensor, max_new_tokens: int = 3) -> Tensor:
        for step in range(max_new_tokens):
            hidden = self.embed(input_ids)
            past = 0 if step == 0 else input_ids.shape[1] - 1
            for layer in self.layers:
                hidden = layer(hidden, past)
            logits = (hidden[:, -1] @ self.embed.weight.T)[:, :9]
            input_ids = torch.cat((input_ids, logits.argmax(-1, keepdim=True)), 1)
        return input_ids


class ForeignLayer(nn.Module):
    def __init__(self, returns: bool) -> None:
        super().__init__()
        self.self_attn = ForeignAttention(returns)

    def forward(self, hidden: Tensor, past: int) -> Tensor:
        return hidden + self.self_attn(hidden, past)[0].new_zeros(hidden.shape).add(hidden)


class ForeignAttention(nn.Module):
    def __init__(self, returns: bool) -> None:
        super().__init__()
        self.returns = returns
        self.query = nn.Linear(8, 8)

    def forward(self, hidden: Tensor, past: int) -> tuple[Tensor, Tensor | None]:
        heads = self.query(hidden).unflatten(-1, (2, 4)).transpose(1, 2)
        logits = heads[:, :, past:] @ heads.transpose(-1, -2)
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril(past)
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        self.last = weights
        return hidden, weights if self.returns else None


def test_models_of_other_code_are_recorded_from_what_their_attention_returns() -> None:
    model, ids = Foreign(), torch.tensor([[1, 9, 9, 2, 3]])
    seen: list[Tensor] = []
    handle = model.layers[1].self_attn.register_forward_hook(lambda _, args, out: seen.append(out[1]))
    with torch.no_grad(), AttentionRecorder(model, mode="eager", layers=[1]) as recorder:
        model.generate(ids)
    handle.remove()
    expected = torch.stack([weights[:, :, -1, 1:3] for weights in seen], 2)[None]
    assert torch.equal(recorder.attentions, expected)
    with pytest.raises(ValueError, match=r'Foreign is no supported.*there is mode="eager"'):
        AttentionRecorder(model)
    silent = Foreign(returns=False)
    refused = pytest.raises(RuntimeError, match="returned no attention weights")
    with refused, torch.no_grad(), AttentionRecorder(silent, mode="eager"):
        silent.generate(ids)
    del model.config.image_token_id
    with pytest.raises(ValueError, match=r'which token stands for images.*use columns="prompt"'):
        AttentionRecorder(model, mode="eager")


def test_what_cannot_be_recorded_is_refused_before_anything_is_generated() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", batch=1)
    for options, message in (
        ({"mode": "live"}, "mode must be one of replay, online, eager"),
        ({"columns": "text"}, 'columns must be "image" or "prompt"'),
        ({"layers": [4]}, r"layers \[4\] do not exist: choose among 0 to 3"),
        ({"layers": []}, "do not exist"),
        ({"heads": [0, -4]}, "come more than once"),
    ):
        with pytest.raises(ValueError, match=message):
            AttentionRecorder(model, **options)
    for options in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
        refused = pytest.raises(NotImplementedError, match=f"{next(iter(options))}=2 .* use mode=.replay.")
        with AttentionRecorder(model, mode="online"), refused:
            model.generate(**inputs, **GREEDY, **options)
    text = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with AttentionRecorder(model), pytest.raises(ValueError, match="no tokens of images"):
        model.generate(**text, **GREEDY)
    assert record(model, text, "replay", columns="prompt").attentions.shape[-1] == 3
    with torch.no_grad():
        cache = {cache_name(model): model(**inputs, use_cache=True)[cache_name(model)]}
    with AttentionRecorder(model), pytest.raises(NotImplementedError, match="a cache with earlier turns"):
        model.generate(**inputs, **GREEDY, **cache)
    with AttentionRecorder(model), pytest.raises(ValueError, match="for prompts of input_ids"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 64, dtype=torch.float64), **GREEDY)
    refused = pytest.raises(NotImplementedError, match="exchanges the attention kernel")
    with VHR(2.0, (1,))(model), refused, AttentionRecorder(model, mode="eager"):
        pass
