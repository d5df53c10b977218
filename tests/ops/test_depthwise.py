"""Depthwise convolutions with their own gradient of wide kernels against PyTorch's."""

from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from visionsel.layers import BilevelRoutingAttention, FocalModulation
from visionsel.layers.convolution import Conv2d
from visionsel.layers.lepe_attention import AttentionLePE
from visionsel.ops.depthwise import conv2d, why_not

module = import_module("visionsel.ops.depthwise")

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch was built without oneDNN"
)

# of the largest value: float32, the error of reordered sums; bfloat16, one rounding of each side
RTOL = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}


def draw(
    *,
    batch: int = 2,
    channels: int = 6,
    height: int = 9,
    width: int = 8,
    kernel: tuple[int, int] = (5, 5),
    bias: bool = True,
    channels_last: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Any]:
    """Leaves: map, weight, bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, channels, height, width), (channels, 1, *kernel), (channels,)
    x, weight, added = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return [x.requires_grad_(), weight.requires_grad_(), added.requires_grad_() if bias else None]


def options_of(weight: Tensor, padding: tuple[int, int] | None = None) -> dict[str, Any]:
    padding = padding or (weight.shape[2] // 2, weight.shape[-1] // 2)
    return {"padding": padding, "groups": weight.shape[0]}


def refusal(x: Tensor, weight: Tensor, bias: Tensor | None, **changes: Any) -> str | None:
    options = {"stride": (1, 1), "dilation": (1, 1), **options_of(weight), **changes}
    return why_not(x, weight, bias, **options)


def gradients(out: Tensor, leaves: list[Any], create_graph: bool = False) -> list[Tensor]:
    weight = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return list(torch.autograd.grad((out * weight).sum(), wanted, create_graph=create_graph))


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        atol = RTOL[one.dtype] * max(1.0, other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The columns of each part of a weight's gradient."""
    seen: list[int] = []
    backward = module._backward

    def spy(grad: Tensor, x: Tensor, weight: Tensor, padding: Any, wanted: tuple[bool, bool]) -> Tensor:
        if wanted[1]:
            seen.append(weight.shape[3])
        return backward(grad, x, weight, padding, wanted)

    monkeypatch.setattr(module, "_backward", spy)
    return seen


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 20),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 11)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 6)),
    bias=st.booleans(),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_are_pytorchs(padding: tuple[int, int], **shape: Any) -> None:
    leaves = draw(**shape)
    x, weight, _ = leaves
    if any(x.shape[i] + 2 * padding[i - 2] < weight.shape[i] for i in (2, 3)):
        return  # PyTorch refuses a map that is smaller than the kernel
    options = options_of(weight, padding)
    out, expected = conv2d(*leaves, **options), F.conv2d(*leaves, **options)
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()
    assert_equal(gradients(out, leaves), gradients(expected, leaves))


@pytest.mark.parametrize(("wide", "parts"), [(4, [3, 1]), (5, [3, 2]), (7, [3, 3, 1]), (9, [3, 3, 3])])
def test_a_wide_kernel_learns_three_columns_at_a_time(
    columns: list[int], wide: int, parts: list[int]
) -> None:
    leaves = draw(kernel=(5, wide), width=12)
    assert refusal(*leaves) is None
    options = options_of(leaves[1])
    got = gradients(conv2d(*leaves, **options), leaves)
    assert columns == parts
    assert_equal(got, gradients(F.conv2d(*leaves, **options), leaves))


@pytest.mark.parametrize("trained", [(1,), (0, 1), (1, 2)])
def test_only_what_is_trained_gets_a_gradient(trained: tuple[int, ...]) -> None:
    leaves = draw()
    for i in {0, 1, 2} - {*trained}:
        leaves[i].requires_grad_(False)
    assert refusal(*leaves) is None
    options = options_of(leaves[1])
    got = gradients(conv2d(*leaves, **options), leaves)
    assert_equal(got, gradients(F.conv2d(*leaves, **options), leaves))


def test_gradients_have_gradients() -> None:
    results = []
    for function in (conv2d, F.conv2d):
        leaves = draw(height=5, width=6)
        first = gradients(function(*leaves, **options_of(leaves[1])), leaves, create_graph=True)
        # of every gradient's curve, through x, weight and the gradient of the output
        curved = sum(grad.sin().sum() for grad in first)
        results.append(list(torch.autograd.grad(curved, leaves[:2])))
    assert_equal(*results)


def test_gradient_checkpointing_changes_nothing(columns: list[int]) -> None:
    leaves = draw()
    layer = Conv2d(6, 6, 5, padding=2, groups=6)
    expected = gradients(layer(leaves[0]).sin(), [leaves[0], *layer.parameters()])
    out = checkpoint(lambda x: layer(x).sin(), leaves[0], use_reentrant=False)
    got = gradients(out, [leaves[0], *layer.parameters()])
    assert columns == [3, 2] * 2
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_as_ever(columns: list[int], dtype: torch.dtype) -> None:
    leaves = draw()
    leaves[0] = leaves[0].detach().to(dtype).requires_grad_()
    options = options_of(leaves[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = conv2d(*leaves, **options), F.conv2d(*leaves, **options)
    assert torch.equal(out, expected)
    assert out.dtype == torch.bfloat16
    got, truth = gradients(out, leaves), gradients(expected, leaves)
    assert columns == [3, 2]
    assert [g.dtype for g in got] == [dtype, torch.float32, torch.float32]
    for one, other in zip(got, truth, strict=True):
        # the gradients were cast from bfloat16
        atol = RTOL[torch.bfloat16] * other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


class Wrapped(Tensor):
    """A tensor of somebody's own."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride": (2, 1)}, "stride and dilation 1"),
        ({"dilation": (1, 2)}, "stride and dilation 1"),
        ({"groups": 3}, "depthwise"),
        ({"padding": (2, 5)}, "too wide"),
        ({"weight": torch.randn(6, 1, 5, 3).requires_grad_()}, "fast as they are"),
        ({"weight": torch.randn(6, 1, 5, 11).requires_grad_(), "padding": (2, 2)}, "too wide"),
        ({"weight": torch.randn(6, 1, 5, 5)}, "learns nothing"),
        ({"x": torch.randn(6, 9, 8)}, "batches"),
        ({"weight": torch.randn(6, 1, 5).requires_grad_(), "padding": (2, 2)}, "batches"),
        ({"x": torch.randn(0, 6, 9, 8)}, "empty"),
        ({"x": torch.randn(2, 6, 9, 8).double()}, "float64"),
        ({"x": torch.randn(2, 6, 9, 8).bfloat16()}, "one dtype for all"),
        ({"x": torch.randn(2, 6, 9, 8).as_subclass(Wrapped)}, "Wrapped"),
        ({"bias": torch.randn(6, device="meta")}, "on meta"),
    ],
)
def test_other_calls_are_left_to_pytorch_and_say_why(change: dict[str, Any], reason: str) -> None:
    arguments = dict(zip(("x", "weight", "bias"), draw(), strict=True)) | change
    assert reason in str(refusal(**arguments))


def test_half_precision_is_left_to_pytorch() -> None:
    leaves = draw()
    with torch.autocast("cpu", dtype=torch.float16):
        assert "float16" in str(refusal(*leaves))
    assert "float16" in str(refusal(*(leaf.half() for leaf in leaves)))


def test_without_gradients_it_is_pytorchs_own() -> None:
    leaves = draw()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert "learns nothing" in str(refusal(*leaves))
            out = conv2d(*leaves, **options_of(leaves[1]))
            assert torch.equal(out, F.conv2d(*leaves, **options_of(leaves[1])))


def test_onednn_switched_off_is_respected(columns: list[int]) -> None:
    leaves = draw()
    torch._C._set_mkldnn_enabled(False)  # the public context warns of other settings
    try:
        assert "switched off" in str(refusal(*leaves))
        gradients(conv2d(*leaves, **options_of(leaves[1])), leaves)
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert columns == []


def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return conv2d(x, weight, bias, padding=(2, 2), groups=6)


def test_compilers_and_tracers_get_pytorchs_own_in_one_graph(columns: list[int]) -> None:
    leaves = draw()
    expected = gradients(call(*leaves), leaves)
    columns.clear()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_equal(gradients(compiled(*leaves), leaves), expected)
    layer = Conv2d(6, 6, 5, padding=2, groups=6)
    program = torch.export.export(layer, (leaves[0].detach(),), strict=False)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.conv2d.default
    ]
    assert columns == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
def test_scripts_and_traces_hold_pytorchs_own() -> None:
    layer, x = Conv2d(6, 6, 5, padding=2, groups=6), draw()[0]
    programs = {"aten::conv2d": torch.jit.script(layer), "aten::_convolution": torch.jit.trace(layer, x)}
    for operator, program in programs.items():
        assert operator in str(program.inlined_graph)
        assert torch.equal(program(x), layer(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")  # inside torch.func
def test_transforms_and_counters_see_pytorchs_own(columns: list[int]) -> None:
    x, weight, bias = draw()
    expected = F.conv2d(x, weight, bias, padding=2, groups=6)
    vectorized = torch.func.vmap(lambda one: call(one[None], weight, bias)[0])(x)
    assert_equal([vectorized], [expected])

    def loss(weight: Tensor) -> Tensor:
        return call(x, weight, bias).square().sum()

    assert_equal([torch.func.grad(loss)(weight)], gradients_of_squares(expected, weight))
    with forward_ad.dual_level():
        out = call(x, forward_ad.make_dual(weight, torch.ones_like(weight)), bias)
        tangent = F.conv2d(x, torch.ones_like(weight), padding=2, groups=6)
        assert_equal([forward_ad.unpack_dual(out).tangent], [tangent])
    with FlopCounterMode(display=False) as counter:
        call(x, weight, bias)
    assert counter.get_total_flops() == 2 * expected.numel() * 25
    assert columns == []


def gradients_of_squares(out: Tensor, weight: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), [weight]))


@pytest.mark.parametrize(
    ("settings", "served"),
    [
        ({"padding": 2}, True),
        ({"padding": "same"}, False),
        ({"padding": 2, "padding_mode": "reflect"}, False),
        ({"padding": 4, "dilation": 2}, False),
    ],
)
def test_a_layer_is_pytorchs_in_values_gradients_and_state(
    columns: list[int], settings: dict[str, Any], served: bool
) -> None:
    own, plain = (kind(6, 6, 5, groups=6, **settings) for kind in (Conv2d, nn.Conv2d))
    plain.load_state_dict(own.state_dict())
    x = draw()[0]
    results = [gradients(layer(x), [x, *layer.parameters()]) for layer in (own, plain)]
    assert_equal(*results)
    assert columns == ([3, 2] if served else [])


@pytest.mark.parametrize(
    ("layer", "parts"),
    [
        (lambda: FocalModulation(8, focal_level=3), [3, 3, 1, 3, 2]),  # the last level first
        (lambda: BilevelRoutingAttention(8, num_heads=2, num_windows=2, topk=2, side_dwconv=5), [3, 2]),
        (lambda: AttentionLePE(8, side_dwconv=5), [3, 2]),
    ],
)
def test_the_layers_with_wide_kernels_learn_by_it(
    monkeypatch: pytest.MonkeyPatch, columns: list[int], layer: Any, parts: list[int]
) -> None:
    own = layer()
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    leaves = [x, *own.parameters()]
    got = gradients(own(x), leaves)
    assert columns == parts
    monkeypatch.setattr(module, "why_not", lambda *args: "PyTorch's own is compared")
    assert_equal(got, gradients(own(x), leaves))
    assert columns == parts
