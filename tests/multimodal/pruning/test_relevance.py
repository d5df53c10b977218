"""Relevance against a plain computation: all attention matrices, autograd, whole products."""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tests.multimodal import tiny
from visionsel.multimodal.pruning import relevance as module
from visionsel.multimodal.pruning.random import RandomPrune
from visionsel.multimodal.pruning.relevance import relevance

ANSWER = 3


@lru_cache
def model_of(name: str) -> Any:
    return tiny.make_model(name)


def batch_of(name: str, **options: Any) -> tuple[dict[str, Any], int]:
    """Prompts with answers of three tokens, padded on the left, and where the answers start."""
    prompts = tiny.make_inputs(name, **options)
    batch, length = prompts["input_ids"].shape
    answers = torch.randint(2, 90, (batch, ANSWER), generator=torch.Generator().manual_seed(7))
    return tiny.grow(prompts, answers), length


def rollout(attentions: list[Tensor], gradients: list[Tensor], rows: list[int]) -> Tensor:
    """Of one sample `[heads, L, L]` a layer: the sum of some rows of R."""
    whole = torch.eye(attentions[0].shape[-1], dtype=attentions[0].dtype)
    for attention, gradient in zip(attentions, gradients, strict=True):
        whole = whole + (gradient * attention).clamp(min=0).mean(0) @ whole
    return whole[rows].sum(0)


def by_autograd(
    model: Any,
    inputs: dict[str, Any],
    starts: list[int],
    ends: list[int],
    attentions: list[Tensor] | None = None,
) -> list[Tensor]:
    """For each sample the relevance of its image tokens; attentions None: those of the output."""
    out = model(**inputs, output_attentions=attentions is None, use_cache=False)
    kept = list(out.attentions) if attentions is None else attentions
    likely = out.logits.log_softmax(-1)
    ids = inputs["input_ids"]
    total = sum(
        likely[b, place - 1, ids[b, place]] for b in range(len(ids)) for place in range(starts[b], ends[b])
    )
    gradients = torch.autograd.grad(total, kept)
    found = []
    for b in range(len(ids)):
        rows = list(range(starts[b] - 1, ends[b] - 1))
        whole = rollout([a[b].detach() for a in kept], [g[b] for g in gradients], rows)
        found.append(whole[ids[b] == tiny.IMAGE])
    return found


@contextmanager
def collecting(model: Any) -> Iterator[list[Tensor]]:
    """A kernel that is a plain softmax in the precision of the model, and leaves its weights in a list."""
    found: list[Tensor] = []

    def attend(
        owner: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **arguments: Any
    ) -> Any:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        size = query.shape[2]
        mask = torch.ones(size, size, dtype=torch.bool).tril() if mask is None else mask
        logits = (query @ key.transpose(2, 3) * arguments["scaling"]).masked_fill(~mask, -1e300)
        weights = logits.softmax(-1)
        found.append(weights)
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("collecting", attend)
    AttentionMaskInterface.register("collecting", sdpa_mask)
    config = getattr(model.model, "language_model", None) or model.model.text_model
    config = config.config
    before, config._attn_implementation = config._attn_implementation, "collecting"
    try:
        yield found
    finally:
        config._attn_implementation = before
        AttentionInterface._global_mapping.pop("collecting")
        AttentionMaskInterface._global_mapping.pop("collecting")


def assert_equal(found: Tensor, expected: list[Tensor], rtol: float) -> None:
    """Samples with fewer tokens are 0 behind their last."""
    assert len(found) == len(expected)
    assert found.shape[1] == max(len(row) for row in expected)
    for row, wanted in zip(found, expected, strict=True):
        assert wanted.min() >= 0
        assert wanted.max() > 0
        torch.testing.assert_close(row[: len(wanted)], wanted, rtol=rtol, atol=rtol * float(wanted.max()))
        assert not row[len(wanted) :].any()


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_it_equals_whole_products_of_all_attentions_and_their_gradients(name: str) -> None:
    model, (inputs, start) = model_of(name), batch_of(name)
    with collecting(model) as attentions:
        length = inputs["input_ids"].shape[1]
        expected = by_autograd(model, inputs, [start] * 2, [length] * 2, attentions)
    assert_equal(relevance(model, inputs, start), expected, 1e-9)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_it_equals_what_the_attentions_of_eager_models_give(name: str) -> None:
    eager = copy.deepcopy(model_of(name)).float()
    eager.set_attn_implementation("eager")
    inputs, start = batch_of(name)
    inputs["pixel_values"] = inputs["pixel_values"].float()
    length = inputs["input_ids"].shape[1]
    expected = by_autograd(eager, inputs, [start] * 2, [length] * 2)
    assert_equal(relevance(eager, inputs, start), expected, 1e-3)
    double = inputs | {"pixel_values": inputs["pixel_values"].double()}
    assert_equal(relevance(model_of(name), double, start), [row.double() for row in expected], 1e-3)


def test_a_sample_alone_with_its_answer_has_the_relevance_it_has_in_either_padding() -> None:
    model = model_of("llava")
    inputs, _ = batch_of("llava", before=(3, 6), after=(5, 4))
    alone = []
    for b in range(2):
        real = inputs["attention_mask"][b].bool()
        one = {key: inputs[key][b : b + 1, real] for key in ("input_ids", "attention_mask")}
        one["pixel_values"] = inputs["pixel_values"][b : b + 1]
        cut = 1 if b else 0  # the second answer is shorter
        one |= {key: one[key][:, : one[key].shape[1] - cut] for key in ("input_ids", "attention_mask")}
        alone.append(one)
    lengths = [one["input_ids"].shape[1] for one in alone]
    starts = [lengths[0] - 3, lengths[1] - 2]
    expected = [relevance(model, one, first)[0] for one, first in zip(alone, starts, strict=True)]
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    for left in (True, False):
        longest = max(lengths)
        ids, mask = torch.full((2, longest), tiny.PAD), torch.zeros(2, longest, dtype=torch.int64)
        offsets = [longest - n if left else 0 for n in lengths]
        for b, offset in enumerate(offsets):
            ids[b, offset : offset + lengths[b]] = alone[b]["input_ids"]
            mask[b, offset : offset + lengths[b]] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": inputs["pixel_values"]}
        first = torch.tensor([start + offset for start, offset in zip(starts, offsets, strict=True)])
        # rotary positions are float32, and padding on the left moves them
        assert_equal(relevance(model, batch, first), expected, 1e-4 if left else 1e-9)


def test_images_of_different_sizes_and_samples_without_images_are_padded_with_zeros() -> None:
    model = model_of("llava_next")
    inputs, start = batch_of("llava_next")
    found = relevance(model, inputs, start)
    counts = (inputs["input_ids"] == tiny.IMAGE).sum(1).tolist()
    assert counts[0] != counts[1]
    for row, number in zip(found, counts, strict=True):
        assert (row[:number] > 0).any()
        assert not row[number:].any()
    inputs, start = batch_of("llava", images=(1, 0))
    found = relevance(model_of("llava"), inputs, start)
    assert found.shape == (2, 16)
    assert not found[1].any()


def every_hook(model: Any) -> list[dict[int, Any]]:
    return [hooks for owner in model.modules() for hooks in (owner._forward_hooks, owner._forward_pre_hooks)]


def test_the_model_stays_as_it_is_and_gets_no_gradients() -> None:
    model, (inputs, start) = model_of("llava"), batch_of("llava")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(**inputs).logits
        hooks = [list(hook.values()) for hook in every_hook(model)]
        found = relevance(model, inputs, start)  # needs no gradients of the caller
        assert torch.equal(model(**inputs).logits, logits)
    with torch.inference_mode():
        inside = relevance(model, {key: value.clone() for key, value in inputs.items()}, start)
    assert torch.equal(found, inside)
    assert not found.requires_grad
    assert torch.equal(found, relevance(model, inputs, start))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [list(hook.values()) for hook in every_hook(model)] == hooks
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_frozen_parameters_change_nothing() -> None:
    inputs, start = batch_of("llava")
    frozen = copy.deepcopy(model_of("llava")).requires_grad_(False)
    assert torch.equal(relevance(frozen, inputs, start), relevance(model_of("llava"), inputs, start))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_one_layer_at_a_time_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    plain = module.explicit_attention

    def watched(call: Any) -> tuple[Tensor, Tensor]:
        assert all(reference() is None for reference in alive)
        output, weights = plain(call)
        alive.append(weakref.ref(weights))
        return output, weights

    monkeypatch.setattr(module, "explicit_attention", watched)
    relevance(model_of("llava"), *batch_of("llava"))
    assert len(alive) == tiny.LAYERS


def test_what_makes_no_sense_is_refused() -> None:
    model, (inputs, start) = model_of("llava"), batch_of("llava")
    length = inputs["input_ids"].shape[1]
    for wrong in (0, length, torch.tensor([start, length])):
        with pytest.raises(ValueError, match="needs a prompt before it and an answer"):
            relevance(model, inputs, wrong)
    with RandomPrune(keep=0.5)(model), pytest.raises(RuntimeError, match="leave its context first"):
        relevance(model, inputs, start)
    trained = copy.deepcopy(model).train()
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        relevance(trained, inputs, start)
