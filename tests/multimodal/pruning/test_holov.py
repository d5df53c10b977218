"""HoloV: against loops written here from the paper and the released rule; what it does in a model."""

import math

import pytest
import torch
from torch import Tensor

from tests.multimodal import tiny
from tests.multimodal.pruning.llava_signals import prune, signals
from visionsel.multimodal.pruning import holov
from visionsel.multimodal.pruning.holov import HoloV

NAN = float("nan")


def draw(*numbers: int, channels: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Attention, features and which tokens are valid; NaN in the padding."""
    valid = torch.arange(max(numbers)) < torch.tensor(numbers)[:, None]
    attention = torch.randn(len(numbers), max(numbers), dtype=torch.float64).exp()
    features = torch.randn(len(numbers), max(numbers), channels, dtype=torch.float64)
    return attention.masked_fill(~valid, NAN), features.masked_fill(~valid[..., None], NAN), valid


def by_the_paper(
    attention: Tensor, features: Tensor, keep: int, chunks: int, alpha: float = 0.09
) -> list[int]:
    """The kept tokens of one sample; `[N]`, `[N, C]`."""
    n = len(features)
    keep = min(keep, n)
    parts, start = [], 0
    for c in range(chunks):
        size = n // chunks + (1 if c < n % chunks else 0)
        parts.append(list(range(start, start + size)))
        start += size
    parts = [part for part in parts if part]
    scores = []
    for part in parts:
        received = [attention[i].item() for i in part]
        variances = []
        for i in part:
            similar = [
                0.0 if i == j else torch.cosine_similarity(features[i], features[j], dim=0).item()
                for j in part
            ]
            mean = sum(similar) / max(1, len(part) - 1)
            variances.append(sum((s - mean) ** 2 for s in similar) / max(1, len(part) - 1))
        scale = (sum(received) / len(part)) / (sum(variances) / len(part) + 1e-6)
        holistic = [a + alpha * scale * v for a, v in zip(received, variances, strict=True)]
        scores.append(sum(holistic) / len(part))
    quota = [
        min(math.floor(s / sum(scores) * keep + 1e-12), len(p)) for s, p in zip(scores, parts, strict=True)
    ]
    order = sorted(range(len(parts)), key=lambda c: (-scores[c], c))
    while sum(quota) < keep:
        for c in order:
            if quota[c] < len(parts[c]) and sum(quota) < keep:
                quota[c] += 1
    kept = []
    for part, number in zip(parts, quota, strict=True):
        kept += sorted(part, key=lambda i: (-attention[i].item(), i))[:number]
    return sorted(kept)


@pytest.mark.parametrize("chunks", [1, 4, 7, 16, 50])
@pytest.mark.parametrize("keep", [1, 9, 20, 35, 40])
def test_it_is_what_the_paper_says(keep: int, chunks: int) -> None:
    attention, features, _ = draw(40, 40, 40)
    mask = holov.select(attention, features, keep, chunks, alpha=0.5)
    assert mask.sum(1).tolist() == [keep] * 3
    for b in range(3):
        expected = by_the_paper(attention[b], features[b], keep, chunks, 0.5)
        assert mask[b].nonzero().flatten().tolist() == expected


def test_what_a_chunk_cannot_hold_goes_to_the_others_one_token_each() -> None:
    attention = torch.tensor([[90.0, 90.0, 1.0, 2.0, 3.0, 4.0, 0.1, 0.2]])
    mask = holov.select(attention, torch.randn(1, 8, 3), keep=5, chunks=4)
    assert mask[0].tolist() == [True, True, False, True, False, True, False, True]


@pytest.mark.parametrize("keep", [1.0, 0.4, 0.01, 6])
def test_a_sample_alone_gives_the_same_as_in_a_padded_batch(keep: float | int) -> None:
    numbers = (5, 37, 1, 16, 20)
    attention, features, valid = draw(*numbers)
    mask = holov.select(attention, features, keep, valid=valid)
    assert not (mask & ~valid).any()
    for b, n in enumerate(numbers):
        number = keep if isinstance(keep, int) else max(1, round(keep * n))
        expected = by_the_paper(attention[b, :n], features[b, :n], number, 16)
        assert mask[b].nonzero().flatten().tolist() == expected


def test_tokens_and_chunks_that_are_alike_are_taken_in_their_order() -> None:
    for n in (12, 13, 23):
        attention, features = torch.full((1, n), 1 / n), torch.ones(1, n, 6)
        mask = holov.select(attention, features, keep=5, chunks=3)
        parts = [len(part) for part in torch.arange(n).tensor_split(3)]
        firsts = [(0, 2), (parts[0], 2), (parts[0] + parts[1], 1)]
        assert mask[0].nonzero().flatten().tolist() == [s + i for s, number in firsts for i in range(number)]


def test_no_attention_at_all_is_shared_evenly() -> None:
    mask = holov.select(torch.zeros(1, 8), torch.randn(1, 8, 3), keep=3, chunks=4)
    assert mask[0].tolist() == [True, False, True, False, True, False, False, False]


def test_half_precision_is_computed_in_float32() -> None:
    attention, features, _ = (x.bfloat16() if x.is_floating_point() else x for x in draw(30))
    mask = holov.select(attention, features, 0.4)
    assert torch.equal(mask, holov.select(attention.float(), features.float(), 0.4))


@pytest.mark.parametrize("which", [0, 1])
def test_nan_is_refused_by_name(which: int) -> None:
    tensors = list(draw(6)[:2])
    tensors[which][0, 1] = NAN
    with pytest.raises(ValueError, match=("attention", "features")[which] + " has NaN"):
        holov.select(*tensors, keep=3)


@pytest.mark.parametrize(
    "wrong",
    [{"keep": 0}, {"chunks": 0}, {"chunks": 2.0}, {"alpha": -0.1}, {"alpha": NAN}, {"alpha": math.inf}],
)
def test_values_out_of_range_are_refused_at_construction(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HoloV(**wrong)  # type: ignore[arg-type]


def test_in_a_model_it_reads_the_layer_whose_output_the_model_uses() -> None:
    model, inputs = tiny.make_model("llava"), tiny.make_inputs("llava")
    seen = signals(model, inputs)
    query, key = seen.tower[-2]
    attention = (query[:, :, :1] @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)[:, :, 0, 1:]
    projected = seen.at_image(seen.hidden[0])
    mask, features = prune(model, inputs, HoloV(keep=7, chunks=4))
    for b in range(2):
        expected = by_the_paper(attention[b].mean(0), seen.features[b], 7, 4)
        assert mask[b].nonzero().flatten().tolist() == expected
        assert torch.allclose(features[b], projected[b][expected])
