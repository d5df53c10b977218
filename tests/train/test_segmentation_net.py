"""The networks: any size, any decoder, weights of classifiers, rates by layer, sliding windows."""

from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from train.segmentation_net import DECODERS, SegmentationNet, load_encoder, slide
from visionsel.embedded.classifier import load_classifier
from visionsel.embedded.files import WEIGHTS

BIFORMER = {"embed_dims": [32, 64, 128], "depths": [1, 2, 2], "num_windows": [4, 4, 1], "topks": [4, 4, -1]}
"""The architecture of the classifier that ships with the package."""
SHIPPED = str(WEIGHTS / "classifier_biformer" / "model.safetensors")
NAT = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "kernel_size": 3}


def upernet(
    encoder: str = "nat_mini", arguments: dict[str, Any] = NAT, auxiliary: int = 0
) -> SegmentationNet:
    return SegmentationNet("upernet", encoder, 3, arguments, {"decoder_channels": 8}, auxiliary)


@pytest.mark.parametrize(
    ("decoder", "arguments"),
    [
        ("upernet", {"decoder_channels": 8}),
        ("fpn", {"decoder_pyramid_channels": 8, "decoder_segmentation_channels": 32}),
        ("unet", {"decoder_channels": [16, 8, 8, 8, 8]}),
    ],
)
def test_decoders_give_logits_of_the_images_size(decoder, arguments) -> None:
    net = SegmentationNet(decoder, "nat_mini", 3, NAT, arguments, auxiliary_channels=8)
    for size in ((64, 64), (50, 71)):
        logits, auxiliary = net(torch.randn(2, 3, *size))
        assert logits.shape == auxiliary.shape == (2, 3, *size)
    assert net.eval()(torch.randn(1, 3, 64, 64))[1] is None


def test_every_parameter_gets_a_gradient() -> None:
    for arguments in ("biformer_tiny", BIFORMER), ("nat_mini", NAT):
        net = upernet(*arguments, auxiliary=8)
        logits, auxiliary = net(torch.randn(2, 3, 64, 64))
        (logits.square().mean() + auxiliary.square().mean()).backward()
        unused = [name for name, parameter in net.named_parameters() if parameter.grad is None]
        assert not unused, unused


def test_the_encoder_starts_as_the_classifier_that_ships_with_the_package() -> None:
    net = upernet("biformer_tiny", BIFORMER).eval()
    load_encoder(net, "biformer_tiny", BIFORMER, False, SHIPPED)
    images = torch.randn(2, 3, 64, 64)
    expected = load_classifier("biformer").forward_intermediates(images, intermediates_only=True)
    for found, wanted in zip(net.smp.encoder(images)[2:], expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_weights_of_another_network_and_files_that_are_none_are_refused(tmp_path) -> None:
    other = {**BIFORMER, "depths": [1, 2, 3]}
    net = upernet("biformer_tiny", other)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"the weights of .*classifier_biformer"):
        load_encoder(net, "biformer_tiny", other, False, SHIPPED)
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="is not a checkpoint, or is cut off"):
        load_encoder(net, "biformer_tiny", other, False, str(tmp_path / "bad.pth"))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_larger_focal_windows_start_as_the_released_ones(tmp_path) -> None:
    classifier = timm.create_model("focalnet_tiny_srf", num_classes=7).eval()
    path = tmp_path / "focalnet.pth"
    torch.save({"model": classifier.state_dict()}, path)
    wide = {"focal_windows": [9, 9, 9, 9]}
    net = upernet("focalnet_tiny_srf", wide).eval()
    load_encoder(net, "focalnet_tiny_srf", wide, False, str(path))
    assert net.smp.encoder.model.layers_0.blocks[0].modulation.focal_layers[1][0].kernel_size == (11, 11)
    images = torch.randn(1, 3, 64, 64)
    expected = classifier.forward_intermediates(images, intermediates_only=True)
    for found, wanted in zip(net.smp.encoder(images)[2:], expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_rates_fall_from_layer_to_layer_and_biases_of_position_do_not_decay() -> None:
    net = upernet(auxiliary=8)
    optimizer = create_optimizer_v2(net, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = {
        names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]
    }
    assert set(groups) == set(names.values())
    encoder = "smp.encoder.model."
    # stem, four stages of a block each but the first with a downsampling (the second has one less), decoder
    scales = [groups[f"{encoder}stages_{stage}.blocks.0.attn.qkv.weight"][0] for stage in range(4)]
    assert scales == sorted(scales)
    assert len(set(scales)) == 4
    assert groups[next(n for n in groups if n.startswith(f"{encoder}stem"))][0] < scales[0]
    assert groups["smp.decoder.fusion_block.0.weight"] == (1.0, 0.1)
    assert groups["auxiliary.0.weight"] == (1.0, 0.1)
    assert scales[-1] < 1
    assert groups[f"{encoder}stages_0.blocks.0.attn.rpb"][1] == 0
    assert groups[f"{encoder}stages_0.blocks.0.attn.qkv.bias"][1] == 0
    assert groups[f"{encoder}stages_0.blocks.0.attn.qkv.weight"][1] == 0.1


@pytest.mark.parametrize(
    ("decoder", "encoder", "arguments", "message"),
    [
        ("uper", "nat_mini", NAT, "unknown decoder 'uper'; choose one of .*upernet"),
        ("upernet", "nat_mini", {"depth": 3}, "upernet over nat_mini with model_args"),
        ("upernet", "no_such_model", {}, "no_such_model"),
        ("upernet", "focalnet_tiny_iso_16", {}, "focalnet_tiny_iso_16"),  # one size of map, no pyramid
    ],
)
def test_what_cannot_be_built_is_refused(decoder, encoder, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationNet(decoder, encoder, 3, arguments, {})
    assert "dpt" not in DECODERS


class Coordinates(nn.Module):
    """Logits that tell where in the window a pixel is, beside its own value."""

    def forward(self, images):
        rows = torch.arange(images.shape[2]).view(1, 1, -1, 1).expand(len(images), 1, -1, images.shape[3])
        return torch.cat([images[:, :1], rows.float()], 1), None


@pytest.mark.parametrize(("size", "window", "stride"), [((9, 7), 4, 3), ((5, 12), 5, 5), ((3, 4), 8, 2)])
def test_sliding_windows_are_those_of_mmsegmentation(size, window, stride) -> None:
    images = torch.randn(2, 3, *size)
    found = slide(Coordinates(), images, window, stride)
    total, count = torch.zeros(2, 2, *size), torch.zeros(2, 1, *size)
    height, width = size
    for row in range(max(height - window + stride - 1, 0) // stride + 1):
        for column in range(max(width - window + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + window, height), min(column * stride + window, width)
            top, left = max(bottom - window, 0), max(right - window, 0)
            part = images[:, :, top:bottom, left:right]
            total[:, :, top:bottom, left:right] += Coordinates()(part)[0]
            count[:, :, top:bottom, left:right] += 1
    assert (count > 0).all()
    torch.testing.assert_close(found, total / count)


def test_released_weights_come_by_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(address: str, **kwargs: Any) -> None:
        asked.append(address)
        raise RuntimeError("no network")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", download)
    with pytest.raises(
        ValueError, match=r"nat_mini with model_args .* and the weights of the release: no network"
    ):
        load_encoder(upernet(), "nat_mini", NAT, True, None)
    assert asked == ["https://shi-labs.com/projects/nat/checkpoints/CLS/nat_mini.pth"]
