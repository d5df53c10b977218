"""VisPruner against a restatement in loops."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from visionsel.multimodal.pruning import vispruner
from visionsel.multimodal.pruning.vispruner import VisPruner

KEEPS = [0.5, 0.2, 1.0, 0.01, 1, 2, 7, 99]
LENGTHS = torch.tensor([41, 24, 7, 1])


def cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(float((a * a).sum())) / math.sqrt(float((b * b).sum()))


def by_loops(attention: Tensor, features: Tensor, keep: float | int, important: float = 0.5) -> list[bool]:
    """Of one sample, `[heads, n]` and `[n, C]`."""
    n = len(features)
    number = min(keep, n) if isinstance(keep, int) else max(1, round(keep * n))
    scores = [sum(float(a[i]) for a in attention) / len(attention) for i in range(n)]
    order = sorted(range(n), key=lambda i: (-scores[i], i))
    first = int(number * important)
    chosen, rest = order[:first], order[first:]
    wanted = number - first
    while wanted > 0 and len(rest) > wanted:
        drop = min(8, len(rest) - wanted)
        even, odd = rest[::2], rest[1::2]
        similar = {i: round(max(cosine(features[i], features[j]) for j in odd), 9) for i in even}
        rest = sorted(even, key=lambda i: -similar[i])[drop:] + odd
    chosen = chosen + (rest if wanted else [])
    return [i in chosen for i in range(n)]


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(4, 3, 41, generator=generator, dtype=torch.float64)
    features = torch.randn(4, 41, 5, generator=generator, dtype=torch.float64)
    return attention, features, torch.arange(41) < LENGTHS[:, None]


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("important", [0.5, 0.0, 0.3, 1.0])
def test_important_tokens_and_then_those_without_duplicates_are_kept(
    keep: float | int, important: float
) -> None:
    attention, features, _ = draw()
    kept = vispruner.select(attention=attention, features=features, keep=keep, important=important)
    assert kept.dtype == torch.bool
    assert kept.tolist() == [by_loops(attention[b], features[b], keep, important) for b in range(4)]


@pytest.mark.parametrize("seed", range(1, 4))
def test_several_rounds_keep_the_order_of_the_release(seed: int) -> None:
    attention, features, _ = draw(seed)
    for keep in (2, 3, 10):  # three to five rounds of 41
        kept = vispruner.select(attention, features, keep)
        assert kept.tolist() == [by_loops(attention[b], features[b], keep) for b in range(4)]


@pytest.mark.parametrize("keep", KEEPS)
def test_a_sample_alone_gives_the_same_as_in_a_padded_batch(keep: float | int) -> None:
    attention, features, valid = draw(2)
    attention.masked_fill_(~valid[:, None], math.nan)  # what stands at padding is not looked at
    features.masked_fill_(~valid[..., None], math.nan)
    kept = vispruner.select(attention, features, keep, valid=valid)
    for b, n in enumerate(LENGTHS.tolist()):
        assert kept[b, :n].tolist() == by_loops(attention[b, :, :n], features[b, :n], keep)
        assert not kept[b, n:].any()
        alone = vispruner.select(attention[b : b + 1, :, :n], features[b : b + 1, :n], keep)
        assert kept[b, :n].equal(alone[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [1, 4, 9, 20])
def test_equal_attention_goes_by_index_and_equal_tokens_by_the_list(keep: int, dtype: torch.dtype) -> None:
    token = torch.randn(37, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    attention, features = torch.ones(1, 2, 29), token.to(dtype).expand(1, 29, -1)
    kept = vispruner.select(attention, features, keep)
    assert kept[0].tolist() == by_loops(attention[0], features[0], keep)
    assert kept[0, : keep // 2].all()


def test_of_two_equal_tokens_one_is_dropped() -> None:
    # by falling attention: 0 is important, the rest are a, b, b, c, and the only duplicate pair is split
    features = torch.eye(4)[None, [3, 0, 1, 1, 2]]
    attention = torch.tensor([[[0.5, 0.4, 0.3, 0.2, 0.1]]])
    kept = vispruner.select(attention, features, 4, important=0.25)
    assert kept.tolist() == [[True, True, True, False, True]]


def test_nan_is_refused() -> None:
    attention, features, valid = draw()
    with pytest.raises(ValueError, match="NaN in sample 2"):
        vispruner.select(attention.index_fill(0, torch.tensor(2), math.nan), features, 0.5, valid=valid)
    with pytest.raises(ValueError, match="features has NaN in sample 1"):
        vispruner.select(attention, features.index_fill(0, torch.tensor(1), math.nan), 0.5, valid=valid)


def test_the_stage_stands_at_the_input_and_reads_the_tower() -> None:
    attention, features, valid = draw()
    (stage,) = VisPruner(keep=0.4, important=0.25).stages(1)
    assert (stage.layer, stage.reads, stage.tower, stage.tower_layer) == (0, None, True, None)
    tokens = SimpleNamespace(
        tower_attention=lambda: attention, mergeable=lambda: (features, None), valid=valid
    )
    expected = vispruner.select(attention, features, 0.4, 0.25, valid)
    assert stage.select(tokens).equal(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments", [{"keep": 0}, {"keep": 0.5, "important": 1.5}, {"keep": 0.5, "important": math.nan}]
)
def test_values_out_of_range_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        VisPruner(**arguments)
