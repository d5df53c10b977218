"""HaloNets: the paper's numbers, timm's numbers, and what the family does beyond the common contract."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.support import check_model_fixture, fill_state_dict, load_fixture
from visionsel.models.halonets import HaloNet, checkpoint_filter_fn

# parameters in millions as in the paper's table 1, exactly as counted here, and the side of the last map
PUBLISHED = {
    "halonet_h0_256": (5.5, 5_502_248, 8),
    "halonet_h1_256": (8.1, 8_105_576, 8),
    "halonet_h2_256": (9.4, 9_405_608, 8),
    "halonet_h3_320": (11.8, 11_842_792, 10),
    "halonet_h4_384": (19.1, 19_103_464, 12),
    "halonet_h5_448": (30.7, 30_718_952, 14),
    "halonet_h6_512": (43.4, 43_458_280, 16),
    "halonet_h7_600": (67.4, 67_434_728, 19),
}
TIMM_H1 = {"num_heads": (8, 8, 8, 8), "project_always": False}


def toy(**kwargs: Any) -> HaloNet:
    """Small, with every part of the family, and blocks that do not begin as their shortcuts."""
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "block_size": 4,
        "halo_size": 1,
        "value_ratio": 2.0,
        "output_ratio": 0.5,
        "depths": (1, 2, 1, 1),
        "final_width": 40,
        "num_classes": 5,
        "zero_init_last": False,
    }
    return HaloNet(**{**small, **kwargs})


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_published(name: str) -> None:
    published, exact, _ = PUBLISHED[name]
    model = timm.create_model(name, device="meta")
    count = sum(p.numel() for p in model.parameters())
    assert count == exact
    assert abs(count / 1e6 - published) < 0.06


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_last_map_at_the_papers_size_is_the_one_the_configuration_names(name: str) -> None:
    side = PUBLISHED[name][2]
    model = timm.create_model(name, device="meta").eval()
    cfg = model.pretrained_cfg
    assert name.endswith(str(cfg["input_size"][1]))
    assert cfg["pool_size"] == (side, side)
    image = torch.empty(1, *cfg["input_size"], device="meta")
    final, maps = model.forward_intermediates(image)
    assert final.shape == (1, model.num_features, side, side)
    assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
    assert maps[-1].shape[2:] == (side, side)


def test_our_names_leave_those_of_timm_alone() -> None:
    assert timm.model_entrypoint("halonet_h1").__module__ == "timm.models.byoanet"
    assert set(timm.list_models(module="halonets")) == set(PUBLISHED)


@pytest.mark.slow
def test_halonet_h1_of_timm_is_reproduced() -> None:
    model = timm.create_model("halonet_h1_256", **TIMM_H1)
    check_model_fixture(model, load_fixture("timm_halonet_h1"), checkpoint_filter_fn)


def test_a_checkpoint_for_another_network_is_refused_with_the_way_out() -> None:
    state = fill_state_dict(load_fixture("timm_halonet_h1")["state_dict"])
    with pytest.raises(ValueError, match=r"shortcut.*num_heads=\(8, 8, 8, 8\) and project_always=False"):
        checkpoint_filter_fn(state, timm.create_model("halonet_h1_256", device="meta"))
    model = timm.create_model("halonet_h1_256", device="meta", **TIMM_H1)
    state.pop("stages.2.4.post_attn.weight")
    with pytest.raises(ValueError, match=r"1 entries are missing, as \['stages.2.blocks.4.norm.weight'\]"):
        checkpoint_filter_fn(state, model)


def test_its_own_state_dict_passes_the_filter_unchanged() -> None:
    model = toy()
    state = model.state_dict()
    for given in (state, {"model": state}, {"state_dict_ema": {f"module.{k}": v for k, v in state.items()}}):
        out = checkpoint_filter_fn(given, model)
        assert out.keys() == state.keys()
        assert all(torch.equal(out[k], state[k]) for k in state)


def test_blocks_begin_as_their_shortcuts() -> None:
    model = toy(zero_init_last=True).eval()
    block = model.stages[1].blocks[1]
    x = torch.randn(1, 64, 8, 8)
    torch.testing.assert_close(block(x), x.relu())
    assert not torch.equal(toy().eval().stages[1].blocks[1](x), x.relu())


def test_queries_and_keys_keep_the_width_of_the_stage() -> None:
    attention = toy().stages[1].blocks[1].attn
    assert attention.q.weight.shape[:2] == (128, 128)
    assert attention.kv.weight.shape[:2] == (128 + 256, 128)


@pytest.mark.parametrize("size", [(96, 96), (128, 64), (125, 150)])
def test_backends_agree_at_any_image_size(size: tuple[int, int]) -> None:
    models = [toy(backend=backend).double().eval() for backend in ("auto", "reference")]
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        logits = [model(image) for model in models]
    assert logits[0].shape == (2, 5)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-10)


def test_padding_to_blocks_leaves_no_pixel_out() -> None:
    model = toy().double().eval()
    image = torch.randn(1, 3, 72, 90, dtype=torch.float64).requires_grad_()
    model(image).square().sum().backward()
    assert (image.grad[0].abs().sum(0) > 0).all()


def test_every_parameter_gets_a_gradient() -> None:
    model = toy()
    model(torch.randn(2, 3, 96, 64)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_the_last_convolution_belongs_to_the_norm() -> None:
    model = toy().eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        final, maps = model.forward_intermediates(image)
        normed = model.forward_intermediates(image, norm=True, intermediates_only=True)
    assert [m.shape[1] for m in maps] == [32, 64, 128, 256]
    assert normed[-1].shape[1] == final.shape[1] == model.num_features == 40
    assert torch.equal(normed[-1], final)
    model.reset_classifier(7)
    assert model(image).shape == (1, 7)


def test_pruning_the_norm_takes_the_classifier_that_read_it() -> None:
    model = toy().eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (last,) = model.forward_intermediates(image, indices=1, intermediates_only=True)
        assert list(model.prune_intermediate_layers(1, prune_norm=True, prune_head=False)) == [3]
        assert torch.equal(model.forward_features(image), last)
    assert model.num_features == model.head_hidden_size == 256
    model.reset_classifier(3, "avg")
    assert model(image).shape == (1, 3)


def test_features_only_gives_four_levels() -> None:
    model = timm.create_model("halonet_h0_256", features_only=True).eval()
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.channels() == [32, 64, 128, 256]
    with torch.no_grad():
        features = model(torch.randn(1, 3, 128, 96))
    assert [tuple(f.shape[1:]) for f in features] == [(32, 32, 24), (64, 16, 12), (128, 8, 6), (256, 4, 3)]


# jit is what timm's users still script models with
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_it_scripts_and_traces() -> None:
    model = toy().double().eval()
    image = torch.randn(1, 3, 72, 90, dtype=torch.float64)
    with torch.no_grad():
        expected = model(image)
        torch.testing.assert_close(torch.jit.script(model)(image), expected, rtol=0, atol=1e-10)
        traced = timm.models.GraphExtractNet(model, ["stages.1", "stages.3"])
        features = traced(image)
    assert [f.shape[1] for f in features] == [64, 256]


def test_it_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    model = toy(depths=(1, 1), num_heads=(2, 2)).double().eval()
    image = torch.randn(1, 3, 72, 90, dtype=torch.float64)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(image), model(image), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_one_exported_program_serves_every_image_size() -> None:
    model = toy(depths=(1, 1), num_heads=(2, 2)).double().eval()
    free = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        image = torch.randn(2, 3, 72, 90, dtype=torch.float64)
        program = torch.export.export(model, (image,), dynamic_shapes=({0: free, 2: free, 3: free},)).module()
        for shape in ((1, 3, 64, 128), (3, 3, 96, 40)):
            image = torch.randn(shape, dtype=torch.float64)
            torch.testing.assert_close(program(image), model(image), rtol=0, atol=1e-10)


def test_settings_that_do_not_fit_say_so() -> None:
    with pytest.raises(ValueError, match="one number a stage, got 3 and 4"):
        HaloNet(depths=(1, 1, 1))
    with pytest.raises(ValueError, match="num_heads must divide dim_out, got 7 heads and dim_out 64"):
        HaloNet(depths=(1,), num_heads=(7,))


def test_drop_path_grows_with_depth() -> None:
    model = HaloNet(depths=(1, 1, 1), num_heads=(4, 8, 8), drop_path_rate=0.2)
    rates = [getattr(stage.blocks[0].drop_path, "drop_prob", 0.0) for stage in model.stages]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    assert isinstance(model.norm, nn.Identity)
