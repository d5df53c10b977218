"""The search for a schedule of VFlowOpt."""

import sys
from typing import Any

import pytest
import torch

from tests.multimodal import tiny
from visionsel.multimodal.pruning.vflowopt import VFlowOpt
from visionsel.multimodal.pruning.vflowopt_schedule import mean_keep
from visionsel.multimodal.pruning.vflowopt_search import Ranges, Trial, calibrate

TARGET = 0.5
STARTS = (1, 3)  # 9 and 18 of 28 in four layers


def setting(number: int = 2) -> tuple[Any, list[dict[str, Any]]]:
    samples = [tiny.make_inputs("llava", batch=1, seed=seed) for seed in range(number)]
    return tiny.make_model("llava"), samples


def agreement(model: Any, samples: list[dict[str, Any]], pruner: VFlowOpt) -> float:
    """Measured without the search: hidden states are asked of the model."""
    total = 0.0
    for sample in samples:
        with torch.no_grad():
            whole = model(**sample, output_hidden_states=True).hidden_states[-1][0, -1]
            with pruner(model):
                pruned = model(**sample, output_hidden_states=True).hidden_states[-1][0, -1]
        total += float(whole @ pruned / whole.norm() / pruned.norm())
    return total


@pytest.fixture(autouse=True)
def _needs_optuna(request: pytest.FixtureRequest) -> None:
    if "without_optuna" not in request.node.name:
        pytest.importorskip("optuna")


def test_the_schedule_found_is_in_the_budget_and_at_least_as_good_as_the_uniform_one() -> None:
    model, samples = setting()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls: list[tuple[int, Trial | None]] = []
    found, trials = calibrate(
        model,
        samples,
        TARGET,
        trials=7,
        startup=5,
        progress=lambda number, best: calls.append((number, best)),
    )
    for trial in trials:
        assert trial.pruner.vision_keep is not None
        assert trial.pruner.stage_keep is not None
        mean = mean_keep(trial.pruner.vision_keep, trial.pruner.stage_keep, STARTS, tiny.LAYERS)
        assert mean <= TARGET + 1e-9
        assert trial.agreement == pytest.approx(agreement(model, samples, trial.pruner), abs=1e-9)
    best = max(trials, key=lambda trial: trial.agreement)
    assert found == best.pruner
    uniform = trials[0].pruner
    assert (uniform.vision_keep, uniform.stage_keep) == (TARGET, (1.0, 1.0))
    assert best.agreement >= agreement(model, samples, uniform) - 1e-9
    assert [number for number, _ in calls] == list(range(1, 8))
    assert calls[-1][1] == best
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_published_schedule_of_the_budget_is_tried_with_its_last_stage_solved() -> None:
    model, samples = setting(1)
    _, trials = calibrate(model, samples, TARGET, trials=2)
    published = trials[1].pruner
    assert published.vision_keep == 0.723
    assert published.stage_keep is not None
    assert published.stage_keep[0] == 0.749
    assert (published.threshold, published.block, published.alpha) == (28.7, 11.76, 0.0)


def test_the_same_seed_gives_the_same_trials_and_another_seed_others() -> None:
    model, samples = setting(1)
    first, second, other = (
        calibrate(model, samples, 0.4, trials=5, startup=4, seed=seed) for seed in (3, 3, 4)
    )
    assert first == second
    assert first[1] != other[1]


def test_ranges_bound_the_search_and_base_gives_the_rest() -> None:
    model, samples = setting(1)
    base = VFlowOpt(layers=(1, 2, 3), stage_keep=(1.0, 1.0, 1.0), tower_layer=0)
    ranges = Ranges(alpha=(0.0, 0.0), block=(2.0, 2.0), threshold=(1.0, 3.0), stage_keep=(0.6, 0.9))
    _, trials = calibrate(model, samples, TARGET, base, trials=5, startup=4, ranges=ranges)
    for trial in trials:
        pruner = trial.pruner
        assert (pruner.alpha, pruner.block, pruner.tower_layer, pruner.layers) == (0.0, 2.0, 0, (1, 2, 3))
        assert pruner.threshold is not None
        assert pruner.stage_keep is not None
        assert 1.0 <= pruner.threshold <= 3.0
        assert all(0.6 <= ratio <= 0.9 for ratio in pruner.stage_keep[:2])


def test_proposals_that_no_last_stage_brings_into_the_budget_are_left_out() -> None:
    model, samples = setting(1)
    base = VFlowOpt(layers=(2, 3))  # late stages: 0.75 * (2 + r) of 4 * 0.5 is too much above r = 0.67
    _, trials = calibrate(model, samples, TARGET, base, trials=10, startup=10)
    assert 2 <= len(trials) < 10
    ranges = Ranges(vision_keep=(1.5, 1.5), stage_keep=(1.0, 1.0))
    with pytest.raises(ValueError, match="no schedule in Ranges"):
        calibrate(model, samples, TARGET, base, trials=2, ranges=ranges)


@pytest.mark.parametrize("wrong", [{"target": 3}, {"target": 0.0}, {"samples": []}, {"trials": 0}])
def test_arguments_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    model, samples = setting(1)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        calibrate(model, **({"samples": samples, "target": TARGET, "trials": 2} | wrong))


def test_a_training_model_and_right_padding_are_refused() -> None:
    model, samples = setting(1)
    padded = dict(samples[0])
    padded["attention_mask"] = padded["attention_mask"].clone()
    padded["attention_mask"][:, -1] = 0
    with pytest.raises(ValueError, match="padded on the left"):
        calibrate(model, [padded], TARGET, trials=1)
    with pytest.raises(ValueError, match="eval mode"):
        calibrate(model.train(), samples, TARGET)


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"visionsel\[train\]"):
        calibrate(None, [], TARGET)
