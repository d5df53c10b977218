"""The halo attention layer: timm's numbers, sizes that timm refuses, and what compilers ask."""

from typing import Any

import pytest
import torch
from timm.layers.halo_attn import HaloAttn
from torch import nn

from tests.support import fill_state_dict, input_tensor, load_fixture
from visionsel.layers import HaloAttention

CASES = {case["case"]: case for case in load_fixture("op_halo_timm")["cases"]}
KINDS = {
    "plain": {},
    "strided": {"stride": 2},
    "pooled": {"stride": 2, "avg_down": True},
    "stride does not divide": {"stride": 2, "block_size": 5},
    "biases, scaled tables": {"qkv_bias": True, "scale_pos_embed": True, "dim_head": 4},
    "wider out": {"dim_out": 32, "qk_ratio": 0.5},
}


def layer(kind: str, **kwargs: Any) -> HaloAttention:
    torch.manual_seed(0)
    return HaloAttention(16, **{"num_heads": 2, "block_size": 4, "halo_size": 1, **KINDS[kind], **kwargs})


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [False, True])
def test_it_gives_the_numbers_of_timm(case: str, backend: str, training: bool) -> None:
    golden = CASES[case]
    model = HaloAttention(**golden["args"], backend=backend)
    model.load_state_dict(fill_state_dict(golden["state_dict"]))
    x = input_tensor(golden["x_key"], tuple(golden["x_shape"]))
    expected = torch.tensor(golden["out_f64"], dtype=torch.float64).view(golden["out_shape"])
    with torch.set_grad_enabled(training):
        out = model(x)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5 + 10 * golden["maxdiff"])
        # golden values are written with 16 digits
        torch.testing.assert_close(model.double()(x.double()), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [(40, 40), (20, 60)])
def test_gradients_are_those_of_timm(kind: str, size: tuple[int, int]) -> None:
    arguments = {"num_heads": 2, "block_size": 4, "halo_size": 1, **KINDS[kind]}
    theirs = HaloAttn(16, **arguments).double()
    ours = layer(kind).double()
    ours.load_state_dict(theirs.state_dict())
    gradients = []
    for model in (theirs, ours):
        x = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        model(x.requires_grad_()).sin().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (13, 18), (8, 7)])
def test_any_size_is_padded_before_the_projections_and_cropped(kind: str, size: tuple[int, int]) -> None:
    model = layer(kind).double().eval()
    height, width = size
    x = torch.randn(2, 16, height, width, dtype=torch.float64)
    out = model(x)
    stride = KINDS[kind].get("stride", 1)
    rows, columns = -(-height // stride), -(-width // stride)
    assert out.shape == (2, KINDS[kind].get("dim_out", 16), rows, columns)
    padded = x.new_zeros(2, 16, 20, 20)
    padded[:, :, :height, :width] = x
    # the grid of whole blocks that holds the map
    block = model.block_size
    padded = padded[:, :, : -(-height // block) * block, : -(-width // block) * block]
    pool, model.pool = model.pool, nn.Identity()
    full = model(padded)[:, :, : -(-height // model.query_stride), : -(-width // model.query_stride)]
    torch.testing.assert_close(out, pool(full), rtol=0, atol=1e-12)


def test_pooling_averages_the_map_alone() -> None:
    model = layer("pooled").eval()
    nn.init.zeros_(model.pos_embed.height_rel)
    nn.init.zeros_(model.pos_embed.width_rel)
    x = torch.randn(1, 16, 7, 7)
    pool, model.pool = model.pool, nn.Identity()
    full = model(x)
    out = pool(full)
    torch.testing.assert_close(out[..., :3, :3], nn.functional.avg_pool2d(full, 2))
    torch.testing.assert_close(out[..., 3, 3], full[..., 6, 6])


def test_backends_agree_and_can_be_set_afterwards(kind: str) -> None:
    model = layer(kind).double()
    x = torch.randn(2, 16, 13, 18, dtype=torch.float64)
    fast = model(x)
    model.backend = "reference"
    torch.testing.assert_close(fast, model(x), rtol=0, atol=1e-10)
    model.backend = "none"
    with pytest.raises(ValueError, match="unknown backend 'none'"):
        model(x)


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_layout_changes_nothing_and_the_input_stays(kind: str, channels_last: bool) -> None:
    model = layer(kind).eval()
    x = torch.randn(2, 16, 20, 20)
    given = x.to(memory_format=torch.channels_last) if channels_last else x
    before = given.clone()
    torch.testing.assert_close(model(given), model(x), rtol=0, atol=1e-6)
    assert torch.equal(given, before)


# jit is what timm's users still script models with
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("training", [False, True])
def test_it_scripts(kind: str, training: bool) -> None:
    model = layer(kind).double()
    scripted = torch.jit.script(model)
    for size in ((20, 20), (13, 18)):
        x = torch.randn(2, 16, *size, dtype=torch.float64)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(scripted(x), model(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["plain", "strided", "stride does not divide"])
def test_it_compiles_to_one_graph_for_all_sizes(kind: str) -> None:
    torch.compiler.reset()
    model = layer(kind).double()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((13, 18), (31, 9), (20, 20)):
        x = torch.randn(2, 16, *size, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["plain", "strided", "stride does not divide"])
def test_one_exported_program_serves_every_size(kind: str) -> None:
    model = layer(kind).double().eval()
    free = torch.export.Dim.DYNAMIC
    x = torch.randn(2, 16, 18, 13, dtype=torch.float64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: free, 2: free, 3: free},)).module()
        # whole blocks and parts of them, many and one, other batches
        for shape in ((3, 16, 31, 8), (1, 16, 20, 20), (1, 16, 4, 4), (1, 16, 3, 40)):
            x = torch.randn(*shape, dtype=torch.float64)
            torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-10)


def test_every_parameter_gets_a_gradient(kind: str) -> None:
    model = layer(kind)
    model(torch.randn(1, 16, 13, 18)).sin().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_parameters_are_made_where_they_are_asked_for() -> None:
    model = HaloAttention(16, num_heads=2, qkv_bias=True, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide dim_out, got 3 heads and dim_out 16"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"halo_size": -1}, "halo_size must be at least 0, got -1"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"dim_head": 0}, "dim_head must be at least 1, got 0"),
    ],
)
def test_invalid_arguments_say_what_is_wrong(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HaloAttention(16, **arguments)
