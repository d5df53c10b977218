"""How long a model takes with and without pruning, measured in turn.

The rounds go A B C, C B A, A B C ...: the speed of a machine drifts, and what is compared is what ran side by
side. CPU time of the process stands beside wall time, which also counts what other programs do.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from visionsel.multimodal.families import find_family
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.pruning.report import Pruned, Report, Times

__all__ = ["measure", "measure_in_turn"]

Seconds = tuple[float, float]  # wall, CPU
_UNPRUNED = ""


def measure(
    model: Any, pruner: Intervention, inputs: Mapping[str, Any], rounds: int = 5, new_tokens: int = 0
) -> Report:
    """Time the prefill, and decoding, of one batch with a pruner and without.

    Args:
        model: a vision-language model of transformers.
        pruner: one pruner, or a `Stack` of them.
        inputs: of `model.generate`, as a processor returns them.
        rounds: counted rounds of both, after one of warm-up.
        new_tokens: how many tokens to generate after the first, greedily; 0 leaves decoding out.

    Returns:
        The report of the batch, with times.

    Raises:
        ValueError: for `rounds` below 1 or `new_tokens` below 0.
    """
    return measure_in_turn(model, {"pruned": pruner}, inputs, rounds, new_tokens)["pruned"]


def measure_in_turn(
    model: Any,
    pruners: Mapping[str, Intervention],
    inputs: Mapping[str, Any],
    rounds: int = 5,
    new_tokens: int = 0,
) -> dict[str, Report]:
    """`measure` of several pruners, which share the runs without pruning; a report for each name."""
    if rounds < 1 or new_tokens < 0:
        raise ValueError(
            f"rounds must be at least 1 and new_tokens at least 0, got {rounds} and {new_tokens}"
        )
    runs: dict[str, Intervention | None] = {_UNPRUNED: None, **pruners}
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in runs}
    reports: dict[str, Report] = {}
    order = list(runs)
    for number in range(rounds + 1):
        for name in order if number % 2 else reversed(order):
            seconds, pruned = _run(model, runs[name], inputs, new_tokens)
            if pruned is not None:
                reports[name] = pruned.report()
            if number:  # the first round warms up
                for clock, (wall, cpu) in seconds.items():
                    found[name][f"{clock}seconds"].append(wall)
                    found[name][f"{clock}cpu_seconds"].append(cpu)
    for name, report in reports.items():
        times: dict[str, Any] = {
            clock: Times.of(full, found[name][clock]) for clock, full in found[_UNPRUNED].items()
        }
        reports[name] = replace(report, **times)
    return reports


def _run(
    model: Any, pruner: Intervention | None, inputs: Mapping[str, Any], new_tokens: int
) -> tuple[dict[str, Seconds], Pruned | None]:
    """Generate once; seconds to the first token ("") and for each later one, and of the decoder's prefill."""
    with pruner(model) if pruner is not None else nullcontext() as handle:
        steps = _Steps(model)
        with _prefill_clock(model) as decoder:
            start = _now(model)
            model.generate(
                **inputs,
                max_new_tokens=1 + new_tokens,
                min_new_tokens=1 + new_tokens,
                do_sample=False,
                num_beams=1,
                logits_processor=LogitsProcessorList([steps]),
            )
    seconds = {"": _since(start, steps.times[0]), "decoder_": decoder[0]}
    if new_tokens:
        wall, cpu = _since(steps.times[0], steps.times[new_tokens])
        seconds["token_"] = (wall / new_tokens, cpu / new_tokens)
    return seconds, handle[0] if isinstance(handle, tuple) else handle


class _Steps(LogitsProcessor):
    """Notes when the logits of each new token are there."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.times: list[Seconds] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(_now(self.model))
        return scores


@contextmanager
def _prefill_clock(model: nn.Module) -> Iterator[list[Seconds]]:
    """Times each forward of the decoder, outside of all hooks that are there by now."""
    decoder = find_family(model).decoder(model)
    starts: list[Seconds] = []
    found: list[Seconds] = []

    def begin(*_: Any) -> None:
        if not found:
            starts.append(_now(model))

    def end(*_: Any) -> None:
        if not found:
            found.append(_since(starts[-1], _now(model)))

    hooks = [decoder.register_forward_pre_hook(begin, prepend=True), decoder.register_forward_hook(end)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _now(model: Any) -> Seconds:
    """The clocks, when the model's device has done what it was told."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter(), time.process_time()


def _since(start: Seconds, end: Seconds) -> Seconds:
    return end[0] - start[0], end[1] - start[1]
