"""Time functions in turn (A B C A B C ...) and report ratios to the first, round by round.

The machine's speed drifts; a ratio of two things timed one after the other does not. CPU seconds of the
process stand beside wall seconds, since a wall clock also counts what other programs do.
"""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

Table = tuple[str, list[str], list[list[str]]]  # a line above it, the header, the rows


@dataclass
class Timing:
    """One function against the baseline: medians over the rounds, and the spread of the ratio."""

    case: str
    name: str
    milliseconds: float
    cpu_milliseconds: float
    speedup: float  # baseline's time over this one's
    speedup_min: float
    speedup_max: float
    max_difference: float  # of the outputs from the baseline's


def compare(case: str, functions: dict[str, Callable[[], torch.Tensor]], rounds: int = 7) -> list[Timing]:
    """Time `functions` in turn; the first is the baseline, and every output must equal its within 1e-4.

    Args:
        case: what is measured, for the table.
        functions: name -> function that returns the output, the baseline first.
        rounds: counted rounds, after one of warm-up.

    Raises:
        RuntimeError: when an output differs, since the speed of a wrong answer means nothing.
    """
    outputs = {name: function().detach() for name, function in functions.items()}
    baseline = next(iter(functions))
    expected = outputs[baseline]
    differences = {name: (output - expected).abs().max().item() for name, output in outputs.items()}
    for name, difference in differences.items():
        if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
            raise RuntimeError(f"{case}: {name} differs from {baseline} by {difference:.2e}")
    repeats = {name: _repeats(function) for name, function in functions.items()}
    wall: dict[str, list[float]] = {name: [] for name in functions}
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            wall_seconds, cpu_seconds = _time(function, repeats[name])
            wall[name].append(wall_seconds)
            cpu[name].append(cpu_seconds)
    timings = []
    for name in functions:
        ratios = [a / b for a, b in zip(wall[baseline], wall[name], strict=True)]
        timings.append(
            Timing(
                case=case,
                name=name,
                milliseconds=1e3 * statistics.median(wall[name]),
                cpu_milliseconds=1e3 * statistics.median(cpu[name]),
                speedup=statistics.median(ratios),
                speedup_min=min(ratios),
                speedup_max=max(ratios),
                max_difference=differences[name],
            )
        )
    return timings


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _time(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    _synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        function()
    _synchronize()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def _repeats(function: Callable[[], Any], target_seconds: float = 0.05) -> int:
    seconds, _ = _time(function, 1)
    return max(1, min(100, round(target_seconds / max(seconds, 1e-6))))


def quiet(text: str) -> None:
    """What programs tell about their steps where nobody listens."""


def machine() -> dict[str, Any]:
    """What the numbers are of."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def found(timings: list[Timing], **more: Any) -> dict[str, Any]:
    """What a program found, as values of JSON."""
    return {"machine": machine(), "timings": [asdict(timing) for timing in timings], **more}


def tables(found: dict[str, Any]) -> list[Table]:
    """The timings of `found`."""
    header = ["case", "what", "ms", "cpu ms", "speed-up", "spread"]
    rows = [
        [
            timing["case"],
            timing["name"],
            f"{timing['milliseconds']:.2f}",
            f"{timing['cpu_milliseconds']:.2f}",
            f"{timing['speedup']:.2f}x",
            f"{timing['speedup_min']:.2f}..{timing['speedup_max']:.2f}",
        ]
        for timing in found["timings"]
    ]
    return [("", header, rows)]
