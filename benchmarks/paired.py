"""Time functions in turn (A B C A B C ...) and report ratios to the first, round by round.

The machine's speed drifts; a ratio of two things timed one after the other does not. CPU seconds of the
process stand beside wall seconds, since a wall clock also counts what other programs do. A function is timed
only after its output was found to equal the first one's.
"""

import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

Table = tuple[str, list[str], list[list[str]]]  # a line above it, the header, the rows
Output = torch.Tensor | Sequence[torch.Tensor]
# of the largest value; half precision rounds every product
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
PACKAGES = ("visionsel", "torch", "timm", "transformers", "natten", "triton")


@dataclass
class Clocks:
    """Seconds of one call, a number a round."""

    seconds: list[float]
    cpu_seconds: list[float]


@dataclass
class Timing(Clocks):
    """One function against the baseline: medians over the rounds, and the spread of the ratios."""

    case: str
    name: str
    milliseconds: float
    cpu_milliseconds: float
    speedup: float  # baseline's time over this one's
    speedup_min: float
    speedup_max: float
    cpu_speedup: float  # the same of CPU time
    cpu_speedup_min: float
    cpu_speedup_max: float
    max_difference: float  # of the outputs from the baseline's, over its largest value


def compare(
    case: str, functions: Mapping[str, Callable[[], Output]], rounds: int = 7, tolerance: float = 1e-4
) -> list[Timing]:
    """Time `functions` in turn; the first is the baseline, and every output must equal its own.

    Args:
        case: what is measured, for the table.
        functions: name -> function that returns the output, or several; the baseline first.
        rounds: counted rounds, after two calls of each for warm-up.
        tolerance: largest difference from the baseline's output, over its largest value.

    Raises:
        RuntimeError: when an output differs, since the speed of a wrong answer means nothing.
    """
    differences = check(case, {name: function() for name, function in functions.items()}, tolerance)
    return timed(case, functions, rounds, differences)


def timed(
    case: str, functions: Mapping[str, Callable[[], Any]], rounds: int, differences: Mapping[str, float]
) -> list[Timing]:
    """`compare` of functions whose answers were compared already; `differences` are what came of that."""
    clocks = time_in_turn(functions, rounds)
    baseline = clocks[next(iter(functions))]
    timings = []
    for name, own in clocks.items():
        ratios = ratios_of(baseline.seconds, own.seconds)
        cpu_ratios = ratios_of(baseline.cpu_seconds, own.cpu_seconds)
        timings.append(
            Timing(
                seconds=own.seconds,
                cpu_seconds=own.cpu_seconds,
                case=case,
                name=name,
                milliseconds=1e3 * statistics.median(own.seconds),
                cpu_milliseconds=1e3 * statistics.median(own.cpu_seconds),
                speedup=statistics.median(ratios),
                speedup_min=min(ratios),
                speedup_max=max(ratios),
                cpu_speedup=statistics.median(cpu_ratios),
                cpu_speedup_min=min(cpu_ratios),
                cpu_speedup_max=max(cpu_ratios),
                max_difference=differences[name],
            )
        )
    return timings


def check(case: str, outputs: Mapping[str, Output], tolerance: float = 1e-4) -> dict[str, float]:
    """How far each output is from the first, over its largest value.

    Raises:
        RuntimeError: when it is more than `tolerance`, or the shapes do not fit.
    """
    baseline = next(iter(outputs))
    expected = _parts(outputs[baseline])
    differences = {}
    for name, output in outputs.items():
        parts = _parts(output)
        sizes, wanted = [x.numel() for x in parts], [x.numel() for x in expected]
        if sizes != wanted:
            raise RuntimeError(f"{case}: {name} returns tensors of {sizes} numbers, {baseline} of {wanted}")
        differences[name] = 0.0
        for own, other in zip(parts, expected, strict=True):
            difference = _apart(own, other)
            if not difference <= tolerance:
                raise RuntimeError(
                    f"{case}: {name} differs from {baseline} by {difference:.2e} of its largest value; "
                    f"at most {tolerance:g} is allowed"
                )
            differences[name] = max(differences[name], difference)
    return differences


def _parts(output: Output) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else list(output)


def _apart(own: torch.Tensor, expected: torch.Tensor) -> float:
    # a 1x1 convolution's weight has two axes more than a linear layer's
    own, expected = own.detach().reshape(expected.shape).double(), expected.detach().double()
    difference = (own - expected).abs().max().item()
    return 0.0 if difference == 0 else difference / max(expected.abs().max().item(), 1e-300)


def usable(
    functions: Mapping[str, Callable[[], Output]],
) -> tuple[dict[str, Callable[[], Output]], dict[str, str]]:
    """Those that can serve their call, tried once, and what the others say against it.

    A backend that cannot serve a call raises NotImplementedError with the reason.
    """
    found, refused = {}, {}
    for name, function in functions.items():
        try:
            function()
        except NotImplementedError as error:
            refused[name] = str(error)
        else:
            found[name] = function
    return found, refused


def time_in_turn(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Clocks]:
    """Seconds of each function, round by round, after two calls of each that are not counted."""
    repeats = {name: _repeats(function) for name, function in functions.items()}
    clocks = {name: Clocks([], []) for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds, cpu_seconds = _time(function, repeats[name])
            clocks[name].seconds.append(seconds)
            clocks[name].cpu_seconds.append(cpu_seconds)
    return clocks


def ratios_of(baseline: Sequence[float], own: Sequence[float]) -> list[float]:
    """How many times as long the baseline took, round by round."""
    return [a / max(b, 1e-9) for a, b in zip(baseline, own, strict=True)]


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _time(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        function()
    synchronize()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def _repeats(function: Callable[[], Any], target_seconds: float = 0.05) -> int:
    function()  # a first call may compile
    seconds, _ = _time(function, 1)
    return max(1, min(100, round(target_seconds / max(seconds, 1e-6))))


def quiet(text: str) -> None:
    """What programs tell about their steps where nobody listens."""


@contextmanager
def exact(device: str | torch.device) -> Iterator[None]:
    """On a GPU, float32 convolutions in float32, not in TF32, so that outputs can be compared."""
    if torch.device(device).type != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What the numbers are of: the machine's class, its share in use, versions and the date."""
    kind = torch.device(device)
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    return {
        "device": kind.type,
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(kind) if kind.type == "cuda" else None,
        "versions": _versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def counted(machine: Mapping[str, Any]) -> str:
    """The clock that ratios are judged by: CPU time of one thread, or the wall's."""
    return "cpu_seconds" if machine["device"] == "cpu" and machine["threads"] == 1 else "seconds"


def found(
    program: str, timings: Sequence[Timing], device: str | torch.device = "cpu", **more: Any
) -> dict[str, Any]:
    """What a program found, as values of JSON."""
    return {
        "program": program,
        "machine": machine(device),
        "timings": [asdict(timing) for timing in timings],
        **more,
    }


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The timings of `found`, and what was left out."""
    header = ["case", "what", "ms", "CPU ms", "speed-up", "spread", "speed-up, CPU time", "spread"]
    rows = [
        [
            timing["case"],
            timing["name"],
            f"{timing['milliseconds']:.2f}",
            f"{timing['cpu_milliseconds']:.2f}",
            f"{timing['speedup']:.2f}x",
            f"{timing['speedup_min']:.2f}..{timing['speedup_max']:.2f}",
            f"{timing['cpu_speedup']:.2f}x",
            f"{timing['cpu_speedup_min']:.2f}..{timing['cpu_speedup_max']:.2f}",
        ]
        for timing in found["timings"]
    ]
    return [("", header, rows), *left_out_table(found)]


def left_out_table(found: Mapping[str, Any]) -> list[Table]:
    """What was not measured and why; no table where all was."""
    cases: dict[tuple[str, str], list[str]] = {}
    for one in found.get("left_out", []):
        cases.setdefault((one["name"], one["why"]), []).append(one["case"])
    rows = [
        [name, why, own[0] + (f" and {len(own) - 1} more" if len(own) > 1 else "")]
        for (name, why), own in cases.items()
    ]
    return [("Not measured:", ["what", "why", "case"], rows)] if rows else []
