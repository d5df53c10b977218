"""Uniform pruning: exact numbers, evenly spaced in a row and on grids."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from visionsel.multimodal.families.family import TokenLayout, View
from visionsel.multimodal.pruning import uniform
from visionsel.multimodal.pruning.uniform import UniformPrune, evenly, grids_of


def grid(height: int, width: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + height * width).view(height, width)


def test_tokens_in_a_row_are_the_middles_of_equal_parts() -> None:
    for n in range(1, 30):
        for t in range(1, n + 1):
            expected = [math.floor((i + 0.5) * n / t + 1e-9) for i in range(t)]
            assert evenly(n, t).tolist() == expected
            assert len(set(expected)) == t


@pytest.mark.parametrize("keep", [0.5, 0.3, 1.0, 1, 2, 99])
def test_a_ragged_batch_without_grids_is_thinned_as_rows(keep: float | int) -> None:
    valid = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]).bool()
    kept = uniform.select(valid=valid, keep=keep)
    for sample, n in enumerate([7, 3, 1]):
        t = min(keep, n) if isinstance(keep, int) else max(1, round(keep * n))
        places = [math.floor((i + 0.5) * n / t + 1e-9) for i in range(t)]
        assert kept[sample].nonzero()[:, 0].tolist() == places
        alone = uniform.select(torch.ones(1, n, dtype=torch.bool), keep)
        assert kept[sample, :n].equal(alone[0])


def test_a_quarter_of_a_square_grid_is_every_second_row_and_column() -> None:
    kept = uniform.select(torch.ones(1, 64, dtype=torch.bool), 0.25, [[grid(8, 8)]])[0].view(8, 8)
    assert kept.nonzero().tolist() == [[y, x] for y in (1, 3, 5, 7) for x in (1, 3, 5, 7)]


def test_a_wide_grid_is_as_dense_across_as_down() -> None:
    kept = uniform.select(torch.ones(1, 64, dtype=torch.bool), 0.25, [[grid(4, 16)]])[0].view(4, 16)
    assert kept.nonzero().tolist() == [[y, x] for y in (1, 3) for x in range(1, 16, 2)]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (3, 5), (6, 6), (4, 11), (24, 24)])
def test_every_number_is_met_and_spread_over_rows_and_columns(height: int, width: int) -> None:
    n = height * width
    for number in range(1, n + 1, 1 if n < 100 else 37):
        kept = uniform.select(torch.ones(1, n, dtype=torch.bool), number, [[grid(height, width)]])
        kept = kept[0].view(height, width)
        assert kept.sum() == number
        per_row = kept.sum(1)[kept.any(1)]
        assert per_row.max() - per_row.min() <= 1
        # no gap between rows is more than one above another
        gaps = kept.any(1).nonzero()[:, 0].diff()
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_views_and_newlines_share_in_proportion() -> None:
    # a 4 x 4 thumbnail and a 2 x 4 grid of tiles with a newline after each row, then a small image
    tiles = torch.tensor([[16, 17, 18, 19], [21, 22, 23, 24]])
    views = (View("thumbnail", grid(4, 4), grid(4, 4)), View("tiles", tiles, grid(2, 4, 16)))
    small = TokenLayout(4, (View("image", grid(2, 2), grid(2, 2)),))
    layouts = [TokenLayout(26, views), small]
    grids = grids_of(layouts)
    assert [g.tolist() for g in grids[1:]] == [tiles.tolist(), [[20, 25]], [[26, 27], [28, 29]]]
    for number in range(1, 31):
        kept = uniform.select(torch.ones(1, 30, dtype=torch.bool), number, [grids])[0]
        assert kept.sum() == number
        until = [0] + [math.floor(number * n / 30 + 0.5) for n in (16, 24, 26, 30)]
        shares = [later - earlier for earlier, later in pairwise(until)]
        assert [int(kept[g].sum()) for g in grids] == shares


def test_a_sample_that_lost_tokens_before_is_thinned_as_a_row() -> None:
    layouts = [[TokenLayout(16, (View("image", grid(4, 4), grid(4, 4)),))]] * 2
    valid = torch.ones(2, 16, dtype=torch.bool)
    valid[1, 12:] = False
    tokens = SimpleNamespace(valid=valid, total=torch.tensor([16, 16]), layouts=layouts)
    pruner = UniformPrune(keep=4, layer=1)
    (stage,) = pruner.stages(2)
    assert (stage.layer, stage.reads, stage.tower) == (1, None, False)
    kept = stage.select(tokens)  # type: ignore[arg-type]
    assert kept[0].nonzero()[:, 0].tolist() == [5, 7, 13, 15]
    assert kept[1].nonzero()[:, 0].tolist() == [1, 4, 7, 10]
    with pytest.raises(ValueError, match="layer 1 does not exist"):
        pruner.stages(1)


def test_a_sample_without_images_keeps_nothing() -> None:
    valid = torch.tensor([[True, True], [False, False]])
    assert uniform.select(valid, 0.5, [[grid(1, 2)], []]).tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("arguments", [{"keep": 0}, {"keep": -0.5}, {"keep": 0.5, "layer": -1}])
def test_values_out_of_range_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        UniformPrune(**arguments)
