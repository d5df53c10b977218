"""The layers of BiFormer against the authors' code (fixtures), and what else a layer has to do."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import fill_state_dict, input_tensor, load_fixture
from visionsel.layers import BilevelRoutingAttention
from visionsel.layers.lepe_attention import AttentionLePE

RENAMED = (
    ("qkv.qkv.", "qkv."),
    ("qkv_linear.", "qkv."),
    ("output_linear.", "wo."),
    ("router.emb.", "router."),
)
LEGACY = load_fixture("op_bra_legacy")["cases"]
REFACTORED = load_fixture("op_bra_nchw")["cases"]

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")


def authors_layer(case: dict[str, Any], **kwargs: Any) -> BilevelRoutingAttention:
    args = dict(case["args"])
    args.pop("auto_pad", None)  # ours always pads
    args["num_windows"] = args.pop("n_win")
    kv_per_win = args.pop("kv_per_win", None)
    if args.pop("kv_downsample_mode", "identity") == "ada_avgpool":
        args["kv_per_win"] = kv_per_win
    layer = BilevelRoutingAttention(**args, **kwargs)
    state = {}
    for key, value in fill_state_dict(case["state_dict"]).items():
        for theirs, ours in RENAMED:
            key = key.replace(theirs, ours)
        state[key] = value.flatten(1) if value.shape[2:] == (1, 1) else value
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", LEGACY, ids=lambda case: case["case"])
def test_it_equals_the_authors_layer(case: dict[str, Any], backend: str) -> None:
    layer = authors_layer(case, backend=backend)
    x = input_tensor(case["x_key"], tuple(case["x_shape"]))
    expected = torch.tensor(case["out_f64"], dtype=torch.float64).view(case["out_shape"])
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=2e-5 + 10 * case["maxdiff"])
    layer.double()
    torch.testing.assert_close(layer(x.double()), expected, rtol=0, atol=1e-9)
    index = layer.routing(x.double())
    assert torch.equal(index.sort(-1).values, torch.tensor(case["routing_idx"]).sort(-1).values)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", REFACTORED, ids=lambda case: case["case"])
def test_padding_after_the_projection_equals_the_authors_refactored_layer(
    case: dict[str, Any], backend: str
) -> None:
    layer = authors_layer(case, pad_projected=True, backend=backend)
    x = input_tensor(case["x_key"], tuple(case["x_shape"])).permute(0, 2, 3, 1)
    expected = torch.tensor(case["out_f64"], dtype=torch.float64).view(case["x_shape"]).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=2e-5 + 10 * case["maxdiff"])
    torch.testing.assert_close(layer.double()(x.double()), expected, rtol=0, atol=1e-9)


OPTIONS = [
    {},
    {"topk": -1},
    {"pad_projected": True},
    {"pad_projected": True, "topk": -1},
    {"soft_routing": True},
    {"soft_routing": True, "diff_routing": True, "param_routing": True},
    {"kv_per_win": 2, "side_dwconv": 0},
]


def small_layer(**options: Any) -> BilevelRoutingAttention:
    torch.manual_seed(0)
    return BilevelRoutingAttention(8, **{"num_heads": 2, "num_windows": 4, "topk": 3, **options})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(8, 8), (11, 6), (3, 5), (1, 1)])
def test_every_size_is_served_alike_by_all_backends_and_torchscript(
    options: dict[str, Any], size: tuple[int, int]
) -> None:
    layer = small_layer(**options).double()
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    out = layer(x)
    assert out.shape == x.shape
    layer.backend = "reference"
    torch.testing.assert_close(layer(x), out, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.jit.script(layer)(x), out, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), out, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_parameter_gets_a_gradient(options: dict[str, Any]) -> None:
    layer = small_layer(**options)
    layer(torch.randn(2, 11, 6, 8)).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_weights_of_soft_routing_have_gradients_only_if_asked() -> None:
    x = torch.randn(1, 8, 8, 8)
    grads = []
    for diff in (False, True):
        layer = small_layer(soft_routing=True, diff_routing=diff)
        layer(x).square().sum().backward()
        grads.append(layer.qkv.weight.grad)
    assert not torch.allclose(grads[0], grads[1])


def test_padding_takes_part_or_not_as_asked() -> None:
    x = torch.randn(1, 9, 8, 8)
    counted, uncounted = small_layer(), small_layer(pad_projected=True)
    even = torch.randn(1, 8, 8, 8)
    torch.testing.assert_close(counted(even), uncounted(even), rtol=0, atol=1e-6)
    assert counted.routing(x).shape == (1, 16, 3)
    assert uncounted.routing(x).shape == (1, 20, 3)  # rows of floor(9 / 4) = 2 tokens: 5 of them


def test_autocast_and_bfloat16_stay_near_float32() -> None:
    layer = small_layer()
    x = torch.randn(1, 8, 8, 8)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    # a routing that flips between nearly equal windows would show as 1e-1
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=2e-2)
    assert (
        small_layer(dtype=torch.bfloat16, param_routing=True, diff_routing=True, soft_routing=True)(
            x.bfloat16()
        )
        .isfinite()
        .all()
    )


@pytest.mark.slow
def test_it_compiles_into_one_dynamic_graph() -> None:
    torch._dynamo.reset()
    layer = small_layer()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((11, 14), (12, 16)):
        x = torch.randn(2, *size, 8, requires_grad=True)
        out, expected = compiled(x), layer(x)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        grad = torch.autograd.grad(out.square().sum(), x)[0]
        torch.testing.assert_close(
            grad, torch.autograd.grad(expected.square().sum(), x)[0], rtol=0, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"pad_projected": True}], ids=str)
def test_one_export_serves_sizes_with_and_without_padding(options: dict[str, Any]) -> None:
    layer = small_layer(**options)
    sizes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(layer, (torch.randn(2, 11, 14, 8),), dynamic_shapes=sizes).module()
    for shape in ((2, 11, 14), (3, 12, 16), (4, 21, 9)):
        x = torch.randn(*shape, 8)
        torch.testing.assert_close(program(x), layer(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads 3 must divide dim 8"),
        ({"qk_dim": 5}, "qk_dim 5"),
        ({"num_windows": 0}, "num_windows must be at least 1"),
        ({"topk": 17}, "1 to 16"),
        ({"topk": 0}, "topk must be -1"),
        ({"side_dwconv": 4}, "side_dwconv must be odd"),
        ({"kv_per_win": 0}, "kv_per_win must be at least 1"),
        ({"diff_routing": True}, "diff_routing needs soft_routing"),
        ({"soft_routing": True, "param_routing": True}, "param_routing needs diff_routing"),
        ({"pad_projected": True, "soft_routing": True}, "pad_projected goes with neither"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_layer(**options)


def plain_attention(layer: AttentionLePE, x: Tensor) -> Tensor:
    batch, height, width, dim = x.shape
    q, k, v = layer.qkv(x).reshape(batch, height * width, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    out = (q @ k.mT * (dim // layer.num_heads) ** -0.5).softmax(-1) @ v
    return out.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("of_value", [False, True])
def test_last_stage_convolves_its_input_or_its_values(of_value: bool) -> None:
    layer = AttentionLePE(16, num_heads=4, lepe_of_value=of_value).double()
    x = torch.randn(2, 5, 3, 16, dtype=torch.float64)
    local = layer.qkv(x)[..., 32:] if of_value else x
    local = layer.lepe(local.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    expected = layer.proj(plain_attention(layer, x) + local)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.jit.script(layer)(x), expected, rtol=0, atol=1e-12)


def test_last_stage_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="num_heads 8 must divide dim 12"):
        AttentionLePE(12)
    with pytest.raises(ValueError, match="side_dwconv must be odd"):
        AttentionLePE(16, side_dwconv=2)
