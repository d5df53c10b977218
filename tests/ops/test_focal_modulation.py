"""Focal modulation: the fast backend against the reference, the reference against loops written here."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from visionsel.ops.focal_modulation import focal_modulation

# float32: the error of reordered sums of a few hundred terms of order 1; float64: the same at its precision
ATOL = {torch.float32: 1e-5, torch.float64: 1e-10}


def draw(
    *,
    batch: int = 2,
    height: int = 5,
    width: int = 6,
    channels: int = 4,
    kernel_sizes: tuple[int, ...] = (3, 5),
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    return {
        "query": normal(batch, height, width, channels),
        "context": normal(batch, height, width, channels),
        "gates": normal(batch, height, width, len(kernel_sizes) + 1),
        "kernels": [normal(channels, 1, size, size, scale=1 / size) for size in kernel_sizes],
        "modulator_weight": normal(channels, channels, 1, 1, scale=channels**-0.5),
        "modulator_bias": normal(channels) if bias else None,
    }


def tensors(case: dict[str, Any]) -> dict[str, Tensor]:
    flat = {name: value for name, value in case.items() if isinstance(value, Tensor)}
    return flat | {f"kernels.{i}": kernel for i, kernel in enumerate(case["kernels"])}


def detached(case: dict[str, Any]) -> dict[str, Any]:
    """The case with leaves of its own, so that gradients do not mix."""

    def leaf(value: Any) -> Any:
        if isinstance(value, list):
            return [leaf(v) for v in value]
        return None if value is None else value.detach().clone().requires_grad_()

    return {name: leaf(value) for name, value in case.items()}


def by_loops(case: dict[str, Any], normalize: bool) -> Tensor:
    """Pixel by pixel, with the gelu written out."""

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))

    query, context, gates = case["query"], case["context"], case["gates"]
    height, width = query.shape[1:3]
    total = torch.zeros_like(query)
    for level, kernel in enumerate(case["kernels"]):
        size = kernel.shape[-1]
        wider = torch.zeros_like(context)
        for y in range(height):
            for x in range(width):
                for i in range(size):
                    for j in range(size):
                        row, column = y + i - size // 2, x + j - size // 2
                        if 0 <= row < height and 0 <= column < width:
                            wider[:, y, x] += context[:, row, column] * kernel[:, 0, i, j]
        context = gelu(wider)
        total += context * gates[..., level, None]
    overall = gelu(context.sum((1, 2)) / (height * width))
    total += overall[:, None, None] * gates[..., -1, None]
    if normalize:
        total /= len(case["kernels"]) + 1
    modulator = torch.einsum("bhwc,dc->bhwd", total, case["modulator_weight"][:, :, 0, 0])
    if case["modulator_bias"] is not None:
        modulator = modulator + case["modulator_bias"]
    return query * modulator


@pytest.mark.parametrize("backend", ["reference", "tiled", "auto"])
@pytest.mark.parametrize("kernel_sizes", [(), (1,), (3, 5), (7, 3)])
@pytest.mark.parametrize("normalize", [False, True])
def test_it_is_the_papers_formula(backend: str, kernel_sizes: tuple[int, ...], normalize: bool) -> None:
    case = draw(height=4, width=3, kernel_sizes=kernel_sizes, bias=normalize)
    out = focal_modulation(**case, normalize=normalize, backend=backend)
    torch.testing.assert_close(out, by_loops(case, normalize), rtol=0, atol=ATOL[torch.float64])


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.integers(1, 6),
    kernel_sizes=st.lists(st.sampled_from([1, 3, 5, 7]), max_size=3).map(tuple),
    bias=st.booleans(),
    normalize=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_backends_agree_in_values_and_gradients(normalize: bool, **shape: Any) -> None:
    case = draw(**shape)
    results = {}
    for backend in ("tiled", "reference"):
        own = detached(case)
        out = focal_modulation(**own, normalize=normalize, backend=backend)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        (out * weight).sum().backward()
        results[backend] = {"out": out.detach()} | {name: x.grad for name, x in tensors(own).items()}
    for name, expected in results["reference"].items():
        atol = max(1.0, expected.abs().max().item()) * ATOL[shape["dtype"]]
        error = (results["tiled"][name] - expected).abs().max().item()
        assert error <= atol, f"{name}: {error} > {atol}"


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_gradients_are_the_numerical_ones(backend: str) -> None:
    case = detached(draw(batch=1, height=3, width=2, channels=2, kernel_sizes=(3,)))
    names = ["query", "context", "gates", "modulator_weight", "modulator_bias"]

    def op(kernel: Tensor, *rest: Tensor) -> Tensor:
        named = dict(zip(names, rest, strict=True))
        return focal_modulation(**named, kernels=[kernel], backend=backend)

    assert torch.autograd.gradcheck(op, (case["kernels"][0], *(case[name] for name in names)))


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_slices_of_a_fused_projection_serve_and_nothing_given_is_written_to(backend: str) -> None:
    case = draw(channels=4)
    fused = torch.cat([case["query"], case["context"], case["gates"]], -1)
    query, context, gates = fused.split((4, 4, 3), -1)
    views = {**case, "query": query, "context": context, "gates": gates}
    before = {name: x.clone() for name, x in tensors(views).items()}
    out = focal_modulation(**views, backend=backend)
    torch.testing.assert_close(out, focal_modulation(**case, backend=backend), rtol=0, atol=1e-12)
    for name, x in tensors(views).items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("kernel_sizes", [(3, 5), (3,), ()])
@pytest.mark.parametrize("normalize", [False, True])
def test_without_gradients_it_is_the_same_and_writes_over_nothing_given(
    kernel_sizes: tuple[int, ...], normalize: bool
) -> None:
    case = draw(kernel_sizes=kernel_sizes, dtype=torch.float32)
    before = {name: x.clone() for name, x in tensors(case).items()}
    with_gradients = focal_modulation(**detached(case), normalize=normalize)
    out = focal_modulation(**case, normalize=normalize)
    torch.testing.assert_close(out, with_gradients.detach(), rtol=0, atol=1e-6)
    for name, x in tensors(case).items():
        assert torch.equal(x, before[name]), name


def test_transforms_see_no_overwriting() -> None:
    case = draw()
    one = {name: case[name][:1] for name in ("query", "context", "gates")}
    many = torch.stack([one["query"], 2 * one["query"]])
    mapped = torch.func.vmap(lambda query: focal_modulation(**{**case, **one, "query": query}))(many)
    torch.testing.assert_close(mapped[1], 2 * mapped[0], rtol=0, atol=1e-10)


def test_samples_do_not_depend_on_each_other() -> None:
    case = draw(batch=3)
    order = [2, 0, 1]
    moved = {**case, **{name: case[name][order] for name in ("query", "context", "gates")}}
    torch.testing.assert_close(focal_modulation(**moved), focal_modulation(**case)[order], rtol=0, atol=1e-12)


def test_arguments_go_by_place_as_documented() -> None:
    case = draw()
    torch.testing.assert_close(focal_modulation(*case.values()), focal_modulation(**case), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_double(dtype: torch.dtype) -> None:
    case = draw(dtype=dtype)
    wide = {
        name: [x.double() for x in value] if isinstance(value, list) else value.double()
        for name, value in case.items()
    }
    out = focal_modulation(**case)
    assert out.dtype == dtype
    # a few roundings of relative size 2**-8 (bfloat16) on values of order 1 to 10
    torch.testing.assert_close(out.double(), focal_modulation(**wide), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_autocast_takes_mixed_inputs_and_float32_weights(backend: str) -> None:
    case = draw(dtype=torch.float32)
    expected = focal_modulation(**case, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        narrow = {name: case[name].bfloat16() for name in ("query", "context", "gates")}
        torch.testing.assert_close(
            focal_modulation(**{**case, **narrow}, backend=backend).float(), expected, rtol=0.05, atol=0.05
        )
        torch.testing.assert_close(
            focal_modulation(**case, backend=backend).float(), expected, rtol=0.05, atol=0.05
        )


def test_inference_mode_leaves_nothing_that_breaks_training_after_it() -> None:
    case = draw()
    with torch.inference_mode():
        expected = focal_modulation(**case)
    own = detached(case)
    out = focal_modulation(**own)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    assert all(x.grad is not None for x in tensors(own).values())


def test_it_compiles_without_graph_breaks() -> None:
    case = draw(dtype=torch.float32)
    compiled = torch.compile(focal_modulation, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**case), focal_modulation(**case), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 5, 6)}, r"query must be \[B, H, W, channels\], got 3 dimensions"),
        ({"query": torch.zeros(2, 5, 6, 4).double()}, "must share dtype and device; query is torch.float64"),
        ({"context": torch.zeros(2, 5, 5, 4)}, r"context must have query's shape \(2, 5, 6, 4\)"),
        ({"gates": torch.zeros(2, 5, 6, 2)}, r"gates must be \(2, 5, 6, 3\): one for each of 2 kernels"),
        (
            {"kernels": [torch.zeros(4, 1, 3, 3), torch.zeros(4, 1, 4, 4)]},
            r"kernels\[1\] must be \[4, 1, k, k\]",
        ),
        ({"kernels": [torch.zeros(4, 4, 3, 3), torch.zeros(4, 1, 5, 5)]}, r"kernels\[0\] must be .* odd k"),
        ({"modulator_weight": torch.zeros(4, 4)}, r"modulator_weight must be \(4, 4, 1, 1\), got \(4, 4\)"),
        ({"modulator_bias": torch.zeros(3)}, r"modulator_bias must be \(4,\), got \(3,\)"),
        (
            {"modulator_bias": torch.zeros(4).double()},
            r"modulator_bias must have query's dtype torch\.float32",
        ),
        ({"modulator_bias": torch.zeros(4, device="meta")}, "modulator_bias must be on query's device cpu"),
        ({"backend": "natten"}, "unknown backend 'natten'; choose one of auto, tiled, reference"),
    ],
)
def test_invalid_calls_say_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        focal_modulation(**{**draw(dtype=torch.float32), **change})


def test_integers_are_refused() -> None:
    case = draw()
    whole = {name: case[name].long() for name in ("query", "context", "gates")}
    with pytest.raises(ValueError, match=r"must be floating point, got torch\.int64"):
        focal_modulation(**{**case, **whole})
