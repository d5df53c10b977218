"""Mean attention equals a mean of the rows that eager attention gives."""

from typing import Any

import pytest
import torch

from tests.multimodal.grounding.heatmaps.eager import HEADS, NAMES, NEW, TOLERANCE, captions, case, padded
from tests.multimodal.test_session import everything_on
from tests.multimodal.tiny import make_inputs
from visionsel.multimodal.grounding import Replay
from visionsel.multimodal.grounding.heatmaps import rows
from visionsel.multimodal.grounding.heatmaps.mean import Mean
from visionsel.multimodal.grounding.heatmaps.rows import middle_layers


@pytest.mark.parametrize("row", ["predict", "token", "prompt"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_mean_over_layers_and_heads(name: str, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK", 2)
    one = case(name)
    before = everything_on(one.model)
    for layers, heads in (((1, 2, 3), range(HEADS)), ((0, -1), (3, 1))):
        method = Mean(row=row) if len(layers) == 3 else Mean(layers, heads, row)
        expected = padded(
            [
                [
                    sum(one.attention(layer, head, row, b, t) for layer in layers for head in heads)
                    / (len(layers) * len(heads))
                    for t in range(NEW)
                ]
                for b in range(2)
            ]
        )
        found = method(one.replay)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, **TOLERANCE)
    assert everything_on(one.model) == before


def test_several_answers_have_maps_of_their_own_and_padding_has_none() -> None:
    one = case("qwen2_5_vl")
    tokens = torch.randperm(80, generator=torch.Generator().manual_seed(4))[: 4 * NEW].view(4, NEW) + 2
    end = int(tokens[3, 0])
    replay = Replay(one.model, {**one.inputs, "eos_token_id": end}, tokens)
    maps = Mean()(replay)
    alone = [Mean()(Replay(one.model, one.inputs, tokens[copy::2])) for copy in (0, 1)]
    assert replay.valid.tolist() == [[True] * NEW] * 3 + [[True, False, False]]
    for copy in (0, 1):
        expected = alone[copy].masked_fill(~replay.valid[copy::2, :, None], 0)
        torch.testing.assert_close(maps[copy::2], expected, **TOLERANCE)
    assert not maps[3, 1:].any()


def test_middle_layers_are_in_proportion() -> None:
    assert middle_layers(32) == list(range(5, 27))
    assert middle_layers(28)[-1] == 22
    assert [middle_layers(number) for number in (1, 2, 4)] == [[0], [1], [1, 2, 3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row": "first"}, "row must be one of predict, token, prompt"),
        ({"layers": (4,)}, r"layers \[4\] do not exist: choose among 0 to 3"),
        ({"layers": (3, -1)}, "more than once"),
        ({"heads": (0, 9)}, r"heads \[0, 9\] do not exist"),
        ({"sinks": "edges"}, "sinks must be None or one of hidden, border, median"),
    ],
)
def test_bad_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mean(**options)(case("llava").replay)


def test_a_prompt_without_images_is_told() -> None:
    one, inputs = case("llava"), make_inputs("llava", images=0)
    with pytest.raises(ValueError, match="no tokens of images"):
        Mean()(Replay(one.model, inputs, one.tokens))


def test_it_points_at_what_a_trained_model_names() -> None:
    scenes = captions()
    assert scenes.hits(Mean()(scenes.replay)) >= 0.85  # measured 0.87
