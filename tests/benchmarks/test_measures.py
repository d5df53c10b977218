"""How things are measured: exponents, peaks, limits and comparisons give known numbers on known things."""

import re
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from benchmarks import cases, growth, memory, paired, roofline


def test_the_exponent_of_a_power_law_is_its_power() -> None:
    tokens = [56**2, 112**2, 224**2]
    for power in (0.5, 1.0, 1.37, 2.0):
        assert growth.exponent(tokens, [3e-7 * number**power for number in tokens]) == pytest.approx(power)


def test_growth_gives_an_exponent_a_round_and_their_median(monkeypatch: pytest.MonkeyPatch) -> None:
    powers = [1.1, 1.5, 1.2]

    def in_turn(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, paired.Clocks]:
        for function in functions.values():
            function()
        sides = [int(re.findall(r"(\d+)x", name)[0]) for name in functions]
        seconds = [[side ** (2 * power) for power in powers[:rounds]] for side in sides]
        return {name: paired.Clocks(one, one) for name, one in zip(functions, seconds, strict=True)}

    monkeypatch.setattr(paired, "time_in_turn", in_turn)
    operators = ["neighborhood", "focal_modulation"]
    found = growth.measure(
        rounds=3, sides=[16, 8], operators=operators, backends=["auto", "natten"], device="cpu"
    )
    assert [(curve["operator"], curve["mode"], curve["name"]) for curve in found["curves"]] == [
        (operator, mode, "auto") for operator in operators for mode in ("forward", "training")
    ]
    for curve in found["curves"]:
        assert curve["tokens"] == [64, 256]
        assert curve["exponents"] == pytest.approx(powers)
        assert curve["exponent"] == pytest.approx(statistics.median(powers))
        assert (curve["exponent_min"], curve["exponent_max"]) == pytest.approx((1.1, 1.5))
    reasons = {one["case"]: one["why"] for one in found["left_out"]}
    assert reasons["focal_modulation, forward"] == "the operator has no such backend"
    assert "relative position bias" in reasons["neighborhood, training"]
    [(_, header, rows), _] = growth.tables(found)
    assert header[3:5] == ["64 tokens", "256 tokens"]
    assert [row[-2:] for row in rows] == [["1.20", "1.10..1.50"]] * 4


@pytest.mark.parametrize("sides", [[56], [56, 56], [56, 60]])
def test_growth_needs_sizes_that_differ_and_divide(sides: list[int]) -> None:
    with pytest.raises(ValueError, match="two or more sides, all multiples of 8"):
        growth.measure(rounds=1, sides=sides, operators=["halo"], backends=["auto"], device="cpu")


def test_the_peak_of_a_known_graph_is_exact() -> None:
    x = torch.ones(1000)  # 4,000 bytes each time

    def chain() -> torch.Tensor:
        y = x.neg()
        y = y.neg()  # two are alive
        return y.neg()  # two again: the first one has gone

    def wide() -> torch.Tensor:
        first, second = x.neg(), x.exp()
        return first + second

    leaf = x.clone().requires_grad_()

    def training() -> tuple[torch.Tensor, ...]:
        out = leaf.exp()  # kept for backward
        return torch.autograd.grad(out, leaf, x)

    for function, peak in ((chain, 8000), (wide, 12000), (training, 8000)):
        function()
        assert memory.peak_bytes(function) == peak


@pytest.mark.gpu
def test_the_peak_on_a_gpu_is_that_of_the_allocator() -> None:
    x = torch.ones(2**20, device="cuda")
    assert memory.peak_bytes(lambda: x.neg().neg(), "cuda") == 2 * x.nbytes


def test_peaks_stand_beside_those_of_what_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "at_224", lambda batch: [cases.Halo(8, 16, 2, batch, 4, 1)])
    found = memory.measure(batch=1, operators=["halo"], backends=["auto"], device="cpu")
    assert [(one["mode"], one["name"]) for one in found["peaks"]] == [
        (mode, name) for mode in ("forward", "training") for name in ("timm", "auto")
    ]
    assert found["peaks"][2]["bytes"] > found["peaks"][0]["bytes"] > 0
    [(_, header, rows)] = memory.tables(found)
    assert header == ["case", "what", "MiB", "of the first"]
    assert [row[3] for row in rows][::2] == ["1.00", "1.00"]


def test_a_backend_that_no_operator_has_is_named_at_once() -> None:
    with pytest.raises(ValueError, match="no backend of halo is called natten; there are auto, "):
        memory.measure(batch=1, operators=["halo"], backends=["natten"], device="cpu")


def test_least_time_is_the_slower_of_computing_and_moving() -> None:
    work = roofline.Work(flops=600, exps=50, numbers=20)
    computing = roofline.Limits(flops=100, exps=25, bytes=1000, itemsize=4)
    assert roofline.least_seconds(work, computing) == 600 / 100 + 50 / 25
    moving = roofline.Limits(flops=100, exps=None, bytes=10, itemsize=4)
    assert roofline.least_seconds(work, moving) == 20 * 4 / 10
    reached = roofline.limits(scale=16)
    assert reached.exps is not None
    assert min(reached.flops, reached.exps, reached.bytes) > 1e6
    assert reached.itemsize == 4


def test_outputs_are_compared_by_their_largest_value_and_nan_is_refused() -> None:
    one = torch.tensor([[1.0, 1000.0]])
    near, far = one + 0.01, one + 1
    assert paired.check("case", {"a": one, "b": near.view(2, 1)})["b"] == pytest.approx(1e-5, rel=0.1)
    for wrong in (far, one * float("nan")):
        with pytest.raises(RuntimeError, match="case: b differs from a by"):
            paired.check("case", {"a": [one, one], "b": [one, wrong]})
    with pytest.raises(RuntimeError, match=r"b returns tensors of \[2, 2\] numbers, a of \[2\]"):
        paired.check("case", {"a": one, "b": [one, one]})


def test_functions_are_timed_in_turn_and_the_first_is_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "_repeats", lambda function: 1)
    called: list[str] = []

    def function(name: str) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            called.append(name)
            return torch.ones(1)

        return call

    timings = paired.compare("case", {name: function(name) for name in "ab"}, rounds=3)
    assert "".join(called) == "ab" + 3 * "ab"
    assert [timing.name for timing in timings] == ["a", "b"]
    assert timings[0].speedup == timings[0].cpu_speedup == 1
    ratios = [a / b for a, b in zip(timings[0].seconds, timings[1].seconds, strict=True)]
    assert timings[1].speedup == pytest.approx(statistics.median(ratios))
    assert (timings[1].speedup_min, timings[1].speedup_max) == pytest.approx((min(ratios), max(ratios)))


def test_what_cannot_serve_a_call_is_left_out_with_its_reason() -> None:
    def refuses() -> torch.Tensor:
        raise NotImplementedError("not this")

    found, refused = paired.usable({"a": lambda: torch.ones(1), "b": refuses})
    assert (list(found), refused) == (["a"], {"b": "not this"})


@pytest.mark.parametrize(
    ("device", "threads", "clock"), [("cpu", 1, "cpu_seconds"), ("cpu", 2, "seconds"), ("cuda", 1, "seconds")]
)
def test_cpu_time_counts_where_one_thread_is_used(device: str, threads: int, clock: str) -> None:
    assert paired.counted({"device": device, "threads": threads}) == clock
