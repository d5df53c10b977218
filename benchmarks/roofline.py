"""How far from the machine's limits: what it can do, what a method needs at least, and the share reached.

The limits are measured in the same run as the times: float operations a second of a large matrix product,
bytes a second of a copy, and on a CPU exponentials a second, which cost more there than the products of a
small head. On a GPU they are not counted: a kernel of exponentials alone is bound by its memory.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import paired
from benchmarks.paired import synchronize

__all__ = ["Limits", "Work", "least_seconds", "limits", "share", "tables"]


@dataclass(frozen=True)
class Work:
    """What one forward pass needs, however it is computed: no product twice, nothing kept in memory.

    Attributes:
        flops: multiplications and additions.
        exps: exponentials, and error functions of a GELU.
        numbers: read from inputs and weights or written to the output.
    """

    flops: float
    exps: float
    numbers: float


@dataclass(frozen=True)
class Limits:
    """What the machine reaches, a second; of CPU time on a CPU, where every thread counts.

    Attributes:
        flops: of a matrix product.
        exps: on a CPU; None elsewhere.
        bytes: read and written by a copy, in the cache or in memory, whichever is faster.
        itemsize: bytes of a number.
    """

    flops: float
    exps: float | None
    bytes: float
    itemsize: int


def limits(device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, scale: int = 1) -> Limits:
    """Measure them, each as the best of five.

    Args:
        device, dtype: of the tensors.
        scale: divides the sizes.
    """
    on_cpu = torch.device(device).type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    side = (1024 if on_cpu else 8192) // scale
    a, b, out = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(3))
    pixels = a.view(1, 32 // scale, -1, side).permute(0, 3, 1, 2)  # as a 1x1 convolution: another library
    products = (partial(torch.mm, a, b, out=out), partial(F.conv2d, pixels, b[:, :, None, None]))
    flops = 2 * side**3 / min(_best(product, clock) for product in products)
    rates = []
    for numbers in (2**18 // scale, 2**26 // scale):  # 1 MB and 256 MB of float32
        source = torch.ones(numbers, device=device, dtype=dtype)
        target = torch.empty_like(source)
        copy = _best(partial(target.copy_, source), clock)
        rates.append(2 * source.nbytes / copy)
    exps = None
    if on_cpu:
        x = torch.linspace(-8, 0, 2**18 // scale, dtype=dtype)
        result = torch.empty_like(x)
        exps = x.numel() / _best(partial(torch.exp, x, out=result), clock)
    return Limits(flops, exps, max(rates), torch.empty((), dtype=dtype).itemsize)


def _best(function: Callable[[], torch.Tensor], clock: Callable[[], float]) -> float:
    """Seconds of one call: the best of five, of calls enough to be measured."""
    seconds: list[float] = []
    repeats = 1
    while len(seconds) < 5:
        synchronize()
        start = clock()
        for _ in range(repeats):
            function()
        synchronize()
        passed = clock() - start
        if passed < 0.01 and repeats < 10_000:
            repeats *= 2
        else:
            seconds.append(passed / repeats)
    return max(min(seconds), 1e-9)


def least_seconds(work: Work, limits: Limits) -> float:
    """No machine with these limits is faster: arithmetic, then exponentials, beside moving the numbers."""
    arithmetic = work.flops / limits.flops
    if limits.exps is not None:
        arithmetic += work.exps / limits.exps
    return max(arithmetic, work.numbers * limits.itemsize / limits.bytes)


def share(
    case: str, timing: paired.Timing, work: Work, limits: Limits, device: str | torch.device
) -> dict[str, Any]:
    """How much of the limits a timed function reaches, by the clock that they were measured with."""
    on_cpu = torch.device(device).type == "cpu"
    least = 1e3 * least_seconds(work, limits)
    taken = timing.cpu_milliseconds if on_cpu else timing.milliseconds
    return {"case": case, "name": timing.name, "least_milliseconds": least, "share": least / taken}


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
