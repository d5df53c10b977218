"""DivPrune against a restatement in loops."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from visionsel.multimodal.pruning import divprune
from visionsel.multimodal.pruning.divprune import DivPrune

KEEPS = [0.5, 0.3, 1.0, 0.01, 1, 2, 5, 99]
LENGTHS = torch.tensor([11, 5, 1])


def distance(a: Tensor, b: Tensor) -> float:
    """One minus the cosine."""
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    lengths = math.sqrt(sum(float(x) ** 2 for x in a)) * math.sqrt(sum(float(y) ** 2 for y in b))
    return 1 - dot / lengths if lengths else 1.0


def by_loops(features: Tensor, keep: float | int) -> list[bool]:
    """Of one sample `[n, C]`; distances within 1e-12 are equal, and the lower index wins."""
    n = len(features)
    number = min(keep, n) if isinstance(keep, int) else max(1, round(keep * n))
    d = [[distance(features[i], features[j]) for j in range(n)] for i in range(n)]
    chosen: list[int] = []
    while len(chosen) < number:
        best, best_score = -1, -math.inf
        for i in range(n):
            if i in chosen:
                continue
            others = chosen or [j for j in range(n) if j != i]
            score = min((d[i][j] for j in others), default=0.0)
            if score > best_score + 1e-12:
                best, best_score = i, score
        chosen.append(best)
    return [i in chosen for i in range(n)]


def draw(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3, 11, 6, generator=generator, dtype=torch.float64)
    return features, torch.arange(11) < LENGTHS[:, None]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_taken_greedily_by_the_smallest_distance(keep: float | int, seed: int) -> None:
    features, _ = draw(seed)
    kept = divprune.select(features=features, keep=keep)
    assert kept.dtype == torch.bool
    assert kept.tolist() == [by_loops(features[b], keep) for b in range(3)]


@pytest.mark.parametrize("keep", KEEPS)
def test_a_sample_alone_gives_the_same_as_in_a_padded_batch(keep: float | int) -> None:
    features, valid = draw(1)
    features[1, 5:] = math.nan  # what stands at padding is not looked at
    kept = divprune.select(features, keep, valid)
    for b, n in enumerate(LENGTHS.tolist()):
        assert kept[b, :n].tolist() == by_loops(features[b, :n], keep)
        assert not kept[b, n:].any()
        assert kept[b, :n].equal(divprune.select(features[b : b + 1, :n], keep)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_equal_tokens_are_taken_in_their_order(seed: int, dtype: torch.dtype) -> None:
    token = torch.randn(37, generator=torch.Generator().manual_seed(seed)).to(dtype)
    kept = divprune.select(token.expand(2, 13, -1), 5)
    assert kept.tolist() == [[True] * 5 + [False] * 8] * 2


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(4))
def test_duplicates_come_last_and_ties_go_to_the_lower_index(keep: int, seed: int) -> None:
    few = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    features = few[:, [2, 0, 1, 0, 3, 1, 2, 3]]
    kept = divprune.select(features, keep)
    assert kept[0].tolist() == by_loops(features[0], keep)
    if keep >= 4:
        assert set(torch.tensor([2, 0, 1, 0, 3, 1, 2, 3])[kept[0]].tolist()) == {0, 1, 2, 3}


def test_the_two_ends_of_the_largest_distance_are_a_tie() -> None:
    # distances of mirrored pairs are the same; axes are exact
    features = torch.eye(4)[None]
    assert divprune.select(features, 2)[0].tolist() == [True, True, False, False]
    opposite = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]]])
    assert divprune.select(opposite, 2)[0].tolist() == [True, False, True, False]


def test_length_does_not_matter_but_a_token_of_zeros_is_far_from_all() -> None:
    features, _ = draw()
    scale = torch.linspace(0.1, 9, 11, dtype=torch.float64)[None, :, None]
    assert divprune.select(features * scale, 0.5).equal(divprune.select(features, 0.5))
    features[0, 3] = 0
    assert divprune.select(features, 4)[0].tolist() == by_loops(features[0], 4)


def test_half_precision_is_measured_in_single() -> None:
    features = draw()[0].bfloat16()
    assert divprune.select(features, 0.5).equal(divprune.select(features.float(), 0.5))


def test_nan_is_refused() -> None:
    features, valid = draw()
    features[1, 2, 3] = math.nan
    with pytest.raises(ValueError, match="features has NaN in sample 1"):
        divprune.select(features, 0.5, valid)


def test_samples_without_tokens_stay_empty() -> None:
    features, valid = draw()
    valid[2] = False
    assert not divprune.select(features, 0.5, valid)[2].any()
    assert not divprune.select(features, 0.5, torch.zeros_like(valid)).any()


def test_the_stage_stands_at_the_input() -> None:
    features, valid = draw()
    (stage,) = DivPrune(keep=0.4).stages(1)
    assert (stage.layer, stage.reads, stage.tower) == (0, None, False)
    tokens = SimpleNamespace(features=features, valid=valid)
    assert stage.select(tokens).equal(divprune.select(features, 0.4, valid))  # type: ignore[arg-type]
    assert DivPrune().keep == 0.098


@pytest.mark.parametrize("keep", [0, 0.0, -1, 1.5, math.nan, True])
def test_values_out_of_range_are_refused(keep: float | int) -> None:
    with pytest.raises(ValueError, match="keep must be"):
        DivPrune(keep=keep)
