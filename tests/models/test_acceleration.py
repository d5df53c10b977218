"""`visionsel.accelerate`: the same numbers, parameters and habits as timm's modules, by another route."""

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.halo_attn import HaloAttn
from timm.models._features_fx import GraphExtractNet
from timm.models.focalnet import FocalModulation, FocalNet
from torch import Tensor, nn
from torch.nn.utils import prune

import visionsel
import visionsel.layers as layers
import visionsel.ops.packed as packing
from tests.ops.test_linear import spied
from tests.support import check_model_fixture, fill_state_dict, load_fixture
from visionsel import accelerate
from visionsel.models import acceleration
from visionsel.ops.linear import unavailable

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")

# float32: the error of reordered sums; float64: the same at its precision
ATOL = {torch.float32: 1e-5, torch.float64: 1e-9}

# each with the shape of an input
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "halo": (lambda: HaloAttn(16, num_heads=2, block_size=4, halo_size=2), (2, 16, 8, 12)),
    "halo_bias_and_scaled_tables": (
        lambda: HaloAttn(16, num_heads=2, block_size=4, halo_size=1, qkv_bias=True, scale_pos_embed=True),
        (2, 16, 8, 12),
    ),
    "halo_stride": (lambda: HaloAttn(16, num_heads=2, block_size=4, halo_size=1, stride=2), (1, 16, 8, 12)),
    "halo_stride_scaled_tables": (
        lambda: HaloAttn(16, num_heads=2, block_size=4, halo_size=1, stride=2, scale_pos_embed=True),
        (1, 16, 8, 12),
    ),
    "halo_pooled": (
        lambda: HaloAttn(
            16, 32, num_heads=2, block_size=4, halo_size=1, stride=2, avg_down=True, qk_ratio=0.5
        ),
        (2, 16, 8, 12),
    ),
    "halo_odd_block_pooled": (
        lambda: HaloAttn(16, num_heads=2, block_size=3, halo_size=1, stride=2, dim_head=4),
        (1, 16, 6, 6),
    ),
    "focal": (lambda: FocalModulation(8, 3, 2), (2, 8, 5, 7)),
    "focal_no_bias": (lambda: FocalModulation(8, 3, 3, bias=False), (1, 8, 6, 6)),
    "focal_post_norm": (
        lambda: FocalModulation(8, 5, 3, use_post_norm=True, normalize_modulator=True),
        (2, 8, 9, 4),
    ),
}

# names of timm models with such layers, with the smallest side that all of their blocks divide
MODELS = {
    "halonet26t": 256,
    "halonet50ts": 256,
    "sehalonet33ts": 256,
    "halonet_h1": 256,
    "eca_halonext26ts": 256,
    "haloregnetz_b": 224,
    "lamhalobotnet50ts_256": 256,
    "halo2botnet50ts_256": 256,
    "focalnet_tiny_srf": 64,
    "focalnet_tiny_lrf": 64,
}


def swapped(model: nn.Module) -> list[nn.Module]:
    fast = (acceleration.AcceleratedHaloAttn, acceleration.AcceleratedFocalModulation)
    return [module for module in model.modules() if isinstance(module, fast)]


def filled(model: nn.Module) -> nn.Module:
    """Weights under which every branch counts: timm starts the last norm of a branch at zero."""
    model.load_state_dict(fill_state_dict([[k, tuple(v.shape)] for k, v in model.state_dict().items()]))
    return model


@pytest.fixture(params=LAYERS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer of timm's, the same accelerated, and an input."""
    build, shape = LAYERS[request.param]
    torch.manual_seed(0)
    layer = build()
    return layer, accelerate(copy.deepcopy(layer)), torch.randn(shape)


@pytest.mark.parametrize("dtype", ATOL)
def test_outputs_and_gradients_are_timms(
    pair: tuple[nn.Module, nn.Module, Tensor], dtype: torch.dtype
) -> None:
    results = []
    for layer in pair[:2]:
        layer.to(dtype)
        x = pair[2].to(dtype).requires_grad_()
        out = layer(x)
        weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        gradients = torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()])
        with torch.no_grad():
            inferred = layer(x)
        results.append([out, inferred, *gradients])
    assert results[1][0].is_contiguous()
    for expected, got in zip(*results, strict=True):
        atol = ATOL[dtype] * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def test_double_before_or_after_makes_no_difference(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    x = pair[2].double()
    before = accelerate(copy.deepcopy(pair[0]).double())
    torch.testing.assert_close(before(x), pair[0].double()(x), rtol=0, atol=1e-9)
    torch.testing.assert_close(before(x), pair[1].double()(x), rtol=0, atol=0)


def test_a_layer_keeps_its_layout_of_memory(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    x = pair[2].contiguous(memory_format=torch.channels_last)
    out = pair[1](x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, pair[0](x), rtol=0, atol=1e-5)


def test_scripted_it_gives_the_same(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    torch.testing.assert_close(torch.jit.script(pair[1])(pair[2]), pair[0](pair[2]), rtol=0, atol=1e-5)


def test_copies_and_pickles_stay_accelerated(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    for other in (copy.deepcopy(pair[1]), pickle.loads(pickle.dumps(pair[1]))):
        assert type(other) is type(pair[1])
        torch.testing.assert_close(other(pair[2]), pair[1](pair[2]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["halo", "halo_stride", "focal_post_norm"])
def test_compiled_without_graph_breaks_it_gives_the_same(name: str) -> None:
    build, shape = LAYERS[name]
    layer = accelerate(build())
    x = torch.randn(shape)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["halo", "halo_stride", "focal_post_norm"])
def test_one_export_serves_other_batches_and_maps(name: str) -> None:
    build, shape = LAYERS[name]
    layer = accelerate(build()).eval()
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(layer, (torch.randn(2, *shape[1:]),), dynamic_shapes=(dims,)).module()
    x = torch.randn(3, shape[1], 16, 8)
    torch.testing.assert_close(program(x), layer(x), rtol=0, atol=1e-5)


def test_autocast_stays_close(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        out = pair[1](pair[2])
    torch.testing.assert_close(out.float(), pair[0](pair[2]), rtol=0.05, atol=0.05)


def test_the_module_stays_itself() -> None:
    model = nn.Sequential(HaloAttn(16, num_heads=2, block_size=4), FocalModulation(16, 3, 2)).eval()
    calls = []
    for module in model:
        module.register_forward_hook(lambda module, args, out: calls.append(module))
    modules, parameters, state = list(model.modules()), list(model.parameters()), list(model.state_dict())
    assert accelerate(model) is model
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert list(model.state_dict()) == state
    assert not any(module.training for module in model.modules())
    assert isinstance(model[0], HaloAttn)
    assert isinstance(model[1], FocalModulation)
    model(torch.randn(1, 16, 8, 8))
    assert calls == list(model)


def test_the_operators_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(HaloAttn(16, num_heads=2, block_size=4), FocalModulation(16, 3, 2))
    accelerate(model)
    called = []
    for name in ("halo_attention", "focal_modulation"):
        operator = getattr(acceleration, name)

        def spy(*args: Any, operator: Any = operator, **kwargs: Any) -> Tensor:
            called.append(operator.__name__)
            return operator(*args, **kwargs)

        monkeypatch.setattr(acceleration, name, spy)
    model(torch.randn(1, 16, 8, 8))
    assert called == ["halo_attention", "focal_modulation"]


def test_a_second_call_changes_nothing_and_does_not_warn() -> None:
    layer = accelerate(FocalModulation(8, 3, 2))
    kind = type(layer)
    assert type(accelerate(layer)) is kind


def test_a_shared_module_stays_shared() -> None:
    layer = FocalModulation(8, 3, 2)
    model = accelerate(nn.ModuleDict({"one": layer, "two": nn.Sequential(layer)}))
    assert model["one"] is model["two"][0] is layer
    assert len(swapped(model)) == 1


def test_a_model_with_nothing_to_accelerate_is_returned_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(acceleration, "onednn_is_faster", lambda rows, weight, bias: False)
    model = nn.Sequential(nn.Linear(3, 3))
    nothing = "Sequential holds no timm HaloAttn or FocalModulation"
    with pytest.warns(
        UserWarning, match=f"{nothing} and no linear layer that oneDNN would speed up; nothing"
    ):
        assert accelerate(model) is model
    with pytest.warns(UserWarning, match=f"{nothing}; nothing was accelerated"):
        assert accelerate(model, linears=False) is model


def test_subclasses_are_left_alone() -> None:
    class Doubled(FocalModulation):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = accelerate(nn.Sequential(Doubled(8, 3, 2), FocalModulation(8, 3, 2)))
    assert type(model[0]) is Doubled
    assert len(swapped(model)) == 1


def test_a_map_that_the_blocks_do_not_divide_is_refused_as_timm_does() -> None:
    layer = accelerate(HaloAttn(16, num_heads=2, block_size=4))
    with pytest.raises(ValueError, match="multiples of block_size 4, got 8 x 10; resize the image"):
        layer(torch.randn(1, 16, 8, 10))


@pytest.mark.parametrize("place", ["f", "h", "focal_layers.0", "focal_layers.1.0", "norm", "proj"])
def test_hooks_inside_focal_modulation_are_still_called(place: str) -> None:
    layer = accelerate(FocalModulation(8, 3, 2, use_post_norm=True))
    x = torch.randn(1, 8, 6, 6)
    expected = layer(x)
    seen = []
    layer.get_submodule(place).register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("kind", "place", "weight"),
    [
        ("focal", "f", "weight"),
        ("focal", "h", "weight"),
        ("halo", "pos_embed", "height_rel"),
        ("halo", "kv", "weight"),
    ],
)
def test_pruning_keeps_its_effect(kind: str, place: str, weight: str) -> None:
    build, shape = LAYERS[kind]
    plain = build()
    layer = accelerate(copy.deepcopy(plain))
    x = torch.randn(shape)
    for each in (plain, layer):
        module = each.get_submodule(place)
        prune.l1_unstructured(module, weight, amount=0.5)
        # only calling the module brings the plain weight up to date
        getattr(module, f"{weight}_orig").data *= 2
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-5)


def test_timms_tracer_sees_a_leaf() -> None:
    model = nn.Sequential(FocalModulation(8, 3, 2), nn.ReLU())
    x = torch.randn(1, 8, 6, 6)
    expected = model(x)
    traced = GraphExtractNet(accelerate(model), ["1"])
    torch.testing.assert_close(traced(x), expected, rtol=0, atol=1e-5)


def test_a_small_large_style_focalnet_is_accelerated_everywhere() -> None:
    torch.manual_seed(0)
    model = FocalNet(
        embed_dim=8,
        depths=(1, 1, 2, 1),
        focal_levels=(3, 3, 3, 3),
        focal_windows=(5, 5, 5, 5),
        use_post_norm=True,
        use_overlap_down=True,
        use_post_norm_in_modulation=True,
        normalize_modulator=True,
        layerscale_value=1e-4,
        proj_drop_rate=0.5,
        num_classes=7,
    ).eval()
    fast = accelerate(copy.deepcopy(filled(model)))
    assert len(swapped(fast)) == 5
    image = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    torch.testing.assert_close(fast.double()(image), model.double()(image), rtol=0, atol=1e-9)
    for each in (model, fast):
        each.train()
        torch.manual_seed(1)  # the same dropout
        each(image).sum().backward()
    for (name, p), (_, q) in zip(model.named_parameters(), fast.named_parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-9, msg=partial("{}: {}".format, name))


def test_all_halo_models_of_timm_are_in_the_table() -> None:
    halo = {n for n in timm.list_models("*halo*") if timm.model_entrypoint(n).__module__.startswith("timm.")}
    assert halo == {name for name in MODELS if "halo" in name}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_of_timm_keep_their_outputs_and_keys(name: str) -> None:
    model = filled(timm.create_model(name)).eval().double()
    fast = accelerate(copy.deepcopy(model))
    expected = sum(type(m) in (HaloAttn, FocalModulation) for m in model.modules())
    assert len(swapped(fast)) == expected > 0
    assert list(fast.state_dict()) == list(model.state_dict())
    image = torch.randn(1, 3, MODELS[name], MODELS[name], dtype=torch.float64)
    with torch.no_grad():
        logits = model(image)
        torch.testing.assert_close(fast(image), logits, rtol=0, atol=1e-9)
        # the comparison says something: without the swapped layers' output the logits are others
        for module in swapped(fast):
            module.register_forward_hook(lambda module, args, out: out * 0.5)
        assert (fast(image) - logits).abs().max() > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["halonet26t", "halonet_h1", "sehalonet33ts"])
def test_timms_halonets_still_meet_their_fixtures(name: str) -> None:
    model = visionsel.accelerate(timm.create_model(name))
    check_model_fixture(model, load_fixture(f"timm_{name}"), lambda state, model: state)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Skip where there is none; the shapes of all that it multiplies."""
    if reason := unavailable():
        pytest.skip(f"no oneDNN: {reason}")
    return spied(monkeypatch)


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3, bias=False))


def test_linear_layers_keep_outputs_gradients_and_keys(onednn: list[tuple[int, ...]]) -> None:
    model = perceptron()
    fast = accelerate(copy.deepcopy(model), linears=True)
    assert list(fast.state_dict()) == list(model.state_dict())
    assert all(isinstance(fast[i], nn.Linear) for i in (0, 2))
    results = []
    for each in (model, fast):
        x = torch.linspace(-1, 1, 2 * 4 * 6).view(2, 4, 6).requires_grad_()
        out = each(x)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, *each.parameters()])])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert onednn[:2] == [(8, 6), (8, 10)]


def pointwise_convolutions() -> nn.Sequential:
    """Two that are linear layers of pixels among some that are not."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 12, 1),
        nn.GELU(),
        nn.Conv2d(12, 8, 1, bias=False),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.Conv2d(8, 6, 1, stride=2),
        nn.Conv2d(6, 6, 1, padding=1),
    )


def test_convolutions_of_pixels_keep_outputs_gradients_and_keys(onednn: list[tuple[int, ...]]) -> None:
    model = pointwise_convolutions()
    fast = accelerate(copy.deepcopy(model), linears=True, channels_last=True)
    assert list(fast.state_dict()) == list(model.state_dict())
    swaps = [i for i, each in enumerate(fast) if isinstance(each, acceleration.AcceleratedPointwise)]
    assert swaps == [1, 3]
    results = []
    for each in (model, fast):
        x = torch.linspace(-1, 1, 2 * 3 * 5 * 7).view(2, 3, 5, 7).requires_grad_()
        out = each(x)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, *each.parameters()])])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5)
    assert results[1][0].is_contiguous(memory_format=torch.channels_last)
    assert onednn[:2] == [(70, 8), (70, 12)]


def test_maps_that_do_not_lie_channels_last_are_convolved(onednn: list[tuple[int, ...]]) -> None:
    model = nn.Conv2d(4, 6, 1)
    fast = accelerate(nn.Sequential(copy.deepcopy(model)), linears=True)
    for shape in ((2, 4, 5, 3), (4, 5, 3)):
        x = torch.randn(shape)
        assert torch.equal(fast(x), model(x))
    assert onednn == []


@pytest.mark.parametrize("linears", [True, False])
def test_focal_modulation_projects_by_what_its_convolutions_became(
    onednn: list[tuple[int, ...]], linears: bool
) -> None:
    model = FocalModulation(8, 3, 2)
    fast = accelerate(copy.deepcopy(model), linears=linears)
    x = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-6)
    assert type(fast.h) is nn.Conv2d  # which the operator takes
    assert onednn == ([(60, 8)] * 4 if linears else [])  # query, context, gates and what leaves


def test_the_layout_of_weights_and_maps_is_a_choice() -> None:
    def made(**options: Any) -> tuple[bool, bool]:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), FocalModulation(8, 3, 2), nn.Conv3d(8, 8, 1))
        accelerate(model, linears=False, **options)
        out = model[:2](torch.randn(2, 3, 9, 9))
        return (
            model[0].weight.is_contiguous(memory_format=torch.channels_last),
            out.is_contiguous(memory_format=torch.channels_last),
        )

    assert made() == made(channels_last=True) == (True, True)
    assert made(channels_last=False) == (False, False)
    model = accelerate(nn.Sequential(nn.Conv2d(3, 8, 3)), linears=False, channels_last=True)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match='channels_last must be "auto", True or False, got None'):
        accelerate(model, channels_last=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["biformer_tiny", "nat_mini"])
def test_stages_that_keep_their_maps_channels_last_get_such_weights(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, depths=(1, 1, 1, 1)).eval()
    fast = accelerate(copy.deepcopy(model), linears=False)
    assert type(fast) is type(model)
    assert list(fast.state_dict()) == list(model.state_dict())
    weights = [m.weight for m in fast.modules() if isinstance(m, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    image = torch.randn(1, 3, 112, 112)
    torch.testing.assert_close(fast(image), model(image), rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="nothing was accelerated"):
        accelerate(model, linears=False, channels_last=False)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


@pytest.mark.parametrize("verdict", [True, False])
def test_auto_swaps_the_linear_layers_that_gain(
    monkeypatch: pytest.MonkeyPatch, onednn: list[tuple[int, ...]], verdict: bool
) -> None:
    asked = []

    def answer(rows: int, weight: Tensor, bias: bool) -> bool:
        asked.append((rows, *weight.shape, bias))
        return verdict and rows != 256 and weight.shape[0] == 10

    monkeypatch.setattr(acceleration, "onednn_is_faster", answer)
    monkeypatch.setattr(import_module("visionsel.ops.linear"), "onednn_is_faster", answer)
    model = perceptron().append(nn.Conv2d(10, 10, 3))
    with nullcontext() if verdict else pytest.warns(UserWarning, match="nothing was accelerated"):
        accelerate(model)
    sizes = [(10, 6, True), (3, 10, False)]
    assert asked == [(rows, *size) for size in sizes for rows in (256, 4096)]
    kinds = [type(model[i]) for i in (0, 2, 3)]
    assert kinds == [acceleration.AcceleratedLinear if verdict else nn.Linear, nn.Linear, nn.Conv2d]
    model[:3](torch.randn(5, 6))
    assert onednn == ([(5, 6)] if verdict else [])
    assert asked[4:] == ([(5, 10, 6, True)] if verdict else [])  # a call is decided by its own rows


def test_linear_layers_are_left_alone_on_request() -> None:
    model = accelerate(nn.Sequential(nn.Linear(8, 8), FocalModulation(8, 3, 2)), linears=False)
    assert type(model[0]) is nn.Linear


def test_only_plain_float32_linear_layers_on_the_cpu_are_swapped(onednn: list[tuple[int, ...]]) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    others = [Doubled(4, 4), nn.Linear(4, 4).double(), nn.Linear(4, 4, device="meta"), nn.Bilinear(2, 2, 2)]
    model = nn.ModuleList([nn.Linear(4, 4), *others, nn.MultiheadAttention(4, 2)])
    kinds = [type(module) for module in model.modules()]
    kinds[1] = acceleration.AcceleratedLinear
    accelerate(model, linears=True)
    assert [type(module) for module in model.modules()] == kinds


def test_a_swapped_linear_layer_is_copied_pickled_and_moved(onednn: list[tuple[int, ...]]) -> None:
    layer = accelerate(nn.Linear(6, 10), linears=True)
    x = torch.randn(5, 6)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert torch.equal(other(x), layer(x))
    onednn.clear()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        moved = copy.deepcopy(layer).to(dtype)
        assert torch.equal(moved(x.to(dtype)), F.linear(x.to(dtype), moved.weight, moved.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert onednn == []
    assert torch.equal(layer.double().float()(x), layer(x))
    assert onednn == [(5, 6), (5, 6)]


@pytest.mark.gpu
def test_a_swapped_linear_layer_works_on_a_gpu() -> None:
    layer = accelerate(nn.Linear(6, 10), linears=True)
    x = torch.randn(5, 6)
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), expected, rtol=0, atol=1e-5)


def test_a_swapped_linear_layer_is_scripted_compiled_and_exported(onednn: list[tuple[int, ...]]) -> None:
    layer = accelerate(nn.Linear(6, 10), linears=True)
    x = torch.randn(5, 6)
    expected = F.linear(x, layer.weight, layer.bias)
    for program in (
        torch.jit.script(layer),
        torch.compile(layer, fullgraph=True, backend="aot_eager"),
        torch.export.export(layer, (x,)).module(),
    ):
        torch.testing.assert_close(program(x), expected, rtol=0, atol=1e-5)


def test_pruning_a_swapped_linear_layer_keeps_its_effect(onednn: list[tuple[int, ...]]) -> None:
    plain = nn.Linear(6, 10)
    layer = accelerate(copy.deepcopy(plain), linears=True)
    for each in (plain, layer):
        prune.l1_unstructured(each, "weight", amount=0.5)
        each.weight_orig.data *= 2
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-5)
    assert onednn == [(5, 6)]


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Skip where weights cannot be packed; the names of the functions that compute with packed ones."""
    if reason := packing.unavailable():
        pytest.skip(f"no oneDNN: {reason}")
    called: list[str] = []
    for name in ("packed_linear", "packed_convolution"):
        function = getattr(packing, name)

        def spy(*args: Any, function: Any = function) -> Tensor:
            called.append(function.__name__)
            return function(*args)

        monkeypatch.setattr(packing, name, spy)
    return called


def layered() -> nn.Sequential:
    """All that can be packed, and some that cannot."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        FocalModulation(8, 3, 2),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 12, 1, bias=False),
        nn.Flatten(2),
        nn.Linear(24, 5),
    )


def test_packed_weights_give_the_same_where_no_gradient_is_wanted(packed: list[str]) -> None:
    model = layered()
    fast = accelerate(copy.deepcopy(model), pack=True)
    assert list(fast.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 8, 12)
    for _ in range(2):
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)
        # f in three parts and proj of focal modulation between the first convolution and the rest
        assert packed == ["packed_convolution"] + ["packed_linear"] * 6
        packed.clear()
    results = []
    for each in (model, fast):
        leaf = x.clone().requires_grad_()
        out = each(leaf)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [leaf, *each.parameters()])])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert packed == []


def test_a_packed_model_is_trained_loaded_copied_and_pickled(packed: list[str]) -> None:
    fast = accelerate(layered(), pack=True)
    plain = layered()
    x = torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        fast(x)
    for each in (plain, fast):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each(x).square().mean().backward()
        optimizer.step()
    reloaded = accelerate(layered(), pack=True)
    with torch.no_grad():
        reloaded(x)
        reloaded.load_state_dict(plain.state_dict())
        expected = plain(x)
        for each in (fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), reloaded):
            packed.clear()
            torch.testing.assert_close(each(x), expected, rtol=0, atol=1e-5)
            assert len(packed) == 7


def test_a_packed_layer_is_scripted_compiled_exported_and_moved(packed: list[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1))
    fast = accelerate(copy.deepcopy(model), pack=True).eval()
    x = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        expected = model(x)
        for program in (
            torch.jit.script(fast),
            torch.compile(fast, fullgraph=True, backend="aot_eager"),
            torch.export.export(fast, (x,)).module(),
        ):
            torch.testing.assert_close(program(x), expected, rtol=0, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert fast(x).dtype == torch.bfloat16
        torch.testing.assert_close(fast.double()(x.double()).float(), expected, rtol=0, atol=1e-5)
        assert packed == []
        fast.float()(x)
    assert packed == ["packed_convolution", "packed_linear"]


def test_a_packed_depthwise_convolution_learns_as_before(packed: list[str]) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 5, padding=2, groups=6))
    fast = accelerate(copy.deepcopy(plain), pack=True)
    x = torch.randn(2, 3, 9, 8)
    for _ in range(2):
        packed.clear()
        gradients = []
        for each in (plain, fast):
            out = each(x).square().sum()
            gradients.append(torch.autograd.grad(out, list(each.parameters())))
        for one, other in zip(*gradients, strict=True):
            atol = 1e-5 * max(1.0, other.abs().max().item())
            torch.testing.assert_close(one, other, rtol=0, atol=atol)
        assert packed == []
        with torch.no_grad():
            torch.testing.assert_close(fast(x), plain(x), rtol=0, atol=1e-5)
        assert packed == ["packed_convolution"] * 2


def test_what_packs_is_a_choice(packed: list[str]) -> None:
    fast = accelerate(layered(), linears=False, pack=True)
    x = torch.randn(1, 3, 8, 12)
    with torch.no_grad():
        fast(x)
        assert set(packed) == {"packed_convolution"}
        packed.clear()
        accelerate(fast, linears=True)(x)  # what is packed stays so
        assert packed == ["packed_convolution"]
        packed.clear()
        accelerate(fast, pack=True)(x)
        assert packed == ["packed_convolution"] + ["packed_linear"] * 6
    with pytest.raises(ValueError, match="pack must be True or False, got 'auto'"):
        accelerate(fast, pack="auto")


def test_our_focal_modulation_keeps_its_operator(packed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = layers.FocalModulation(8)
    fast = accelerate(copy.deepcopy(plain), linears=True, pack=True)
    monkeypatch.setattr(layers.FocalModulation, "_modulate_by_modules", None)
    x = torch.randn(2, 6, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=0, atol=1e-5)
    assert packed == ["packed_linear"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["biformer_tiny", "nat_mini", "dinat_mini", "selectformer_nano"])
def test_packed_models_keep_their_outputs(name: str, packed: list[str]) -> None:
    model = filled(timm.create_model(name)).eval()
    fast = accelerate(copy.deepcopy(model), pack=True)
    image = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        expected = model(image)
        for _ in range(2):
            got = fast(image)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert {"packed_convolution", "packed_linear"} == set(packed)


def test_without_onednn_packing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_works", lambda: False)
    with pytest.raises(NotImplementedError, match=r"pack=True: PyTorch .* has no operators .*; leave it out"):
        accelerate(nn.Linear(3, 3), pack=True)


def test_linears_takes_three_values() -> None:
    with pytest.raises(ValueError, match="linears must be \"auto\", True or False, got 'always'"):
        accelerate(nn.Linear(3, 3), linears="always")


def test_without_onednn_true_is_refused_and_auto_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("visionsel.ops.linear"), "_operator", lambda: None)
    model = nn.Sequential(nn.Linear(8, 8), FocalModulation(8, 3, 2))
    with pytest.raises(
        NotImplementedError, match=r'linears=True: PyTorch .* has no .*; choose "auto" or False'
    ):
        accelerate(model, linears=True)
    assert type(model[0]) is type(accelerate(model)[0]) is nn.Linear
