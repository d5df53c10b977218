"""Packed weights against PyTorch's own layers: values, changes that count, and what is left behind."""

import gc
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionsel.ops.packed import packed_convolution, packed_linear, unavailable, why_not, why_not_convolution

module = import_module("visionsel.ops.packed")

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no oneDNN: {unavailable()}")

# float32: the error of reordered sums of some hundred terms of order 1
ATOL = 1e-4


def draw(outputs: int = 40, inputs: int = 24, *kernel: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A weight and a bias."""
    return nn.Parameter(torch.randn(outputs, inputs, *kernel)), nn.Parameter(torch.randn(outputs))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all weights that are packed."""
    seen: list[tuple[int, ...]] = []
    for name in ("_reorder_linear", "_reorder_convolution"):
        reorder = getattr(module, name)

        def spy(weight: Tensor, *settings: Any, reorder: Any = reorder) -> Tensor:
            seen.append(tuple(weight.shape))
            return reorder(weight, *settings)

        monkeypatch.setattr(module, name, spy)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 3), (2, 5, 4)])
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 24), (1, 1), (17, 33), (384, 96)])
def test_a_linear_layer_gives_pytorchs_values(
    outputs: int, inputs: int, leading: tuple[int, ...], bias: bool
) -> None:
    weight, added = draw(outputs, inputs)
    x = torch.randn(*leading, inputs)
    added = added if bias else None
    for _ in range(2):  # packed, and kept
        got = packed_linear(x, weight, added)
        torch.testing.assert_close(got, F.linear(x, weight, added), rtol=0, atol=ATOL)


@torch.no_grad()
def test_parts_of_the_outputs_are_packed_each_by_itself(packings: list[tuple[int, ...]]) -> None:
    weight, bias = draw(40, 24, 1, 1)
    weight = nn.Parameter(channels_last(weight.detach()))
    x = torch.randn(5, 24)
    expected = F.linear(x, weight.flatten(1), bias)
    for _ in range(2):
        for first, stop in ((0, 16), (16, 40), (39, 40)):
            got = packed_linear(x, weight, bias[first:stop], (first, stop))
            torch.testing.assert_close(got, expected[:, first:stop], rtol=0, atol=ATOL)
    assert packings == [(16, 24), (24, 24), (1, 24)]


CONVOLUTIONS: list[tuple[int, int, tuple[int, int], dict[str, Any]]] = [
    (3, 8, (3, 3), {"padding": (1, 1)}),
    (8, 8, (5, 5), {"padding": (2, 2), "groups": 8}),
    (8, 12, (3, 1), {"stride": (2, 1), "padding": (1, 0), "groups": 4}),
    (6, 4, (2, 2), {"stride": (2, 2)}),
    (4, 6, (3, 3), {"dilation": (2, 3), "padding": (2, 3)}),
    (4, 6, (1, 1), {}),
]
DEFAULTS: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs", "kernel", "settings"), CONVOLUTIONS)
def test_a_convolution_gives_pytorchs_values_for_every_shape(
    inputs: int, outputs: int, kernel: tuple[int, int], settings: dict[str, Any], bias: bool
) -> None:
    settings = {**DEFAULTS, **settings}
    weight, added = draw(outputs, inputs // settings["groups"], *kernel)
    for shape in ((1, 9, 12), (2, 16, 7), (1, 9, 12)):
        x = channels_last(torch.randn(shape[0], inputs, *shape[1:]))
        got = packed_convolution(x, weight, added if bias else None, **settings)
        expected = F.conv2d(x, weight, added if bias else None, **settings)
        torch.testing.assert_close(got, expected, rtol=0, atol=ATOL)
        assert got.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_a_weight_is_packed_once_and_a_kernel_for_each_new_shape(packings: list[tuple[int, ...]]) -> None:
    weight, bias = draw()
    for rows in (3, 3, 50):
        packed_linear(torch.randn(rows, 24), weight, bias)
    assert packings == [(40, 24)]
    packings.clear()
    kernel, bias = draw(6, 4, 3, 3)
    for side in (8, 8, 9, 8):
        packed_convolution(channels_last(torch.randn(1, 4, side, side)), kernel, bias, **DEFAULTS)
    assert packings == [(6, 4, 3, 3)] * 3


def _in_inference_mode(weight: nn.Parameter) -> None:
    with torch.inference_mode():
        weight[1, 2] = 5


def _by_an_optimizer(weight: nn.Parameter) -> None:
    weight.grad = torch.zeros_like(weight)
    weight.grad[3, 4] = 1
    torch.optim.SGD([weight], lr=1).step()


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight[1, 2].fill_(5),
        lambda weight: weight.copy_(torch.randn_like(weight)),
        _in_inference_mode,
        _by_an_optimizer,
        lambda weight: setattr(weight, "data", torch.randn_like(weight)),
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.data.add_(torch.randn(40, 1) @ torch.randn(1, 24)),  # an adapter, merged
    ],
)
def test_a_changed_weight_counts_from_the_next_call_on(change: Callable[[nn.Parameter], None]) -> None:
    weight, bias = draw()
    x = torch.randn(5, 24)
    before = packed_linear(x, weight, bias)
    change(weight)
    after = packed_linear(x, weight, bias)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, F.linear(x, weight, bias), rtol=0, atol=ATOL)


def test_what_inference_mode_packs_serves_outside() -> None:
    weight, bias = draw()
    x = torch.randn(5, 24)
    with torch.inference_mode():
        packed_linear(x, weight, bias)
    with torch.no_grad():
        got = packed_linear(x, weight, bias)
    assert not got.is_inference()
    torch.testing.assert_close(got * 1, F.linear(x, weight, bias).detach(), rtol=0, atol=ATOL)


@torch.no_grad()
def test_the_copy_goes_with_the_weight() -> None:
    weight, bias = draw()
    packed_linear(torch.randn(5, 24), weight, bias)
    gc.collect()
    before = len(module._kept)
    assert weight in module._kept
    del weight
    gc.collect()
    assert len(module._kept) == before - 1


def test_why_a_call_is_not_served() -> None:
    weight, bias = draw()
    x = torch.randn(5, 24)
    assert "no gradient" in str(why_not(x, weight, bias))
    with torch.no_grad():
        assert why_not(x, weight, bias) is None
        assert "it takes parameters" in str(why_not(x, weight.detach(), bias))
        assert "no empty products" in str(why_not(x[:0], weight, bias))
        assert "x is torch.float64" in str(why_not(x.double(), weight, bias))
        assert "no empty products" in str(why_not(x, nn.Parameter(weight[:0]), bias[:0]))
        for gaps in (
            weight.detach()[:1].expand(40, 24),
            torch.randn(24, 40).t(),
            torch.randn(40, 48)[:, ::2],
        ):
            assert "without gaps" in str(why_not(x, nn.Parameter(gaps), bias))
        with torch.inference_mode():
            made_there = nn.Parameter(torch.randn(40, 24), requires_grad=False)
        assert "do not count their changes" in str(why_not(x, made_there, bias))
        kernel, bias = draw(6, 4, 3, 3)
        maps = torch.randn(1, 4, 8, 8)
        assert "channels-last" in str(why_not_convolution(maps, kernel, bias))
        assert "channels-last" in str(why_not_convolution(maps[0], kernel, bias))
        assert why_not_convolution(channels_last(maps), kernel, bias) is None


@pytest.mark.parametrize("failure", [RuntimeError, TypeError, AttributeError, None])
def test_operators_of_another_form_are_not_used(
    monkeypatch: pytest.MonkeyPatch, failure: type[Exception] | None
) -> None:
    def other(*args: Any) -> Tensor:
        if failure is not None:
            raise failure
        return torch.zeros(1, 2, 1, 1)

    monkeypatch.setattr(module.torch.ops.mkldnn, "_convolution_pointwise", other)
    assert module._works.__wrapped__() is False
    monkeypatch.setattr(module, "_works", lambda: False)
    assert "has no operators of the known form" in str(unavailable())
    weight, bias = draw()
    with torch.no_grad():
        assert "has no operators of the known form" in str(why_not(torch.randn(5, 24), weight, bias))
