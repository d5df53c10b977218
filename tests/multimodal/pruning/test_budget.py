"""What a budget means for each kind of method."""

import pytest

from visionsel.multimodal.pruning.budget import has_budget, with_budget
from visionsel.multimodal.pruning.dart import DART
from visionsel.multimodal.pruning.divprune import DivPrune
from visionsel.multimodal.pruning.fastv import FastV
from visionsel.multimodal.pruning.promptdistill import PromptDistill
from visionsel.multimodal.pruning.prumerge import PruMerge
from visionsel.multimodal.pruning.pruner import Pruner
from visionsel.multimodal.pruning.pyramiddrop import PyramidDrop
from visionsel.multimodal.pruning.random import RandomPrune
from visionsel.multimodal.pruning.sparsevlm import SparseVLM
from visionsel.multimodal.pruning.vflowopt import VFlowOpt
from visionsel.multimodal.pruning.yopo import Yopo

ALL = [RandomPrune, DivPrune, FastV, DART, PromptDistill, PyramidDrop, SparseVLM, VFlowOpt, Yopo]


def mean(pruner: Pruner, layers: int) -> float:
    """The share of tokens of each decoder layer, in the mean, of what is kept at the stages that drop."""
    keep = pruner.keep if isinstance(pruner.keep, tuple) else (pruner.keep,)
    starts = [stage.layer for stage in pruner.stages(layers)][-len(keep) :]
    share, found = 1.0, []
    for layer in range(layers):
        if layer in starts:
            share = keep[starts.index(layer)]
        found.append(share)
    return sum(found) / layers


@pytest.mark.parametrize("kind", [RandomPrune, DivPrune, FastV, DART, PyramidDrop, SparseVLM, PromptDistill])
@pytest.mark.parametrize("budget", [1.0, 0.75, 0.6])
def test_methods_of_every_place_use_the_budget_in_the_mean_over_the_layers(
    kind: type[Pruner], budget: float
) -> None:
    for layers in (4, 28, 32):
        pruner = with_budget(kind, budget, layers)
        assert mean(pruner, layers) == pytest.approx(budget, abs=1e-9)


def test_layers_are_the_papers_at_the_same_depth() -> None:
    assert with_budget(FastV, 0.5, 32).layer == 2
    assert with_budget(FastV, 0.5, 4).layer == 1
    assert with_budget(FastV, 0.5, 64).layer == 4
    assert with_budget(PyramidDrop, 0.5, 32).layers == (8, 16, 24)
    assert with_budget(PyramidDrop, 0.5, 4).layers == (1, 2, 3)
    assert with_budget(SparseVLM, 0.5, 4).layers == (1, 2, 3)
    assert with_budget(SparseVLM, 0.5, 3).layers == (1, 2)
    assert with_budget(RandomPrune, 0.5, 32).layer == 0


def test_a_budget_below_what_the_first_layers_take_becomes_the_ratio_itself() -> None:
    assert with_budget(FastV, 0.25, 4).keep == 0.25
    assert with_budget(FastV, 0.05, 32).keep == 0.05
    assert with_budget(PyramidDrop, 0.25, 32).keep == (0.25, 0.25**2, 0.25**3)
    assert with_budget(FastV, 0.25, 32).keep == pytest.approx((0.25 * 32 - 2) / 30)


def test_other_meanings_of_a_budget() -> None:
    assert with_budget(VFlowOpt, 0.25, 28) == VFlowOpt(keep=0.25)
    assert with_budget(Yopo, 0.5, 32) == Yopo(layer_stop=16)
    assert with_budget(Yopo, 0.01, 32) == Yopo(layer_stop=1)
    assert with_budget(Yopo, 0.999, 32) == Yopo(layer_stop=31)
    assert with_budget(Yopo, 1.0, 32) == Yopo(window=None)
    assert not has_budget(PruMerge)
    assert with_budget(PruMerge, 0.5, 32, plus=True) == PruMerge(plus=True)
    assert all(has_budget(kind) for kind in ALL)


def test_settings_go_on_to_the_method_and_may_name_the_layer() -> None:
    assert with_budget(RandomPrune, 0.5, 32, seed=3) == RandomPrune(keep=0.5, seed=3)
    late = with_budget(FastV, 0.8, 32, layer=16)
    assert late.layer == 16
    assert mean(late, 32) == pytest.approx(0.8)


@pytest.mark.parametrize("budget", [0, -0.5, 1.5, float("nan")])
def test_a_budget_is_a_share(budget: float) -> None:
    with pytest.raises(ValueError, match="budget must be a ratio"):
        with_budget(RandomPrune, budget, 32)
