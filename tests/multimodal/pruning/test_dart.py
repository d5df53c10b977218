"""DART: against loops written here from the paper and the released rule; what it does in a model."""

import pytest
import torch
from torch import Tensor

from tests.multimodal import tiny
from tests.multimodal.pruning.llava_signals import prune, signals
from visionsel.multimodal.pruning import dart
from visionsel.multimodal.pruning.dart import DART

NAN = float("nan")


def draw(numbers: tuple[int, ...], channels: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, features and which tokens are valid; NaN in the padding."""
    valid = torch.arange(max(numbers)) < torch.tensor(numbers)[:, None]
    keys = torch.randn(len(numbers), 2, max(numbers), 3, dtype=torch.float64)
    features = torch.randn(len(numbers), max(numbers), channels, dtype=torch.float64)
    return (
        keys.masked_fill(~valid[:, None, :, None], NAN),
        features.masked_fill(~valid[..., None], NAN),
        valid,
    )


def by_the_paper(
    keys: Tensor,
    features: Tensor,
    text_keys: Tensor,
    text_features: Tensor,
    keep: int,
    pivots: tuple[int, int] = (4, 4),
) -> list[int]:
    """The kept tokens of one sample; `[heads, N, head_dim]`, `[N, C]`."""
    n, words = len(features), len(text_features)
    if keep >= n:
        return list(range(n))

    def largest(keys: Tensor, number: int) -> list[int]:
        norm = [keys[:, i].abs().sum().item() for i in range(keys.shape[1])]
        return sorted(range(len(norm)), key=lambda i: (-norm[i], i))[:number]

    of_image, of_text = largest(keys, min(pivots[0], keep)), largest(text_keys, min(pivots[1], words))
    share = (keep - len(of_image)) // (len(of_image) + len(of_text))
    kept = set(of_image)
    for pivot in [features[i] for i in of_image] + [text_features[i] for i in of_text]:
        free = [j for j in range(n) if j not in kept]
        cosine = {j: round(torch.cosine_similarity(pivot, features[j], dim=0).item(), 12) for j in free}
        kept |= set(sorted(free, key=lambda j: (cosine[j], j))[:share])
    return sorted(kept)


@pytest.mark.parametrize("pivots", [(4, 4), (1, 0), (3, 1), (2, 9)])
@pytest.mark.parametrize("keep", [1, 3, 4, 12, 17, 28, 29, 30, 50])
def test_it_is_what_the_paper_says(keep: int, pivots: tuple[int, int]) -> None:
    keys, features, _ = draw((30, 30))
    text_keys, text_features, _ = draw((7, 7))
    mask = dart.select(keys, features, text_keys, text_features, keep, pivots)
    for b in range(2):
        expected = by_the_paper(keys[b], features[b], text_keys[b], text_features[b], keep, pivots)
        assert mask[b].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("keep", [0.5, 1.0, 0.01])
def test_a_sample_alone_gives_the_same_as_in_a_padded_batch(keep: float) -> None:
    numbers, words = (5, 40, 1, 12), (2, 0, 6, 9)
    keys, features, valid = draw(numbers)
    text_keys, text_features, text_valid = draw(words)
    mask = dart.select(keys, features, text_keys, text_features, keep, (4, 4), valid, text_valid)
    assert not (mask & ~valid).any()
    for b, (n, t) in enumerate(zip(numbers, words, strict=True)):
        expected = by_the_paper(
            keys[b, :, :n],
            features[b, :n],
            text_keys[b, :, :t],
            text_features[b, :t],
            max(1, round(keep * n)),
        )
        assert mask[b].nonzero().flatten().tolist() == expected


def test_without_text_the_pivots_of_the_image_share_the_budget() -> None:
    keys, features, _ = draw((24,))
    mask = dart.select(keys, features, keys[:, :, :0], features[:, :0], keep=12)
    assert mask.sum() == 4 + 4 * 2


def test_tokens_that_are_alike_are_taken_in_their_order() -> None:
    keys, features = torch.ones(1, 2, 40, 3), torch.ones(1, 40, 6)
    mask = dart.select(keys, features, keys[:, :, :5], features[:, :5], keep=20)
    assert mask[0].tolist() == [True] * 20 + [False] * 20


def test_half_precision_is_computed_in_float32() -> None:
    keys, features, _ = (x.bfloat16() if x.is_floating_point() else x for x in draw((30,)))
    halves = (keys, features, keys[:, :, :6], features[:, :6])
    assert torch.equal(dart.select(*halves, keep=12), dart.select(*(x.float() for x in halves), keep=12))


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_nan_is_refused_by_name(which: int) -> None:
    tensors = [*draw((6,))[:2], *draw((5,))[:2]]
    tensors[which][0, 0, 0] = NAN
    with pytest.raises(
        ValueError, match=("keys", "features", "text_keys", "text_features")[which] + " has NaN"
    ):
        dart.select(*tensors, keep=3)


@pytest.mark.parametrize(
    "wrong", [{"keep": 0.0}, {"pivots": (0, 4)}, {"pivots": (4, -1)}, {"pivots": (4,)}, {"pivots": (4, 1.5)}]
)
def test_values_out_of_range_are_refused_at_construction(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DART(**wrong)  # type: ignore[arg-type]


def test_a_layer_that_does_not_exist_is_refused_at_entry() -> None:
    model = tiny.make_model("llava")
    for layer in (0, tiny.LAYERS):
        with pytest.raises(ValueError, match="choose one of 1 to 3"), DART(layer=layer)(model):
            pass


@pytest.mark.parametrize("layer", [1, 2])
def test_in_a_model_it_reads_keys_of_the_layer_before_and_the_text_after_the_image(layer: int) -> None:
    model, inputs = tiny.make_model("llava"), tiny.make_inputs("llava")
    seen = signals(model, inputs)
    mask, features = prune(model, inputs, DART(keep=13, layer=layer, pivots=(2, 3)))
    for b in range(2):
        keys, hidden = seen.keys[layer - 1][b], seen.hidden[layer][b]
        image, text = seen.image[b], seen.text[b]
        expected = by_the_paper(keys[:, image], hidden[image], keys[:, text], hidden[text], 13, (2, 3))
        assert mask[b].nonzero().flatten().tolist() == expected
        assert torch.allclose(features[b], hidden[image][expected])
