"""Average pooling: the means against loops, the shape of blocks against a search."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from visionsel.multimodal.families.family import TokenLayout, View
from visionsel.multimodal.pruning import pool
from visionsel.multimodal.pruning.pool import PoolPrune, block_numbers, block_shape


def grid(height: int, width: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + height * width).view(height, width)


def image(height: int, width: int) -> TokenLayout:
    return TokenLayout(height * width, (View("image", grid(height, width), grid(height, width)),))


def with_newlines(height: int, width: int) -> TokenLayout:
    """One grid with a newline token after each row."""
    view = View("tiles", grid(height, width + 1)[:, :-1].contiguous(), grid(height, width))
    return TokenLayout(height * (width + 1), (view,))


def by_loops(features: Tensor, blocks: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    kept, merged = torch.zeros_like(valid), features.clone()
    for b in range(valid.shape[0]):
        members: dict[int, list[int]] = {}
        for i in range(valid.shape[1]):
            if valid[b, i]:
                members.setdefault(int(blocks[b, i]), []).append(i)
        for group in members.values():
            kept[b, group[0]] = True
            merged[b, group[0]] = sum(features[b, i] for i in group) / len(group)
    return kept, merged


def draw(batch: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, n, 5, generator=generator, dtype=torch.float64)
    return features, torch.randint(0, max(n // 3, 1), (batch, n), generator=generator)


@pytest.mark.parametrize("seed", range(4))
def test_each_block_becomes_its_mean_at_its_first_token(seed: int) -> None:
    features, blocks = draw(3, 14, seed)
    valid = torch.arange(14) < torch.tensor([14, 9, 1])[:, None]
    kept, merged = pool.select(features=features, blocks=blocks, valid=valid)
    expected_kept, expected = by_loops(features, blocks, valid)
    assert kept.equal(expected_kept)
    torch.testing.assert_close(merged[kept], expected[kept], rtol=0, atol=1e-12)
    for b, n in enumerate([14, 9, 1]):
        alone_kept, alone = pool.select(features[b : b + 1, :n], blocks[b : b + 1, :n])
        assert alone_kept[0].equal(kept[b, :n])
        torch.testing.assert_close(alone[0], merged[b, :n], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_token_alone_in_its_block_does_not_change(dtype: torch.dtype) -> None:
    features = draw(1, 6)[0].to(dtype)
    kept, merged = pool.select(features, torch.arange(6)[None])
    assert kept.all()
    assert merged.dtype == dtype
    assert merged.equal(features)


def test_what_stands_at_padding_does_not_matter() -> None:
    features, blocks = draw(1, 6)
    valid = torch.arange(6)[None] < 4
    expected = pool.select(features, blocks, valid)
    features[0, 4:] = math.nan
    kept, merged = pool.select(features, blocks, valid)
    assert kept.equal(expected[0])
    assert merged[kept].equal(expected[1][kept])


def test_nan_is_refused() -> None:
    features, blocks = draw(2, 6)
    features[1, 2, 0] = math.nan
    with pytest.raises(ValueError, match="features has NaN in sample 1"):
        pool.select(features, blocks)


def test_blocks_start_at_the_first_row_and_column_of_a_grid_and_may_be_cut_at_the_last() -> None:
    numbers = block_numbers([image(3, 5), image(2, 2)], (2, 3))
    assert numbers[:15].view(3, 5).tolist() == [[0, 0, 0, 3, 3], [0, 0, 0, 3, 3], [10, 10, 10, 13, 13]]
    assert numbers[15:].tolist() == [15] * 4


def test_newline_tokens_are_in_no_block() -> None:
    numbers = block_numbers([with_newlines(2, 2)], (2, 2)).view(2, 3)
    assert numbers.tolist() == [[0, 0, 2], [0, 0, 5]]


@pytest.mark.parametrize(
    ("height", "width", "target", "shape"),
    [
        (24, 24, 576, (1, 1)),
        (24, 24, 288, (1, 2)),
        (24, 24, 144, (2, 2)),
        (24, 24, 64, (3, 3)),
        (24, 24, 1, (24, 24)),
        (24, 24, -5, (24, 24)),
        (1, 7, 3, (1, 3)),
        (1, 1, 1, (1, 1)),
    ],
)
def test_blocks_are_nearly_square(height: int, width: int, target: int, shape: tuple[int, int]) -> None:
    assert block_shape([(height, width)], target) == shape


@pytest.mark.parametrize("grids", [[(5, 7)], [(4, 4), (6, 8), (6, 8)], [(1, 9), (2, 3)]])
def test_no_shape_of_blocks_comes_nearer_to_the_target(grids: list[tuple[int, int]]) -> None:
    def number(rows: int, columns: int) -> int:
        return sum(len(range(0, h, rows)) * len(range(0, w, columns)) for h, w in grids)

    for target in range(1, sum(h * w for h, w in grids) + 1):
        reached = abs(number(*block_shape(grids, target)) - target)
        assert reached == min(abs(number(r, c) - target) for r in range(1, 10) for c in range(1, 10))


def test_the_pruner_pools_each_view_of_each_sample() -> None:
    features, _ = draw(3, 16)
    layouts = [[image(4, 4)], [with_newlines(2, 2), image(2, 2)], []]
    valid = torch.arange(16) < torch.tensor([16, 10, 0])[:, None]
    index = torch.arange(16).masked_fill(~valid, 0)
    tokens = SimpleNamespace(features=features, valid=valid, index=index, layouts=layouts)
    (stage,) = PoolPrune(keep=0.25).stages(1)
    assert (stage.layer, stage.reads, stage.tower) == (0, None, False)
    kept, merged = stage.select(tokens)  # type: ignore[arg-type]
    assert kept[0].nonzero()[:, 0].tolist() == [0, 2, 8, 10]
    # two newlines stay: 2 of 10 were asked for, 4 are the fewest
    assert kept[1].nonzero()[:, 0].tolist() == [0, 2, 5, 6]
    assert not kept[2].any()
    torch.testing.assert_close(merged[0, 2], features[0, [2, 3, 6, 7]].mean(0), rtol=0, atol=1e-12)
    assert merged[1, 2].equal(features[1, 2])
    (stage,) = PoolPrune(window=(1, 4)).stages(1)
    assert stage.select(tokens)[0][0].nonzero()[:, 0].tolist() == [0, 4, 8, 12]  # type: ignore[arg-type]
    (stage,) = PoolPrune(window=2).stages(1)
    assert stage.select(tokens)[0].equal(kept)  # type: ignore[arg-type]


def test_tokens_dropped_before_are_not_averaged() -> None:
    features, _ = draw(1, 3)
    index = torch.tensor([[1, 2, 3]])  # token 0 of a 2 x 2 grid is gone
    valid = torch.ones(1, 3, dtype=torch.bool)
    tokens = SimpleNamespace(features=features, valid=valid, index=index, layouts=[[image(2, 2)]])
    (stage,) = PoolPrune(window=2).stages(1)
    kept, merged = stage.select(tokens)  # type: ignore[arg-type]
    assert kept.tolist() == [[True, False, False]]
    torch.testing.assert_close(merged[0, 0], features[0].mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"keep": 0.5, "window": 2}, {"keep": 0.0}, {"window": 0}, {"window": (2, 0)}, {"window": (1, 2, 3)}],
)
def test_values_out_of_range_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"keep|window"):
        PoolPrune(**arguments)
