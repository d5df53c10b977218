"""The Triton kernels against the reference in float64: results and every gradient. See `kernels.py`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import kernels
from visionsel.ops.bilevel_routing import triton
from visionsel.ops.bilevel_routing.reference import reference

# of the largest number; float32: reordered sums; half precision: the attention and its gradient are rounded
# before they are multiplied (by the interpreter towards zero), and once more what is stored
TOLERANCE = {torch.float32: 4e-6, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}


@dataclass(frozen=True)
class Case:
    """A call: windows of `region` tokens on a `grid`, with `pooled` keys a window if these are fewer."""

    grid: tuple[int, int] = (2, 2)
    region: tuple[int, int] = (2, 2)
    topk: int = 2
    heads: int = 1
    dims: tuple[int, int] = (16, 16)
    batch: int = 1
    pooled: tuple[int, int] | None = None
    soft: bool = False
    repeated: bool = False
    layout: str = "plain"  # "fused": slices of one projection, "nchw": channels before the map
    needed: str = "qkvw"
    dtype: torch.dtype = torch.float32


CASES = {
    "windows of four tokens share a block": Case(grid=(2, 3), topk=5),
    "windows of one token": Case(region=(1, 1), topk=3),
    "one window": Case(grid=(1, 1), region=(3, 2), topk=1),
    "blocks end amid windows": Case(grid=(1, 3), region=(3, 5), topk=2),
    "several blocks of queries and keys": Case(grid=(1, 1), region=(13, 19), topk=1),
    "windows that fill their blocks": Case(grid=(2, 1), region=(8, 8), topk=1, dims=(32, 32)),
    "windows twice": Case(grid=(2, 2), region=(3, 3), topk=3, repeated=True),
    "a batch with routings of its own": Case(batch=2, grid=(1, 3), region=(1, 4), topk=2),
    "odd dims": Case(grid=(1, 2), region=(3, 2), dims=(20, 33), heads=2),
    "wide values": Case(region=(3, 2), dims=(8, 72)),
    "wide heads": Case(region=(2, 3), topk=3, dims=(144, 130)),
    "soft": Case(batch=2, grid=(3, 1), soft=True),
    "soft, windows twice": Case(region=(3, 3), topk=3, soft=True, repeated=True),
    "soft, several blocks": Case(grid=(2, 1), region=(9, 9), topk=2, soft=True),
    "coarser keys": Case(region=(4, 4), pooled=(2, 1), topk=3),
    "coarser keys, soft": Case(region=(6, 4), pooled=(2, 2), topk=2, soft=True, dims=(8, 12)),
    "slices of a projection": Case(grid=(1, 2), region=(3, 4), layout="fused", heads=2, soft=True),
    "channels before the map": Case(grid=(2, 1), region=(3, 4), layout="nchw", heads=2, dims=(12, 20)),
    "gradient of queries only": Case(needed="q", soft=True),
    "gradient of keys only": Case(needed="k", soft=True),
    "gradient of values only": Case(needed="v", soft=True),
    "gradient of weights only": Case(needed="w", soft=True),
    "float16": Case(region=(3, 4), topk=3, dtype=torch.float16, soft=True),
    "bfloat16": Case(region=(3, 4), topk=3, dtype=torch.bfloat16, soft=True),
}

# as in BiFormer at 224 pixels, in its detector with windows of 13 x 19, and with pooled keys
REAL = {
    "stage 1": Case(batch=4, grid=(7, 7), region=(8, 8), topk=1, heads=2, dims=(32, 32), layout="fused"),
    "stage 2": Case(batch=4, grid=(7, 7), region=(4, 4), topk=4, heads=4, dims=(32, 32), layout="fused"),
    "stage 3": Case(batch=4, grid=(7, 7), topk=16, heads=8, dims=(32, 32), layout="fused"),
    "detection": Case(grid=(16, 16), region=(13, 19), topk=1, heads=2, dims=(32, 32), layout="fused"),
    "pooled keys": Case(grid=(7, 7), region=(8, 8), pooled=(4, 4), topk=4, heads=2, dims=(32, 64)),
    "soft routing": Case(batch=2, grid=(7, 7), region=(8, 8), topk=4, heads=2, dims=(64, 64), soft=True),
    "heads of 256": Case(grid=(4, 4), region=(7, 7), topk=4, dims=(256, 256), soft=True),
}


def compare(case: Case, device: str) -> None:
    """Results and gradients of the kernels and of the reference in float64, of the same rounded numbers."""
    generator = torch.Generator().manual_seed(0)
    windows = case.grid[0] * case.grid[1]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    regions = (case.region, case.pooled or case.region)
    sides = [(case.grid[0] * height, case.grid[1] * width) for height, width in regions]
    if case.layout == "fused":
        leaves = [random(case.batch, *sides[0], 3, case.heads, case.dims[0])]
    else:
        shapes = ((sides[0], case.dims[0]), (sides[1], case.dims[0]), (sides[1], case.dims[1]))
        order = (0, 3, 4, 1, 2) if case.layout == "nchw" else (0, 1, 2, 3, 4)
        leaves = [
            random(case.batch, *side, case.heads, dim).permute(order).contiguous() for side, dim in shapes
        ]
    index = torch.rand(case.batch, windows, windows, generator=generator).argsort(-1)[..., : case.topk]
    if case.repeated:
        index[..., 1] = index[..., 0]
    weight = torch.rand(index.shape, generator=generator) + 0.5 if case.soft else None
    probe = random(case.batch, *sides[0], case.heads, case.dims[case.layout != "fused"])
    maps = "qkv" if case.layout != "fused" else ("q",)
    grads_of = [name in case.needed for name in (*maps, "w")]

    results = []
    for run, dtype, place in ((triton.triton, case.dtype, device), (reference, torch.float64, "cpu")):
        own = [
            x.detach().to(place, dtype).requires_grad_(wanted)
            for x, wanted in zip(leaves, grads_of, strict=False)
        ]
        factor = None
        if weight is not None:
            factor = weight.detach().to(place, torch.float64 if run is reference else torch.float32)
            factor.requires_grad_(grads_of[-1])
        if case.layout == "fused":
            q, k, v = own[0].unbind(3)
        elif case.layout == "nchw":
            q, k, v = (x.permute(0, 3, 4, 1, 2) for x in own)
        else:
            q, k, v = own
        out = run(q, k, v, case.grid, 0.4, index.to(place), factor)
        inputs = [x for x in (*own, factor) if x is not None and x.requires_grad]
        grads = torch.autograd.grad(out, inputs, probe.to(place, dtype))
        results.append([x.detach().cpu().double() for x in (out, *grads)])
    for fast, truth in zip(*results, strict=True):
        largest = max(1.0, truth.abs().max().item())
        torch.testing.assert_close(fast, truth, rtol=0, atol=TOLERANCE[case.dtype] * largest)


def small(device: str) -> tuple[Any, ...]:
    """A call of 1 x 3 windows with soft routing, all of it with gradients."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 1, 16, device=device).requires_grad_() for _ in range(3))
    index = torch.rand(1, 3, 3, device=device).argsort(-1)[..., :2]
    weight = torch.rand(1, 3, 2, device=device).requires_grad_()
    return q, k, v, (1, 3), 0.3, index, weight


def the_operator_is_registered_as_torch_wants(device: str) -> None:
    q, k, v, grid, scale, index, weight = small(device)
    for w in (weight, None):
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(triton.attend.operator, (q, k, v, index, w, *grid, scale), test_utils=tests)


def all_windows_are_plain_attention(device: str) -> None:
    q, k, v, grid, scale, *_ = small(device)
    index = torch.arange(3, device=device).expand(1, 3, 3)
    plain = triton.triton(q, k, v, grid, scale, None, None)
    torch.testing.assert_close(plain, triton.triton(q, k, v, grid, scale, index, None), rtol=0, atol=2e-6)


def an_empty_batch_is_served(device: str) -> None:
    q, k, v, grid, scale, index, weight = small(device)
    assert triton.triton(q[:0], k[:0], v[:0], grid, scale, index[:0], weight[:0]).shape == (0, 2, 6, 1, 16)


CHECKS: dict[str, Callable[[str], None]] = {
    **kernels.shared_checks(triton, small),
    **{
        check.__name__: check
        for check in (
            the_operator_is_registered_as_torch_wants,
            all_windows_are_plain_attention,
            an_empty_batch_is_served,
        )
    },
}


@pytest.mark.slow
def test_the_interpreted_kernels_equal_the_reference() -> None:
    kernels.assert_interpreted(__name__)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*CASES, *REAL])
def test_the_kernels_equal_the_reference_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    compare(replace({**CASES, **REAL}[name], dtype=dtype), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_the_operator_holds_on_a_gpu(name: str) -> None:
    CHECKS[name]("cuda")


@pytest.mark.gpu
def test_results_repeat_bit_for_bit_on_a_gpu() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 56, 56, 2, 32, device="cuda", requires_grad=True) for _ in range(3))
    index = torch.randint(49, (4, 49, 8), device="cuda")
    runs = []
    for _ in range(3):
        out = triton.triton(q, k, v, (7, 7), 0.2, index, None)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for again in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("windows", [1, 5])
def test_the_routing_turned_round_names_every_reader(windows: int) -> None:
    index = torch.randint(windows, (3, windows, 4), generator=torch.Generator().manual_seed(0))
    places, starts = triton.turned(index, windows)
    for b in range(3):
        flat = index[b].flatten().tolist()
        for window in range(windows):
            readers = places[b, starts[b, window] : starts[b, window + 1]].tolist()
            assert readers == [place for place, named in enumerate(flat) if named == window]


if __name__ == "__main__":
    kernels.report(triton, {name: partial(compare, case) for name, case in CASES.items()} | CHECKS)
