"""The layer of NAT against the authors' module (fixtures), and what else a layer has to do."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.support import fill_state_dict, input_tensor, load_fixture
from visionsel.layers import NeighborhoodAttention

CASES = load_fixture("op_na2d_module")["cases"]

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")


def small_layer(**kwargs: Any) -> NeighborhoodAttention:
    torch.manual_seed(0)
    layer = NeighborhoodAttention(**{"dim": 8, "num_heads": 2, "kernel_size": 3, **kwargs})
    if layer.rpb is not None:
        torch.nn.init.normal_(layer.rpb)
    return layer


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_it_equals_the_authors_module(case: dict[str, Any], backend: str) -> None:
    layer = NeighborhoodAttention(**case["args"], backend=backend)
    layer.load_state_dict(fill_state_dict(case["state_dict"]), strict=True)
    x = input_tensor(case["x_key"], tuple(case["x_shape"]))
    expected = torch.tensor(case["out_f64"], dtype=torch.float64).view(case["x_shape"])
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(layer.double()(x.double()), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [(9, 8), (21, 16), (2, 5), (1, 1), (6, 19)])
@pytest.mark.parametrize(
    "options",
    [{}, {"dilation": 2}, {"kernel_size": (3, 5), "dilation": (3, 1)}, {"rel_pos_bias": False}],
    ids=str,
)
def test_every_size_is_served_alike_by_all_backends_and_torchscript(
    size: tuple[int, int], options: dict[str, Any]
) -> None:
    layer = small_layer(**options).double()
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    out = layer(x)
    assert out.shape == x.shape
    torch.testing.assert_close(torch.jit.script(layer)(x), out, rtol=0, atol=1e-12)
    layer.backend = "reference"
    torch.testing.assert_close(layer(x), out, rtol=0, atol=1e-12)


def test_padding_takes_part_as_keys_of_the_projections_bias() -> None:
    layer = small_layer(kernel_size=5)
    x = torch.randn(1, 3, 4, 8)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1, 0, 2))
    torch.testing.assert_close(layer(x), layer(padded)[:, :3, :4], rtol=0, atol=1e-6)
    assert not torch.allclose(layer(x)[:, :3, :3], small_layer()(x)[:, :3, :3], atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"rel_pos_bias": False}], ids=str)
def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none(options: dict[str, Any]) -> None:
    layer = small_layer(dilation=2, **options)
    x = torch.randn(2, 9, 16, 8, requires_grad=True)
    grads = []
    for run in (layer, lambda y: checkpoint(layer, y, use_reentrant=False)):
        layer.zero_grad()
        run(x).square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None})
    assert grads[0].keys() == dict(layer.named_parameters()).keys()
    assert all(g.abs().max() > 0 for g in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=1e-6)


def test_scale_and_drop_are_the_ones_given() -> None:
    x = torch.randn(1, 6, 6, 8)
    assert small_layer().scale == 4**-0.5
    assert not torch.allclose(small_layer(scale=3.0)(x), small_layer()(x), atol=1e-4)
    dropped = small_layer(proj_drop=1.0)
    assert dropped(x).abs().max() == 0
    torch.testing.assert_close(dropped.eval()(x), small_layer()(x), rtol=0, atol=0)


def test_autocast_and_bfloat16_stay_near_float32() -> None:
    layer = small_layer()
    x = torch.randn(1, 8, 8, 8)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=3e-2)
    half = small_layer().bfloat16()
    assert half.rpb is not None
    assert half.rpb.dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), expected, rtol=0, atol=5e-2)


@pytest.mark.slow
def test_it_compiles_into_one_dynamic_graph() -> None:
    torch._dynamo.reset()
    layer = small_layer(dilation=2).double()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((17, 20), (9, 30)):
        x = torch.randn(2, *size, 8, dtype=torch.float64, requires_grad=True)
        out, expected = compiled(x), layer(x)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
        grads: list[Tensor] = [torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected)]
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("dilation", [1, 2])
def test_one_export_serves_sizes_with_and_without_padding(dilation: int) -> None:
    layer = small_layer(kernel_size=5, dilation=dilation)
    sizes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(layer, (torch.randn(2, 11, 14, 8),), dynamic_shapes=sizes).module()
    for shape in ((2, 11, 14), (3, 4, 6), (1, 21, 9), (4, 40, 33)):
        x = torch.randn(*shape, 8)
        torch.testing.assert_close(program(x), layer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads 3 must divide dim 8"),
        ({"num_heads": 0}, "num_heads 0 must divide"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"kernel_size": (3, 6)}, "kernel_size must be odd"),
        ({"dilation": 0}, "dilation must be a positive int"),
        ({"kernel_size": -3}, "kernel_size must be a positive int"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_layer(**options)


def test_an_unknown_backend_is_named_when_it_is_called() -> None:
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        small_layer(backend="fast")(torch.randn(1, 5, 5, 8))
