"""The search for a schedule of VFlowOpt on a few samples (Yang et al. 2025, arXiv:2508.05211).

What the last prompt token has become behind the last layer stands for what the model made of the image. A
schedule is good when this changes little by pruning: the sum over samples of the cosine similarity between
the runs with and without. Bayesian optimisation by a Gaussian process proposes schedules; the ratio of the
last stage is solved from the budget, so that all that are tried cost the same or less.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from visionsel.multimodal.families import find_family
from visionsel.multimodal.pruning.checks import check_keep
from visionsel.multimodal.pruning.vflowopt import VFlowOpt
from visionsel.multimodal.pruning.vflowopt_schedule import last_keep, scheduled

# merged tokens come on top of the schedule; where they are many, as with small blocks, a schedule is refused
ALLOWANCE = 1.1

__all__ = ["Ranges", "Trial", "calibrate"]

Inputs = Mapping[str, Any]
Range = tuple[float, float]


@dataclass(frozen=True)
class Ranges:
    """Where the search looks, by default as the authors; lower and upper end may be the same.

    Attributes:
        vision_keep: in multiples of the target; never above 1.
        stage_keep: of the stages behind the input, but for the last.
        threshold, block, alpha: of `VFlowOpt`.
    """

    vision_keep: Range = (1.0, 1.5)
    stage_keep: Range = (0.533, 1.0)
    threshold: Range = (0.0, 50.0)
    block: Range = (3.0, 24.0)
    alpha: Range = (-1.0, 1.0)


@dataclass(frozen=True)
class Trial:
    """A schedule that was tried.

    Attributes:
        pruner: with the schedule.
        agreement: sum over samples of the cosine similarity with the run that drops nothing.
    """

    pruner: VFlowOpt
    agreement: float


def calibrate(
    model: Any,
    samples: Iterable[Inputs],
    target: float,
    base: VFlowOpt | None = None,
    trials: int = 300,
    startup: int = 27,
    ranges: Ranges | None = None,
    seed: int = 0,
    progress: Callable[[int, Trial | None], None] | None = None,
) -> tuple[VFlowOpt, list[Trial]]:
    """Search the schedule with which a model's answer to a few prompts changes least.

    The first two trials are the uniform schedule, which drops at the input only, and the published one of
    this budget (see `scheduled`); the next are random, then the Gaussian process takes over.

    Args:
        model: in eval mode.
        samples: what its processor returns for prompts with images, on its device, padded on the left; the
            authors take 30.
        target: the budget: the ratio of tokens that a decoder layer has on average.
        base: gives all that is not searched: `layers`, `mean` and `std`, `tower_layer`. Where alpha is
            searched, mean and std must be those of the processor.
        trials: how many schedules are tried.
        startup: how many of them before the Gaussian process; both counts default to the authors'.
        ranges: where to look.
        seed: of the proposals: the same seed gives the same trials, as far as the model computes the same.
        progress: is called after each trial with the number done and the best so far.

    Returns:
        the best pruner (the first of several) and the trials in order, without those that no last stage could
        have brought within the budget, and those that merge into so many tokens that a tenth more is left
        than the budget says, and more than by the first two.

    Raises:
        ImportError: without optuna.
        ValueError: for arguments out of range, or ranges without a schedule in the budget.
    """
    optuna = _optuna()
    base, ranges, samples = base or VFlowOpt(), ranges or Ranges(), list(samples)
    check_keep(target, "target")
    if isinstance(target, int) or not samples or trials < 1 or model.training:
        raise ValueError(
            f"calibrate needs a target ratio, samples, trials and a model in eval mode; got target={target}, "
            f"{len(samples)} samples, {trials} trials and training={model.training}"
        )
    depth = len(find_family(model).decoder(model).layers)  # type: ignore[arg-type]
    bounds = _bounds(ranges, target, len(base.starts(depth)) - 1)
    with _quiet(optuna):
        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        starts = _starts(target, bounds)
        for start in starts:
            study.enqueue_trial(start)
        whole = [_last_hidden(model, sample) for sample in samples]
        tried: list[Trial] = []
        limit = ALLOWANCE * target
        for number in range(trials):
            proposal = study.ask()
            values = {name: proposal.suggest_float(name, *bound) for name, bound in bounds.items()}
            pruner = _pruner(base, target, values, depth)
            agreement, share = (0.0, 1.0) if pruner is None else _agreement(model, samples, whole, pruner)
            if pruner is not None and number < len(starts):  # known schedules, whatever merging adds to them
                limit = max(limit, share)
            if pruner is None or share > limit:
                study.tell(proposal, state=optuna.trial.TrialState.PRUNED)
            else:
                tried.append(Trial(pruner, agreement))
                study.tell(proposal, agreement)
            if progress is not None:
                progress(number + 1, _best(tried))
    best = _best(tried)
    if best is None:
        raise ValueError(
            f"no schedule in {ranges} meets the budget {target} at layers {base.layers}; widen them"
        )
    return best.pruner, tried


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError('the search needs optuna: pip install "visionsel[train]"') from error
    return optuna


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without a line of log for each trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _best(tried: Sequence[Trial]) -> Trial | None:
    return max(tried, key=lambda trial: trial.agreement, default=None)


def _bounds(ranges: Ranges, target: float, free: int) -> dict[str, Range]:
    """Lower and upper end of each variable, by name."""
    low, high = (min(1.0, factor * target) for factor in ranges.vision_keep)
    stages = {f"stage_keep_{i}": ranges.stage_keep for i in range(free)}
    others = {"threshold": ranges.threshold, "block": ranges.block, "alpha": ranges.alpha}
    return {"vision_keep": (low, high), **stages, **others}


def _starts(target: float, bounds: Mapping[str, Range]) -> list[dict[str, float]]:
    """The uniform schedule and the published one, as near as the bounds allow."""
    known = scheduled(target)
    stages = [name for name in bounds if name.startswith("stage_keep")]
    common = {"threshold": known.threshold, "block": known.block, "alpha": 0.0}
    published = dict(zip(stages, known.stage_keep, strict=False))
    starts = [
        {"vision_keep": target, **dict.fromkeys(stages, 1.0), **common},
        {"vision_keep": known.vision_keep, **dict.fromkeys(stages, 1.0), **published, **common},
    ]
    return [
        {name: min(max(start[name], low), high) for name, (low, high) in bounds.items()} for start in starts
    ]


def _pruner(base: VFlowOpt, target: float, values: Mapping[str, float], depth: int) -> VFlowOpt | None:
    """With the last stage that meets the budget; None where there is none."""
    free = tuple(value for name, value in values.items() if name.startswith("stage_keep"))
    last = last_keep(target, values["vision_keep"], free, base.starts(depth), depth)
    if last is None:
        return None
    return replace(
        base,
        keep=target,
        vision_keep=values["vision_keep"],
        stage_keep=(*free, last),
        threshold=values["threshold"],
        block=values["block"],
        alpha=values["alpha"],
    )


def _agreement(
    model: Any, samples: Sequence[Inputs], whole: Sequence[Tensor], pruner: VFlowOpt
) -> tuple[float, float]:
    """Sum of the cosine similarities with the runs that drop nothing, and what part of the tokens is left."""
    total = left = full = 0.0
    with pruner(model) as pruned:
        for sample, expected in zip(samples, whole, strict=True):
            total += float(torch.cosine_similarity(_last_hidden(model, sample), expected, dim=1).sum())
            report = pruned.report()
            left += report.equivalent_tokens * len(expected)
            full += report.full_tokens * len(expected)
    return total, left / full


@torch.no_grad()
def _last_hidden(model: Any, sample: Inputs) -> Tensor:
    """`[B, C]`: what the head reads of the last prompt token; float32 (float64 stays)."""
    mask = sample.get("attention_mask")
    if mask is not None and not bool(mask[:, -1].all()):
        raise ValueError('samples must be padded on the left: processor(..., padding_side="left")')
    found: list[Tensor] = []

    def look(module: Any, args: tuple[Any, ...]) -> None:
        found.append(args[0][:, -1])

    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    hook = model.get_output_embeddings().register_forward_pre_hook(look)
    try:
        model(**sample, **few)
    finally:
        hook.remove()
    return found[0].to(torch.promote_types(found[0].dtype, torch.float32))
