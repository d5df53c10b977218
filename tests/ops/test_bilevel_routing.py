"""Bi-level routing: each backend against the reference, the reference against a loop written for the test."""

import math
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from visionsel.ops import chunks
from visionsel.ops.bilevel_routing import bilevel_routing_attention, top_windows, window_means

tiled: Any = import_module("visionsel.ops.bilevel_routing.tiled")

# float32: the error of reordered sums of a few hundred terms of order 1; float64: the same at its precision
ATOL = {torch.float32: 1e-5, torch.float64: 1e-10}


def maps(
    *shape: int, value_dim: int | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dims = (shape[-1], shape[-1], shape[-1] if value_dim is None else value_dim)
    q, k, v = (torch.randn(*shape[:-1], d, generator=generator, dtype=torch.float64).to(dtype) for d in dims)
    return q, k, v


def by_loops(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], topk: int, scale: float) -> Tensor:
    """The paper's sentences, window by window."""
    batch, height, width, heads, _ = q.shape
    h, w = height // grid[0], width // grid[1]
    windows = [(i * h, j * w) for i in range(grid[0]) for j in range(grid[1])]
    out = torch.empty(batch, height, width, heads, v.shape[-1], dtype=q.dtype)

    def tokens(x: Tensor, b: int, corner: tuple[int, int]) -> Tensor:
        return x[b, corner[0] : corner[0] + h, corner[1] : corner[1] + w].flatten(0, 1)

    for b in range(batch):
        key_means = torch.stack([tokens(k, b, corner).mean(0).flatten() for corner in windows])
        for corner in windows:
            query = tokens(q, b, corner)
            agreement = key_means @ query.mean(0).flatten() * scale
            chosen = [windows[i] for i in agreement.argsort(descending=True)[:topk].tolist()]
            key = torch.cat([tokens(k, b, c) for c in chosen])
            value = torch.cat([tokens(v, b, c) for c in chosen])
            for head in range(heads):
                attention = (query[:, head] @ key[:, head].T * scale).softmax(-1)
                patch = (attention @ value[:, head]).view(h, w, -1)
                out[b, corner[0] : corner[0] + h, corner[1] : corner[1] + w, head] = patch
    return out


@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("topk", [1, 3, 6, -1])
def test_it_is_what_the_paper_says(backend: str, topk: int) -> None:
    q, k, v = maps(2, 6, 6, 2, 4, value_dim=5)
    expected = by_loops(q, k, v, (3, 2), 6 if topk == -1 else topk, 0.3)
    out = bilevel_routing_attention(q, k, v, (3, 2), topk, 0.3, backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    region=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    heads=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    share=st.floats(0, 1),
    soft=st.booleans(),
    pooled=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    numbers=st.sampled_from([chunks._NUMBERS, 40]),  # of a chunk: one or many
)
def test_tiled_equals_the_reference_in_values_and_gradients(
    batch: int,
    grid: tuple[int, int],
    region: tuple[int, int],
    heads: int,
    dims: tuple[int, int],
    share: float,
    soft: bool,
    pooled: bool,
    dtype: torch.dtype,
    numbers: int,
) -> None:
    windows = grid[0] * grid[1]
    topk = max(1, round(share * windows))
    size = (grid[0] * region[0], grid[1] * region[1])
    q, k, v = maps(batch, *size, heads, dims[0], value_dim=dims[1], dtype=dtype)
    if pooled:
        k, v = k[:, :: region[0], :: region[1]], v[:, :: region[0], :: region[1]]
    given_routing = {}
    if soft:
        index, logits = top_windows(window_means(q, grid), window_means(k, grid), topk, 0.5)
        given_routing = {"routing": index, "routing_weight": logits.softmax(-1)}
    results = []
    with patch.object(chunks, "_NUMBERS", numbers):
        for backend in ("tiled", "reference"):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out, index = bilevel_routing_attention(
                *leaves, grid, topk, backend=backend, return_routing=True, **given_routing
            )
            out.square().sum().backward()
            with torch.no_grad():
                unlearned = bilevel_routing_attention(*leaves, grid, topk, backend=backend, **given_routing)
            results.append([out, unlearned, *(x.grad for x in leaves), index])
    assert torch.equal(results[0].pop().sort(-1).values, results[1].pop().sort(-1).values)
    for fast, truth in zip(*results, strict=True):
        scale = max(1.0, truth.abs().max().item())
        torch.testing.assert_close(fast, truth, rtol=0, atol=ATOL[dtype] * scale)


@pytest.mark.parametrize("kept", [None, (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_mask_attends_to_what_is_gathered(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kept: tuple[int, int] | None
) -> None:
    """Values and gradients, with windows that are routed twice, and with keys pooled in their windows."""
    grid = (3, 2)
    q, k, v = maps(2, 6, 8, 2, 8, value_dim=8, dtype=dtype)
    if kept is not None:
        k, v = (x[:, : 3 * kept[0], : 2 * kept[1]] for x in (k, v))
    tensors = [x.clone().requires_grad_() for x in (q, k, v)]
    routing = torch.randint(6, (2, 6, 3), generator=torch.Generator().manual_seed(0))
    routing[:, :, 2] = routing[:, :, 0]
    results = []
    for masked in (True, False):
        monkeypatch.setattr(tiled, "masking_pays", lambda *_, masked=masked: masked)
        out = bilevel_routing_attention(*tensors, grid, 3, 0.3, "tiled", routing=routing)
        results.append([out, *torch.autograd.grad(out.sin().sum(), tensors)])
    rtol = 0.02 if dtype == torch.bfloat16 else 0  # a few of its steps
    for masked, gathered in zip(*results, strict=True):
        torch.testing.assert_close(masked, gathered, rtol=rtol, atol={**ATOL, torch.bfloat16: 0.02}[dtype])


@pytest.mark.parametrize(
    ("side", "windows", "topk", "soft", "masks"),
    [
        (56, 7, 1, False, False),  # the routed stages of BiFormer at 224
        (28, 7, 4, False, False),
        (14, 7, 16, False, True),
        (14, 7, 16, True, False),  # weights go to keys and values
        (56, 7, 16, False, False),  # the third stage at 896
        (64, 16, 16, False, False),  # and in detection
    ],
)
def test_a_mask_is_taken_for_many_small_windows(
    monkeypatch: pytest.MonkeyPatch, side: int, windows: int, topk: int, soft: bool, masks: bool
) -> None:
    masked = []

    def spy(*args: Any) -> Tensor:
        masked.append(args)
        return made(*args)

    made = tiled.routing_mask
    monkeypatch.setattr(tiled, "routing_mask", spy)
    q, k, v = maps(1, side, side, 1, 4, dtype=torch.float32)
    routing = torch.arange(topk).expand(1, windows**2, -1)
    weight = torch.ones(1, windows**2, topk) if soft else None
    bilevel_routing_attention(q, k, v, windows, topk, routing=routing, routing_weight=weight)
    assert bool(masked) is masks


def test_default_scale_is_that_of_the_head_and_arguments_go_by_position_and_name() -> None:
    q, k, v = maps(1, 4, 4, 2, 4)
    positional = bilevel_routing_attention(q, k, v, 2, 2, None, "auto", False)
    named = bilevel_routing_attention(
        q=q, k=k, v=v, num_windows=(2, 2), topk=2, scale=0.5, backend="reference", return_routing=False
    )
    torch.testing.assert_close(positional, named, rtol=0, atol=1e-12)


def test_routing_compares_means_over_all_heads_and_is_row_major() -> None:
    q, k, v = (torch.zeros(1, 4, 6, 2, 2) for _ in range(3))
    q[0, 2:, :2, 0, 0] = 1.0  # window 3 of the 2 x 3 grid asks, in its first head ...
    k[0, :2, 4:, 0, 0] = 2.0  # ... and window 2 answers
    k[0, 2:, 2:4, 1, 0] = 9.0  # window 4 is loud in a head that does not ask
    _, index = bilevel_routing_attention(q, k, v, (2, 3), 1, return_routing=True)
    assert index.shape == (1, 6, 1)
    assert index.dtype == torch.int64
    assert index[0, 3, 0] == 2


@pytest.mark.parametrize("topk", [-1, 4])
def test_all_windows_is_full_attention(topk: int) -> None:
    q, k, v = maps(2, 4, 6, 2, 4)
    out, index = bilevel_routing_attention(q, k, v, 2, topk, return_routing=True)
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    expected = (flat[0] @ flat[1].mT / 2).softmax(-1) @ flat[2]
    torch.testing.assert_close(out.flatten(1, 2).transpose(1, 2), expected, rtol=0, atol=1e-12)
    assert torch.equal(index.sort(-1).values, torch.arange(4).expand(2, 4, 4))


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_routing_carries_no_gradient(backend: str) -> None:
    q, k, v = maps(1, 4, 4, 1, 3)
    index = bilevel_routing_attention(q, k, v, 2, 2, return_routing=True)[1]
    grads = []
    for routing in (None, index):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        bilevel_routing_attention(*leaves, 2, 2, backend=backend, routing=routing).square().sum().backward()
        grads.append([x.grad for x in leaves])
    for own, given_index in zip(*grads, strict=True):
        torch.testing.assert_close(own, given_index, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_gradients_are_those_of_finite_differences(backend: str) -> None:
    q, k, v = (x.requires_grad_() for x in maps(1, 4, 2, 2, 2))
    routing = bilevel_routing_attention(q, k, v, (2, 1), 1, return_routing=True)[1]
    weight = torch.rand(routing.shape, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda q, k, v, w: bilevel_routing_attention(
            q, k, v, (2, 1), 1, backend=backend, routing=routing, routing_weight=w
        ),
        (q, k, v, weight),
    )


def test_views_of_a_fused_projection_are_served_and_inputs_are_left_alone() -> None:
    qkv = torch.randn(2, 6, 6, 3, 2, 4, generator=torch.Generator().manual_seed(1))
    before = qkv.clone()
    out = bilevel_routing_attention(*qkv.unbind(3), 3, 4)
    expected = bilevel_routing_attention(*(x.contiguous() for x in qkv.unbind(3)), 3, 4, backend="reference")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert torch.equal(qkv, before)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    q, k, v = maps(3, 6, 6, 2, 4)
    out = bilevel_routing_attention(q, k, v, 3, 2)
    swapped = bilevel_routing_attention(*(x.flip(0) for x in (q, k, v)), 3, 2).flip(0)
    torch.testing.assert_close(out, swapped, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_routes_as_float32_does(backend: str, dtype: torch.dtype) -> None:
    q, k, v = maps(2, 8, 8, 2, 8, dtype=dtype)
    for grad in (False, True):
        q.requires_grad_(grad)
        out, index = bilevel_routing_attention(q, k, v, 4, 3, backend=backend, return_routing=True)
        wide, wide_index = bilevel_routing_attention(
            *(x.float() for x in (q, k, v)), 4, 3, backend="reference", return_routing=True
        )
        assert out.dtype == dtype
        assert torch.equal(index, wide_index)
        # 16 attended tokens, each rounded once more
        torch.testing.assert_close(out.float(), wide, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_autocast_attends_in_half_precision_and_routes_in_full(backend: str) -> None:
    q, k, v = maps(1, 8, 8, 2, 8, dtype=torch.float32)
    wide, wide_index = bilevel_routing_attention(q, k, v, 4, 3, backend="reference", return_routing=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, index = bilevel_routing_attention(q, k, v, 4, 3, backend=backend, return_routing=True)
    assert torch.equal(index, wide_index)
    torch.testing.assert_close(out.float(), wide, rtol=0, atol=8 * torch.finfo(torch.bfloat16).eps)


def test_training_works_after_inference_mode() -> None:
    q, k, v = maps(1, 4, 4, 1, 3)
    with torch.inference_mode():
        bilevel_routing_attention(q, k, v, 2, 2)
    q.requires_grad_()
    bilevel_routing_attention(q, k, v, 2, 2).sum().backward()
    assert q.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_it_compiles_into_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    # aot_eager: the graph and its gradient as the compiler sees them, without minutes of code generation
    compiled = torch.compile(bilevel_routing_attention, fullgraph=True, backend="aot_eager")
    for size in ((4, 6), (8, 4)):  # the second size makes for a dynamic graph
        leaves = [x.requires_grad_() for x in maps(2, *size, 2, 4)]
        out = compiled(*leaves, 2, 2, backend=backend)
        expected = bilevel_routing_attention(*leaves, 2, 2, backend="reference")
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        for grad, truth in zip(grads, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
            torch.testing.assert_close(grad, truth, rtol=0, atol=1e-10)


class Routed(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return bilevel_routing_attention(q, k, v, 4, 3, return_routing=True)


def test_one_export_serves_every_batch_and_map() -> None:
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Routed(), maps(2, 12, 16, 2, 4), dynamic_shapes=(sizes,) * 3).module()
    for shape in ((2, 12, 16), (3, 20, 8), (1, 16, 16)):
        inputs = maps(*shape, 2, 4)
        out, index = program(*inputs)
        expected, expected_index = Routed()(*inputs)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        assert torch.equal(index, expected_index)


def test_more_batch_and_windows_than_a_cuda_axis_holds_share_axes() -> None:
    # what the kernels see as batch and heads; each is bounded by 65535 on CUDA
    shapes = []
    original = torch.nn.functional.scaled_dot_product_attention

    def record(query: Tensor, *args: Tensor, **kwargs: float) -> Tensor:
        shapes.append(query.shape)
        return original(query, *args, **kwargs)

    q, k, v = maps(3, 16, 16, 2, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
        bilevel_routing_attention(q, k, v, 16, 1)
    assert [tuple(shape[:2]) for shape in shapes] == [(3, 2 * 256)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_windows": 5}, r"num_windows \(5, 5\) does not divide q's map of 8x8; pad it to 10x10"),
        ({"num_windows": (2, 3)}, r"pad it to 8x9"),
        ({"num_windows": 0}, "num_windows must be a positive int"),
        ({"topk": 0}, "topk must be -1"),
        ({"topk": 17}, "1 to 16, the number of windows; got 17"),
        ({"topk": -2}, "got -2"),
        ({"backend": "natten"}, "unknown backend 'natten'; choose one of auto, tiled, reference"),
        ({"q": torch.zeros(1, 8, 8, 4)}, "q must be"),
        ({"k": torch.zeros(1, 8, 8, 2, 3)}, "q and k must agree"),
        ({"v": torch.zeros(1, 4, 8, 2, 4)}, "k and v must agree"),
        ({"k": torch.zeros(1, 8, 8, 2, 4).double()}, "share dtype"),
        (
            {"k": torch.zeros(1, 6, 8, 2, 4), "v": torch.zeros(1, 6, 8, 2, 4)},
            "does not divide k's map of 6x8",
        ),
        (
            {"routing": torch.zeros(1, 16, 3, dtype=torch.int64)},
            r"routing must be int64 of shape \(1, 16, 2\)",
        ),
        ({"routing": torch.zeros(1, 16, 2)}, "routing must be int64"),
        ({"routing": torch.full((1, 16, 2), 16)}, "windows 0 to 15, got 16 to 16"),
        ({"routing_weight": torch.ones(1, 16, 2)}, "pass routing too"),
        (
            {"routing": torch.zeros(1, 16, 2, dtype=torch.int64), "routing_weight": torch.ones(1, 16)},
            "routing_weight must have routing's shape",
        ),
    ],
)
def test_a_wrong_call_is_told_the_rule(change: dict, message: str) -> None:
    q, k, v = maps(1, 8, 8, 2, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        bilevel_routing_attention(**{"q": q, "k": k, "v": v, "num_windows": 4, "topk": 2, **change})


def test_window_means_are_plain_means_of_row_major_windows() -> None:
    x = torch.arange(4 * 6, dtype=torch.float64).view(1, 4, 6, 1, 1)
    means = window_means(x, (2, 3))
    expected = [x[0, i : i + 2, j : j + 2].mean().item() for i in (0, 2) for j in (0, 2, 4)]
    assert means.flatten().tolist() == expected
    assert math.isclose(means.mean().item(), x.mean().item())
