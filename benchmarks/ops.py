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

from benchmarks import cases, paired, roofline
from benchmarks import run as run_program
from benchmarks.roofline import limits, tables

__all__ = ["measure", "tables"]


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
        for mode in cases.MODES:
            name = f"{case.name}, {mode}"
            functions, others = cases.functions(case, prepared, backends, mode)
            left_out += [{"case": name, "name": other, "why": why} for other, why in others.items()]
            with paired.exact(device):
                found = paired.compare(name, functions, rounds, paired.TOLERANCE[dtype])
            timings += found
            if mode == "forward":
                shares += [roofline.share(name, timing, case.work(), reached, device) for timing in found]
    return paired.found(
        "ops",
        timings,
        device,
        options=options,
        left_out=left_out,
        limits=asdict(reached),
        shares=shares,
    )


if __name__ == "__main__":
    sys.exit(run_program("ops"))
