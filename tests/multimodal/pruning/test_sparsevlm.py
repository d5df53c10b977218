"""SparseVLM against restatements in loops: raters, ranking, recycling, the published tables."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from visionsel.multimodal.pruning import sparsevlm
from visionsel.multimodal.pruning.sparsevlm import SparseVLM

KEEPS = [0.5, 0.3, 1.0, 0.01, 1, 4, 99]
LENGTHS = torch.tensor([9, 4, 1])
TEXTS = torch.tensor([5, 3, 1])


def raters_by_loops(image: Tensor, text: Tensor) -> list[bool]:
    """Of one sample, `[n, C]` and `[t, C]`."""
    weight = [0.0] * len(text)
    for token in image:
        logits = [float((token * word).sum()) for word in text]
        total = sum(math.exp(x - max(logits)) for x in logits)
        for j, x in enumerate(logits):
            weight[j] += math.exp(x - max(logits)) / total / len(image)
    raters = [w > sum(weight) / len(weight) + 1e-12 for w in weight]
    return raters if any(raters) else [True] * len(text)


def scores_by_loops(attention: Tensor, raters: list[bool]) -> list[float]:
    """Of one sample `[heads, T, n]`."""
    heads, _, n = attention.shape
    rows = [t for t, rates in enumerate(raters) if rates]
    return [
        sum(float(attention[h, t, i]) for h in range(heads) for t in rows) / heads / len(rows)
        for i in range(n)
    ]


def highest(scores: list[float], number: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:number]


def recycle_by_loops(features: Tensor, scores: list[float], kept: list[bool]) -> tuple[list[bool], Tensor]:
    """Of one sample `[n, C]`."""
    dropped = [i for i, stays in enumerate(kept) if not stays]
    mask, merged = list(kept), features.clone()
    if not dropped:
        return mask, merged
    size = int(0.3 * len(dropped)) + 1
    candidates = sorted(sorted(dropped, key=lambda i: (-scores[i], i))[:size])
    number = int(size / 10) + 1
    d = {
        (i, j): math.sqrt(float(((features[i] - features[j]) ** 2).sum()) / features.shape[1])
        for i in candidates
        for j in candidates
    }
    density = {}
    for i in candidates:
        nearest = sorted(d[i, j] for j in candidates)[:number]
        density[i] = math.exp(-sum(x * x for x in nearest) / number)
    value = {}
    for i in candidates:
        denser = [j for j in candidates if density[j] > density[i] or (density[j] == density[i] and j < i)]
        value[i] = density[i] * (min(d[i, j] for j in denser) if denser else max(d.values()))
    centres = sorted(sorted(candidates, key=lambda i: (-value[i], i))[:number])
    groups: dict[int, list[int]] = {c: [] for c in centres}
    for i in candidates:
        groups[i if i in centres else min(centres, key=lambda c: (d[i, c], c))].append(i)
    for c, members in groups.items():
        mask[c] = True
        merged[c] = sum(features[i] for i in members) / len(members)
    return mask, merged


def draw(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention, raters, and which image and text tokens there are."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(3, 2, 5, 9, generator=generator, dtype=torch.float64)
    words = torch.arange(5) < TEXTS[:, None]
    raters = (torch.rand(3, 5, generator=generator) < 0.5) & words
    raters[:, 0] = True
    return attention, raters, torch.arange(9) < LENGTHS[:, None], words


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("seed", range(3))
def test_the_tokens_that_raters_attend_to_most_are_kept(keep: float | int, seed: int) -> None:
    attention, raters, _, _ = draw(seed)
    kept = sparsevlm.select(attention=attention, raters=raters, keep=keep)
    number = min(keep, 9) if isinstance(keep, int) else max(1, round(keep * 9))
    for b in range(3):
        best = highest(scores_by_loops(attention[b], raters[b].tolist()), number)
        assert sorted(best) == kept[b].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("keep", KEEPS)
def test_a_sample_alone_gives_the_same_as_in_a_padded_batch(keep: float | int) -> None:
    attention, raters, valid, _ = draw()
    attention.masked_fill_(~valid[:, None, None], math.nan)
    kept = sparsevlm.select(attention, raters, keep, valid)
    for b, (n, t) in enumerate(zip(LENGTHS.tolist(), TEXTS.tolist(), strict=True)):
        alone = sparsevlm.select(attention[b : b + 1, :, :t, :n], raters[b : b + 1, :t], keep)
        assert kept[b, :n].equal(alone[0])
        assert not kept[b, n:].any()


def test_ties_go_to_the_lower_index_and_other_text_does_not_rate() -> None:
    attention = torch.ones(1, 2, 3, 6)
    attention[:, :, 1] = torch.arange(6.0)
    raters = torch.tensor([[True, False, True]])
    assert sparsevlm.select(attention, raters, 0.5)[0].tolist() == [True] * 3 + [False] * 3


def test_nan_and_samples_without_raters_are_refused() -> None:
    attention, raters, valid, _ = draw()
    attention[1, 0, 4, 2] = math.nan
    with pytest.raises(ValueError, match="attention has NaN in sample 1"):
        sparsevlm.select(attention, raters, 0.5, valid)
    with pytest.raises(ValueError, match="raters has none in sample 0"):
        sparsevlm.select(torch.ones(1, 1, 2, 3), torch.zeros(1, 2, dtype=torch.bool), 0.5)


@pytest.mark.parametrize("seed", range(4))
def test_raters_are_the_words_that_image_tokens_turn_to_more_than_on_average(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(3, 9, 4, generator=generator, dtype=torch.float64)
    text = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    _, _, valid, words = draw()
    raters = sparsevlm.text_raters(image, text, valid, words)
    for b, (n, t) in enumerate(zip(LENGTHS.tolist(), TEXTS.tolist(), strict=True)):
        assert raters[b, :t].tolist() == raters_by_loops(image[b, :n], text[b, :t])
        assert not raters[b, t:].any()
        assert raters[b, :t].equal(sparsevlm.text_raters(image[b : b + 1, :n], text[b : b + 1, :t])[0])


def test_where_no_word_stands_out_all_rate() -> None:
    image = torch.ones(1, 4, 2)
    assert sparsevlm.text_raters(image, torch.ones(1, 1, 2)).tolist() == [[True]]
    assert sparsevlm.text_raters(image, torch.ones(1, 3, 2)).tolist() == [[True] * 3]


def test_an_image_without_text_after_it_is_refused() -> None:
    image, text = torch.ones(2, 4, 2), torch.ones(2, 3, 2)
    words = torch.tensor([[True] * 3, [False] * 3])
    with pytest.raises(ValueError, match="sample 1 has no text after its last image"):
        sparsevlm.text_raters(image, text, None, words)
    with pytest.raises(ValueError, match="text has NaN in sample 0"):
        sparsevlm.text_raters(image, text * math.nan)


@pytest.mark.parametrize("number", [1, 10, 30, 69, 70])
@pytest.mark.parametrize("seed", range(4))
def test_the_better_part_of_the_dropped_becomes_clusters(number: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = 1.5 * torch.randn(2, 70, 4, generator=generator, dtype=torch.float64)
    scores = torch.rand(2, 70, generator=generator, dtype=torch.float64)
    lengths = [70, 41]
    valid = torch.arange(70) < torch.tensor(lengths)[:, None]
    kept = torch.zeros_like(valid)
    for b, n in enumerate(lengths):
        kept[b, highest(scores[b, :n].tolist(), number)] = True
    features[1, 41:] = math.nan
    mask, merged = sparsevlm.recycle(features, scores, kept, valid)
    for b, n in enumerate(lengths):
        wanted, expected = recycle_by_loops(features[b, :n], scores[b, :n].tolist(), kept[b, :n].tolist())
        assert mask[b, :n].tolist() == wanted
        assert not mask[b, n:].any()
        torch.testing.assert_close(merged[b, :n], expected, rtol=0, atol=1e-12)
        alone = sparsevlm.recycle(features[b : b + 1, :n], scores[b : b + 1, :n], kept[b : b + 1, :n])
        assert alone[0][0].equal(mask[b, :n])


def test_equal_tokens_make_clusters_in_their_order() -> None:
    features = torch.ones(1, 60, 3)
    kept = torch.arange(60)[None] < 4
    mask, merged = sparsevlm.recycle(features, torch.ones(1, 60), kept)
    assert mask[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5]  # 17 of 56 in 2 clusters
    assert merged.equal(features)


def test_kept_tokens_are_not_changed_and_nothing_dropped_means_nothing_recycled() -> None:
    features = torch.randn(1, 20, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    kept = torch.arange(20)[None] < 8
    mask, merged = sparsevlm.recycle(features, torch.rand(1, 20), kept)
    assert merged.dtype == torch.bfloat16
    assert merged[kept].equal(features[kept])
    assert (mask & kept).equal(kept)
    mask, merged = sparsevlm.recycle(features, torch.rand(1, 20), torch.ones_like(kept))
    assert mask.all()
    assert merged.equal(features)
    features[0, 3] = math.nan
    with pytest.raises(ValueError, match="features has NaN in sample 0"):
        sparsevlm.recycle(features, torch.rand(1, 20), kept)


@pytest.mark.parametrize(
    ("version", "keep", "numbers"),
    [
        (1, 192, (300, 200, 110)),
        (1, 128, (303, 110, 36)),
        (1, 96, (238, 48, 26)),
        (1, 64, (66, 30, 17)),
        (1, 1 / 3, (300, 200, 110)),
        (1, 1.0, (576, 576, 576)),
        (1, 576, (576, 576, 576)),
        (1, 160, (302, 155, 73)),  # halfway between 128 and 192
        (1, 32, (33, 15, 8)),
        (2, 192, (300, 200, 118)),
        (2, 128, (238, 108, 60)),
        (2, 96, (246, 54, 28)),
        (2, 64, (66, 34, 20)),
        (1, (400, 0.25, 10), (400, 144, 10)),
    ],
)
def test_the_published_tables_say_how_many_of_576_tokens_stay(
    version: int, keep: float | int | tuple, numbers: tuple[int, ...]
) -> None:
    n = 576
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(1, 2, 3, n, generator=generator)
    valid = torch.ones(1, n, dtype=torch.bool)
    tokens = SimpleNamespace(
        features=torch.randn(1, n, 4, generator=generator),
        valid=valid,
        total=torch.tensor([n]),
        memory={},
        text_features=lambda: (torch.randn(1, 3, 4), torch.ones(1, 3, dtype=torch.bool)),
        text_attention=lambda: (attention, torch.ones(1, 3, dtype=torch.bool)),
    )
    first, *stages = SparseVLM(keep=keep, version=version, recycle=False).stages(32)
    assert first.layer == 0
    assert first.select(tokens).equal(valid)  # type: ignore[arg-type]
    assert [(stage.layer, stage.reads) for stage in stages] == [(2, "own"), (6, "own"), (15, "own")]
    assert tuple(int(stage.select(tokens).sum()) for stage in stages) == numbers  # type: ignore


def test_the_stages_rate_by_the_words_chosen_at_the_input_and_recycle() -> None:
    attention, _, valid, words = draw()
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(3, 9, 4, generator=generator, dtype=torch.float64)
    text = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    tokens = SimpleNamespace(
        features=features,
        valid=valid,
        total=torch.tensor([18, 4, 1]),
        memory={},
        text_features=lambda: (text, words),
        text_attention=lambda: (attention.masked_fill(~words[:, None, :, None], 0.0), words),
    )
    first, *stages = SparseVLM(keep=(0.25, 2, 1), layers=(1, 2, 3)).stages(4)
    first.select(tokens)  # type: ignore[arg-type]
    numbers = [[4, 1, 1], [2, 2, 1], [1, 1, 1]]
    for stage, number in zip(stages, numbers, strict=True):
        mask, merged = stage.select(tokens)  # type: ignore[arg-type]
        for b, (n, t) in enumerate(zip(LENGTHS.tolist(), TEXTS.tolist(), strict=True)):
            raters = raters_by_loops(features[b, :n], text[b, :t])
            scores = scores_by_loops(attention[b, :, :t, :n], raters)
            best = highest(scores, number[b])
            wanted, expected = recycle_by_loops(features[b, :n], scores, [i in best for i in range(n)])
            assert mask[b, :n].tolist() == wanted
            torch.testing.assert_close(merged[b, :n], expected, rtol=0, atol=1e-12)


def test_the_second_version_recycles_nothing_unless_asked() -> None:
    assert SparseVLM(version=2).recycle is None
    with pytest.raises(ValueError, match="layer 15 does not exist"):
        SparseVLM().stages(15)


@pytest.mark.parametrize(
    "arguments",
    [
        {"keep": 0},
        {"keep": (0.5, 0.5)},
        {"keep": (0.5, 0.0, 0.1)},
        {"layers": (0, 2, 4)},
        {"layers": (2, 2, 4)},
        {"layers": (2, 6)},
        {"keep": (), "layers": ()},
        {"version": 3},
    ],
)
def test_values_out_of_range_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"keep|layer|version"):
        SparseVLM(**arguments)
