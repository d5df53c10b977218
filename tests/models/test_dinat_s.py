"""DiNAT_s against the authors' numbers, and their files, tags and sizes."""

import re
from typing import Any

import pytest
import timm
import torch
from timm.models import create_feature_extractor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import visionsel  # noqa: F401  (registers the models)
from tests.support import check_model_fixture, load_fixture
from visionsel.models.dinat_s import checkpoint_filter_fn

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")

# billions of multiply-adds in the papers' tables, and parameters of the authors' code
PUBLISHED = {
    "dinat_s_tiny": (4.5, 28_288_354),
    "dinat_s_small": (8.7, 49_606_258),
    "dinat_s_base": (15.4, 87_768_224),
    "dinat_s_large": (34.5, 196_532_476),
    "dinat_s_large.in22k_ft_in1k_384": (101.5, 196_532_476),
}
TOY: dict[str, Any] = {
    "embed_dim": 16,
    "depths": (2, 2, 2, 1),
    "num_heads": (1, 2, 2, 4),
    "dilations": ((1, 3), (1, 2), (1, 2), (1,)),
}


def toy(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("dinat_s_tiny", **{**TOY, **kwargs}).eval()


def to_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of ours under the authors' names."""
    out = {}
    for key, value in state.items():
        if found := re.match(r"stages\.(\d+)\.downsample\.(.+)", key):
            key = f"layers.{int(found[1]) - 1}.downsample.{found[2]}"
        key = key.replace("stages.", "layers.").replace("stem.", "patch_embed.").replace("head.fc.", "head.")
        out[key] = value
    return out


@pytest.mark.parametrize("name", ["dinat_s_tiny", pytest.param("dinat_s_large", marks=pytest.mark.slow)])
def test_it_equals_the_authors_model(name: str) -> None:
    # weights that the fixture's replace, strictly, take seconds to draw
    model = timm.create_model(name, device="meta").to_empty(device="cpu")
    assert {key for key, _ in model.named_buffers()} <= set(model.state_dict())
    check_model_fixture(model, load_fixture(name), checkpoint_filter_fn)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_variant_has_the_published_size_and_cost(name: str) -> None:
    giga, parameters = PUBLISHED[name]
    model = timm.create_model(name, device="meta", backend="reference").eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    image = torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, rel=0.02)


def dilations(model: nn.Module) -> list[list[int]]:
    return [[block.attn.dilation[0] for block in stage.blocks] for stage in model.stages]


def test_a_tag_fixes_dilations_classes_and_image_size() -> None:
    at_224 = [[1, 8], [1, 4], [1, 2] * 9, [1, 1]]
    at_384 = [[1, 13], [1, 6], [1, 3] * 9, [1, 1]]
    expected = {
        "dinat_s_large": (at_224, 1000, 224),
        "dinat_s_large.in22k_ft_in1k": (at_224, 1000, 224),
        "dinat_s_large.in22k_ft_in1k_384": (at_384, 1000, 384),
        "dinat_s_large.in22k": (at_224, 21841, 224),
    }
    assert set(timm.list_models("dinat_s_large.*", include_tags=True)) == set(expected) - {"dinat_s_large"}
    for name, (pattern, classes, size) in expected.items():
        model = timm.create_model(name, device="meta")
        assert dilations(model) == pattern, name
        assert model.num_classes == classes, name
        assert model.pretrained_cfg["input_size"] == (3, size, size), name
    assert dilations(timm.create_model("dinat_s_tiny", device="meta")) == [[1, 8], [1, 4], [1, 2] * 3, [1, 1]]


def test_arguments_win_over_the_tag() -> None:
    chosen = [[1, 2], [3, 2], [1, 1] * 9, [2, 1]]
    model = timm.create_model(
        "dinat_s_large.in22k_ft_in1k_384", device="meta", kernel_size=5, dilations=chosen, num_classes=7
    )
    assert dilations(model) == chosen
    assert model.stages[0].blocks[0].attn.kernel_size == (5, 5)
    assert model.num_classes == 7


@pytest.mark.parametrize(
    "given", [((1, 1), (1, 1)), ((1, 2), (1, 2), (1,), (1,)), (1, 2, 2, 1), ((1, 0), *[(1, 1)] * 3)]
)
def test_dilations_that_do_not_fit_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="dilation"):
        timm.create_model("dinat_s_tiny", **{**TOY, "dilations": given})


@pytest.mark.parametrize("nested", [None, "model", "state_dict", "model_ema", "state_dict_ema"])
def test_the_authors_file_loads_as_it_is(nested: str | None) -> None:
    source, model = toy(num_classes=10), toy(num_classes=10)
    for p in source.parameters():
        nn.init.normal_(p)
    theirs = to_authors(source.state_dict())
    theirs["norm0.weight"] = torch.ones(16)  # their backbone for detection has norms of its outputs
    theirs["norm3.bias"] = torch.ones(128)
    checkpoint = theirs if nested is None else {nested: theirs, "epoch": 3}
    model.load_state_dict(checkpoint_filter_fn(checkpoint, model), strict=True)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_a_pretrained_file_adapts_to_other_channels_and_classes(tmp_path: Any) -> None:
    source = toy()
    torch.save(to_authors(source.state_dict()), tmp_path / "dinat_s.pth")
    overlay = {"file": str(tmp_path / "dinat_s.pth")}
    model = toy(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=3)
    assert model.head.fc.weight.shape == (3, 128)
    weight = source.stem.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(model.stem.proj.weight, weight, rtol=0, atol=1e-5)
    for key, value in source.stages.state_dict().items():
        assert torch.equal(model.stages.state_dict()[key], value), key


@pytest.mark.parametrize("classes", [1000, 3])
def test_a_file_of_another_variant_or_kernel_is_refused(classes: int) -> None:
    model = toy(num_classes=classes)
    theirs = to_authors(toy().state_dict())
    with pytest.raises(ValueError, match=r"that of kernel_size 5, and the model wants .* kernel_size 7"):
        checkpoint_filter_fn(to_authors(toy(kernel_size=5).state_dict()), model)
    cut = {key: value for key, value in theirs.items() if not key.startswith("layers.3.")}
    with pytest.raises(ValueError, match=r"entries are missing, as \['stages\.3\.blocks"):
        checkpoint_filter_fn(cut, model)
    with pytest.raises(ValueError, match=r"unexpected, as \['levels\.0\.weight'"):
        checkpoint_filter_fn({"levels.0.weight": torch.ones(2)}, model)


def test_position_biases_take_no_weight_decay() -> None:
    model = toy()
    assert model.no_weight_decay() == {k for k in model.state_dict() if k.endswith(".rpb")}
    assert len(model.no_weight_decay()) == 7


def test_drop_path_grows_with_depth_and_is_off_by_default() -> None:
    def rates(model: nn.Module) -> list[float]:
        return [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]

    assert rates(toy()) == [0.0] * 7
    assert rates(toy(drop_path_rate=0.3)) == pytest.approx([0.05 * i for i in range(7)])


@pytest.mark.parametrize("size", [(64, 64), (97, 131), (30, 33)])
def test_scripted_or_traced_by_fx_it_gives_the_same_at_any_size(size: tuple[int, int]) -> None:
    model = toy(num_classes=5)
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = model(image)
        torch.testing.assert_close(torch.jit.script(model)(image), expected, rtol=0, atol=1e-6)
        fx = create_feature_extractor(model, {"head.fc": "logits"})
        assert torch.equal(fx(image)["logits"], expected)
        features = model.forward_intermediates(image, intermediates_only=True)
    for i, feature in enumerate(features):
        reduction = 4 * 2**i
        assert feature.shape == (2, 16 * 2**i, -(-size[0] // reduction), -(-size[1] // reduction))


def test_features_only_gives_the_stages() -> None:
    extractor = toy(features_only=True)
    model = toy()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = extractor(image)
        expected = model.forward_intermediates(image, intermediates_only=True)
    assert extractor.feature_info.channels() == [16, 32, 64, 128]
    assert extractor.feature_info.reduction() == [4, 8, 16, 32]
    for feature, stage in zip(features, expected, strict=True):
        assert torch.equal(feature, stage)


@pytest.mark.slow
def test_it_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    model = toy(num_classes=5, depths=(1, 0), num_heads=(1, 2), dilations=((3,), ()))
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        out = torch.compile(model, fullgraph=True)(image)
        torch.testing.assert_close(out, model(image), rtol=0, atol=1e-5)
