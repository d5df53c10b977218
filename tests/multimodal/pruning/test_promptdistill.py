"""PromptDistill: against loops written here from the rule; what it does in a model."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.multimodal import tiny
from tests.multimodal.pruning.llava_signals import signals
from visionsel.multimodal.pruning import promptdistill
from visionsel.multimodal.pruning.promptdistill import PromptDistill

NAN = float("nan")


def plain_scores(query: Tensor, keys: Tensor) -> list[float]:
    """Of one sample: `[heads, head_dim]`, `[kv_heads, N, head_dim]`."""
    heads, size = query.shape
    group = heads // len(keys)
    return [
        sum(
            sum(query[h, d].item() * keys[h // group, i, d].item() for d in range(size)) / size**0.5
            for h in range(heads)
        )
        / heads
        for i in range(keys.shape[1])
    ]


def plain_select(scores: list[float], keep: int, pool: int) -> list[int]:
    n, reach = len(scores), pool // 2
    means = []
    for i in range(n):
        around = [scores[j] for j in range(i - reach, i + reach + 1) if 0 <= j < n]
        means.append(sum(around) / len(around))
    return sorted(sorted(range(n), key=lambda i: (-means[i], i))[:keep])


@pytest.mark.parametrize("pool", [1, 3, 5, 9])
@pytest.mark.parametrize("n", [1, 2, 4, 17])
@pytest.mark.parametrize("keep", [1, 3, 0.5, 1.0])
def test_the_highest_averages_over_neighbours_stay(n: int, keep: float | int, pool: int) -> None:
    scores = torch.randn(3, n, dtype=torch.float64)
    number = min(keep, n) if isinstance(keep, int) else max(1, round(keep * n))
    mask = promptdistill.select(scores, keep=keep, pool=pool)
    for row, values in zip(mask, scores, strict=True):
        assert row.nonzero().flatten().tolist() == plain_select(values.tolist(), number, pool)


def test_ties_go_to_the_lower_index_at_the_ends_too() -> None:
    scores = torch.randint(-2, 3, (20, 13)).double()
    scores[0] = 4.0
    mask = promptdistill.select(scores, keep=5)
    assert mask[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    for row, values in zip(mask, scores, strict=True):
        assert row.nonzero().flatten().tolist() == plain_select(values.tolist(), 5, 5)


def test_samples_of_a_ragged_batch_are_chosen_as_they_are_alone() -> None:
    numbers = (11, 1, 6)
    valid = torch.arange(11) < torch.tensor(numbers)[:, None]
    scores = torch.randn(3, 11, dtype=torch.float64).masked_fill(~valid, NAN)
    mask = promptdistill.select(scores, keep=0.4, valid=valid)
    assert not (mask & ~valid).any()
    for row, values, n in zip(mask, scores, numbers, strict=True):
        assert torch.equal(row[:n], promptdistill.select(values[None, :n], keep=0.4)[0])


def test_scores_are_means_over_heads_of_raw_products_with_shared_keys() -> None:
    queries, keys = torch.randn(2, 6, 1, 4, dtype=torch.float64), torch.randn(2, 2, 7, 4, dtype=torch.float64)
    found = promptdistill.relevance(queries, keys)
    for b in range(2):
        expected = torch.tensor(plain_scores(queries[b, :, 0], keys[b]), dtype=torch.float64)
        torch.testing.assert_close(found[b], expected, rtol=0, atol=1e-12)
    halves = queries.bfloat16(), keys.bfloat16()
    assert torch.equal(
        promptdistill.relevance(*halves), promptdistill.relevance(*(x.float() for x in halves))
    )


def test_nan_and_bad_widths_are_refused() -> None:
    scores = torch.randn(2, 6)
    for pool in (0, 2, -1, True, 1.5):
        with pytest.raises(ValueError, match="pool must be an odd number"):
            promptdistill.select(scores, keep=2, pool=pool)  # type: ignore[arg-type]
    scores[1, 4] = NAN
    with pytest.raises(ValueError, match="scores has NaN in sample 1"):
        promptdistill.select(scores, keep=2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": 0.0}, "keep"),
        ({"keep": (0.5, 0.25)}, "one value for each layer"),
        ({"layers": (1, 2)}, "one value for each layer"),
        ({"layers": (1, 2), "keep": (0.25, 0.5)}, "cannot grow"),
        ({"layers": (2, 1), "keep": (0.5, 0.25)}, "layers must rise"),
        ({"layers": -1}, "layer -1 does not exist"),
        ({"layers": (), "keep": ()}, "one value for each layer"),
        ({"pool": 4}, "pool"),
    ],
)
def test_values_out_of_range_are_refused_at_construction(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptDistill(**wrong)


def test_the_last_layer_cannot_choose_since_no_layer_is_left() -> None:
    with (
        pytest.raises(ValueError, match="choose one of 0 to 2"),
        PromptDistill(layers=3)(tiny.make_model("llava")),
    ):
        pass


def last_query(model: Any, inputs: dict[str, Any], layer: int) -> Tensor:
    """`[B, heads, head_dim]` of the last token, positions applied by the model's own functions."""
    seen: list[Any] = []
    decoder = model.model.language_model
    attention = decoder.layers[layer].self_attn
    handles = [
        attention.q_proj.register_forward_hook(lambda module, args, out: seen.append(out)),
        decoder.rotary_emb.register_forward_hook(lambda module, args, out: seen.append(out)),
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    (cos, sin), query = seen
    query = query.unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
    return apply_rotary_pos_emb(query, query, cos, sin)[0][:, :, -1]


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("pool", [1, 5])
def test_in_a_model_a_layer_chooses_by_its_own_query_and_keys_for_the_next(layer: int, pool: int) -> None:
    model, inputs = tiny.make_model("llava"), tiny.make_inputs("llava")
    seen, query = signals(model, inputs), last_query(model, inputs, layer)
    with torch.no_grad(), PromptDistill(layers=layer, keep=6, pool=pool)(model) as pruned:
        model(**inputs)
    [(entered, kept)] = pruned.kept
    assert entered == layer + 1
    for b in range(2):
        scores = plain_scores(query[b], seen.keys[layer][b][:, seen.image[b]])
        assert kept[b][seen.image[b]].nonzero().flatten().tolist() == plain_select(scores, 6, pool)


def test_several_layers_keep_their_share_of_the_original_tokens() -> None:
    model, inputs = tiny.make_model("qwen2_vl"), tiny.make_inputs("qwen2_vl")
    image = inputs["input_ids"] == tiny.IMAGE
    totals = image.sum(1).tolist()
    with torch.no_grad(), PromptDistill(layers=(0, 2), keep=(0.5, 0.25))(model) as pruned:
        model(**inputs)
    for (layer, kept), ratio in zip(pruned.kept, (0.5, 0.25), strict=True):
        assert layer in (1, 3)
        assert (kept & image).sum(1).tolist() == [max(1, round(ratio * total)) for total in totals]
    assert not (pruned.kept[1][1] & ~pruned.kept[0][1]).any()


@pytest.mark.parametrize("truncate", [False, True])
def test_truncation_takes_the_dropped_tokens_out_of_the_cache_of_earlier_layers(truncate: bool) -> None:
    model, inputs = tiny.make_model("llava"), tiny.make_inputs("llava", batch=1)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), PromptDistill(layers=1, keep=6, truncate=truncate)(model):
        cache = model(**inputs, use_cache=True).past_key_values
        held = [layer.keys.shape[2] for layer in cache.layers]
        short = length - 16 + 6
        assert held == [short] * 4 if truncate else held == [length, length, short, short]
        assert model.generate(**inputs, max_new_tokens=2).shape[1] == length + 2
