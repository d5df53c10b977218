"""A replay computes what decoding with a cache computed, and leaves no trace."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multimodal.runs import ByScore, run, tiny
from tests.multimodal.test_session import everything_on
from tests.multimodal.tiny import FAMILIES, IMAGE, LAYERS, PAD, WITH_VIDEO, alone, grow, make_inputs
from visionsel.multimodal import VAR, VCD, VHR
from visionsel.multimodal.attention import AttentionCall, attention_rows
from visionsel.multimodal.grounding import Replay

TOLERANCE = 1e-10  # float64: sums in another order
NEW = 5


def inputs_of(name: str) -> dict[str, Any]:
    """Left padded; the first sample has two images, and where there can be one a video."""
    return make_inputs(name, images=(2, 1), video=name in WITH_VIDEO)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_decoding_with_a_cache(name: str) -> None:
    model, inputs = tiny(name), inputs_of(name)
    decoded = run(model, inputs, NEW)
    before, deltas = everything_on(model), getattr(model.model, "rope_deltas", None)
    replay = Replay(model, inputs, decoded.tokens)
    read = replay.run(hidden=True, logits=True)
    assert everything_on(model) == before
    assert getattr(model.model, "rope_deltas", None) is deltas  # of the model's own last prompt
    torch.testing.assert_close(read.logits, decoded.logits.transpose(0, 1), rtol=0, atol=TOLERANCE)
    length = inputs["input_ids"].shape[1]
    assert read.hidden.shape == (2, length + NEW, 64)
    rows = read.hidden.gather(1, replay.rows[..., None].expand(-1, -1, 64))
    torch.testing.assert_close(model.get_output_embeddings()(rows), read.logits, rtol=0, atol=TOLERANCE)
    alike = replay.run(hidden=True)
    assert alike.logits is None
    torch.testing.assert_close(alike.hidden, read.hidden, rtol=0, atol=0)


def test_it_says_where_things_are() -> None:
    model, inputs = tiny("qwen2_5_vl"), inputs_of("qwen2_5_vl")
    tokens = run(model, inputs, NEW).tokens
    replay = Replay(model, inputs, tokens)
    assert replay.scope is None
    replay.run()
    length = inputs["input_ids"].shape[1]
    assert (replay.length, replay.copies, tuple(replay.tokens.shape)) == (length, 1, (2, NEW))
    assert torch.equal(replay.sequences, tokens)
    assert replay.rows.tolist() == [list(range(length - 1, length - 1 + NEW))] * 2
    assert replay.valid.all()
    for row, ids in enumerate(inputs["input_ids"]):
        places = (ids == IMAGE).nonzero()[:, 0].tolist()
        assert [place for place in replay.image[row].tolist() if place >= 0] == places
        assert replay.image[row, : len(places)].tolist() == places
    assert replay.scope.length == length + NEW
    assert replay.scope.drafted == NEW  # the answer is no prompt
    assert replay.scope.last.tolist() == [length - 1] * 2
    kinds = [[picture.modality for picture in row] for row in replay.scope.pictures]
    assert kinds == [["image", "image", "video"], ["image", "video"]]


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl", "idefics3", "gemma3"])
def test_several_answers_of_samples_with_several_images_are_each_as_alone(name: str) -> None:
    model, inputs = tiny(name), inputs_of(name)
    beams = run(model, inputs, NEW, num_beams=3, num_return_sequences=3).tokens
    calls: list[AttentionCall] = []
    many = Replay(model, inputs, beams)
    assert many.copies == 3
    read = many.run({1: calls.append}, hidden=True, logits=True)
    for copy in range(3):
        own: list[AttentionCall] = []
        one = Replay(model, inputs, beams[copy::3])
        alike = one.run({1: own.append}, hidden=True, logits=True)
        torch.testing.assert_close(read.logits[copy::3], alike.logits, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(read.hidden[copy::3], alike.hidden, rtol=0, atol=TOLERANCE)
        rows = attention_rows(calls[0])[copy::3]
        torch.testing.assert_close(rows, attention_rows(own[0]), rtol=0, atol=TOLERANCE)
        assert torch.equal(many.image[copy::3], one.image)
        assert torch.equal(many.scope.visual[copy::3], one.scope.visual)
        for several, single in zip(many.scope.pictures[copy::3], one.scope.pictures, strict=True):
            assert [picture.positions.tolist() for picture in several] == [
                picture.positions.tolist() for picture in single
            ]
    assert len({tuple(row) for row in beams.tolist()}) == 6, "the answers should differ"


@pytest.mark.parametrize("name", ["llava", "gemma3", "paligemma"])
def test_taps_see_the_attention_of_a_forward_over_all_of_it(name: str) -> None:
    model, inputs = tiny(name, "eager"), make_inputs(name, dtype=torch.float32)
    tokens = run(model, inputs, NEW).tokens
    with torch.no_grad():
        whole = model(
            **grow(inputs, tokens[:, -NEW:]), use_cache=False, output_attentions=True, logits_to_keep=1
        )
    seen: dict[int, Tensor] = {}

    def see(layer: int) -> Any:
        return lambda call: seen.__setitem__(layer, attention_rows(call))

    replay = Replay(model, inputs, tokens)
    replay.run({layer: see(layer) for layer in range(LAYERS)})
    real = replay.scope.real
    for layer, attention in enumerate(whole.attentions):
        found, expected = seen[layer].transpose(1, 2)[real], attention.transpose(1, 2)[real]
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("whole", [True, False])
def test_new_tokens_and_whole_sequences_are_told_apart(whole: bool) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    tokens = run(model, inputs, NEW).tokens
    given = tokens if whole else tokens[:, -NEW:]
    replay = Replay(model, inputs, given)
    assert torch.equal(replay.sequences, tokens)
    assert torch.equal(replay.tokens, tokens[:, -NEW:])


def test_padding_behind_an_answer_changes_nothing_and_is_told() -> None:
    model, inputs = tiny("qwen2_vl"), make_inputs("qwen2_vl")
    tokens = run(model, inputs, NEW).tokens[:, -NEW:]
    end = int(tokens[0, 2])
    assert end not in tokens[1].tolist()
    cut = tokens.clone()
    cut[0, 3:] = PAD
    replay = Replay(model, {**inputs, "eos_token_id": end}, cut)
    assert replay.valid.tolist() == [[True, True, True, False, False], [True] * 5]
    # what stopped it may not be a token: padding is known by itself, too
    assert torch.equal(Replay(model, {**inputs, "pad_token_id": PAD}, cut).valid, replay.valid)
    read = replay.run(logits=True).logits
    full = Replay(model, inputs, tokens).run(logits=True).logits
    torch.testing.assert_close(read[replay.valid], full[replay.valid], rtol=0, atol=TOLERANCE)
    assert not replay.scope.real[0, -2:].any()


def test_a_mask_that_was_not_given_is_the_one_of_generate() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    tokens = run(model, inputs, NEW).tokens
    assert (inputs["input_ids"] == PAD).any()
    bare = {name: one for name, one in inputs.items() if name != "attention_mask"}
    expected = Replay(model, inputs, tokens).run(logits=True).logits
    torch.testing.assert_close(Replay(model, bare, tokens).run(logits=True).logits, expected)
    no_padding = alone(inputs, 1) | {"attention_mask": None, "pad_token_id": 5, "eos_token_id": [5, 7]}
    assert Replay(model, no_padding, tokens[1:, -NEW:])._given["attention_mask"].all()


@pytest.mark.parametrize("method", [VAR(sink_dims=(3,), tau=1.5, layers=(1, 2)), VHR(2.0, (1, 2))], ids=str)
def test_modulators_act_on_the_replay_as_they_did_on_the_answer(method: Any) -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    plain = run(model, inputs, NEW)
    with method(model):
        decoded = run(model, inputs, NEW)
        replay = Replay(model, inputs, decoded.tokens)
        read = replay.run(logits=True).logits
    torch.testing.assert_close(read, decoded.logits.transpose(0, 1), rtol=0, atol=TOLERANCE)
    assert float((plain.logits[0] - decoded.logits[0]).abs().amax()) > 1e-3


def test_a_second_view_does_not_touch_a_replay() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    tokens = run(model, inputs, NEW).tokens
    expected = Replay(model, inputs, tokens).run(logits=True).logits
    with VCD()(model):
        assert torch.equal(Replay(model, inputs, tokens).run(logits=True).logits, expected)


def test_what_cannot_be_replayed_is_refused() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    tokens = run(model, inputs, NEW).tokens
    for given, generated, message in (
        ({"pixel_values": inputs["pixel_values"]}, tokens, "a replay needs input_ids"),
        (inputs, inputs["input_ids"], "nothing was generated"),
        (inputs, tokens[:, -NEW:][[0, 1, 0]], "3 answers do not go with 2 prompts"),
        (inputs, tokens[0], r"got torch.int64 \[\d+\]"),
        (inputs, "a cat", "what generate\\(\\) returns; got str"),
    ):
        with pytest.raises(ValueError, match=message):
            Replay(model, given, generated)
    with pytest.raises(NotImplementedError, match="tokens that stand for images"):
        Replay(model, inputs, torch.full((2, 3), IMAGE))
    replay = Replay(model, inputs, tokens)
    with pytest.raises(ValueError, match="layer 4 does not exist: the decoder has 0 to 3"):
        replay.run({4: print})
    with ByScore({1: (0.5,)})(model), pytest.raises(NotImplementedError, match="a pruner drops tokens"):
        replay.run()
    model.set_attn_implementation("flex_attention")
    try:
        with pytest.raises(NotImplementedError, match="set_attn_implementation"):
            replay.run({0: print})
    finally:
        model.set_attn_implementation("sdpa")
