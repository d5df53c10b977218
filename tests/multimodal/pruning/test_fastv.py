"""FastV against a restatement in loops."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from visionsel.multimodal.pruning import fastv
from visionsel.multimodal.pruning.fastv import FastV

KEEPS = [0.5, 0.3, 1.0, 0.01, 1, 4, 99]
LENGTHS = torch.tensor([9, 4, 1])


def by_loops(attention: Tensor, keep: float | int, n: int) -> list[bool]:
    """Of one sample `[heads, N]`: by the mean over heads, the lower index first among equals."""
    heads = len(attention)
    scores = [sum(float(attention[h, i]) for h in range(heads)) / heads for i in range(n)]
    number = min(keep, n) if isinstance(keep, int) else max(1, round(keep * n))
    best = sorted(range(n), key=lambda i: (-scores[i], i))[:number]
    return [i in best for i in range(attention.shape[1])]


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(3, 4, 9, generator=generator, dtype=torch.float64)
    return attention, torch.arange(9) < LENGTHS[:, None]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("seed", range(3))
def test_the_most_attended_tokens_are_kept(keep: float | int, seed: int) -> None:
    attention, _ = draw(seed)
    kept = fastv.select(attention=attention, keep=keep)
    assert kept.dtype == torch.bool
    assert kept.tolist() == [by_loops(attention[b], keep, 9) for b in range(3)]


@pytest.mark.parametrize("keep", KEEPS)
def test_a_sample_alone_gives_the_same_as_in_a_padded_batch(keep: float | int) -> None:
    attention, valid = draw()
    attention[1, :, 4:] = math.nan  # what stands at padding is not looked at
    attention[2, :, 1:] = 5
    kept = fastv.select(attention, keep, valid)
    for b, n in enumerate(LENGTHS.tolist()):
        assert kept[b].tolist() == by_loops(attention[b], keep, n)
        assert kept[b, :n].equal(fastv.select(attention[b : b + 1, :, :n], keep)[0])


@pytest.mark.parametrize("keep", KEEPS)
def test_ties_go_to_the_lower_index(keep: float | int) -> None:
    equal = torch.full((1, 2, 8), 0.25)
    number = min(keep, 8) if isinstance(keep, int) else max(1, round(keep * 8))
    assert fastv.select(equal, keep)[0].nonzero()[:, 0].tolist() == list(range(number))
    pairs = torch.tensor([[[0.0, 1.0, 1.0, 0.0, 1.0]]])
    assert fastv.select(pairs, 2)[0].tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_averaged_in_single(dtype: torch.dtype) -> None:
    attention = draw()[0].to(dtype)
    assert fastv.select(attention, 0.5).equal(fastv.select(attention.float(), 0.5))


def test_nan_is_refused() -> None:
    attention, valid = draw()
    attention[1, 2, 3] = math.nan
    with pytest.raises(ValueError, match="NaN in sample 1"):
        fastv.select(attention, 0.5, valid)


def test_the_stage_reads_the_layer_before() -> None:
    attention, valid = draw()
    (stage,) = FastV().stages(32)
    assert (stage.layer, stage.reads, stage.tower) == (2, "previous", False)
    (stage,) = FastV(keep=3, layer=1).stages(2)
    tokens = SimpleNamespace(attention=lambda: attention, valid=valid)
    assert stage.select(tokens).equal(fastv.select(attention, 3, valid))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer 2 does not exist"):
        FastV().stages(2)


@pytest.mark.parametrize("arguments", [{"keep": 0}, {"keep": 1.01}, {"layer": 0}, {"layer": -1}])
def test_values_out_of_range_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        FastV(**arguments)
