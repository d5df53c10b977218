"""Tiny models that run: cached, with a pruner whose choice is known beforehand."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from tests.multimodal.oracle import SCORES
from tests.multimodal.tiny import make_inputs, make_model
from visionsel.multimodal.pruning.checks import count, counts, top
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens

DTYPES = {"sdpa": torch.float64, "eager": torch.float32}  # eager computes its softmax in float32 anyway
Ratios = Mapping[int, Sequence[float]]


@lru_cache
def tiny(name: str, attention: str = "sdpa", dtype: torch.dtype | None = None) -> Any:
    """A model; tests share it, so whoever changes it puts it back."""
    model = make_model(name, attention, dtype or DTYPES[attention])
    with torch.no_grad():  # transformers puts hooks of its own on at the first forward
        model(**make_inputs(name, dtype=model.dtype))
    return model


@dataclass(frozen=True)
class ByScore(Pruner):
    """Keeps the tokens with the highest `SCORES`: the same ones in any batch.

    Attributes:
        ratios: for each layer, what part of the tokens that arrive stays, by sample (cyclically).
        merge: whether a kept token becomes the mean of itself and the tokens up to the next kept one.
        options: of the stages.
    """

    ratios: Ratios
    merge: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def stages(self, layers: int) -> list[Stage]:
        return [
            Stage(layer, partial(self._select, ratios), **self.options)
            for layer, ratios in self.ratios.items()
        ]

    def _select(self, ratios: Sequence[float], tokens: VisualTokens) -> Tensor | tuple[Tensor, Tensor]:
        number = [count(ratios[b % len(ratios)], int(n)) for b, n in enumerate(tokens.valid.sum(1))]
        scores = SCORES.to(tokens.index.device)[tokens.index]
        mask = top(scores, tokens.index.new_tensor(number), tokens.valid)
        if not self.merge:
            return mask
        group = mask.cumsum(1)[..., None].expand_as(tokens.features)
        sums = torch.zeros_like(tokens.features[:, :1]).repeat(1, mask.shape[1] + 1, 1)
        sizes = sums.scatter_add(1, group, tokens.valid[..., None].to(sums.dtype).expand_as(tokens.features))
        sums = sums.scatter_add(1, group, tokens.features)
        return mask, (sums / sizes.clamp(min=1)).gather(1, group)


@dataclass(frozen=True)
class ByAttention(Pruner):
    """Keeps the tokens that the last token of the prompt attends to most, or the vision tower."""

    keep: float
    layer: int
    reads: str | None = "previous"
    tower: bool = False

    def stages(self, layers: int) -> list[Stage]:
        return [Stage(self.layer, self._select, reads=self.reads, tower=self.tower)]

    def _select(self, tokens: VisualTokens) -> Tensor:
        attention = tokens.tower_attention() if self.tower else tokens.attention()
        return top(attention.mean(1), counts(self.keep, tokens.valid), tokens.valid)


@dataclass
class Run:
    """What `generate` gave.

    Attributes:
        tokens: `[B, L + new]`.
        logits: `[forwards, B, vocabulary]` of the last token, in the precision of the model.
        cache: at the end.
    """

    tokens: Tensor
    logits: Tensor
    cache: Any


def run(model: Any, inputs: Mapping[str, Any], new: int = 7, **options: Any) -> Run:
    """Generate greedily: the prompt and `new - 1` steps."""
    logits: list[Tensor] = []
    # generate() itself gives logits in float32
    hook = model.get_output_embeddings().register_forward_hook(lambda *call: logits.append(call[2][:, -1]))
    options = {"do_sample": False, "max_new_tokens": new, "return_dict_in_generate": True} | options
    try:
        with torch.no_grad():
            out = model.generate(**inputs, **options)
    finally:
        hook.remove()
    return Run(out.sequences, torch.stack(logits), out.get(cache_name(model)))


def cache_name(model: Any) -> str:
    """How this version of transformers calls the cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return float((a - b).abs().amax())
