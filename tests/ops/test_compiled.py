"""Operators as torch.compile makes them, against the reference; and what is compiled anew and what is not.

What a compiler is given is tested with one that compiles nothing, in a second; real code is made for one
call on the CPU, and for all on a GPU, since every one of these takes seconds.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from visionsel.ops import compilation
from visionsel.ops.compilation import call_compiled, no_compiler

# float32: the error of reordered sums of a few hundred terms of order 1; float64: the same at its precision
ATOL = {torch.float32: 1e-5, torch.float64: 1e-10}

Case = tuple[str, list[Any]]  # an operator's package and the arguments that its backends take


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def qkv(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    """Slices of a fused projection, as in use."""
    return list(normal(*shape[:-2], 3, *shape[-2:], dtype=dtype).unbind(3))


def neighborhood(size: tuple[int, int] = (9, 8), dtype: Any = torch.float32) -> Case:
    bias = normal(2, 5, 9, dtype=dtype)
    return "neighborhood", [*qkv(2, *size, 2, 4, dtype=dtype), (3, 5), (2, 1), bias, 0.4]


def neighborhood_plain(dtype: Any = torch.float32) -> Case:
    return "neighborhood", [*qkv(1, 16, 15, 2, 8, dtype=dtype), (7, 7), (1, 2), None, 0.3]


def bilevel_routing(dtype: Any = torch.float32) -> Case:
    index = torch.tensor([[[0, 3], [1, 1], [5, 2], [3, 4], [0, 5], [2, 0]]])
    weight = normal(1, 6, 2, dtype=dtype)
    return "bilevel_routing", [*qkv(1, 4, 9, 2, 4, dtype=dtype), (2, 3), 0.4, index, weight]


def halo(size: tuple[int, int] = (8, 12), stride: int = 1, dtype: Any = torch.float32) -> Case:
    q, k, v = qkv(2, *size, 2, 4, dtype=dtype)
    tables = [normal(11, 4, dtype=dtype), normal(11, 4, dtype=dtype).flip(0)]
    return "halo", [q[:, ::stride, ::stride], k, v, 4, 1, stride, *tables, 0.5]


def halo_plain(dtype: Any = torch.float32) -> Case:
    q, k, v = qkv(1, 6, 6, 1, 4, dtype=dtype)
    return "halo", [q, k, v, 3, 4, 1, None, None, 0.5]


def focal_modulation(dtype: Any = torch.float32) -> Case:
    query, context, gates = normal(2, 6, 5, 19, dtype=dtype).split((8, 8, 3), -1)
    kernels = [normal(8, 1, 3, 3, dtype=dtype), normal(8, 1, 5, 3, dtype=dtype)]
    weight, bias = normal(8, 8, 1, 1, dtype=dtype), normal(8, dtype=dtype)
    return "focal_modulation", [query, context, gates, kernels, weight, bias, True]


CASES: dict[str, Callable[..., Case]] = {
    "neighborhood": neighborhood,
    "neighborhood without a bias": neighborhood_plain,
    "bilevel routing": bilevel_routing,
    "halo": halo,
    "halo with a stride": partial(halo, stride=2),
    "halo without tables": halo_plain,
    "focal modulation": focal_modulation,
}


def functions(operator: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Any]:
    """The reference, the compiled backend and its `why_not`."""
    package = import_module(f"visionsel.ops.{operator}")
    backend = package.BACKENDS["compiled"]
    return import_module(f"{package.__name__}.reference").reference, backend.run, backend.why_not


def leaves(args: list[Any], device: str = "cpu") -> tuple[list[Any], list[Tensor]]:
    """Arguments that take gradients, with the layout that they had, and a list of these."""
    found: list[Tensor] = []

    def leaf(x: Any) -> Any:
        if isinstance(x, list):
            return [leaf(item) for item in x]
        if not isinstance(x, Tensor):
            return x
        x = x.detach().to(device)
        if x.is_floating_point():
            found.append(x.requires_grad_())
        return x

    return [leaf(x) for x in args], found


def outcome(function: Callable[..., Tensor], args: list[Any], training: bool, device: str) -> list[Tensor]:
    """The output, and in training the gradients of everything."""
    given, learned = leaves(args, device)
    if not training:
        with torch.inference_mode():
            return [function(*given)]
    out = function(*given)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), learned)]


def compare(case: Case, training: bool, dtype: torch.dtype, device: str = "cpu") -> None:
    operator, args = case
    reference, compiled, _ = functions(operator)
    results = [outcome(f, args, training, device) for f in (compiled, reference)]
    for got, expected in zip(*results, strict=True):
        # gradients of tables and weights are sums over the whole map
        atol = ATOL[dtype] * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """A compiler that runs graphs as they are; the list gets all that it is given."""
    given: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        given.append(graph)
        return graph.forward

    torch.compiler.reset()
    compilation._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield given
    compilation._compiled.cache_clear()


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("neighborhood", False),
        ("neighborhood", True),
        ("neighborhood without a bias", False),
        ("bilevel routing", True),
        ("halo", True),
        ("halo with a stride", False),
        ("halo without tables", True),
        ("focal modulation", True),
    ],
)
def test_what_is_compiled_is_one_graph_that_equals_the_reference(
    compiler: list[torch.fx.GraphModule], name: str, training: bool
) -> None:
    compare(CASES[name](dtype=torch.float64), training, torch.float64)
    assert len(compiler) == 1


needs_compiler = pytest.mark.skipif("no_compiler('cpu') is not None", reason="needs a C++ compiler")


@pytest.mark.slow
@needs_compiler
def test_real_code_equals_the_reference() -> None:
    compare(neighborhood(), False, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_real_code_for_gpus_equals_the_reference(name: str, training: bool) -> None:
    with torch.backends.cudnn.flags(allow_tf32=False):
        compare(CASES[name](), training, torch.float32, "cuda")


@pytest.mark.parametrize("name", ["bilevel routing", "focal modulation"])
def test_inside_a_compiled_model_it_is_part_of_its_graph(name: str) -> None:
    operator, args = CASES[name]()
    reference, compiled, why_not = functions(operator)

    def model(*given: Any) -> Tensor:
        assert why_not(*given) is None
        return compiled(*given) * 2

    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(*args), 2 * reference(*args), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "sizes"), [(neighborhood, [(9, 8), (16, 11)]), (halo, [(8, 12), (12, 16)])]
)
def test_inside_a_model_for_maps_of_many_sizes_too(
    build: Callable[..., Case], sizes: list[tuple[int, int]]
) -> None:
    torch.compiler.reset()
    whole: Callable[..., Tensor] | None = None
    for size in sizes:  # the second makes height and width dynamic
        operator, args = build(size=size)
        reference, compiled, _ = functions(operator)
        whole = whole or torch.compile(compiled, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(whole(*args), reference(*args), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["neighborhood", "halo"])
def test_under_autocast_it_computes_in_its_dtype(compiler: list[torch.fx.GraphModule], name: str) -> None:
    operator, args = CASES[name]()
    reference, compiled, _ = functions(operator)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = compiled(*args), reference(*args)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out.float(), reference(*args), rtol=0.05, atol=0.1)


def double(x: Tensor, factor: float = 2.0) -> Tensor:
    return x * factor


def test_many_shapes_are_compiled_once_each_and_never_given_up(
    compiler: list[torch.fx.GraphModule],
) -> None:
    for _ in range(2):
        for size in range(1, 13):  # the compiler's own limit is 8
            assert torch.equal(call_compiled(double, torch.ones(size)), torch.full((size,), 2.0))
    assert len(compiler) == 12


def test_every_kind_of_call_has_code_of_its_own(compiler: list[torch.fx.GraphModule]) -> None:
    x = torch.randn(4, 4)
    kinds: list[Callable[[], Tensor]] = [
        lambda: call_compiled(double, x),
        lambda: call_compiled(double, x.t()),
        lambda: call_compiled(double, x.double()),
        lambda: call_compiled(double, torch.nn.Parameter(x)),
        lambda: call_compiled(double, x.clone().requires_grad_()),
        lambda: call_compiled(double, x, 3.0),
        lambda: call_compiled(first_two, [x, x]),
        lambda: call_compiled(first_two, [x, x.clone()]),
    ]
    for _ in range(2):
        for kind in kinds:
            kind()
    assert len(compiler) == len(kinds)
    with torch.no_grad():
        kinds[4]()
    with torch.inference_mode():
        kinds[0]()
    with torch.autocast("cpu", torch.bfloat16):
        kinds[0]()
    assert len(compiler) == len(kinds) + 3
    assert call_compiled(double, x.clone().requires_grad_()).requires_grad


def first_two(tensors: list[Tensor]) -> Tensor:
    return tensors[0] + tensors[1]


def test_nothing_is_compiled_for_empty_tensors_and_tracers(
    compiler: list[torch.fx.GraphModule],
) -> None:
    assert call_compiled(double, torch.ones(0, 3)).shape == (0, 3)
    with torch._subclasses.FakeTensorMode():
        assert call_compiled(double, torch.ones(2)).shape == (2,)
    assert compiler == []


def test_it_says_why_it_cannot_serve() -> None:
    for name in CASES:
        operator, args = CASES[name]()
        _, _, why_not = functions(operator)
        assert why_not(*args) == no_compiler("cpu")
        assert "on cpu and cuda, the tensors are on meta" in str(why_not(args[0].to("meta"), *args[1:]))


def test_a_machine_without_a_compiler_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    cpp_builder = import_module("torch._inductor.cpp_builder")

    def nothing() -> str:
        raise RuntimeError

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nothing)
    assert "no C++ compiler was found: install g++" in compilation._no_cpp_compiler.__wrapped__()
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda name: "/nowhere")
    assert "/nowhere/Python.h: install python3-dev" in compilation._no_cpp_compiler.__wrapped__()
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert "triton, which compiles for GPUs, is not installed" in compilation._no_triton.__wrapped__()


def test_compiling_is_not_exporting() -> None:
    class Told(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (2 if compilation.is_exporting() else 3)

    x, told = torch.ones(2), Told()
    assert torch.equal(told(x), 3 * x)
    assert torch.equal(torch.compile(told, fullgraph=True, backend="eager")(x), 3 * x)
    for strict in (False, True):
        assert torch.equal(torch.export.export(told, (x,), strict=strict).module()(x), 2 * x)
