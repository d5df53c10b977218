"""The Triton kernels against the reference in float64: results and every gradient. See `kernels.py`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import kernels
from visionsel.ops import gpu
from visionsel.ops.halo import triton
from visionsel.ops.halo.reference import reference

# of the largest number; float32: reordered sums; half precision: the attention and its gradient are rounded
# before they are multiplied (by the interpreter towards zero), and so are relative logits and what is stored
TOLERANCE = {torch.float32: 4e-6, torch.float16: 8 * 2**-10, torch.bfloat16: 8 * 2**-7}


@dataclass(frozen=True)
class Case:
    """A call on a map of so many `blocks`; q lies on a map that is `stride` times coarser."""

    blocks: tuple[int, int] = (2, 2)
    block: int = 4
    halo: int = 1
    stride: int = 1
    heads: int = 1
    dims: tuple[int, int] = (16, 16)
    batch: int = 1
    tables: bool = True
    scale: float = 0.4
    layout: str = "plain"  # "fused": slices of one projection, "nchw": channels before the map
    needed: str = "qkvhw"
    dtype: torch.dtype = torch.float32


CASES = {
    "as published, smaller": Case(block=4, halo=2, blocks=(2, 3)),
    "one block": Case(blocks=(1, 1)),
    "one block of one key": Case(blocks=(1, 1), block=1, halo=0),
    "blocks of one key": Case(blocks=(2, 3), block=1, halo=1),
    "no halo": Case(blocks=(1, 2), halo=0),
    "a halo larger than blocks": Case(blocks=(4, 3), block=2, halo=3),
    "a halo larger than the map": Case(blocks=(1, 2), block=2, halo=5, tables=False),
    "coarser queries": Case(blocks=(1, 2), block=6, halo=2, stride=2),
    "one query a block": Case(blocks=(2, 1), block=3, halo=1, stride=3),
    "several parts of blocks and windows": Case(blocks=(1, 1), block=9, halo=1),
    "windows that fill what is read": Case(blocks=(1, 2), block=8, halo=0, tables=False, dims=(32, 32)),
    "no tables": Case(blocks=(1, 2), tables=False),
    "odd dims": Case(blocks=(1, 2), dims=(20, 33), block=3, heads=2),
    "wide heads": Case(blocks=(1, 1), dims=(60, 16)),
    "wide values": Case(blocks=(1, 1), dims=(8, 60)),
    "no scale": Case(blocks=(1, 2), scale=0.0),
    "a negative scale": Case(blocks=(1, 2), scale=-0.7),
    "slices of a projection": Case(blocks=(2, 1), block=3, heads=2, batch=2, layout="fused"),
    "channels before the map": Case(blocks=(1, 2), block=3, heads=2, layout="nchw", dims=(12, 20)),
    "gradient of queries only": Case(blocks=(1, 2), needed="q", tables=False),
    "gradient of keys only": Case(blocks=(1, 2), needed="k"),
    "gradient of values only": Case(blocks=(1, 2), needed="v"),
    "gradient of a table only": Case(blocks=(1, 2), needed="w"),
    "float16": Case(blocks=(1, 2), halo=2, dtype=torch.float16),
    "bfloat16": Case(blocks=(1, 2), halo=2, dtype=torch.bfloat16),
}

# as in HaloNet and timm's models with halos, and at the limits of the tables of sizes
REAL = {
    "heads of 16": Case((8, 8), 8, 3, heads=4, batch=4, layout="fused"),
    "heads of 32": Case((4, 5), 8, 3, heads=4, dims=(32, 32), batch=4, layout="fused"),
    "heads of 32, coarser queries": Case((4, 4), 8, 3, 2, heads=4, dims=(32, 64), batch=4, layout="nchw"),
    "blocks of 10": Case((3, 3), 10, 3, heads=2, batch=2),
    "blocks of 14": Case((2, 3), 14, 2, heads=2, dims=(16, 48), batch=2),
    "a window of 72": Case((2, 2), 64, 4, dims=(32, 32)),
    "heads of 64": Case((4, 4), 8, 3, heads=2, dims=(64, 64)),
    "a large batch": Case((1, 1), 7, 1, heads=3, batch=700),
}

KERNELS = ("relate", "forward", "backward_query", "backward_key", "factor_query", "factor_tables")


def compare(case: Case, device: str) -> None:
    """Results and gradients of the kernels and of the reference in float64, of the same rounded numbers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    size = tuple(count * case.block for count in case.blocks)
    coarse = tuple(side // case.stride for side in size)
    if case.layout == "fused":
        leaves = [random(case.batch, *size, 3, case.heads, case.dims[0])]
    else:
        order = (0, 3, 4, 1, 2) if case.layout == "nchw" else (0, 1, 2, 3, 4)
        shapes = ((coarse, case.dims[0]), (size, case.dims[0]), (size, case.dims[1]))
        leaves = [
            random(case.batch, *side, case.heads, dim).permute(order).contiguous() for side, dim in shapes
        ]
    wanted = ["q" in case.needed] if case.layout == "fused" else [name in case.needed for name in "qkv"]
    if case.tables:
        rows = 2 * (case.block + 2 * case.halo) - 1
        leaves += [random(rows, case.dims[0]) * 0.25 for _ in "hw"]
        wanted += [name in case.needed for name in "hw"]
    probe = random(case.batch, *coarse, case.heads, case.dims[1])

    results = []
    for run, dtype, place in ((triton.triton, case.dtype, device), (reference, torch.float64, "cpu")):
        own = [x.to(place, dtype, copy=True).requires_grad_(on) for x, on in zip(leaves, wanted, strict=True)]
        height, width = own[-2:] if case.tables else (None, None)
        if case.layout == "fused":
            q, k, v = own[0].unbind(3)
        elif case.layout == "nchw":
            q, k, v = (x.permute(0, 3, 4, 1, 2) for x in own[:3])
        else:
            q, k, v = own[:3]
        out = run(q, k, v, case.block, case.halo, case.stride, height, width, case.scale)
        inputs = [x for x in own if x.requires_grad]
        grads = torch.autograd.grad(out, inputs, probe.to(place, dtype))
        results.append([x.detach().cpu().double() for x in (out, *grads)])
    for fast, truth in zip(*results, strict=True):
        largest = max(1.0, truth.abs().max().item())
        torch.testing.assert_close(fast, truth, rtol=0, atol=TOLERANCE[case.dtype] * largest)


def small(device: str) -> tuple[Any, ...]:
    """A call on a map of 2 x 4, with gradients of all but one table."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 1, 16, device=device).requires_grad_() for _ in range(3))
    height, width = torch.randn(2, 7, 16, device=device)
    return q, k, v, 2, 1, 1, height, width.clone().requires_grad_(), 0.3


def the_operators_are_registered_as_torch_wants(device: str) -> None:
    q, k, v, *sizes, height, width, scale = small(device)
    check = partial(
        torch.library.opcheck,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    tables = torch.stack([height, width]).detach().requires_grad_()
    check(triton.relate.operator, (q, tables, *sizes))
    factors = triton.relate(q, tables, *sizes).detach().requires_grad_()
    for needed in ([True, False], [False, True]):
        check(triton.differentiate_factors.operator, (needed, factors, q, tables, *sizes))
    for given in (factors, None):
        call = (q, k, v, given, *sizes, scale)
        check(triton.attend.operator, call)
        out, sums = (x.detach() for x in triton.attend(*call))
        needed = [True, False, True, given is not None]
        check(triton.differentiate.operator, (needed, out, q, k, v, given, out, sums, *sizes, scale))


def an_empty_batch_is_served(device: str) -> None:
    q, k, v, *rest = small(device)
    out = triton.triton(q[:0], k[:0], v[:0], *rest)
    assert out.shape == (0, 2, 4, 1, 16)
    assert not torch.autograd.grad(out.sum(), rest[4])[0].any()


CHECKS: dict[str, Callable[[str], None]] = {
    **kernels.shared_checks(triton, small),
    **{
        check.__name__: check
        for check in (
            the_operators_are_registered_as_torch_wants,
            an_empty_batch_is_served,
        )
    },
}


def test_the_interpreted_kernels_equal_the_reference() -> None:
    kernels.assert_interpreted(__name__)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_a_gpu_without_one(
    capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run() -> None:
        q, k, v = torch.zeros(1, 16, 16, 3, 2, 16, dtype=torch.bfloat16).unbind(3)
        tables = torch.zeros(2, 27, 16, dtype=torch.bfloat16)
        sizes = (8, 3, 1)
        factors = triton.relate(q, tables, *sizes)
        triton.factor_gradients([True] * 2, factors, q, tables, *sizes)
        out, sums = triton.attention(q, k, v, factors, *sizes, 0.25)
        triton.gradients([True] * 4, out, q, k, v, factors, out, sums, *sizes, 0.25)

    shared = kernels.compiled_without_a_gpu(run, capability, monkeypatch, tmp_path)
    assert set(shared) == set(KERNELS)
    assert max(shared.values()) <= 99 * 1024  # bytes that a program may have on consumers' GPUs


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
@pytest.mark.parametrize("head_dim", [16, 32])
def test_results_repeat_bit_for_bit_on_a_gpu(head_dim: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 64, 64, 4, head_dim, device="cuda", requires_grad=True) for _ in range(3))
    height, width = (torch.randn(27, head_dim, device="cuda", requires_grad=True) for _ in range(2))
    runs = []
    for _ in range(3):
        out = triton.triton(q, k, v, 8, 3, 1, height, width, 0.2)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, height, width))))
    for again in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], again, strict=True))


def test_exported_programs_hold_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "interpreted", lambda: True)
    call = small("cpu")
    assert triton.why_not(*call) is None
    monkeypatch.setattr(gpu, "is_exporting", lambda: True)
    assert "exported programs" in str(triton.why_not(*call))


@pytest.mark.parametrize("tile", [4, 8])
@pytest.mark.parametrize("block", [1, 2, 7, 8, 10])
@pytest.mark.parametrize("halo", [0, 1, 3, 9])
def test_tiles_of_keys_begin_where_fewest_blocks_reach_them(tile: int, block: int, halo: int) -> None:
    def reached(shift: int) -> int:
        return sum(
            block * b - halo < first + tile and first < block * (b + 1) + halo
            for first in range(-shift, tile * block - shift, tile)
            for b in range(-60, 60)
        )

    shift = triton.best_shift(tile, block, halo)
    assert 0 <= shift < tile
    assert reached(shift) == min(map(reached, range(tile)))


@pytest.mark.parametrize("window", [1, 4, 8, 14, 18])
def test_what_is_read_covers_a_window(window: int) -> None:
    for read in (16, 32, 64):
        sizes = triton.reading(read, window)
        assert sizes["READ"] == read
        left = window * window % read
        assert left <= sizes["LAST"] <= read
        assert (sizes["LAST"] == 0) == (left == 0)


if __name__ == "__main__":
    kernels.report(triton, {name: partial(compare, case) for name, case in CASES.items()} | CHECKS)
