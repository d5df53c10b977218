"""Linear layers by oneDNN against PyTorch's own; which of the two is taken, and what the choice rests on."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from visionsel.ops.linear import linear, onednn_is_faster, unavailable, why_not

module = import_module("visionsel.ops.linear")

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no oneDNN: {unavailable()}")

# float32: the error of reordered sums of at most a hundred terms of order 1
ATOL = 1e-5


def draw(*leading: int, inputs: int = 24, outputs: int = 40, bias: bool = True) -> list[Tensor | None]:
    return [
        torch.randn(*leading, inputs),
        torch.randn(outputs, inputs),
        torch.randn(outputs) if bias else None,
    ]


def leaves(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def outcome(tensors: list[Tensor | None], backend: str) -> list[Tensor]:
    """The output, the one without gradients, and the gradients."""
    out = linear(*tensors, backend=backend)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    gradients = torch.autograd.grad((out * weight).sum(), [t for t in tensors if t is not None])
    with torch.inference_mode():
        inferred = linear(*tensors, backend=backend)
    return [out.detach(), inferred, *gradients]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 5, 4), (2, 1, 3, 2)])
def test_values_and_gradients_are_pytorchs(leading: tuple[int, ...], bias: bool) -> None:
    tensors = draw(*leading, bias=bias)
    expected = outcome(leaves(tensors), "default")
    for got, truth in zip(outcome(leaves(tensors), "onednn"), expected, strict=True):
        assert got.shape == truth.shape
        torch.testing.assert_close(got, truth, rtol=0, atol=ATOL * max(1.0, truth.abs().max().item()))


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 40), (24, 1), (17, 33), (96, 384)])
def test_every_width_is_served(inputs: int, outputs: int) -> None:
    tensors = draw(9, inputs=inputs, outputs=outputs)
    expected = outcome(leaves([t.double() for t in tensors]), "default")
    for got, truth in zip(outcome(leaves(tensors), "onednn"), expected, strict=True):
        atol = ATOL * max(1.0, truth.abs().max().item())
        torch.testing.assert_close(got.double(), truth, rtol=0, atol=atol)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_empty_batches_have_empty_outputs_and_zero_gradients(leading: tuple[int, ...]) -> None:
    tensors = leaves(draw(*leading))
    out = linear(*tensors, backend="onednn")
    assert out.shape == (*leading, 40)
    out.sum().backward()
    assert all(t.grad is not None and not t.grad.any() for t in tensors)


@pytest.mark.parametrize("inputs", ["transposed", "sliced", "repeated", "reversed axes"])
def test_any_layout_of_memory_is_served(inputs: str) -> None:
    x = {
        "transposed": torch.randn(24, 6).t(),
        "sliced": torch.randn(6, 60)[:, 5:53:2],
        "repeated": torch.randn(24).expand(2, 6, 24),
        "reversed axes": torch.randn(24, 3, 5, 2).permute(3, 1, 2, 0),
    }[inputs]
    _, _, bias = draw(1)
    for weight in (torch.randn(24, 40).t(), torch.randn(40, 30)[:, 3:27]):
        tensors = [x, weight, bias]
        for t in tensors:
            t.requires_grad_()
        out = linear(*tensors, backend="onednn")
        torch.testing.assert_close(out, F.linear(*tensors), rtol=0, atol=ATOL)
        # the gradient of a sum is one number repeated, in no memory of its own
        got = torch.autograd.grad(out.sum(), tensors)
        for one, other in zip(got, torch.autograd.grad(F.linear(*tensors).sum(), tensors), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=10 * ATOL)


@pytest.mark.parametrize("trained", range(3))
def test_only_what_is_trained_gets_a_gradient_and_keeps_memory(trained: int) -> None:
    tensors = draw(6)
    tensors[trained].requires_grad_()
    out = linear(*tensors, backend="onednn")
    (got,) = torch.autograd.grad(out.sin().sum(), tensors[trained], retain_graph=True)
    (expected,) = torch.autograd.grad(F.linear(*tensors).sin().sum(), tensors[trained])
    torch.testing.assert_close(got, expected, rtol=0, atol=ATOL * 10)
    kept = out.grad_fn.next_functions[0][0] if "View" in out.grad_fn.name() else out.grad_fn
    assert [t is not None for t in kept.saved_tensors] == [trained == 1, trained == 0]


def test_gradients_have_gradients() -> None:
    penalties = []
    for backend in ("onednn", "default"):
        torch.manual_seed(0)
        tensors = leaves(draw(6))
        first = torch.autograd.grad(linear(*tensors, backend=backend).sin().sum(), tensors, create_graph=True)
        penalties.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for got, expected in zip(*penalties, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)  # sums of squares of order 100


def test_gradient_checkpointing_changes_nothing() -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        tensors = leaves(draw(6))
        if recompute:
            out = checkpoint(linear, *tensors, "onednn", use_reentrant=False)
        else:
            out = linear(*tensors, "onednn")
        gradients.append(torch.autograd.grad(out.sin().sum(), tensors))
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))


def faster(monkeypatch: pytest.MonkeyPatch, verdict: bool) -> list[tuple[int, ...]]:
    """Settle what `auto` finds; the list gets what it asks."""
    asked: list[tuple[int, ...]] = []

    def answer(rows: int, weight: Tensor, bias: bool) -> bool:
        asked.append((rows, *weight.shape, bias))
        return verdict

    monkeypatch.setattr(module, "onednn_is_faster", answer)
    return asked


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all inputs that oneDNN gets."""
    seen: list[tuple[int, ...]] = []
    product = module.product

    def spy(x: Tensor, *others: Tensor | None) -> Tensor:
        seen.append(tuple(x.shape))
        return product(x, *others)

    monkeypatch.setattr(module, "product", spy)
    return seen


@pytest.mark.parametrize("verdict", [True, False])
def test_auto_does_what_is_found_to_be_faster(monkeypatch: pytest.MonkeyPatch, verdict: bool) -> None:
    asked, seen = faster(monkeypatch, verdict), spied(monkeypatch)
    tensors = draw(2, 3)
    torch.testing.assert_close(linear(*tensors), F.linear(*tensors), rtol=0, atol=ATOL)
    assert asked == [(6, 40, 24, True)]
    assert seen == ([(6, 24)] if verdict else [])


def test_auto_rests_on_no_clock_where_results_must_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = faster(monkeypatch, True)
    tensors = draw(5)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(linear(*tensors), F.linear(*tensors))
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == []


def test_default_is_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spied(monkeypatch)
    tensors = draw(5)
    assert torch.equal(linear(*tensors, backend="default"), F.linear(*tensors))
    assert seen == []


class Wrapped(Tensor):
    pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.double(), r"dense float32 tensors on the cpu, x is torch\.float64"),
        (lambda x: x.bfloat16(), r"x is torch\.bfloat16, torch\.strided on cpu"),
        (lambda x: x.to("meta"), r"x is torch\.float32, torch\.strided on meta"),
        (lambda x: x.to_sparse(), r"x is torch\.float32, torch\.sparse_coo on cpu"),
        (lambda x: x.as_subclass(Wrapped), "plain tensors, x is a Wrapped"),
    ],
)
def test_tensors_that_onednn_does_not_take_are_named(change: Callable[[Tensor], Tensor], reason: str) -> None:
    x, weight, bias = draw(5)
    with pytest.raises(NotImplementedError, match=f"backend 'onednn' cannot serve this call: .*{reason}"):
        linear(change(x), weight, bias, "onednn")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_auto_serves_other_dtypes_as_pytorch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    faster(monkeypatch, True)
    tensors = [t.to(dtype) for t in draw(5)]
    assert torch.equal(linear(*tensors), F.linear(*tensors))


def test_parameters_are_plain_tensors_and_each_argument_counts() -> None:
    x, weight, bias = draw(5)
    assert why_not(x, nn.Parameter(weight), nn.Parameter(bias)) is None
    assert "weight is torch.float64" in str(why_not(x, weight.double(), bias))
    assert "bias is a Wrapped" in str(why_not(x, weight, bias.as_subclass(Wrapped)))


def test_under_autocast_it_is_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    faster(monkeypatch, True)
    tensors = draw(5)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(*tensors)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, F.linear(*tensors))
        assert "autocast" in str(why_not(*tensors))


def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return linear(x, weight, bias)


def test_compilers_and_tracers_get_pytorchs_own_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, seen = faster(monkeypatch, True), spied(monkeypatch)
    tensors = draw(5)

    class Layer(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return linear(x, weight, bias)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Layer(), tuple(tensors)).module()
    for program in (compiled, exported):
        torch.testing.assert_close(program(*tensors), F.linear(*tensors), rtol=0, atol=ATOL)
    assert asked == seen == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_a_jit_trace_holds_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    faster(monkeypatch, True)
    tensors = draw(5)
    traced = torch.jit.trace(call, tuple(tensors))
    assert "aten::linear" in str(traced.inlined_graph)
    assert torch.equal(traced(*tensors), F.linear(*tensors))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")  # inside torch.func
def test_transforms_and_counters_see_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    faster(monkeypatch, True)
    x, weight, bias = draw(5)
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(torch.func.vmap(call, (0, None, None))(x, weight, bias), expected)
    _, tangent = torch.func.jvp(lambda x: call(x, weight, bias), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, weight.sum(1).expand(5, -1))
    with forward_ad.dual_level():
        out = call(forward_ad.make_dual(x, torch.ones_like(x)), weight, bias)
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, weight.sum(1).expand(5, -1))
    with FlopCounterMode(display=False) as counter:
        call(x, weight, bias)
    assert counter.get_total_flops() == 2 * 5 * 24 * 40


def test_a_pytorch_without_the_operator_computes_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = draw(5)
    monkeypatch.setattr(module, "_operator", lambda: None)
    assert torch.equal(linear(*tensors), F.linear(*tensors))
    assert not onednn_is_faster(5, tensors[1])
    with pytest.raises(NotImplementedError, match=r"has no torch\.ops\.mkldnn\._linear_pointwise"):
        linear(*tensors, backend="onednn")


@pytest.mark.parametrize("failure", [RuntimeError, TypeError, None])
def test_an_operator_of_another_form_is_not_used(
    monkeypatch: pytest.MonkeyPatch, failure: type[Exception] | None
) -> None:
    def other(*args: Any) -> Tensor:
        if failure is not None:
            raise failure
        return torch.zeros(2, 2)

    monkeypatch.setattr(module.torch.ops.mkldnn, "_linear_pointwise", other)
    assert module._operator.__wrapped__() is None


def test_onednn_switched_off_is_respected() -> None:
    tensors = draw(5)
    torch._C._set_mkldnn_enabled(False)  # the public context warns of other settings
    try:
        assert "switched off" in str(why_not(*tensors))
        assert torch.equal(linear(*tensors), F.linear(*tensors))
    finally:
        torch._C._set_mkldnn_enabled(True)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((5, 24), (40,), None), r"weight must be \[out, in\], got 1 dimensions: \(40,\)"),
        (((5, 24), (40, 25), None), r"must be weight's 25 input features, got \(5, 24\)"),
        (((), (40, 1), None), r"must be weight's 1 input features, got \(\)"),
        (((5, 24), (40, 24), (41,)), r"bias must be \(40,\), got \(41,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[Any, ...], message: str) -> None:
    x, weight, bias = (None if shape is None else torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        linear(x, weight, bias, backend="onednn")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown backend 'mkl'; choose one of auto, onednn, default"):
        linear(*draw(5), backend="mkl")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A clock that only the two products move, each by what the test says; nothing is known yet."""
    state: dict[str, Any] = {"now": 0.0, "onednn": 1.0, "default": 1.0, "runs": []}

    def product(name: str) -> Callable[..., None]:
        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
            assert bias is None or bias.shape == weight.shape[:1]
            state["now"] += state[name]
            state["runs"].append((name, x.shape[0]))

        return run

    monkeypatch.setattr(module, "perf_counter", lambda: state["now"])
    monkeypatch.setattr(module, "product", product("onednn"))
    monkeypatch.setattr(module.F, "linear", product("default"))
    monkeypatch.setattr(module, "_found", {})
    return state


@pytest.mark.parametrize(("default", "verdict"), [(0.5, False), (1.0, False), (1.09, False), (1.2, True)])
def test_onednn_is_faster_by_a_margin_or_not_at_all(
    clock: dict[str, Any], default: float, verdict: bool
) -> None:
    clock["default"] = default
    assert onednn_is_faster(8, torch.zeros(40, 24)) is verdict
    assert [name for name, _ in clock["runs"]] == ["onednn", "default"] * 6


def test_each_size_and_number_of_threads_is_measured_once(clock: dict[str, Any]) -> None:
    same = torch.zeros(40, 24)
    for rows, weight, measured in (
        (5, same, 8),
        (8, same, None),  # rounded up to the same power of two
        (9, same, 16),
        (9, torch.zeros(24, 40), 16),
        (1, same, 1),
        (10**9, same, 2**26 // 960),  # as many as make a product of a millisecond
        (10**9, torch.zeros(1, 1).expand(8192, 8192), 32),
    ):
        clock["runs"].clear()
        onednn_is_faster(rows, weight)
        assert {count for _, count in clock["runs"]} == ({measured} if measured else set())
    clock["runs"].clear()
    onednn_is_faster(5, same, bias=True)
    assert clock["runs"]
    clock["runs"].clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    onednn_is_faster(5, same)
    torch.set_num_threads(threads)
    assert clock["runs"]


def test_measuring_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_found", {})
    weight = nn.Parameter(torch.randn(40, 24))
    state, before = torch.get_rng_state(), weight.detach().clone()
    assert onednn_is_faster(3, weight) in (True, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weight, before)
    assert weight.grad is None
    assert (4, 24, 40, False, torch.get_num_threads()) in module._found
