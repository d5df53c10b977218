"""PruMerge: against loops written here from the paper and the authors' rule; what it does in a model."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.multimodal import tiny
from tests.multimodal.pruning.llava_signals import prune, signals
from visionsel.multimodal.pruning import prumerge
from visionsel.multimodal.pruning.prumerge import PruMerge

NAN = float("nan")


def draw(*numbers: int, dim: int = 6, channels: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention with outliers, keys, features and which tokens are valid; NaN in the padding."""
    batch, width = len(numbers), max(numbers)
    valid = torch.arange(width) < torch.tensor(numbers)[:, None]
    attention = (2 * torch.randn(batch, width, dtype=torch.float64)).exp().masked_fill(~valid, NAN)
    keys = torch.randn(batch, width, dim, dtype=torch.float64).masked_fill(~valid[..., None], NAN)
    features = torch.randn(batch, width, channels, dtype=torch.float64).masked_fill(~valid[..., None], NAN)
    return attention, keys, features, valid


def by_the_paper(
    attention: Tensor, keys: Tensor, features: Tensor, neighbours: int = 32, plus: bool = False
) -> dict[int, Tensor]:
    """The kept tokens of one sample and what they become; `[N]`, `[N, D]`, `[N, C]`."""
    n = len(features)
    weight = attention.tolist()
    lower, upper = np.percentile(weight, 25), np.percentile(weight, 75)
    chosen = [i for i in range(n) if weight[i] > upper + 1.5 * (upper - lower)]
    if plus:
        step = max(1, int(int(n / max(1, len(chosen))) / 3))
        chosen = sorted({*chosen, *range(0, n, step)})
    kept = {}
    for i in chosen:
        cosine = {j: torch.cosine_similarity(keys[i], keys[j], dim=0).item() for j in range(n) if j != i}
        near = sorted(cosine, key=lambda j: (-round(cosine[j], 12), j))[:neighbours]
        kept[i] = features[i] + sum((weight[j] * features[j] for j in near), torch.zeros_like(features[i]))
    pruned = [j for j in range(n) if j not in kept]
    if pruned:
        place = max(pruned, key=lambda j: (weight[j], -j))
        kept[place] = sum((weight[j] * features[j] for j in pruned), torch.zeros_like(features[0]))
    return kept


def agrees(result: tuple[Tensor, Tensor], sample: int, expected: dict[int, Tensor]) -> bool:
    mask, features = result
    same = all(torch.allclose(features[sample, i], x, rtol=1e-10) for i, x in expected.items())
    return same and mask[sample].nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("neighbours", [1, 5, 32])
def test_it_is_what_the_paper_says(plus: bool, neighbours: int) -> None:
    attention, keys, features, _ = draw(40, 40, 40, 40)
    result = prumerge.select(attention, keys, features, neighbours, plus=plus)
    assert len(set(result[0].sum(1).tolist())) > 1  # each sample has its own number
    for b in range(4):
        assert agrees(result, b, by_the_paper(attention[b], keys[b], features[b], neighbours, plus))


@pytest.mark.parametrize("plus", [False, True])
def test_a_sample_alone_gives_the_same_as_in_a_padded_batch(plus: bool) -> None:
    numbers = (7, 30, 1, 2, 19)
    attention, keys, features, valid = draw(*numbers)
    result = prumerge.select(attention, keys, features, 4, valid, plus)
    assert not (result[0] & ~valid).any()
    for b, n in enumerate(numbers):
        assert agrees(result, b, by_the_paper(attention[b, :n], keys[b, :n], features[b, :n], 4, plus))


def test_plus_spreads_about_three_tokens_for_each_outlier() -> None:
    attention = torch.full((1, 96), 0.01, dtype=torch.float64)
    attention[0, [5, 50, 51, 90]] = 1.0
    mask, _ = prumerge.select(attention, torch.randn(1, 96, 3), torch.randn(1, 96, 2), plus=True)
    assert mask[0].nonzero().flatten().tolist() == sorted({*range(0, 96, 8), 5, 50, 51, 90, 1})


def test_where_nothing_stands_out_the_sum_of_all_is_left_at_the_first_token() -> None:
    attention, keys, features = torch.full((1, 8), 0.125), torch.ones(1, 8, 3), torch.randn(1, 8, 4)
    mask, merged = prumerge.select(attention, keys, features)
    assert mask[0].tolist() == [True] + [False] * 7
    assert torch.allclose(merged[0, 0], features[0].mean(0))
    spread, _ = prumerge.select(attention, keys, features, plus=True)
    assert spread[0].nonzero().flatten().tolist() == [0, 1, 2, 4, 6]  # every second, and the sum at 1


def test_equally_near_tokens_are_taken_in_their_order() -> None:
    attention = torch.full((1, 9), 0.01)
    attention[0, 4] = 1.0
    features = torch.eye(9)[None]
    _, merged = prumerge.select(attention, torch.ones(1, 9, 3), features, neighbours=3)
    assert merged[0, 4].nonzero().flatten().tolist() == [0, 1, 2, 4]


def test_what_is_not_kept_is_left_alone_and_dtypes_stay() -> None:
    attention, keys, features, _ = (x.bfloat16() if x.is_floating_point() else x for x in draw(24))
    mask, merged = prumerge.select(attention, keys, features)
    wide_mask, wide = prumerge.select(attention.float(), keys.float(), features.float())
    assert torch.equal(mask, wide_mask)
    assert torch.equal(merged, wide.bfloat16())
    assert torch.equal(merged[~mask], features[~mask])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_refused_by_name(which: int) -> None:
    tensors = list(draw(5)[:3])
    tensors[which][0, 1] = NAN
    with pytest.raises(ValueError, match=f"{('attention', 'keys', 'features')[which]} has NaN"):
        prumerge.select(*tensors)


@pytest.mark.parametrize("neighbours", [0, -1, 2.5, True, NAN])
def test_values_out_of_range_are_refused_at_construction(neighbours: float) -> None:
    with pytest.raises(ValueError, match="neighbours must be a whole number from 1 up"):
        PruMerge(neighbours=neighbours)  # type: ignore[arg-type]


@pytest.mark.parametrize("plus", [False, True])
def test_in_a_model_it_reads_the_last_layer_of_the_tower_as_one_head(plus: bool) -> None:
    model, inputs = tiny.make_model("llava"), tiny.make_inputs("llava")
    seen = signals(model, inputs)
    query, key = (x.transpose(1, 2).flatten(2) for x in seen.tower[-1])
    attention = (query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])).softmax(-1)[:, 0, 1:]
    project = model.model.multi_modal_projector
    mask, features = prune(model, inputs, PruMerge(plus=plus, neighbours=6))
    for b in range(2):
        expected = by_the_paper(attention[b], key[b, 1:], seen.features[b], 6, plus)
        assert mask[b].nonzero().flatten().tolist() == sorted(expected)
        assert torch.allclose(features[b], project(torch.stack([expected[i] for i in sorted(expected)])))
