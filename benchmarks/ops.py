"""The operators against what they replace, in turn: `visionsel bench ops [--rounds 7]`.

The baselines are the authors' formulations (`benchmarks.formulations`) and timm's modules; the sizes are
those of `benchmarks.cases`. Training means forward and backward of all inputs, weights and tables. Beside
each time stands the share of the machine's limits that it reaches (`benchmarks.roofline`).
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import cases, paired
from benchmarks import run as run_program
from benchmarks.roofline import least_seconds, limits

__all__ = ["measure", "tables"]

# of the largest value; half precision rounds every product
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def measure(
    *,
    rounds: int,
    batch: int,
    operators: Sequence[str],
    backends: Sequence[str],
    dtype: str,
    device: str | torch.device,
    say: Callable[[str], None] = paired.quiet,
) -> dict[str, Any]:
    """All cases of some operators, forward and training.

    Raises:
        ValueError: for a backend that no operator has.
        RuntimeError: when two ways to compute a case differ.
    """
    options = {name: value for name, value in locals().items() if name not in ("say", "device")}
    cases.check_backends(operators, backends)
    torch.manual_seed(0)
    precision = getattr(torch, dtype)
    timings: list[paired.Timing] = []
    left_out: list[dict[str, str]] = []
    say("limits of the machine")
    reached = limits(device, precision)
    shares: list[dict[str, Any]] = []
    measured = cases.chosen(cases.at_224(batch), operators)
    for number, case in enumerate(measured, 1):
        say(f"[{number}/{len(measured)}] {case.name}")
        prepared = case.prepare(device, precision)
        least = least_seconds(case.work(), reached)
        for mode in cases.MODES:
            name = f"{case.name}, {mode}"
            functions, others = cases.functions(case, prepared, backends, mode)
            left_out += [{"case": name, "name": other, "why": why} for other, why in others.items()]
            with paired.exact(device):
                found = paired.compare(name, functions, rounds, TOLERANCE[dtype])
            timings += found
            if mode == "forward":
                shares += [
                    {
                        "case": name,
                        "name": timing.name,
                        "least_milliseconds": 1e3 * least,
                        "share": least / (1e-3 * _milliseconds(timing, device)),
                    }
                    for timing in found
                ]
    return paired.found(
        "ops",
        timings,
        device,
        options=options,
        left_out=left_out,
        limits=asdict(reached),
        shares=shares,
    )


def _milliseconds(timing: paired.Timing, device: str | torch.device) -> float:
    """By the clock that the limits were measured with."""
    return timing.cpu_milliseconds if torch.device(device).type == "cpu" else timing.milliseconds


def tables(found: dict[str, Any]) -> list[paired.Table]:
    """The times, and how far they are from the machine's limits."""
    times, *left_out = paired.tables(found)
    reached = found["limits"]
    title = (
        f"Share of the machine's limits, forward: {reached['flops'] / 1e9:.0f} GFLOP/s of a matrix product"
    )
    if reached["exps"] is not None:
        title += f", {reached['exps'] / 1e9:.2f} G exponentials/s"
    title += f", a copy of {reached['bytes'] / 1e9:.0f} GB/s"
    rows = [
        [one["case"], one["name"], f"{one['least_milliseconds']:.3f}", f"{100 * one['share']:.1f} %"]
        for one in found["shares"]
    ]
    return [times, (f"{title}.", ["case", "what", "ms at the limits", "share"], rows), *left_out]


if __name__ == "__main__":
    sys.exit(run_program("ops"))
