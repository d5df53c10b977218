"""Pruners of one budget, so that methods can be compared.

A budget is the share of the image tokens that a decoder layer gets in the mean over the layers, which is what
the `equivalent_tokens` of a report count. Methods that drop at the input get it as their `keep`. Methods that
drop later have passed some layers whole by then, and keep less afterwards:

- one layer (FastV, DART, PromptDistill): the ratio x after it solves (K + (L - K) x) / L = budget, for a drop
  before layer K of L;
- several layers (PyramidDrop, SparseVLM): x, x**2, x**3, ... of the original tokens stay, as in PyramidDrop
  with its lambda, with the x that meets the budget; what SparseVLM recycles comes on top;
- Yopo drops all image tokens before a layer: the nearest to budget * L, 1 or later; below a budget of 1 it
  has its window too;
- VFlowOpt has a budget of its own, of the same meaning;
- PruMerge decides itself how much it keeps: it has no budget.

Layers are the methods' defaults for 32 layers, at the same depth of the decoder. In a decoder of few layers
those before the drop alone can be above the budget, or leave next to nothing for the others. Where x would be
below a quarter of the budget, the budget itself is x: the method then uses more than the others, and
`equivalent_tokens` says how much.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from visionsel.multimodal.pruning.checks import check_keep
from visionsel.multimodal.pruning.pruner import Pruner

__all__ = ["has_budget", "with_budget"]

PAPERS_LAYERS = 32
LEAST_SHARE = 0.25


def has_budget(kind: type[Pruner]) -> bool:
    """Whether the method can be told how much to keep."""
    return bool({"keep", "layer_stop"} & {field.name for field in fields(kind)})


def with_budget(kind: type[Pruner], budget: float, layers: int, **settings: Any) -> Pruner:
    """A pruner that keeps a share of the image tokens in the mean over the decoder layers; see the module.

    Args:
        kind: the method.
        budget: in (0, 1]; ignored by methods without one.
        layers: of the decoder.
        settings: further hyperparameters.

    Raises:
        ValueError: for a budget out of range.
    """
    check_keep(float(budget), "budget")
    default: dict[str, Any] = {field.name: field.default for field in fields(kind)}
    if not has_budget(kind):
        return kind(**settings)
    if "layer_stop" in default:
        if budget == 1:
            return kind(**{"window": None, "layer_stop": None} | settings)
        return kind(**{"layer_stop": min(max(1, round(budget * layers)), layers - 1)} | settings)
    if "stage_keep" in default or not {"layer", "layers"} & set(default):
        return kind(**{"keep": float(budget)} | settings)
    name = "layer" if "layer" in default else "layers"
    where = settings.pop(name, None) or _scaled(default[name], layers)

    def make(x: float) -> Pruner:
        several = isinstance(where, tuple)
        keep = tuple(x ** (stage + 1) for stage in range(len(where))) if several else x
        return kind(**{name: where, "keep": keep} | settings)

    # a stage that only looks, at the input, is not one that drops
    number = len(where) if isinstance(where, tuple) else 1
    starts = [stage.layer for stage in make(1.0).stages(layers)][-number:]
    return make(_solve(budget, starts, layers))


def _scaled(where: Any, layers: int) -> Any:
    """Layers at the same depth of another decoder, rising, and with a layer behind them."""
    if isinstance(where, int):
        return where and max(1, where * layers // PAPERS_LAYERS)
    found: list[int] = []
    for layer in where:
        found.append(max(found[-1] + 1 if found else 1, layer * layers // PAPERS_LAYERS))
    return tuple(layer for layer in found if layer < layers)


def _solve(budget: float, starts: Sequence[int], layers: int) -> float:
    """The x whose powers meet the budget when they are what stays from each start on."""
    ends = [*starts[1:], layers]

    def mean(x: float) -> float:
        spans = [end - start for start, end in zip(starts, ends, strict=True)]
        return (starts[0] + sum(x ** (stage + 1) * span for stage, span in enumerate(spans))) / layers

    x = _bisect(lambda x: mean(x) - budget)
    return budget if x < LEAST_SHARE * budget else round(x, 12)


def _bisect(function: Callable[[float], float]) -> float:
    """Where a rising function on [0, 1] is zero; an end where it nowhere is."""
    low, high = 0.0, 1.0
    if function(high) <= 0:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return low
