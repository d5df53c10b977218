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
from visionsel.ops.neighborhood import triton
from visionsel.ops.neighborhood.rectangles import build_plan
from visionsel.ops.neighborhood.reference import reference

# of the largest number; float32: reordered sums; half precision: the attention and its gradient are rounded
# before they are multiplied (by the interpreter towards zero), and once more what is stored
TOLERANCE = {torch.float32: 4e-6, torch.float16: 8 * 2**-10, torch.bfloat16: 8 * 2**-7}


@dataclass(frozen=True)
class Case:
    """A call on a map of `size`; `bias` is "none", "plain" or "closed": a plain one with some -inf."""

    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    dilation: tuple[int, int] = (1, 1)
    heads: int = 1
    dims: tuple[int, int] = (16, 16)
    batch: int = 1
    bias: str = "plain"
    scale: float = 0.4
    layout: str = "plain"  # "fused": slices of one projection, "nchw": channels before the map
    needed: str = "qkvb"
    dtype: torch.dtype = torch.float32


CASES = {
    "one tile": Case((4, 5)),
    "tiles in both directions": Case((10, 9), (3, 5), bias="none"),
    "a map that its tiles fill": Case((8, 16), needed="qkv"),
    "a kernel of the map's size": Case((5, 7), (5, 7), needed="qkv"),
    "a kernel almost of the map's size": Case((10, 9), (7, 7), bias="none"),
    "a kernel of one position": Case((3, 2), (1, 1)),
    "a kernel of one row": Case((2, 11), (1, 5)),
    "a kernel of one column": Case((17, 2), (5, 1), needed="qkv"),
    "grids of one size": Case((3, 6), (1, 3), (3, 2)),
    "grids of several sizes": Case((7, 3), (3, 1), (2, 2)),
    "grids whose last tiles are empty": Case((9, 4), (3, 1), (2, 1), dims=(100, 16), needed="qkv"),
    "many tiles of wide heads": Case((9, 6), (5, 3), dims=(100, 20), needed="qkv"),
    "odd dims": Case((4, 3), dims=(20, 33), needed="qkv"),
    "strips of columns": Case((2, 40), (1, 5)),
    "blocks of columns": Case((1, 50), (1, 33)),
    "splits of the batch": Case((8, 3), (1, 3), batch=4),
    "a bias with closed places": Case((4, 5), bias="closed"),
    "no scale": Case((4, 5), scale=0.0, needed="qkv"),
    "a negative scale": Case((4, 5), scale=-0.7, needed="qkv"),
    "slices of a projection": Case((1, 5), (1, 3), heads=2, layout="fused", batch=2),
    "channels before the map": Case((1, 3), (1, 3), heads=2, layout="nchw", dims=(12, 20)),
    "gradient of queries only": Case((4, 5), needed="q"),
    "gradient of keys only": Case((4, 5), needed="k"),
    "gradient of values only": Case((4, 5), needed="v"),
    "gradient of the bias only": Case((1, 5), (1, 3), needed="b"),
    "float16": Case((3, 9), (1, 5), dtype=torch.float16),
    "bfloat16": Case((3, 9), (1, 5), dtype=torch.bfloat16),
}

# as in NAT and DiNAT at 224 pixels, in a detector, and at the limits of the tables of sizes
REAL = {
    "stage 1": Case((56, 56), (7, 7), heads=2, dims=(32, 32), batch=4, layout="fused"),
    "stage 1, dilated": Case((56, 56), (7, 7), (8, 8), heads=2, dims=(32, 32), batch=4, layout="fused"),
    "stage 2, dilated": Case((28, 28), (7, 7), (3, 3), heads=4, dims=(32, 32), batch=4, layout="fused"),
    "stage 3": Case((14, 14), (7, 7), heads=8, dims=(32, 32), batch=4, layout="fused"),
    "stage 4": Case((7, 7), (7, 7), heads=16, dims=(32, 32), batch=4, layout="fused"),
    "detection": Case((100, 152), (7, 7), (1, 3), heads=2, dims=(32, 32), layout="fused"),
    "kernel of 13": Case((40, 70), (13, 13), heads=2, dims=(64, 64)),
    "kernel of 63": Case((64, 70), (3, 63), heads=2, dims=(32, 32)),
    "heads of 128": Case((20, 30), (7, 7), heads=2, dims=(128, 128)),
    "heads of 256": Case((20, 30), (7, 7), (2, 2), heads=2, dims=(256, 256)),  # not in float32
    "a large batch": Case((7, 7), (3, 3), heads=3, dims=(16, 16), batch=700),
}


def compare(case: Case, device: str) -> None:
    """Results and gradients of the kernels and of the reference in float64, of the same rounded numbers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

    if case.layout == "fused":
        leaves = [random(case.batch, *case.size, 3, case.heads, case.dims[0])]
    else:
        order = (0, 3, 4, 1, 2) if case.layout == "nchw" else (0, 1, 2, 3, 4)
        leaves = [
            random(case.batch, *case.size, case.heads, dim).permute(order).contiguous()
            for dim in (case.dims[0], *case.dims)
        ]
    table = torch.randn(case.heads, *(2 * k - 1 for k in case.kernel), generator=generator)
    if case.bias == "closed":
        table[:, 0] = -torch.inf
    probe = random(case.batch, *case.size, case.heads, case.dims[1])
    wanted = [name in case.needed for name in ("q" if case.layout == "fused" else "qkv")]

    results = []
    for run, dtype, place in ((triton.triton, case.dtype, device), (reference, torch.float64, "cpu")):
        own = [x.to(place, dtype, copy=True).requires_grad_(on) for x, on in zip(leaves, wanted, strict=True)]
        bias = None
        if case.bias != "none":
            bias = table.to(place, torch.promote_types(dtype, torch.float32), copy=True)
            bias.requires_grad_("b" in case.needed)
        if case.layout == "fused":
            q, k, v = own[0].unbind(3)
        elif case.layout == "nchw":
            q, k, v = (x.permute(0, 3, 4, 1, 2) for x in own)
        else:
            q, k, v = own
        out = run(q, k, v, case.kernel, case.dilation, bias, case.scale)
        inputs = [x for x in (*own, bias) if x is not None and x.requires_grad]
        grads = torch.autograd.grad(out, inputs, probe.to(place, dtype))
        results.append([x.detach().cpu().double() for x in (out, *grads)])
    for fast, truth in zip(*results, strict=True):
        largest = max(1.0, truth.abs().max().item())
        torch.testing.assert_close(fast, truth, rtol=0, atol=TOLERANCE[case.dtype] * largest)


def small(device: str) -> tuple[Any, ...]:
    """A call on a map of 2 x 4, all of it with gradients."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 4, 1, 16, device=device).requires_grad_() for _ in range(3))
    bias = torch.randn(1, 1, 5, device=device).requires_grad_()
    return q, k, v, (1, 3), (2, 1), bias, 0.3


def the_operator_is_registered_as_torch_wants(device: str) -> None:
    q, k, v, kernel, dilation, bias, scale = small(device)
    for table in (bias, None):
        call = (q, k, v, table, kernel, dilation, scale)
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(triton.attend.operator, call, test_utils=tests)
        out, sums = (x.detach() for x in triton.attend(*call))
        needed = [True, False, True, table is not None]
        rest = (q, k, v, table, out, sums, kernel, dilation, scale)
        torch.library.opcheck(triton.differentiate.operator, (needed, out, *rest), test_utils=tests)


def an_empty_batch_is_served(device: str) -> None:
    q, k, v, kernel, dilation, bias, scale = small(device)
    out = triton.triton(q[:0], k[:0], v[:0], kernel, dilation, bias, scale)
    assert out.shape == (0, 2, 4, 1, 16)
    assert not torch.autograd.grad(out.sum(), bias)[0].any()


CHECKS: dict[str, Callable[[str], None]] = {
    **kernels.shared_checks(triton, small),
    **{
        check.__name__: check
        for check in (
            the_operator_is_registered_as_torch_wants,
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
        q, k, v = torch.zeros(1, 14, 14, 3, 2, 32, dtype=torch.bfloat16).unbind(3)
        numbers = ((7, 7), (1, 2), 0.1)
        bias = torch.zeros(2, 13, 13)
        out, sums = triton.attention(q, k, v, bias, *numbers)
        triton.gradients([True] * 4, out, q, k, v, bias, out, sums, *numbers)

    shared = kernels.compiled_without_a_gpu(run, capability, monkeypatch, tmp_path)
    assert set(shared) == {"forward", "row_products", "query_gradient", "key_gradient", "table_gradient"}
    assert max(shared.values()) <= 99 * 1024  # bytes that a program may have on consumers' GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*CASES, *REAL])
def test_the_kernels_equal_the_reference_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    if (name, dtype) == ("heads of 256", torch.float32):
        pytest.skip("the kernels refuse it")
    compare(replace({**CASES, **REAL}[name], dtype=dtype), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_the_operator_holds_on_a_gpu(name: str) -> None:
    CHECKS[name]("cuda")


@pytest.mark.gpu
def test_results_repeat_bit_for_bit_on_a_gpu() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 56, 56, 2, 32, device="cuda", requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 13, 13, device="cuda", requires_grad=True)
    runs = []
    for _ in range(3):
        out = triton.triton(q, k, v, (7, 7), (1, 2), bias, 0.2)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))))
    for again in runs[1:]:
        assert all(torch.equal(x, y) for x, y in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 7, 1), (40, 1, 3), (33, 5, 2), (57, 7, 8), (29, 13, 2)])
def test_rectangles_hold_all_pairs_once(sizes: tuple[int, int, int], of_keys: bool) -> None:
    """Of one axis and with the other of one position: each query and neighbor, in each sample."""
    length, kernel, step = sizes
    positions = torch.arange(length)
    grid, own = positions % step, positions // step
    start = (own - kernel // 2).clamp(min=0).minimum((length - grid + step - 1) // step - kernel)
    pairs = {
        (sample, grid[q].item() + step * k, q.item(), k - own[q].item() + kernel - 1)
        for sample in range(3)
        for q in positions
        for k in range(start[q].item(), start[q].item() + kernel)
    }
    for tile, programs in ((4, 2048), (8, 5)):
        arguments = (length, 1), (kernel, 1), (step, 1), (tile, 1), of_keys, 3, programs
        tiles, shares, relative, _ = build_plan(*arguments, torch.device("cpu"))
        found = []
        for kind, _, begin, number, first, last, *sides in shares.tolist():
            rows, _, reach, _ = sides
            for item in range(first, last):
                y, _, top, _ = tiles[begin + item % number].tolist()
                for mine in range(rows):
                    for other in range(reach):
                        entry = relative[kind, mine, other].item()
                        both = (y + mine * step, top + other * step)
                        key, query = both if of_keys else both[::-1]
                        if entry >= 0:
                            found.append((item // number, key, query, entry))
        assert len(found) == len(set(found))
        assert set(found) == pairs
        assert relative.shape[1] == tile


@pytest.mark.parametrize("positions", [16, 32, 64])
def test_tiles_have_as_many_positions_as_asked(positions: int) -> None:
    for size in ((1, 1), (1, 40), (33, 2), (7, 7), (56, 57)):
        for dilation in ((1, 1), (1, 2), (3, 1)):
            rows, columns = triton.tile_sides(size, dilation, positions)
            assert rows * columns == positions
            assert rows == 1 or rows < 2 * -(-size[0] // dilation[0])


if __name__ == "__main__":
    kernels.report(triton, {name: partial(compare, case) for name, case in CASES.items()} | CHECKS)
