"""BiFormer against the authors' models (fixtures) and their published numbers, and timm's contract."""

import pickle
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.error import HTTPError

import pytest
import timm
import torch
from timm.models._features_fx import GraphExtractNet
from torch.utils.flop_counter import FlopCounterMode

import visionsel  # noqa: F401  registers the models
from tests.support import check_model_fixture, fill_state_dict, input_image, load_fixture
from visionsel.layers import BilevelRoutingAttention
from visionsel.models.biformer import BiFormer, checkpoint_filter_fn
from visionsel.ops.bilevel_routing import top_windows

TWO_STAGES: dict[str, Any] = {"embed_dims": (16, 16), "depths": (1, 1), "num_windows": 4, "topks": (2, -1)}
NAMES = ["biformer_tiny", "biformer_small", "biformer_base", "biformer_stl", "biformer_stl.nchw_in1k"]
RELEASES = {
    "biformer_tiny": "biformer_tiny",
    "biformer_small": "biformer_small",
    "biformer_stl": "biformer_stl",
    "biformer_stl.nchw_in1k": "biformer_stl_nchw",
}

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")


def toy(**kwargs: Any) -> BiFormer:
    torch.manual_seed(0)
    args: dict[str, Any] = {
        "embed_dims": (16, 16, 32, 32),
        "depths": (1, 1, 2, 1),
        "head_dim": 8,
        "num_windows": 4,
        "topks": (1, 2, 4, -1),
        "num_classes": 5,
    }
    return BiFormer(**{**args, **kwargs})


def settle_ties(monkeypatch: pytest.MonkeyPatch, model: BiFormer, images: list[torch.Tensor]) -> None:
    """Route as the model in float64 does, on these images, wherever that is a choice among equals.

    Windows that suit a window equally well but for rounding are chosen by rounding, which differs between
    processors, and each choice leads to other logits. The choice of float64 has to be one in float32 too.
    """
    settled: dict[tuple[int, ...], list[torch.Tensor]] = {}
    size: tuple[int, ...] = ()
    layer = 0

    def start(stem: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        nonlocal size, layer
        size, layer = tuple(args[0].shape[2:]), 0

    def choose(
        query: torch.Tensor, key: torch.Tensor, topk: int, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal layer
        index, chosen = top_windows(query, key, topk, scale)
        if layer < len(settled.setdefault(size, [])):
            index = settled[size][layer]
            logits = ((query * scale) @ key.transpose(1, 2)).gather(2, index)
            atol = 1e-12 if query.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(logits.sort()[0], chosen.sort()[0], rtol=0, atol=atol)
        else:
            settled[size].append(index)
        layer += 1
        return index, chosen

    model.stem.register_forward_pre_hook(start)
    for module in ("visionsel.ops.bilevel_routing", "visionsel.layers.bilevel_routing_attention"):
        monkeypatch.setattr(import_module(module), "top_windows", choose)
    model.eval().double()
    with torch.no_grad():
        for image in images:
            model(image.double())
    routed = sum(isinstance(module, BilevelRoutingAttention) for module in model.modules())
    assert all(len(indices) == routed for indices in settled.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASES)
def test_logits_and_features_are_the_authors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, fixture = timm.create_model(name), load_fixture(RELEASES[name])
    model.load_state_dict(checkpoint_filter_fn(fill_state_dict(fixture["state_dict"]), model))
    sizes = [
        fixture["input_size"][1:],
        *(fixture[key] for key in ("alt_size", "alt_size2") if key in fixture),
    ]
    settle_ties(monkeypatch, model, [input_image(*size) for size in sizes])
    check_model_fixture(model, fixture, checkpoint_filter_fn)


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl"])
def test_the_first_layer_routes_as_the_authors_do(name: str) -> None:
    fixture = load_fixture(name)
    model = timm.create_model(name).eval()
    model.load_state_dict(checkpoint_filter_fn(fill_state_dict(fixture["state_dict"]), model))
    routing = []
    layer = next(m for m in model.modules() if isinstance(m, BilevelRoutingAttention))
    layer.register_forward_pre_hook(lambda layer, args: routing.append(layer.routing(args[0])))
    with torch.no_grad():
        model.stages[0](model.stem(input_image(224, 224)))
    assert routing[0][0].sort(-1).values.tolist() == fixture["routing_idx_first_layer_sorted"]


# the authors' README; parameters counted in their code
@pytest.mark.parametrize(
    ("name", "params", "flops"),
    [
        ("biformer_tiny", 13_142_760, 2.2),
        ("biformer_small", 25_536_232, 4.5),
        ("biformer_base", 56_804_968, 9.8),
        ("biformer_stl", 28_372_552, 4.6),
        ("biformer_stl.nchw_in1k", 28_372_552, 4.6),
    ],
)
def test_parameters_and_flops_are_those_published(name: str, params: int, flops: float) -> None:
    model = timm.create_model(name, backend="reference", device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == params
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(flops, rel=0.02)


def test_drop_path_grows_linearly_over_all_blocks() -> None:
    model = timm.create_model("biformer_tiny", drop_path_rate=0.13, device="meta")
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx(torch.linspace(0, 0.13, 14).tolist())


def test_the_last_stage_has_eight_heads_at_every_width() -> None:
    for name in NAMES:
        model = timm.create_model(name, device="meta")
        last = model.stages[3].blocks[0].attn
        assert (last.num_heads, last.qkv.bias) == (8, None)
        assert last.lepe_of_value == name.endswith("nchw_in1k")


@pytest.mark.parametrize("name", NAMES)
def test_preprocessing_is_the_authors(name: str) -> None:
    cfg = timm.create_model(name, device="meta").pretrained_cfg
    assert cfg["mean"] == timm.data.IMAGENET_DEFAULT_MEAN
    assert cfg["std"] == timm.data.IMAGENET_DEFAULT_STD
    assert (cfg["interpolation"], cfg["crop_pct"], cfg["input_size"]) == ("bicubic", 0.875, (3, 224, 224))
    assert cfg["url"].startswith("https://api.onedrive.com/")


def test_a_tag_fixes_the_numerics_however_it_is_given_and_arguments_win() -> None:
    tagged = timm.create_model("biformer_stl.nchw_in1k", device="meta")
    assert tagged.refactored
    assert timm.create_model("biformer_stl", pretrained_cfg="nchw_in1k", device="meta").refactored
    assert timm.create_model("biformer_stl", pretrained_cfg=tagged.pretrained_cfg, device="meta").refactored
    assert not timm.create_model("biformer_stl", device="meta").refactored
    assert not timm.create_model("biformer_stl.nchw_in1k", refactored=False, device="meta").refactored


@pytest.mark.parametrize("refactored", [False, True])
@pytest.mark.parametrize("swin_layout", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (75, 50), (33, 130)])
def test_any_size_gives_features_and_logits(
    size: tuple[int, int], swin_layout: bool, refactored: bool
) -> None:
    model = toy(swin_layout=swin_layout, refactored=refactored).eval()
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        last, features = model.forward_intermediates(image)
        assert [f.shape[1] for f in features] == [16, 16, 32, 32]
        torch.testing.assert_close(last, model.forward_features(image), rtol=0, atol=0)
        torch.testing.assert_close(model.norm(features[-1]), last, rtol=0, atol=0)
        logits = model(image)
        assert logits.shape == (2, 5)
        torch.testing.assert_close(model(image.flip(0)).flip(0), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("refactored", [False, True])
def test_every_parameter_learns_also_with_checkpointing_and_window_count(refactored: bool) -> None:
    model = toy(num_windows=(5, 4, 3, 2), refactored=refactored)
    image = torch.randn(2, 3, 96, 80)
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        model(image).square().sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("refactored", [False, True])
def test_it_scripts_and_traces_to_the_same_answer(refactored: bool) -> None:
    model = toy(refactored=refactored).eval()
    image = torch.randn(1, 3, 75, 100)
    expected = model(image)
    torch.testing.assert_close(torch.jit.script(model)(image), expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        graph = GraphExtractNet(model, {"stages.2": "map"}, squeeze_out=True)
        torch.testing.assert_close(
            graph(image), model.forward_intermediates(image, [2], intermediates_only=True)[0]
        )


def test_features_only_gives_the_stages() -> None:
    model = timm.create_model("biformer_tiny", features_only=True, out_indices=(1, 3), num_windows=4)
    assert (model.feature_info.channels(), model.feature_info.reduction()) == ([128, 512], [8, 32])
    assert [tuple(f.shape) for f in model(torch.randn(1, 3, 64, 96))] == [(1, 128, 8, 12), (1, 512, 2, 3)]


@pytest.mark.slow
def test_it_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    model = toy(**TWO_STAGES)
    image = torch.randn(2, 3, 64, 80)
    # aot_eager: the graph as the compiler sees it, without minutes of code generation
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(image)
    torch.testing.assert_close(out, model(image), rtol=0, atol=1e-5)


def authors_names(model: BiFormer) -> dict[str, torch.Tensor]:
    """A state dict as the authors' code would save it for the toy model."""
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in (
            ("stem.", "downsample_layers.0."),
            (".blocks.", "."),
            (".attn.qkv.", ".attn.qkv." if key.startswith("stages.3") else ".attn.qkv.qkv."),
            (".mlp.fc1.", ".mlp.0."),
            (".mlp.fc2.", ".mlp.3."),
            ("head.fc.", "head."),
        ):
            key = key.replace(ours, theirs)
        if ".downsample." in key:
            stage, rest = key.removeprefix("stages.").split(".downsample.")
            key = f"downsample_layers.{stage}.{rest}"
        state[key] = value
    return state


@pytest.mark.parametrize("wrap", [None, "model", "state_dict", "model_ema", "state_dict_ema"])
def test_the_filter_takes_the_authors_names_nested_or_not_and_our_own(wrap: str | None) -> None:
    model = toy()
    for state in (authors_names(model), model.state_dict()):
        out = checkpoint_filter_fn({wrap: state, "epoch": 3} if wrap else state, model)
        assert set(out) == set(model.state_dict())
        model.load_state_dict(out, strict=True)


def test_the_filter_refuses_other_checkpoints() -> None:
    model = toy()
    state = authors_names(model)
    truncated = {k: v for k, v in state.items() if not k.startswith("stages.2.1.")}
    with pytest.raises(
        ValueError, match=r"16 entries are missing, as \['stages.2.blocks.1.pos_embed.weight'"
    ):
        checkpoint_filter_fn(truncated, model)
    with pytest.raises(ValueError, match=r"16 unexpected, as \['stages.2.blocks.1"):
        checkpoint_filter_fn(state, toy(depths=(1, 1, 1, 1)))
    with pytest.raises(ValueError, match="entries are missing"):
        checkpoint_filter_fn({"conv1.weight": torch.zeros(1)}, model)
    with pytest.raises(
        ValueError, match=r"numerics of biformer_stl.in1k, the model has those of .*nchw_in1k"
    ):
        checkpoint_filter_fn(state, toy(refactored=True))


def test_a_local_file_loads_also_with_other_channels_and_classes(tmp_path: Path) -> None:
    fixture = load_fixture("biformer_tiny")
    state = fill_state_dict(fixture["state_dict"])
    path = tmp_path / "biformer_tiny.pth"
    torch.save({"model": state}, path)
    overlay = {"file": str(path)}
    model = timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.head.fc.weight, state["head.weight"])
    gray = timm.create_model(
        "biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=7
    )
    torch.testing.assert_close(
        gray.stem[0].weight, state["downsample_layers.0.0.weight"].sum(1, keepdim=True)
    )
    assert gray.head.fc.out_features == 7


def test_a_dead_link_says_what_to_do_and_caches_each_release_apart(tmp_path: Path) -> None:
    error = HTTPError("https://api.onedrive.com", 404, "not found", {}, None)  # type: ignore[arg-type]
    with (
        mock.patch("timm.models._builder.load_state_dict_from_url", side_effect=error) as load,
        pytest.raises(RuntimeError, match=r"biformer_stl.nchw_in1k does not answer .*pretrained_cfg_overlay"),
    ):
        timm.create_model("biformer_stl.nchw_in1k", pretrained=True, cache_dir=tmp_path)
    assert load.call_args.kwargs["model_dir"] == tmp_path / "biformer_stl.nchw_in1k"


def test_settings_of_other_lengths_are_refused_and_models_pickle() -> None:
    with pytest.raises(ValueError, match="one number a stage, got 4, 4, 2 and 4"):
        toy(num_windows=(4, 4))
    model = toy().eval()
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(image), model(image), rtol=0, atol=0)


def test_blocks_get_maps_that_lie_channels_last_whatever_the_stem_leaves() -> None:
    model = timm.create_model("biformer_tiny", depths=(1, 1, 1, 1)).eval()
    seen = []
    for stage in model.stages:
        stage.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    with torch.no_grad():
        assert model.stem(torch.randn(1, 3, 64, 64)).is_contiguous()  # NCHW
        model(torch.randn(1, 3, 64, 64))
    assert seen == [True] * 4
