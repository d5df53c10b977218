"""The focal-modulation layer against the authors' outputs, and with what people do to layers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from tests.support import fill_state_dict, input_tensor, load_fixture
from visionsel.layers import FocalModulation

CASES = {case["case"]: case for case in load_fixture("op_focal_modulation")["cases"]}

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")


def toy(**kwargs: Any) -> FocalModulation:
    torch.manual_seed(0)
    return FocalModulation(**{"dim": 8, "focal_level": 2, **kwargs})


class Halved(nn.Module):
    """A parametrization, an adapter: anything that changes what a weight means."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


@pytest.mark.parametrize("backend", ["auto", "tiled", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_the_authors(name: str, backend: str) -> None:
    case = CASES[name]
    args = dict(case["args"])
    args["use_post_norm"] = args.pop("use_postln_in_modulation", False)
    layer = FocalModulation(**args, backend=backend)
    layer.load_state_dict(fill_state_dict(case["state_dict"]), strict=True)
    assert list(layer.state_dict()) == [key for key, *_ in case["state_dict"]]
    for dtype, suffix, atol in (
        (torch.float32, "", 2e-5 + 10 * case["maxdiff"]),
        (torch.float64, "_f64", 1e-9),
    ):
        x = input_tensor(case["x_key"], tuple(case["x_shape"])).to(dtype)
        expected = torch.tensor(case[f"out{suffix}"], dtype=torch.float64).view(case["out_shape"])
        torch.testing.assert_close(layer.to(dtype)(x).double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "kwargs", [{}, {"bias": False}, {"use_post_norm": True, "normalize_modulator": True}]
)
def test_every_parameter_gets_the_same_gradient_from_each_backend(kwargs: dict[str, Any]) -> None:
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    gradients = {}
    for backend in ("auto", "reference"):
        layer = toy(**kwargs, backend=backend).double()
        layer(x).square().mean().backward()
        gradients[backend] = {name: p.grad for name, p in layer.named_parameters()}
    for name, expected in gradients["reference"].items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(gradients["auto"][name], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("place", ["f", "h", "proj", "focal_layers.0.0"])
def test_a_parametrized_projection_or_kernel_keeps_its_effect(place: str) -> None:
    changed, expected = toy(), toy()
    x = torch.randn(1, 6, 6, 8)
    parametrize.register_parametrization(changed.get_submodule(place), "weight", Halved())
    weight = expected.get_submodule(place).weight
    weight.data *= 0.5
    torch.testing.assert_close(changed(x), expected(x))
    assert (changed(x) - toy()(x)).abs().max() > 1e-3


@pytest.mark.parametrize("place", ["f", "h", "focal_layers.1.0"])
def test_a_pruned_weight_follows_its_mask_through_training(place: str) -> None:
    layer = toy()
    module = layer.get_submodule(place)
    prune.l1_unstructured(module, "weight", amount=0.5)
    # the module's plain `weight` is only brought up to date when the module is called
    module.weight_orig.data *= 2
    expected = toy()
    plain = expected.get_submodule(place)
    plain.weight.data = 2 * plain.weight.data * module.weight_mask
    x = torch.randn(1, 6, 6, 8)
    torch.testing.assert_close(layer(x), expected(x))


@pytest.mark.parametrize("place", ["f", "h", "focal_layers.0", "focal_layers.1.0", "proj"])
def test_hooks_on_submodules_are_called_and_the_output_stays(place: str) -> None:
    layer = toy()
    x = torch.randn(1, 6, 6, 8)
    expected = layer(x)
    seen = []
    layer.get_submodule(place).register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(layer(x), expected)
    assert len(seen) == 1


def test_another_activation_in_a_level_is_used() -> None:
    layer = toy()
    x = torch.randn(1, 6, 6, 8)
    expected = layer(x)
    layer.focal_layers[0][1] = nn.ReLU()
    assert (layer(x) - expected).abs().max() > 1e-4


def test_scripted_it_gives_the_same() -> None:
    layer = toy(use_post_norm=True, normalize_modulator=True).eval()
    x = torch.randn(2, 5, 9, 8)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x), rtol=0, atol=1e-5)


def test_compiled_without_graph_breaks_it_gives_the_same() -> None:
    layer = toy()
    x = torch.randn(2, 5, 9, 8)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-5)


def test_one_export_serves_every_batch_and_map() -> None:
    layer = toy()
    dims = dict.fromkeys(range(3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(layer, (torch.randn(2, 5, 9, 8),), dynamic_shapes=(dims,)).module()
    for shape in ((1, 12, 4, 8), (3, 3, 7, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), layer(x), rtol=0, atol=1e-5)


def test_dtype_and_device_reach_every_parameter() -> None:
    layer = toy(use_post_norm=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


def test_autocast_stays_close() -> None:
    layer = toy()
    x = torch.randn(2, 6, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"focal_window": 4}, r"kernels \[4, 6\]; all must be odd"),
        ({"focal_factor": 1}, r"kernels \[3, 4\]; all must be odd"),
        ({"focal_level": -1}, "focal_level must be at least 0, got -1"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
    ],
)
def test_impossible_numbers_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        toy(**kwargs)


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="unknown backend 'fast'; choose one of auto, tiled, reference"):
        toy(backend="fast")(torch.randn(1, 4, 4, 8))
