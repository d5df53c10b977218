"""VisionZip: against loops written here from the paper; what it does in a model."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.multimodal import tiny
from tests.multimodal.pruning.llava_signals import prune, signals
from visionsel.multimodal.pruning import visionzip
from visionsel.multimodal.pruning.visionzip import VisionZip

NAN = float("nan")


def draw(
    *numbers: int, heads: int = 2, dim: int = 4, channels: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention, keys, features and which tokens are valid; NaN in the padding."""
    batch, width = len(numbers), max(numbers)
    valid = torch.arange(width) < torch.tensor(numbers)[:, None]
    attention = torch.rand(batch, heads, width, dtype=torch.float64).masked_fill(~valid[:, None], NAN)
    keys = torch.randn(batch, heads, width, dim, dtype=torch.float64).masked_fill(
        ~valid[:, None, :, None], NAN
    )
    features = torch.randn(batch, width, channels, dtype=torch.float64).masked_fill(~valid[..., None], NAN)
    return attention, keys, features, valid


def by_the_paper(
    attention: Tensor, keys: Tensor, features: Tensor, dominant: int, contextual: int
) -> dict[int, Tensor]:
    """The kept tokens of one sample and what they become; `[heads, N]`, `[heads, N, head_dim]`, `[N, C]`."""
    n = features.shape[0]
    received = [sum(attention[h, i].item() for h in range(len(attention))) for i in range(n)]
    ranked = sorted(range(n), key=lambda i: (-received[i], i))
    kept = {i: features[i] for i in ranked[:dominant]}
    rest = [i for i in range(n) if i not in kept]
    number = min(contextual, len(rest))
    if number == 0:
        return kept
    step = max(1, len(rest) // number)
    targets = rest[::step][:number]
    members: dict[int, list[int]] = {t: [] for t in targets}
    mean_key = keys.mean(0)
    for i in rest:
        if i not in targets:
            cosines = [torch.cosine_similarity(mean_key[i], mean_key[t], dim=0).item() for t in targets]
            members[targets[cosines.index(max(cosines))]].append(i)
    for t, own in members.items():
        kept[t] = features[t] + sum(features[i] for i in own) / len(own) if own else features[t]
    return kept


def agrees(result: tuple[Tensor, Tensor], sample: int, expected: dict[int, Tensor]) -> bool:
    mask, features = result
    same = all(torch.allclose(features[sample, i], x, atol=1e-12) for i, x in expected.items())
    return same and mask[sample].nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize(
    ("dominant", "contextual"), [(4, 3), (1, 1), (7, 5), (3, 0), (5, 40), (40, 2), (11, 1), (2, 9)]
)
def test_it_is_what_the_paper_says(dominant: int, contextual: int) -> None:
    attention, keys, features, _ = draw(12, 12, 12)
    result = visionzip.select(attention, keys, features, dominant, contextual)
    for b in range(3):
        assert agrees(result, b, by_the_paper(attention[b], keys[b], features[b], dominant, contextual))


def test_a_sample_alone_gives_the_same_as_in_a_padded_batch() -> None:
    attention, keys, features, valid = draw(3, 14, 1, 9)
    result = visionzip.select(attention, keys, features, 4, 3, valid)
    assert not (result[0] & ~valid).any()
    for b, n in enumerate((3, 14, 1, 9)):
        expected = by_the_paper(attention[b, :, :n], keys[b, :, :n], features[b, :n], 4, 3)
        assert agrees(result, b, expected)


def test_ratios_are_of_the_tokens_of_each_sample() -> None:
    attention, keys, features, valid = draw(20, 8)
    mask, _ = visionzip.select(attention, keys, features, 0.25, 0.125, valid)
    assert mask.sum(1).tolist() == [5 + 2, 2 + 1]


def test_tokens_that_are_alike_are_taken_in_their_order() -> None:
    attention, keys, features = torch.ones(1, 2, 9), torch.ones(1, 2, 9, 4), torch.ones(1, 9, 5)
    mask, merged = visionzip.select(attention, keys, features, dominant=3, contextual=2)
    assert mask[0].tolist() == [True] * 4 + [False] * 2 + [True] + [False] * 2  # of 3 to 8 every third
    assert merged[0, 3, 0] == 2  # all others belong to the first target
    assert merged[0, 6, 0] == 1


def test_one_token_and_all_tokens_stay_as_they_are() -> None:
    for n, dominant, contextual in ((1, 54, 10), (6, 1.0, 0), (6, 6, 2)):
        attention, keys, features, _ = draw(n)
        mask, merged = visionzip.select(attention, keys, features, dominant, contextual)
        assert mask.all()
        assert torch.equal(merged, features)


def test_attention_that_is_already_summed_over_heads_is_taken_too() -> None:
    attention, keys, features, _ = draw(10)
    both = [visionzip.select(a, keys, features, 3, 2) for a in (attention, attention.sum(1))]
    assert torch.equal(both[0][0], both[1][0])
    assert torch.equal(both[0][1], both[1][1])


def test_half_precision_is_computed_in_float32() -> None:
    attention, keys, features, _ = (x.bfloat16() if x.is_floating_point() else x for x in draw(16))
    mask, merged = visionzip.select(attention, keys, features, 4, 3)
    wide_mask, wide = visionzip.select(attention.float(), keys.float(), features.float(), 4, 3)
    assert torch.equal(mask, wide_mask)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, wide.bfloat16())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_is_refused_by_name(which: int) -> None:
    tensors = list(draw(5)[:3])
    tensors[which] = tensors[which].clone()
    tensors[which][0, 0, 0] = NAN
    with pytest.raises(ValueError, match=f"{('attention', 'keys', 'features')[which]} has NaN"):
        visionzip.select(*tensors, dominant=2, contextual=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"dominant": 0},
        {"dominant": 1.5},
        {"contextual": -1},
        {"contextual": False},
        {"keep": 0},
        {"keep": NAN},
    ],
)
def test_values_out_of_range_are_refused_at_construction(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VisionZip(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pruner", "dominant", "contextual"),
    [(VisionZip(dominant=5, contextual=3), 5, 3), (VisionZip(keep=0.5), 7, 1), (VisionZip(keep=13), 11, 2)],
)
def test_in_a_model_it_reads_the_layer_whose_output_the_model_uses(
    pruner: VisionZip, dominant: int, contextual: int
) -> None:
    model, inputs = tiny.make_model("llava"), tiny.make_inputs("llava")
    seen = signals(model, inputs)
    query, key = seen.tower[-2]
    attention = (query[:, :, :1] @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1)[:, :, 0, 1:]
    project = model.model.multi_modal_projector
    mask, features = prune(model, inputs, pruner)
    for b in range(2):
        expected = by_the_paper(attention[b], key[b, :, 1:], seen.features[b], dominant, contextual)
        assert mask[b].nonzero().flatten().tolist() == sorted(expected)
        assert torch.allclose(features[b], project(torch.stack([expected[i] for i in sorted(expected)])))


def as_they_are(merged: Tensor) -> Tensor:
    return merged


def test_a_number_of_tokens_is_split_as_in_the_paper() -> None:
    attention, keys, features = torch.rand(1, 1, 576), torch.randn(1, 1, 576, 4), torch.randn(1, 576, 2)
    for keep, dominant, contextual in ((192, 162, 30), (128, 108, 20), (64, 54, 10), (1, 1, 0)):
        expected = visionzip.select(attention, keys, features, dominant, contextual)
        tokens = SimpleNamespace(
            tower_attention=lambda: attention,
            tower_keys=lambda: keys,
            mergeable=lambda: (features, as_they_are),
            valid=torch.ones(1, 576, dtype=torch.bool),
        )
        mask, merged = VisionZip(keep=keep)._select(tokens)
        assert torch.equal(mask, expected[0])
        assert torch.equal(merged, expected[1])
