"""PyramidDrop against a restatement in loops."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from visionsel.multimodal.pruning import pyramiddrop
from visionsel.multimodal.pruning.pyramiddrop import PyramidDrop

KEEPS = [0.5, 0.3, 1.0, 0.01, 1, 4, 99]
LENGTHS = torch.tensor([9, 4, 1])


def highest(attention: Tensor, number: int, n: int) -> list[bool]:
    """Of one sample `[heads, N]`: by the mean over heads, the lower index first among equals."""
    heads = len(attention)
    scores = [sum(float(attention[h, i]) for h in range(heads)) / heads for i in range(n)]
    best = sorted(range(n), key=lambda i: (-scores[i], i))[:number]
    return [i in best for i in range(attention.shape[1])]


def share(keep: float | int, n: int) -> int:
    return min(keep, n) if isinstance(keep, int) else max(1, round(keep * n))


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(3, 4, 9, generator=generator, dtype=torch.float64)
    return attention, torch.arange(9) < LENGTHS[:, None]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("seed", range(3))
def test_the_most_attended_tokens_are_kept(keep: float | int, seed: int) -> None:
    attention, _ = draw(seed)
    kept = pyramiddrop.select(attention=attention, keep=keep)
    assert kept.tolist() == [highest(attention[b], share(keep, 9), 9) for b in range(3)]


@pytest.mark.parametrize("keep", KEEPS)
def test_a_sample_alone_gives_the_same_as_in_a_padded_batch(keep: float | int) -> None:
    attention, valid = draw()
    attention[1, :, 4:] = math.nan
    kept = pyramiddrop.select(attention, keep, valid)
    for b, n in enumerate(LENGTHS.tolist()):
        assert kept[b].tolist() == highest(attention[b], share(keep, n), n)
        assert kept[b, :n].equal(pyramiddrop.select(attention[b : b + 1, :, :n], keep)[0])


def test_ties_go_to_the_lower_index() -> None:
    assert pyramiddrop.select(torch.ones(1, 2, 6), 0.5)[0].tolist() == [True] * 3 + [False] * 3


def test_nan_is_refused() -> None:
    attention, valid = draw()
    attention[0, 1, 8] = math.nan
    with pytest.raises(ValueError, match="NaN in sample 0"):
        pyramiddrop.select(attention, 0.5, valid)


def test_ratios_are_of_the_original_tokens() -> None:
    attention, valid = draw()
    # of 20, 6 and 1 tokens there were, 9, 4 and 1 have come so far
    total = torch.tensor([20, 6, 1])
    tokens = SimpleNamespace(attention=lambda: attention, valid=valid, total=total)
    stages = PyramidDrop(layers=(1, 3, 4), keep=(0.75, 0.25, 2)).stages(5)
    assert [(stage.layer, stage.reads, stage.tower) for stage in stages] == [
        (1, "own", False),
        (3, "own", False),
        (4, "own", False),
    ]
    numbers = [[9, 4, 1], [5, 2, 1], [2, 2, 1]]
    for stage, number in zip(stages, numbers, strict=True):
        kept = stage.select(tokens)  # type: ignore[arg-type]
        for b, n in enumerate(LENGTHS.tolist()):
            assert kept[b].tolist() == highest(attention[b], number[b], n)


def test_the_published_stages_are_the_default() -> None:
    assert [stage.layer for stage in PyramidDrop().stages(32)] == [8, 16, 24]
    assert PyramidDrop().keep == (0.5, 0.25, 0.125)
    with pytest.raises(ValueError, match="layer 24 does not exist"):
        PyramidDrop().stages(24)


@pytest.mark.parametrize(
    "arguments",
    [
        {"keep": (0.5, 0.25)},
        {"layers": (), "keep": ()},
        {"keep": (0.5, 0.25, 0.0)},
        {"keep": (0.25, 0.5, 0.125)},
        {"keep": (8, 9, 1)},
        {"layers": (8, 8, 24)},
        {"layers": (8, 24, 16)},
        {"layers": (-1, 8, 16)},
    ],
)
def test_values_out_of_range_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"keep|layer"):
        PyramidDrop(**arguments)
