"""Methods that change attention, said plainly: one sample, no cache, weights as a matrix, row by row."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from tests.multimodal.oracle import visual_tokens
from tests.multimodal.runs import run, tiny
from tests.multimodal.test_session import everything_on
from tests.multimodal.tiny import grow, make_inputs, make_model
from visionsel.multimodal.intervention import Intervention

Row = Sequence[float]
# logits and weights of a row, its place, places of image tokens and of sinks, to new weights
Rule = Callable[[Row, Row, int, list[int], set[int]], Row]
Mark = Callable[[Tensor, int], bool]  # from the hidden state and place of a token to whether it is a sink


@lru_cache
def wide(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model whose norms do not round to float32, which makes 1e-7 of 1e-16 now and then."""
    model = make_model(name, dtype=dtype)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module, 1 if "Gemma" in type(module).__name__ else 0)
    return model


def _norm(module: Any, shift: int, hidden: Tensor) -> Tensor:
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * (module.weight + shift)


@contextmanager
def literal(
    model: Any,
    sample: Mapping[str, Any],
    layers: Sequence[int],
    rule: Rule,
    mark: Mark = lambda hidden, place: False,
    gone: Mapping[int, set[int]] | None = None,
    sinks_of: Callable[[Tensor, Tensor, int], list[set[int]]] | None = None,
) -> Iterator[list[int]]:
    """Attention of the decoder as a matrix whose rows go through a rule; no cache may be used.

    Args:
        model: to run.
        sample: the prompt; several rows, for beams, share it.
        layers: where the rule holds.
        rule: for a row.
        mark: which tokens are sinks.
        gone: for each layer the places that a pruner dropped before it.
        sinks_of: tells from logits and weights `[heads, L, L]`, and the layer, the sinks of each head;
            instead of `mark`.

    Yields:
        a list that gets the layer of each row that was changed.
    """
    decoder = getattr(model.model, "language_model", None) or model.model.text_model
    visual = visual_tokens(sample)[0].nonzero()[:, 0].tolist()
    sinks: dict[int, list[set[int]]] = {}
    changed: list[int] = []

    def look(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            sinks[layer] = [{j for j in range(len(row)) if mark(row[j], j)} for row in hidden]

        return hook

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
    ) -> tuple[Tensor, None]:
        groups, size = query.shape[1] // key.shape[1], query.shape[2]
        assert key.shape[2] == size, "no cache"
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = query @ key.transpose(2, 3) * more["scaling"]
        if attention_mask is None:
            attention_mask = torch.ones(size, size, dtype=torch.bool).tril()
        logits = logits.masked_fill(~attention_mask.expand(logits.shape), -torch.inf)
        weights, layer = logits.softmax(-1), module.layer_idx
        if layer in layers:
            away = (gone or {}).get(layer, set())
            there = [j for j in visual if j not in away]
            found = [[sinks[layer][b]] * weights.shape[1] for b in range(len(weights))]
            if sinks_of is not None:
                found = [sinks_of(logits[b], weights[b], layer) for b in range(len(weights))]
            scores, before_rule = logits.tolist(), weights.tolist()
            for b, h, i in itertools.product(*map(range, weights.shape[:3])):
                row = before_rule[b][h][i]
                new = rule(scores[b][h][i], row, i, there, found[b][h] - away)
                if new is not row and i not in away:
                    changed.append(layer)
                    weights[b, h, i] = torch.tensor(new, dtype=weights.dtype)
        return (weights @ value).transpose(1, 2), None

    config, name = decoder.config, "literal"
    before = config._attn_implementation
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    config._attn_implementation = name
    with ExitStack() as stack, torch.no_grad():
        for number, layer in enumerate(decoder.layers):
            stack.callback(layer.register_forward_pre_hook(look(number), with_kwargs=True).remove)
        try:
            yield changed
        finally:
            config._attn_implementation = before
            for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
                table._global_mapping.pop(name)


def steps(model: Any, sample: dict[str, Any], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the prompt `[L, vocabulary]`, and those that each of the tokens `[T]` was chosen by."""
    prompt = model(**sample, use_cache=False).logits[0]
    last = [prompt[-1]]
    for number in range(1, len(tokens)):
        last.append(model(**grow(sample, tokens[None, :number]), use_cache=False).logits[0, -1])
    return prompt, torch.stack(last)


def assert_left_as_it_was(name: str, method: Intervention) -> None:
    """A tiny model is what it was after the context of a method, also where a forward in it fails."""
    model, inputs = tiny(name), make_inputs(name)
    expected = run(model, inputs, 3)
    before = everything_on(model)

    def fail(*args: Any) -> None:
        raise KeyError("on purpose")

    with method(model):
        run(model, inputs, 3)
    assert everything_on(model) == before
    with ExitStack() as faults:
        faults.callback(model.model.language_model.layers[2].mlp.register_forward_hook(fail).remove)
        with pytest.raises(KeyError, match="on purpose"), method(model):
            run(model, inputs, 3)
    assert everything_on(model) == before
    assert torch.equal(run(model, inputs, 3).logits, expected.logits)
