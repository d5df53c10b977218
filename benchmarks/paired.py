"""Time functions in turn (A B C A B C ...) and report ratios to the first, round by round.

The machine's speed drifts; a ratio of two things timed one after the other does not. CPU seconds of the
process stand beside wall seconds, since a wall clock also counts what other programs do.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


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


def report(timings: list[Timing], path: Path) -> None:
    """Print the table and write it with the machine's particulars as JSON, under a temporary name first."""
    width = max(len(t.case) for t in timings)
    print(f"{'case':{width}}  {'what':12}  {'ms':>9}  {'cpu ms':>9}  {'speed-up':>8}  {'spread':>13}")
    for t in timings:
        spread = f"{t.speedup_min:.2f}..{t.speedup_max:.2f}"
        print(
            f"{t.case:{width}}  {t.name:12}  {t.milliseconds:9.2f}  {t.cpu_milliseconds:9.2f}  "
            f"{t.speedup:7.2f}x  {spread:>13}"
        )
    machine = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"machine": machine, "timings": [asdict(t) for t in timings]}, indent=2))
    partial.replace(path)
    print(f"\nwritten to {path}")
