"""Peak memory of the operators and of what they replace: `visionsel bench memory`.

Bytes that are alive at once during a call, above those that were there before it: activations, what is kept
for backward, gradients. On the CPU the profiler of PyTorch reports each allocation, those inside a kernel
too; scratch of oneDNN and of the C library is not seen. On a GPU the allocator counts.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.profiler import profile

from benchmarks import cases, paired
from benchmarks import run as run_program

__all__ = ["measure", "peak_bytes", "tables"]


def peak_bytes(function: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """The most bytes that were alive at once while `function` ran, its result included.

    Tables that are built once and kept count too: call `function` before.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = function()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del kept
        return peak
    if device.type != "cpu":
        raise ValueError(f"memory is counted on cpu and cuda, not on {device.type}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells stderr of every start and stop
    with profile(use_kineto=True, profile_memory=True) as profiler:
        kept = function()
    del kept
    assert profiler.kineto_results is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def measure(
    *,
    batch: int,
    operators: Sequence[str],
    backends: Sequence[str],
    device: str | torch.device,
    say: Callable[[str], None] = paired.quiet,
) -> dict[str, Any]:
    """Peaks of all cases of some operators, forward and training.

    Raises:
        ValueError: for a backend that no operator has, and a device whose memory is not counted.
        RuntimeError: when two ways to compute a case differ.
    """
    options = {name: value for name, value in locals().items() if name not in ("say", "device")}
    cases.check_backends(operators, backends)
    torch.manual_seed(0)
    peaks: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    measured = cases.chosen(cases.at_224(batch), operators)
    for number, case in enumerate(measured, 1):
        say(f"[{number}/{len(measured)}] {case.name}")
        prepared = case.prepare(device)
        for mode in cases.MODES:
            name = f"{case.name}, {mode}"
            functions, others = cases.functions(case, prepared, backends, mode)
            left_out += [{"case": name, "name": other, "why": why} for other, why in others.items()]
            with paired.exact(device):
                paired.check(name, {key: run() for key, run in functions.items()})
                peaks += [
                    {
                        "operator": case.operator,
                        "case": name,
                        "mode": mode,
                        "name": key,
                        "bytes": peak_bytes(run, device),
                    }
                    for key, run in functions.items()
                ]
    return paired.found("memory", [], device, options=options, left_out=left_out, peaks=peaks)


def tables(found: dict[str, Any]) -> list[paired.Table]:
    """The peaks, and their share of the baseline's."""
    baselines: dict[str, int] = {}
    rows = []
    for one in found["peaks"]:
        baseline = baselines.setdefault(one["case"], one["bytes"])
        share = f"{one['bytes'] / baseline:.2f}" if baseline else "-"
        rows.append([one["case"], one["name"], f"{one['bytes'] / 2**20:.1f}", share])
    header = ["case", "what", "MiB", "of the first"]
    return [("", header, rows), *paired.left_out_table(found)]


if __name__ == "__main__":
    sys.exit(run_program("memory"))
