"""How time grows with the image: `visionsel bench growth [--rounds 5]`.

The first stage of each operator at images of 224, 448 and 896: maps of 56, 112 and 224 a side, with 4 and 16
times the tokens; bi-level routing with windows of one size. The sizes are timed in turn, and each round gives
an exponent: the slope of log(time) over log(tokens), by least squares. 1 is linear, 2 quadratic. Answers are
compared with the baseline's at the smallest size; at the largest, those that gather need gigabytes.
"""

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import cases, paired
from benchmarks import run as run_program

__all__ = ["exponent", "measure", "tables"]


def exponent(tokens: Sequence[float], seconds: Sequence[float]) -> float:
    """The power of tokens that time grows with."""
    x, y = [math.log(number) for number in tokens], [math.log(number) for number in seconds]
    return statistics.linear_regression(x, y).slope


def measure(
    *,
    rounds: int,
    sides: Sequence[int],
    operators: Sequence[str],
    backends: Sequence[str],
    device: str | torch.device,
    say: Callable[[str], None] = paired.quiet,
) -> dict[str, Any]:
    """The exponents of some operators, forward and training.

    Raises:
        ValueError: for fewer than two different sides, or one that blocks of 8 do not divide, and for a
            backend that no operator has.
        RuntimeError: when an operator differs from the baseline at the smallest size.
    """
    options = {name: value for name, value in locals().items() if name not in ("say", "device")}
    cases.check_backends(operators, backends)
    if len(set(sides)) < 2 or any(side % 8 for side in sides):
        given = ", ".join(map(str, sides))
        raise ValueError(f"growth needs two or more sides, all multiples of 8, got {given}; try 56 112 224")
    torch.manual_seed(0)
    by_side = [cases.chosen(cases.first_stages(side), operators) for side in sorted(set(sides))]
    curves: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    clock = paired.counted(paired.machine(device))
    for number, sizes in enumerate(zip(*by_side, strict=True), 1):
        operator = sizes[0].operator
        say(f"[{number}/{len(operators)}] {operator}")
        prepared = [case.prepare(device) for case in sizes]
        for mode in cases.MODES:
            functions, others = cases.functions(sizes[0], prepared[0], backends, mode)
            with paired.exact(device):
                paired.check(f"{sizes[0].name}, {mode}", {name: run() for name, run in functions.items()})
            named = f"{operator}, {mode}"
            left_out += [
                {"case": named, "name": name, "why": why} for name, why in others.items() if name in backends
            ]
            for backend in (name for name in backends if name in functions):
                runs = {
                    case.name: partial(cases.MODES[mode], ways.ours(backend))
                    for case, ways in zip(sizes, prepared, strict=True)
                }
                with paired.exact(device):
                    clocks = list(paired.time_in_turn(runs, rounds).values())
                tokens = [_tokens(case) for case in sizes]
                counted = [getattr(one, clock) for one in clocks]
                exponents = [exponent(tokens, one) for one in zip(*counted, strict=True)]
                curves.append(
                    {
                        "operator": operator,
                        "mode": mode,
                        "name": backend,
                        "cases": list(runs),
                        "tokens": tokens,
                        "milliseconds": [1e3 * statistics.median(one.seconds) for one in clocks],
                        "cpu_milliseconds": [1e3 * statistics.median(one.cpu_seconds) for one in clocks],
                        "exponent": statistics.median(exponents),
                        "exponent_min": min(exponents),
                        "exponent_max": max(exponents),
                        "exponents": exponents,
                    }
                )
    return paired.found("growth", [], device, options=options, left_out=left_out, curves=curves)


def _tokens(case: cases.Case) -> int:
    height, width = case.size if isinstance(case, cases.BilevelRouting) else (case.side, case.side)
    return case.batch * height * width


def tables(found: dict[str, Any]) -> list[paired.Table]:
    """The exponents, and the times they are of."""
    clock = paired.counted(found["machine"])
    name = {"cpu_seconds": "cpu_milliseconds", "seconds": "milliseconds"}[clock]
    sizes = [f"{tokens:,} tokens" for tokens in found["curves"][0]["tokens"]] if found["curves"] else []
    header = ["operator", "mode", "what", *sizes, "exponent", "spread"]
    rows = [
        [
            curve["operator"],
            curve["mode"],
            curve["name"],
            *(f"{milliseconds:.2f} ms" for milliseconds in curve[name]),
            f"{curve['exponent']:.2f}",
            f"{curve['exponent_min']:.2f}..{curve['exponent_max']:.2f}",
        ]
        for curve in found["curves"]
    ]
    title = "Time that the exponent is of: " + ("CPU time." if clock == "cpu_seconds" else "on the wall.")
    return [(title, header, rows), *paired.left_out_table(found)]


if __name__ == "__main__":
    sys.exit(run_program("growth"))
