"""Neighborhood attention: the reference against the authors' kernels, the rest against the reference."""

import sys
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import input_tensor, load_fixture
from visionsel import ops
from visionsel.ops import chunks
from visionsel.ops.neighborhood import neighborhood_attention
from visionsel.ops.neighborhood.reference import neighbors
from visionsel.ops.neighborhood.traced import traced

# float32: the error of reordered sums of some hundred terms of order 1; float64: the same at its precision
ATOL = {torch.float32: 1e-5, torch.float64: 1e-10}


def maps(
    *shape: int, value_dim: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dims = (shape[-1], shape[-1], shape[-1] if value_dim is None else value_dim)
    q, k, v = (torch.randn(*shape[:-1], d, generator=generator, dtype=torch.float64).to(dtype) for d in dims)
    return q, k, v


def table(heads: int, kernel: tuple[int, int], dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def test_windows_and_bias_rows_are_those_of_the_authors_kernels() -> None:
    tables = load_fixture("op_na_window_tables")["tables"]
    assert len(tables) > 100
    for name, (starts, bias_starts) in tables.items():
        kernel, dilation, length = map(int, name.split(","))
        position, bias_index = neighbors(length, kernel, dilation, torch.device("cpu"))
        step = torch.arange(kernel)
        assert torch.equal(position, torch.tensor(starts)[:, None] + step * dilation), name
        assert torch.equal(bias_index, torch.tensor(bias_starts)[:, None] + step), name


@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
@pytest.mark.parametrize(
    "case", load_fixture("op_na2d")["cases"], ids=lambda c: f"k{c['kernel_size']}d{c['dilation']}"
)
def test_it_equals_the_authors_kernels(case: dict[str, Any], backend: str) -> None:
    kernel, dilation = case["kernel_size"], case["dilation"]
    shape = (1, 2, case["H"], case["W"], 8)
    bias = input_tensor("rpb", (2, 2 * kernel - 1, 2 * kernel - 1), 0.5)
    for rel_pos_bias, name in ((bias, "out_rpb_f64"), (None, "out_norpb_f64")):
        expected = torch.tensor(case[name], dtype=torch.float64).view(shape).permute(0, 2, 3, 1, 4)
        for dtype, atol in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
            q, k, v = (input_tensor(key, shape).to(dtype).permute(0, 2, 3, 1, 4) for key in "qkv")
            bias_as = None if rel_pos_bias is None else rel_pos_bias.to(dtype)
            out = neighborhood_attention(q, k, v, kernel, dilation, bias_as, backend=backend)
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)


KERNELS = st.sampled_from([1, 3, 5, 7])
DILATIONS = st.sampled_from([1, 1, 2, 3, 4])


@pytest.mark.parametrize(
    ("size", "dilation", "kinds"),
    [
        ((56, 49), 1, 9),  # corners, sides and what is between
        ((56, 14), 1, 6),  # gathered anyway, so a width of two halves
        ((28, 28), 2, 4),  # each grid in quarters
        ((14, 9), 1, 1),
        ((56, 56), 8, 1),  # each grid is one tile
        ((30, 30), 4, 4),  # grids of 8 and of 7
    ],
)
def test_without_gradients_tiles_of_one_kind_share_a_table(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], dilation: int, kinds: int
) -> None:
    masks: list[tuple[int, ...]] = []
    attend = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **options: Any) -> Tensor:
        masks.append(tuple(mask.shape))
        return attend(q, k, v, mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, k, v = maps(2, *size, 3, 4)
    bias = table(3, (7, 7))
    out = neighborhood_attention(q, k, v, 7, dilation, bias)
    assert [mask[:2] for mask in masks] == [(1, 3)] * kinds
    masks.clear()
    learned = neighborhood_attention(q.requires_grad_(), k, v, 7, dilation, bias)
    assert masks == []  # where something is learned, products of matrices
    torch.testing.assert_close(out, learned, rtol=0, atol=1e-10)


def test_maps_without_numbers_have_a_shape() -> None:
    with FakeTensorMode():
        q = torch.empty(2, 20, 23, 2, 4)
        assert neighborhood_attention(q, q, q, 7, 2).shape == q.shape


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    kernel=st.tuples(KERNELS, KERNELS),
    dilation=st.tuples(DILATIONS, DILATIONS),
    beyond=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    heads=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    numbers=st.sampled_from([chunks._NUMBERS, 40]),  # of a chunk: one or many
)
def test_tiled_equals_the_reference_in_values_and_gradients(
    batch: int,
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    beyond: tuple[int, int],
    heads: int,
    dims: tuple[int, int],
    biased: bool,
    dtype: torch.dtype,
    numbers: int,
) -> None:
    height, width = (k * d + more for k, d, more in zip(kernel, dilation, beyond, strict=True))
    tensors = list(maps(batch, height, width, heads, dims[0], value_dim=dims[1], dtype=dtype))
    if biased:
        tensors.append(table(heads, kernel, dtype))
    results = []
    with patch.object(chunks, "_NUMBERS", numbers):
        for backend in ("tiled", "reference"):
            leaves = [x.clone().requires_grad_() for x in tensors]
            q, k, v, bias = leaves if biased else [*leaves, None]
            out = neighborhood_attention(q, k, v, kernel, dilation, bias, 0.4, backend)
            out.square().sum().backward()
            with torch.no_grad():
                unlearned = neighborhood_attention(q, k, v, kernel, dilation, bias, 0.4, backend)
            results.append([out, unlearned, *(x.grad for x in leaves)])
    with torch.no_grad():
        symbolic = traced(q, k, v, kernel, dilation, bias, 0.4)
    torch.testing.assert_close(symbolic, results[1][0], rtol=0, atol=ATOL[dtype])
    for fast, truth in zip(*results, strict=True):
        scale = max(1.0, truth.abs().max().item())
        torch.testing.assert_close(fast, truth, rtol=0, atol=ATOL[dtype] * scale)


@pytest.mark.parametrize("size", [(56, 56), (28, 40)])
@pytest.mark.parametrize("dilation", [1, 4])
def test_a_map_of_many_tiles_equals_the_reference(size: tuple[int, int], dilation: int) -> None:
    q, k, v = maps(2, *size, 2, 4)
    bias = table(2, (7, 7))
    fast, truth = (
        neighborhood_attention(q, k, v, 7, dilation, bias, backend=backend)
        for backend in ("tiled", "reference")
    )
    torch.testing.assert_close(fast, truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_a_kernel_of_the_maps_size_is_full_attention(backend: str) -> None:
    q, k, v = maps(2, 5, 7, 2, 4, value_dim=3)
    out = neighborhood_attention(q, k, v, (5, 7), backend=backend)
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    expected = (flat[0] @ flat[1].mT / 2).softmax(-1) @ flat[2]
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_the_bias_is_that_of_key_minus_query_and_is_not_scaled(backend: str) -> None:
    q, k, v = (torch.zeros(1, 8, 6, 1, 2, dtype=torch.float64) for _ in range(3))
    bias = torch.full((1, 5, 5), -torch.inf, dtype=torch.float64)
    bias[0, 2, 2] = 0.0  # the query itself ...
    bias[0, 3, 2] = 50.0  # ... and before it, if it is a neighbor, the key two rows below
    v[..., 0] = torch.arange(8, dtype=torch.float64)[:, None, None]
    out = neighborhood_attention(q, k, v, 3, (2, 1), bias, scale=1e-3, backend=backend)
    expected = torch.tensor([2, 3, 4, 5, 6, 7, 6, 7], dtype=torch.float64)  # the last two have none below
    torch.testing.assert_close(out[0, :, :, 0, 0], expected[:, None].expand(8, 6), rtol=0, atol=1e-12)


def test_default_scale_is_that_of_the_head_and_arguments_go_by_position_and_name() -> None:
    q, k, v = maps(1, 9, 8, 2, 4)
    bias = table(2, (3, 3))
    positional = neighborhood_attention(q, k, v, 3, 2, bias, None, "auto")
    named = ops.neighborhood_attention(
        q=q,
        k=k,
        v=v,
        kernel_size=(3, 3),
        dilation=(2, 2),
        rel_pos_bias=bias,
        scale=0.5,
        backend="reference",
    )
    torch.testing.assert_close(positional, named, rtol=0, atol=1e-12)


def test_views_of_a_fused_projection_are_served_and_left_unmodified() -> None:
    qkv = torch.randn(2, 15, 17, 3, 2, 4, dtype=torch.float64)
    before = qkv.clone()
    bias = table(2, (5, 5))
    q, k, v = qkv.unbind(3)
    for training in (False, True):
        qkv.requires_grad_(training)
        fast, truth = (
            neighborhood_attention(q, k, v, 5, 2, bias, backend=backend) for backend in ("tiled", "reference")
        )
        torch.testing.assert_close(fast, truth, rtol=0, atol=1e-10)
    assert torch.equal(qkv, before)
    assert torch.equal(bias, table(2, (5, 5)))


def test_a_sample_does_not_see_the_rest_of_its_batch() -> None:
    q, k, v = maps(3, 16, 15, 2, 4)
    together = neighborhood_attention(q, k, v, 3, 2)
    order = torch.tensor([2, 0, 1])
    alone = [neighborhood_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], 3, 2) for i in order]
    torch.testing.assert_close(torch.cat(alone), together[order], rtol=0, atol=1e-12)


def test_training_works_after_inference_mode_has_built_the_tables() -> None:
    q, k, v = maps(1, 19, 16, 1, 4, seed=3)
    with torch.inference_mode():
        expected = neighborhood_attention(q, k, v, 3, backend="tiled")
    q.requires_grad_()
    out = neighborhood_attention(q, k, v, 3, backend="tiled")
    out.sum().backward()
    assert q.grad is not None
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_half_precision_stays_near_float32(dtype: torch.dtype, training: bool) -> None:
    q, k, v = maps(1, 16, 21, 2, 8, dtype=torch.float32)
    bias = table(2, (5, 5), torch.float32)
    expected = neighborhood_attention(q, k, v, 5, 2, bias, backend="reference")
    # 8 bits of mantissa and logits of order 5
    atol = {torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    for backend in ("tiled", "reference"):
        leaves = [x.to(dtype).requires_grad_(training) for x in (q, k, v)]
        out = neighborhood_attention(*leaves, 5, 2, bias, backend=backend)  # the bias as a float32 parameter
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("training", [False, True])
def test_autocast_stays_near_float32(training: bool) -> None:
    q, k, v = maps(1, 16, 21, 2, 8, dtype=torch.float32)
    bias = table(2, (5, 5), torch.float32).requires_grad_(training)
    expected = neighborhood_attention(q, k, v, 5, 2, bias, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        out = neighborhood_attention(q, k, v, 5, 2, bias)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=5e-2)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("dilation", [1, 3])
def test_memory_grows_with_the_map_not_with_its_square(dilation: int) -> None:
    largest = []
    for side in (42, 84):
        q = torch.randn(1, side, side, 2, 4, requires_grad=True)
        bias = torch.zeros(2, 13, 13, requires_grad=True)
        with Largest() as mode:
            neighborhood_attention(q, q, q, 7, dilation, bias).sum().backward()
        largest.append(mode.elements / side**2)
    # keys that a tile sees: 13 x 13, for each query and head
    assert largest[0] <= 2 * 14**2
    assert largest[1] <= 2 * 14**2


@pytest.mark.slow
@pytest.mark.parametrize("dilation", [1, 2])
def test_it_compiles_into_one_graph(dilation: int) -> None:
    torch._dynamo.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, 3, dilation, bias)

    for dynamic in (False, True):
        compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for size in ((16, 18), (9, 21)):
            leaves = [x.requires_grad_() for x in (*maps(1, *size, 2, 4), table(2, (3, 3)))]
            out, expected = compiled(*leaves), attend(*leaves)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
            grads = (torch.autograd.grad(x.square().sum(), leaves) for x in (out, expected))
            for fast, truth in zip(*grads, strict=True):
                torch.testing.assert_close(fast, truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_inference_is_one_operator_and_equals_eager(dynamic: bool, biased: bool) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return neighborhood_attention(q, k, v, 3, (2, 1), bias)

    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend=keep)
    bias = table(2, (3, 3)) if biased else None
    sizes = ((16, 18), (9, 21), (6, 3))
    for size in sizes:
        q, k, v = (x.transpose(1, 2) for x in maps(2, *reversed(size), 2, 4, value_dim=5))
        out, expected = compiled(q, k, v, bias), attend(q, k, v, bias)
        assert torch.equal(out, expected)
        assert out.stride() == expected.contiguous().stride()
    # one graph for all sizes where they may change
    assert len(graphs) == (1 if dynamic else len(sizes))
    for graph in graphs:
        called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        assert called.count(torch.ops.visionsel.neighborhood_by_kind.default) == 1


def test_compiled_gradients_of_torch_func_equal_eager() -> None:
    torch._dynamo.reset()
    q, k, v = maps(1, 9, 9, 2, 4)

    def attend(q: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, 3).square().sum()

    def gradient(q: Tensor) -> Tensor:
        return torch.func.grad(attend)(q)

    out = torch.compile(gradient, fullgraph=True, backend="aot_eager")(q)
    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(attend(leaf), leaf)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_hold_no_operator_of_this_package(strict: bool) -> None:
    q, k, v = maps(1, 9, 12, 2, 4, dtype=torch.float32)
    with torch.no_grad():
        program = torch.export.export(Attend(3, True), (q, k, v), strict=strict)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called
    assert not [name for name in called if "visionsel" in name]
    torch.testing.assert_close(program.module()(q, k, v), Attend(3, True)(q, k, v), rtol=0, atol=1e-5)


class Attend(nn.Module):
    def __init__(self, dilation: int, biased: bool) -> None:
        super().__init__()
        self.dilation = dilation
        self.bias = table(2, (3, 3), torch.float32) if biased else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, 3, self.dilation, self.bias)


@pytest.mark.slow
@pytest.mark.parametrize(("dilation", "biased"), [(1, False), (3, True)])
def test_one_export_serves_every_size(dilation: int, biased: bool) -> None:
    module = Attend(dilation, biased)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        module, maps(2, 17, 19, 2, 4, dtype=torch.float32), dynamic_shapes=(free, free, free)
    ).module()
    for shape in ((1, 9, 9), (2, 12, 10), (3, 21, 42), (1, 50, 33)):
        q, k, v = maps(*shape, 2, 4, dtype=torch.float32)
        torch.testing.assert_close(program(q, k, v), module(q, k, v), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd, got 4; choose 3 or 5"),
        ({"kernel_size": (3, 2)}, "kernel_size must be odd"),
        ({"kernel_size": 0}, "kernel_size must be a positive int"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be a positive int"),
        ({"dilation": 0}, "dilation must be a positive int"),
        ({"kernel_size": 11}, "more than the map's height of 9; pad the map to 11"),
        ({"kernel_size": 3, "dilation": (1, 3)}, "3 x 3 = 9, more than the map's width of 8"),
        ({"rel_pos_bias": torch.zeros(2, 3, 3)}, r"shape \(2, 5, 5\)"),
        ({"rel_pos_bias": torch.zeros(1, 5, 5)}, r"shape \(2, 5, 5\)"),
        ({"rel_pos_bias": torch.zeros(2, 5, 5, dtype=torch.int64)}, "must be floating point"),
        ({"rel_pos_bias": torch.zeros(2, 5, 5, device="meta")}, "rel_pos_bias is on meta, q on cpu"),
        ({"backend": "flash"}, "unknown backend 'flash'; choose one of auto, tiled, reference, natten"),
        ({"q": torch.zeros(9, 8, 2, 4)}, "q must be"),
        ({"k": torch.zeros(1, 9, 9, 2, 4), "v": torch.zeros(1, 9, 9, 2, 4)}, "q and k must have one shape"),
        ({"v": torch.zeros(1, 9, 9, 2, 4)}, "k and v must agree"),
        ({"v": torch.zeros(1, 9, 8, 2, 4, dtype=torch.float64)}, "share dtype and device"),
    ],
)
def test_invalid_input_is_refused_with_the_rule(change: dict[str, Any], message: str) -> None:
    q, k, v = maps(1, 9, 8, 2, 4, dtype=torch.float32)
    arguments = {"q": q, "k": k, "v": v, "kernel_size": 3, **change}
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**arguments)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A natten that computes by our reference; the calls that it got."""
    calls: list[dict[str, Any]] = []

    def na2d(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
        is_causal: Any = False,
        scale: float | None = None,
    ) -> Tensor:
        assert stride == 1
        assert is_causal is False
        calls.append({"kernel_size": kernel_size, "dilation": dilation, "scale": scale})
        return neighborhood_attention(
            query, key, value, kernel_size, dilation, scale=scale, backend="reference"
        )

    package, functional = ModuleType("natten"), ModuleType("natten.functional")
    functional.na2d = na2d  # type: ignore[attr-defined]
    package.functional = functional  # type: ignore[attr-defined]
    package.HAS_LIBNATTEN = True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "natten", package)
    monkeypatch.setitem(sys.modules, "natten.functional", functional)
    return calls


def test_natten_gets_its_own_arguments(stand_in: list[dict[str, Any]]) -> None:
    assert "natten" in ops.backends("neighborhood")
    q, k, v = maps(2, 16, 21, 2, 8, dtype=torch.float32)
    out = neighborhood_attention(q, k, v, (5, 7), (2, 3), scale=0.3, backend="natten")
    expected = neighborhood_attention(q, k, v, (5, 7), (2, 3), scale=0.3, backend="tiled")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert stand_in == [{"kernel_size": (5, 7), "dilation": (2, 3), "scale": 0.3}]


def test_auto_never_takes_natten_on_the_cpu(stand_in: list[dict[str, Any]]) -> None:
    neighborhood_attention(*maps(1, 9, 9, 2, 8, dtype=torch.float32), 3)
    assert stand_in == []


@pytest.mark.parametrize(
    ("dtype", "dims", "change", "reason"),
    [
        (torch.float32, (8, 8), {"rel_pos_bias": torch.zeros(2, 5, 5)}, "no relative position bias"),
        (torch.float64, (8, 8), {}, "float32, float16 or bfloat16"),
        (torch.float32, (8, 16), {}, "one head dim"),
        (torch.float32, (12, 12), {}, "power of two"),
        (torch.float32, (8, 8), {"kernel_size": (1, 3)}, "at least 3"),
        (torch.float32, (8, 8), {"scale": 0.0}, "scale 0"),
    ],
)
def test_natten_says_what_it_cannot_serve(
    stand_in: list[dict[str, Any]],
    dtype: torch.dtype,
    dims: tuple[int, int],
    change: dict[str, Any],
    reason: str,
) -> None:
    q, k, v = maps(1, 9, 9, 2, dims[0], value_dim=dims[1], dtype=dtype)
    with pytest.raises(NotImplementedError, match=f"'natten' cannot serve this call: .*{reason}"):
        neighborhood_attention(**{"q": q, "k": k, "v": v, "kernel_size": 3, "backend": "natten", **change})
    assert stand_in == []


def test_natten_on_the_cpu_learns_nothing(stand_in: list[dict[str, Any]]) -> None:
    q, k, v = maps(1, 9, 9, 2, 8, dtype=torch.float32)
    v.requires_grad_()
    with pytest.raises(NotImplementedError, match="no backward on the cpu"):
        neighborhood_attention(q, k, v, 3, backend="natten")
    with torch.no_grad():
        neighborhood_attention(q, k, v, 3, backend="natten")
    assert len(stand_in) == 1


def test_without_natten_it_is_not_listed_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "natten", None)  # importing it raises ImportError
    assert "natten" not in ops.backends("neighborhood")
    with pytest.raises(NotImplementedError, match=r"pip install .*visionsel\[natten\]"):
        neighborhood_attention(*maps(1, 9, 9, 2, 8, dtype=torch.float32), 3, backend="natten")


@pytest.mark.natten
@pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning")  # natten's call of PyTorch
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("dilation", [1, 2])
def test_the_real_natten_equals_the_reference(dilation: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (x.to(device) for x in maps(2, 16, 21, 2, 32, dtype=torch.float32))
    out = neighborhood_attention(q, k, v, 5, dilation, scale=0.3, backend="natten")
    expected = neighborhood_attention(q, k, v, 5, dilation, scale=0.3, backend="reference")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_on_cuda_tiled_equals_the_reference(dilation: int) -> None:
    results = []
    for backend in ("tiled", "reference"):
        leaves = [x.cuda().requires_grad_() for x in (*maps(2, 30, 28, 2, 8), table(2, (5, 5)))]
        out = neighborhood_attention(*leaves[:3], 5, dilation, leaves[3], backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for fast, truth in zip(*results, strict=True):
        torch.testing.assert_close(fast, truth, rtol=0, atol=1e-9)
