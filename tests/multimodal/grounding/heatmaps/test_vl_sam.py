"""The flow that is carried upwards in pieces equals the product of whole matrices."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.multimodal.grounding.heatmaps.eager import NEW, captions
from tests.multimodal.grounding.heatmaps.whole import WHOLE, exactly, matrices, wanted
from tests.multimodal.runs import tiny
from tests.multimodal.test_session import everything_on
from tests.multimodal.tiny import LAYERS, PAD, alone, make_inputs
from visionsel.multimodal.grounding import Replay
from visionsel.multimodal.grounding.heatmaps import propagation
from visionsel.multimodal.grounding.heatmaps.vl_sam import VLSAM, flow, image_flow

EAGER = {"rtol": 1e-5, "atol": 1e-5}  # float32, sums in another order
EXACT = {"rtol": 0, "atol": 1e-10}
PLACES = ("layer", "flow", None)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time, and a last piece that is shorter."""
    monkeypatch.setattr(propagation, "ELEMENTS", 3000)


@pytest.mark.parametrize("name", WHOLE)
def test_it_is_the_flow_through_the_matrices_of_eager_attention(name: str) -> None:
    replay, samples = matrices(name)
    for attention, seen, _ in samples:
        assert torch.equal((attention != 0).any(1), seen)
    before = everything_on(replay.model)
    for row, place, weigh in (
        ("predict", "layer", True),
        ("token", "flow", True),
        ("prompt", None, False),
        ("predict", "flow", False),
    ):
        products = [flow(attention, seen, place, weigh) for attention, seen, _ in samples]
        found = VLSAM(row=row, regularise_on=place, weigh_heads=weigh)(replay)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted(products, samples, row), **EAGER)
    assert everything_on(replay.model) == before


def test_in_float64_nothing_is_lost() -> None:
    model, inputs = tiny("llava"), alone(make_inputs("llava"), 1)
    replay = Replay(model, inputs, torch.randint(2, 90, (1, NEW), generator=torch.Generator().manual_seed(3)))
    attention = exactly(replay, LAYERS)
    for place in PLACES:
        for layers in ([0, 1, 2, 3], [2], [1, 3]):
            expected = flow(attention[layers], regularise_on=place)[replay.rows[0]][:, replay.image[0]]
            found = image_flow(replay, layers, regularise_on=place)[0]
            assert found.dtype == torch.float64
            torch.testing.assert_close(found, expected, **EXACT)


def test_the_plain_flow_is_what_the_paper_writes() -> None:
    generator = torch.Generator().manual_seed(0)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    scores = torch.randn(3, 2, 5, 5, generator=generator, dtype=torch.float64)
    attention = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    factor = [(j + 1) / 5 for j in range(5)]  # token j is seen by the 5 - j from itself on
    for place in PLACES:
        total: Any = None
        for rows in attention:
            weights = [sum(float(row.max()) for row in head) / 5 for head in rows]
            layer = [
                [
                    sum(w * float(head[i, j]) for w, head in zip(weights, rows, strict=True)) / 2
                    for j in range(5)
                ]
                for i in range(5)
            ]
            if place == "layer":
                layer = [[value * factor[j] for j, value in enumerate(line)] for line in layer]
            if total is None:
                total = layer
            else:
                total = [
                    [
                        sum(((i == k) + layer[i][k]) * ((k == j) + total[k][j]) for k in range(5))
                        for j in range(5)
                    ]
                    for i in range(5)
                ]
            if place == "flow":
                total = [[value * factor[j] for j, value in enumerate(line)] for line in total]
        expected = torch.tensor(total, dtype=torch.float64)
        torch.testing.assert_close(flow(attention, regularise_on=place), expected, **EXACT)


def test_a_batch_several_answers_and_padding_behind_them_change_nothing() -> None:
    model, inputs = tiny("qwen2_5_vl"), make_inputs("qwen2_5_vl")
    assert (inputs["attention_mask"] == 0).any()
    answers = torch.randint(2, 90, (4, NEW), generator=torch.Generator().manual_seed(4))
    end = int(answers[3, 0])
    replay = Replay(model, {**inputs, "eos_token_id": end, "pad_token_id": PAD}, answers)
    assert replay.copies == 2
    assert replay.valid.tolist() == [[True] * 3] * 3 + [[True, False, False]]
    maps = VLSAM()(replay)
    for number in range(4):
        length = int(replay.valid[number].sum())
        one = Replay(model, alone(inputs, number // 2), answers[number : number + 1, :length])
        single = VLSAM()(one)[0]
        torch.testing.assert_close(maps[number, :length, : single.shape[1]], single, **EAGER)
        assert not maps[number, length:].any()
        assert not maps[number, :, single.shape[1] :].any()


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.numel())
        return out


def test_no_matrix_of_all_heads_is_made() -> None:
    model, inputs = tiny("llava"), alone(make_inputs("llava", before=(40,), after=(60,)), 0)
    replay = Replay(model, inputs, torch.full((1, NEW), 7))
    length = replay.sequences.shape[1]
    with Largest() as bare:
        replay.run()
    with Largest() as whole:
        exactly(replay, 1)
    with Largest() as streamed:
        VLSAM()(replay)
    assert whole.numbers >= 4 * length**2
    assert streamed.numbers <= max(bare.numbers, length**2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row": "last"}, "row must be one of predict, token, prompt"),
        ({"regularise_on": "columns"}, 'regularise_on must be "layer", "flow" or None, got \'columns\''),
        ({"layers": [7]}, r"layers \[7\] do not exist: choose among 0 to 3"),
        ({"sinks": "edges"}, "sinks must be None or one of hidden, border, median"),
    ],
)
def test_bad_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VLSAM(**options)(matrices("llava")[0])


def test_prompts_without_images_are_told_and_sinks_are_left_out() -> None:
    replay, _ = matrices("llava")
    with pytest.raises(ValueError, match="no tokens of images"):
        VLSAM()(Replay(replay.model, make_inputs("llava", images=0), replay.tokens))
    plain, inner = VLSAM()(replay), VLSAM(sinks="border")(replay)
    assert not inner[..., :5].any()
    assert torch.equal(inner[..., 5:7], plain[..., 5:7])


def test_it_points_at_what_a_trained_model_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    scenes = captions()
    assert scenes.hits(VLSAM()(scenes.replay)) >= 0.75  # measured 0.765; a token drawn at random 0.05
