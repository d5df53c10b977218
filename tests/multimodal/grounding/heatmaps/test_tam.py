"""Token activation maps equal loops over words, tokens and windows."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.multimodal.runs import tiny
from tests.multimodal.test_session import everything_on
from tests.multimodal.tiny import IMAGE, PAD, alone, make_inputs
from visionsel.multimodal.grounding import Replay
from visionsel.multimodal.grounding.heatmaps.tam import TAM, rank_gaussian, without_interference

EXACT = {"rtol": 1e-6, "atol": 1e-6}  # float64 made float32
ANSWERS = torch.tensor([[11, 23, 11, 40, 23], [55, 11, 7, 7, 30]])  # words come twice


def by_loops(model: Any, replay: Replay, b: int, t: int, context: str) -> Tensor:
    """The map of one new token, unfiltered, from the logits of the whole vocabulary."""
    hidden = replay.run(hidden=True).hidden[b]
    with torch.no_grad():
        logits = model.get_output_embeddings()(hidden).clamp(min=0)
    ids, length = replay.sequences[b].tolist(), replay.length
    real = replay.scope.real[b].tolist()
    image = [place for place, token in enumerate(ids) if token == IMAGE]
    word = ids[length + t]
    own = [float(logits[place, word]) for place in image]
    others, total = [0.0] * len(image), 0.0
    for place in range(length + t):
        behind = place > image[-1] if context == "after" else place >= length
        if not real[place] or ids[place] in (IMAGE, word) or not (context == "all" or behind):
            continue
        score = float(logits[place, word])
        total += score
        for k, seen in enumerate(image):
            others[k] += score * float(logits[seen, ids[place]])
    if total:
        others = [value / total for value in others]
    size = sum(value**2 for value in others)
    scale = sum(a * o for a, o in zip(own, others, strict=True)) / size if size else 0.0
    return torch.tensor([max(0.0, a - scale * o) for a, o in zip(own, others, strict=True)])


def filtered_by_loops(grid: Tensor, window: int) -> Tensor:
    """Sorted windows under a Gaussian of ranks."""
    height, width = grid.shape
    out, half = torch.zeros_like(grid), window // 2
    for i in range(height):
        for j in range(width):
            cells = sorted(
                float(grid[min(max(i + y, 0), height - 1), min(max(j + x, 0), width - 1)])
                for y in range(-half, half + 1)
                for x in range(-half, half + 1)
            )
            mean = sum(cells) / len(cells)
            variance = sum((cell - mean) ** 2 for cell in cells) / len(cells)
            if not variance:
                out[i, j] = mean
                continue
            sigma = math.sqrt(variance) / mean
            weights = [
                math.exp(-((rank - window**2 // 2) ** 2) / (2 * sigma**2)) for rank in range(window**2)
            ]
            out[i, j] = sum(w * c for w, c in zip(weights, cells, strict=True)) / sum(weights)
    return out


def replay_of(name: str, **options: Any) -> tuple[Any, Replay]:
    model = tiny(name)
    return model, Replay(model, make_inputs(name, **options), ANSWERS)


@pytest.mark.parametrize("context", ["after", "all", "answer"])
def test_maps_are_those_of_loops_over_words(context: str) -> None:
    model, replay = replay_of("qwen2_5_vl", images=(2, 1))
    before = everything_on(model)
    maps = TAM(context, window=None)(replay)
    assert everything_on(model) == before
    assert maps.dtype == torch.float32
    counts = (replay.image >= 0).sum(1).tolist()
    assert counts[0] > counts[1]
    for b, number in enumerate(counts):
        for t in range(ANSWERS.shape[1]):
            expected = by_loops(model, replay, b, t, context)
            torch.testing.assert_close(maps[b, t, :number], expected, **EXACT)
            assert expected.any()
            assert not maps[b, t, number:].any()


def test_each_grid_is_filtered_by_itself() -> None:
    _, replay = replay_of("llava_next")
    plain, maps = TAM(window=None)(replay), TAM()(replay)
    for b, pictures in enumerate(replay.scope.pictures):
        expected = torch.zeros(pictures[0].layout.n)  # newline tokens are on no grid
        assert len(pictures[0].layout.views) > 1
        for view in pictures[0].layout.views:
            expected[view.index] = filtered_by_loops(plain[b, 3][view.index], 3)
        torch.testing.assert_close(maps[b, 3, : len(expected)], expected, **EXACT)


def test_the_filter_keeps_edges_and_drops_outliers() -> None:
    grid = torch.rand(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for window in (1, 3, 5):
        torch.testing.assert_close(rank_gaussian(grid, window), filtered_by_loops(grid, window))
    edge = torch.tensor([1.0] * 3 + [1.5] * 3).repeat(6, 1)
    torch.testing.assert_close(rank_gaussian(edge), edge, rtol=0, atol=1e-3)
    speck = torch.full((5, 5), 1.0)
    speck[2, 2] = 2.0
    assert float(rank_gaussian(speck)[2, 2]) < 1.01
    assert torch.equal(rank_gaussian(torch.zeros(2, 2)), torch.zeros(2, 2))


def test_what_earlier_words_say_is_taken_away_and_what_is_the_words_own_stays() -> None:
    plate, fork = torch.tensor([4.0, 4, 0, 0]), torch.tensor([0.0, 0, 3, 1])
    maps = torch.stack((plate, plate.flip(0), 0.5 * plate + fork))
    found = without_interference(maps, torch.tensor([[2.0, 0, 0]]))
    torch.testing.assert_close(found, fork[None])
    assert torch.equal(without_interference(maps, torch.zeros(1, 3)), maps[2:])


def test_a_batch_several_answers_and_padding_behind_them_change_nothing() -> None:
    model, inputs = tiny("llava_next"), make_inputs("llava_next")
    assert (inputs["attention_mask"] == 0).any()
    answers = torch.cat((ANSWERS, ANSWERS.flip(1)))
    end = 23  # in the first answer the second token, in the third the first
    replay = Replay(model, {**inputs, "eos_token_id": end, "pad_token_id": PAD}, answers)
    assert replay.valid.sum(1).tolist() == [2, 5, 1, 5]
    maps = TAM()(replay)
    for number in range(4):
        length = int(replay.valid[number].sum())
        sizes = inputs["image_sizes"]
        one = alone(inputs, number // 2) | {"image_sizes": sizes[number // 2 : number // 2 + 1]}
        single = TAM()(Replay(model, one, answers[number : number + 1, :length]))[0]
        torch.testing.assert_close(maps[number, :length, : single.shape[1]], single, **EXACT)
        assert not maps[number, length:].any()


@contextmanager
def head_of(model: Any, head: nn.Module) -> Iterator[None]:
    before = model.lm_head
    model.lm_head = head
    try:
        yield
    finally:
        model.lm_head = before


def test_a_head_with_biases_counts_them_and_one_that_cannot_be_read_is_told() -> None:
    model, replay = replay_of("llava")
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(64, 100, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.copy_(torch.randn(100, generator=generator))
    plain = TAM(window=None)(replay)
    with head_of(model, head):
        maps = TAM(window=None)(replay)
        torch.testing.assert_close(maps[1, 2], by_loops(model, replay, 1, 2, "after"), **EXACT)
    assert not torch.equal(maps, plain)
    with head_of(model, nn.Identity()), pytest.raises(NotImplementedError, match="is a Identity without a"):
        TAM()(replay)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "prompt"}, "context must be one of after, all, answer, got 'prompt'"),
        ({"window": 4}, "window must be an odd number of tokens or None, got 4"),
        ({"window": -1}, "window must be an odd"),
    ],
)
def test_bad_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TAM(**options)


def test_a_prompt_without_images_is_told() -> None:
    with pytest.raises(ValueError, match="no tokens of images"):
        TAM()(replay_of("llava", images=0)[1])
