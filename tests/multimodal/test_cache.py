"""Cache layers after pruning: they answer with the length of the prompt, and know which tokens they hold."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from tests.multimodal.runs import ByScore, cache_name, run, tiny
from tests.multimodal.tiny import grow, make_inputs
from visionsel.multimodal.cache import (
    Dropped,
    PrunedLayer,
    PrunedSlidingLayer,
    cache_of,
    mark_dropped,
    restore_layer,
    seen_tokens,
)

KINDS: dict[str, tuple[Any, Any]] = {
    "full": (DynamicLayer, PrunedLayer),
    "sliding": (lambda: DynamicSlidingWindowLayer(16), PrunedSlidingLayer),
}
COLUMNS = torch.tensor([[0, 2, 5, 8, 9], [1, 2, 6, 8, 9]])  # of ten tokens; the last two are text


def tokens(places: Tensor) -> Tensor:
    """Keys `[B, 2, n, 4]` that say where they come from."""
    return places[:, None, :, None].double().expand(-1, 2, -1, 4).clone()


def pruned(kind: str, real: bool = True) -> Any:
    """A layer that holds five of ten tokens of two samples; without `real`, one of them is a filler."""
    layer = KINDS[kind][0]()
    layer.update(tokens(COLUMNS), -tokens(COLUMNS))
    is_real = torch.ones(2, 5, dtype=torch.bool)
    is_real[1, 0] = real
    mark_dropped(layer, Dropped(10, COLUMNS, is_real, real))
    return layer


def write(layer: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """As a decoder layer does inside the context of a pruner."""
    layer.expected = True
    return layer.update(keys, values)


def places(layer: Any) -> list[list[int]]:
    assert torch.equal(layer.keys, -layer.values)
    found: list[list[int]] = layer.keys[:, 0, :, 0].long().tolist()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_length_counts_what_was_dropped(kind: str) -> None:
    layer = pruned(kind)
    assert type(layer) is KINDS[kind][1]
    assert layer.get_seq_length() == 10
    assert layer.get_mask_sizes(3) == (13, 0)
    assert layer.dropped.number == 5
    new = torch.tensor([[10, 11]]).expand(2, -1)
    keys, values = write(layer, tokens(new), -tokens(new))
    assert keys.shape[2] == values.shape[2] == 7
    assert layer.get_seq_length() == 12
    assert places(layer) == [[0, 2, 5, 8, 9, 10, 11], [1, 2, 6, 8, 9, 10, 11]]


@pytest.mark.parametrize("kind", KINDS)
def test_cropping_takes_what_was_written_after_the_prompt(kind: str) -> None:
    layer = pruned(kind)
    new = torch.arange(10, 14).expand(2, -1)
    write(layer, tokens(new), -tokens(new))
    layer.crop(0)
    layer.crop(-1)
    assert layer.get_seq_length() == 13
    assert places(layer)[0] == [0, 2, 5, 8, 9, 10, 11, 12]
    layer.crop(11)  # the length to leave, as older versions say it
    layer.crop(99)
    assert layer.get_seq_length() == 11
    layer.crop(-1)
    assert places(layer) == COLUMNS.tolist()
    assert layer.dropped.length == 10


@pytest.mark.parametrize("kind", KINDS)
def test_cropping_may_take_the_last_tokens_of_the_prompt_itself(kind: str) -> None:
    layer = pruned(kind, real=False)
    layer.crop(-2)
    assert layer.get_seq_length() == 8
    assert places(layer) == [[0, 2, 5], [1, 2, 6]]
    assert layer.dropped.length == 8
    assert layer.dropped.columns.tolist() == places(layer)
    assert layer.dropped.real.tolist() == [[True] * 3, [False, True, True]]
    assert not layer.dropped.complete
    new = torch.tensor([[8], [8]])
    write(layer, tokens(new), -tokens(new))
    assert layer.get_seq_length() == 9


@pytest.mark.parametrize("crop", [-3, -5, -10, -11, 7, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_cropping_to_where_tokens_were_dropped_is_refused(kind: str, crop: int) -> None:
    layer = pruned(kind)
    with pytest.raises(ValueError, match="a pruned prompt of 10 tokens cannot be cropped to"):
        layer.crop(crop)
    assert places(layer) == COLUMNS.tolist()
    assert layer.get_seq_length() == 10


@pytest.mark.parametrize("kind", KINDS)
def test_rows_move_with_what_is_known_of_them(kind: str) -> None:
    layer = pruned(kind, real=False)
    layer.batch_repeat_interleave(2)
    assert layer.dropped.columns.tolist() == places(layer) == [COLUMNS[row].tolist() for row in (0, 0, 1, 1)]
    layer.reorder_cache(torch.tensor([3, 0, 1, 0]))
    assert layer.dropped.columns.tolist() == places(layer) == [COLUMNS[row].tolist() for row in (1, 0, 0, 0)]
    assert layer.dropped.real.all(1).tolist() == [False, True, True, True]
    layer.batch_select_indices(torch.tensor([1, 0]))
    assert layer.dropped.columns.tolist() == places(layer) == COLUMNS.tolist()
    assert layer.get_seq_length() == 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_layer_is_an_ordinary_one_again(kind: str) -> None:
    layer, plain = pruned(kind), KINDS[kind][0]()
    plain.update(tokens(COLUMNS), tokens(COLUMNS))
    plain.reset()
    layer.reset()
    assert type(layer) is type(plain)
    assert set(vars(layer)) == set(vars(plain))
    assert layer.get_seq_length() == plain.get_seq_length()


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_layer_counts_its_keys(kind: str) -> None:
    layer = pruned(kind)
    restore_layer(layer)
    assert type(layer) is type(KINDS[kind][0]())
    assert not hasattr(layer, "dropped")
    assert layer.keys.shape[2] == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_may_be_marked_again(kind: str) -> None:
    layer = pruned(kind)
    layer.keys, layer.values = layer.keys[:, :, 3:], layer.values[:, :, 3:]
    mark_dropped(layer, Dropped(10, COLUMNS[:, 3:], torch.ones(2, 2, dtype=torch.bool), True))
    assert type(layer) is KINDS[kind][1]
    assert layer.get_seq_length() == 10
    assert layer.dropped.number == 8


def test_layers_of_other_kinds_are_refused() -> None:
    class Other(DynamicLayer):
        pass

    for layer in (Other(), StaticLayer(max_cache_len=8)):
        with pytest.raises(NotImplementedError, match=f"of type {type(layer).__name__}; use the default"):
            mark_dropped(layer, Dropped(10, COLUMNS, torch.ones(2, 5, dtype=torch.bool), True))


def test_a_full_window_is_refused() -> None:
    layer = pruned("sliding")
    new = torch.arange(10, 16).expand(2, -1)
    write(layer, tokens(new), -tokens(new))
    assert layer.get_seq_length() == 16
    with pytest.raises(NotImplementedError, match="17 tokens pass the sliding window of 16"):
        write(layer, tokens(new[:, :1]), -tokens(new[:, :1]))


def test_a_cache_tells_how_many_tokens_each_layer_has_seen() -> None:
    cache = DynamicCache()
    assert seen_tokens(None) == seen_tokens(cache) == seen_tokens(cache, 3) == 0
    for layer in range(2):
        cache.update(tokens(COLUMNS), tokens(COLUMNS), layer)
    mark_dropped(cache.layers[1], Dropped(10, COLUMNS, torch.ones(2, 5, dtype=torch.bool), True))
    assert [seen_tokens(cache, layer) for layer in range(3)] == [5, 10, 0]


def test_the_cache_is_found_under_its_old_name_and_its_new_one() -> None:
    cache = DynamicCache()
    assert cache_of({"past_key_values": cache}) is cache
    assert cache_of({"cache": cache, "past_key_values": None}) is cache
    assert cache_of({"cache": None, "past_key_values": cache}) is cache
    assert cache_of({"cache": None}) is cache_of({}) is None


def test_outputs_are_asked_for_their_cache_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("transformers.utils.generic.logger.warning_once", told.append, raising=False)
    assert cache_of(BaseModelOutputWithPast(last_hidden_state=torch.zeros(1))) is None
    cache = DynamicCache()
    model = tiny("llava")
    with torch.no_grad():
        out = model(**make_inputs("llava"), **{cache_name(model): cache})
    assert cache_of(out) is cache
    assert not told


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_copied_cache_goes_its_own_way(name: str) -> None:
    """One image, two questions."""
    model, inputs = tiny(name), make_inputs(name)
    with ByScore({0: (0.3, 0.6)})(model):
        first = run(model, inputs, 2)
        lengths = [layer.keys.shape[2] for layer in first.cache.layers]
        continued = []
        for cache in (copy.deepcopy(first.cache), copy.deepcopy(first.cache), first.cache):
            grown = grow(inputs, torch.cat([first.tokens[:, -2:], torch.tensor([[11, 12], [13, 14]])], 1))
            text = {key: value for key, value in grown.items() if "pixel" not in key}
            continued.append(run(model, {**text, cache_name(model): cache}, 3))
            if cache is not first.cache:
                assert [layer.keys.shape[2] for layer in first.cache.layers] == lengths
    assert all(torch.equal(one.logits, continued[0].logits) for one in continued)


def test_a_reset_cache_reads_the_next_prompt_as_a_new_one_does() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with ByScore({0: (0.3, 0.6), 2: (0.5,)})(model):
        first = run(model, {**inputs, cache_name(model): cache}, 3)
        assert first.cache is cache
        cache.reset()
        assert {type(layer) for layer in cache.layers} == {DynamicLayer}
        if cache.get_seq_length() == 0:  # earlier versions of transformers fill it with zeros
            again = run(model, {**inputs, cache_name(model): cache}, 3)
            assert torch.equal(again.logits, first.logits)
