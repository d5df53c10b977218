"""Pictures and figures of a run: what they show is true, and no loss changes by them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lightning import LightningModule
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.train.conftest import make_config as make_classification
from tests.train.conftest import make_image_folder, record_losses, rows
from tests.train.test_segmentation import make_config as make_segmentation
from tests.train.test_segmentation_data import make_ade20k
from train import classification, segmentation
from train.callbacks import FeaturePictures, PredictionPictures, Throughput
from train.callbacks_drawing import sheet, to_images
from train.callbacks_maps import attention, feature_colors, modulation, routed_boxes, spatial
from visionsel.layers.bilevel_routing_attention import BilevelRoutingAttention
from visionsel.layers.focal_modulation import FocalModulation
from visionsel.layers.neighborhood_attention import NeighborhoodAttention
from visionsel.models.acceleration import accelerate
from visionsel.ops import bilevel_routing_attention

PICTURES = "train.callbacks.FeaturePictures"
CALLBACKS: list[dict[str, Any]] = [
    {"class_path": PICTURES, "init_args": {"images": 1, "query": [0.3, 0.8]}},
    {"class_path": "train.callbacks.Throughput", "init_args": {"skip": 1}},
]


def test_neighborhood_attention_is_the_softmax_over_the_kernel() -> None:
    layer = NeighborhoodAttention(8, 2, kernel_size=3, dilation=2)
    torch.nn.init.normal_(layer.rpb)
    x = torch.randn(2, 9, 7, 8)
    found = attention(layer, x, (0.5, 0.0))  # row 4, column 0
    q, k, _ = layer.qkv(x).unflatten(3, (3, 2, 4)).unbind(3)
    expected = torch.zeros(2, 9, 7)
    for head in range(2):
        cells = [(row, column) for row in (2, 4, 6) for column in (0, 2, 4)]  # the kernel stays in the map
        logits = torch.stack(
            [
                (q[:, 4, 0, head] * k[:, row, column, head]).sum(-1) * 0.5
                + layer.rpb[head, (row - 4) // 2 + 2, column // 2 + 2]
                for row, column in cells
            ],
            -1,
        )
        for weight, (row, column) in zip(logits.softmax(-1).unbind(-1), cells, strict=True):
            expected[:, row, column] += weight / 2
    torch.testing.assert_close(found, expected)
    assert layer.rpb.grad is None


def test_routed_attention_is_that_of_the_operator_and_stays_in_the_routed_windows() -> None:
    layer = BilevelRoutingAttention(8, num_heads=1, num_windows=4, topk=3)
    x = torch.randn(2, 10, 13, 8)  # padded to 12 x 16: windows of 3 x 4
    weights = attention(layer, x, (0.45, 0.6))  # row 4, column 7
    q, k, v, _, grid = layer.project(x)
    out = bilevel_routing_attention(q, k, v, grid, 3, layer.scale)[:, 4, 7, 0]
    kept = torch.zeros(2, 12, 16)
    kept[:, :10, :13] = weights
    # what is missing fell on padding, whose values are those of the bias
    value = (kept[..., None] * v[..., 0, :]).sum((1, 2)) + (1 - weights.sum((1, 2)))[:, None] * v[
        :, 11, 15, 0
    ]
    torch.testing.assert_close(value, out)
    window, routed = routed_boxes(layer, x, (0.45, 0.6))
    assert window == pytest.approx((4 / 13, 3 / 10, 8 / 13, 6 / 10))
    index = layer.routing(x)[:, 1 * 4 + 1]
    for sample in range(2):
        inside = torch.zeros(12, 16, dtype=torch.bool)
        for number in index[sample].tolist():
            top, left = number // 4 * 3, number % 4 * 4
            inside[top : top + 3, left : left + 4] = True
        drawn = torch.zeros(10, 13, dtype=torch.bool)
        for x0, y0, x1, y1 in routed[sample]:
            drawn[round(y0 * 10) : round(y1 * 10), round(x0 * 13) : round(x1 * 13)] = True
        assert torch.equal(drawn, inside[:10, :13])
        assert (weights[sample][~drawn] == 0).all()


@pytest.mark.parametrize("kind", ["ours", "timm's", "timm's, accelerated"])
def test_modulators_and_gates_are_those_that_the_layer_answers_with(kind) -> None:
    x = torch.randn(2, 8, 9, 6, dtype=torch.float64)
    layer: Any = FocalModulation(6, focal_level=2, normalize_modulator=True)
    if kind != "ours":
        layer = timm.models.focalnet.FocalModulation(6, focal_window=3, focal_level=2)
        x = x.movedim(-1, 1)
    if "accelerated" in kind:
        layer = accelerate(layer)
    layer = layer.double().requires_grad_(False)
    # the answer is then query times modulator
    layer.proj.weight.copy_(torch.eye(6, dtype=torch.float64).view_as(layer.proj.weight))
    layer.proj.bias.zero_()
    projected, out = layer.f(x), layer(x)
    if kind != "ours":
        projected, out = projected.movedim(1, -1), out.movedim(1, -1)
    found, gates = modulation(layer, x)
    torch.testing.assert_close(found, (out / projected[..., :6]).norm(dim=-1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gates, projected[..., 12:].movedim(-1, 1))
    assert gates.shape == (2, 3, 8, 9)
    assert torch.equal(layer(x), out if kind == "ours" else out.movedim(-1, 1))
    assert not any(module._forward_hooks for module in layer.modules())


def test_feature_colours_are_principal_components_and_always_the_same() -> None:
    direction = torch.randn(16)
    strength = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    maps = strength * direction.view(1, -1, 1, 1) + 0.01 * torch.randn(1, 16, 8, 8)
    colors = feature_colors(maps)
    assert colors.shape == (1, 3, 8, 8)
    assert colors.min() == 0
    assert colors.max() == 1
    order = colors[0, 0].flatten().argsort().float()
    assert abs(np.corrcoef(order.numpy(), np.arange(64))[0, 1]) > 0.95  # the strongest direction comes first
    assert torch.equal(colors, feature_colors(maps.clone()))
    assert feature_colors(torch.randn(1, 2, 4, 4)).shape == (1, 3, 4, 4)
    assert feature_colors(torch.ones(1, 5, 4, 4)).isfinite().all()


def test_layouts_of_maps_are_told_apart() -> None:
    maps = torch.randn(2, 24, 8, 12)
    for output in (maps, [maps], maps.permute(0, 2, 3, 1)):
        assert torch.equal(spatial(output, (64, 96)), maps)
    tokens = maps.flatten(2).transpose(1, 2)
    with_class = torch.cat([torch.randn(2, 5, 24), tokens], 1)
    assert torch.equal(spatial(with_class, (64, 96)), maps)
    for wrong in (torch.randn(2, 10), {"a": 1}):
        with pytest.raises(ValueError, match="is no map"):
            spatial(wrong, (8, 8))
    with pytest.raises(ValueError, match="2 tokens, which fill no grid"):
        spatial(torch.randn(2, 2, 4), (100, 300))


def test_images_look_as_they_were_and_sheets_hold_their_panels() -> None:
    pixels = torch.rand(2, 3, 6, 5)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    normalized = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    images = to_images(normalized, {"mean": mean, "std": std})
    found = np.array(images[1]).transpose(2, 0, 1)
    assert np.abs(found - 255 * pixels[1].numpy()).max() <= 0.51
    assert np.array(to_images(normalized, None)[0]).max() == 255
    whole = sheet([[images[0], images[1]], [images[1], images[0]]], ["a", "b"])
    assert np.array_equal(np.array(whole)[18:24, :5], np.array(images[0]))


def run_losses(monkeypatch: pytest.MonkeyPatch, program: Any, kind: type, config: Path) -> list[float]:
    """The loss of each batch of a run."""
    with monkeypatch.context() as patch:
        seen = record_losses(patch, kind)
        assert program.main(["fit", "--config", str(config)]) == 0
    return list(seen.values())


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs ended alike, to the bit."""
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, other)]
    return all(
        torch.equal(value, states[1]["state_dict"][key]) for key, value in states[0]["state_dict"].items()
    )


def test_a_classifier_is_trained_alike_with_and_without_callbacks(tmp_path, monkeypatch) -> None:
    images = make_image_folder(tmp_path / "images")
    model = {"model": "nat_mini", "ema_decay": 0.5}
    model["model_args"] = {"embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "kernel_size": 3}
    model["model_args"]["drop_path_rate"] = 0.2  # type: ignore[index]
    losses = {}
    for name, callbacks in (("plain", []), ("drawn", CALLBACKS)):
        config = make_classification(
            tmp_path / f"{name}.yaml",
            images,
            output=str(tmp_path / name),
            model=model,
            trainer={"callbacks": callbacks},
            data={"batch_size": 8},
        )
        losses[name] = run_losses(monkeypatch, classification, classification.ImageClassifier, config)
    assert len(losses["plain"]) == 6
    assert losses["plain"] == losses["drawn"]
    assert same_weights(tmp_path / "plain", tmp_path / "drawn")
    logs = tmp_path / "drawn" / "logs" / "version_0"
    names = {path.name for path in (logs / "pictures").iterdir()}
    # of three stages, each with one layer of attention
    stages = {f"net.stages.{stage}" for stage in range(3)}
    layers = stages | {f"{stage}.blocks.0.attn" for stage in stages}
    assert names == {f"{layer}_epoch00{e}_step{3 + 3 * e:06d}.png" for layer in layers for e in range(2)}
    with Image.open(logs / "pictures" / "net.stages.0.blocks.0.attn_epoch001_step000006.png") as picture:
        assert len(np.unique(np.array(picture).reshape(-1, 3), axis=0)) > 50
    events = EventAccumulator(str(logs), size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == layers
    rates = rows(tmp_path / "drawn", "throughput/images_per_second")
    peaks = rows(tmp_path / "drawn", "memory/peak_gib")
    assert len(rates) == len(peaks) == 2
    assert min(rates) > 0
    assert 0.05 < min(peaks) <= max(peaks) < 100


def test_a_segmenter_is_trained_alike_with_and_without_callbacks(tmp_path, monkeypatch) -> None:
    root = make_ade20k(tmp_path / "data", train=4)
    callbacks = [*CALLBACKS, {"class_path": "train.callbacks.PredictionPictures", "init_args": {"images": 3}}]
    losses = {}
    for name, added in (("plain", []), ("drawn", callbacks)):
        config = make_segmentation(
            tmp_path / f"{name}.yaml", root, output=str(tmp_path / name), trainer={"callbacks": added}
        )
        losses[name] = run_losses(monkeypatch, segmentation, segmentation.SemanticSegmentation, config)
    assert len(losses["plain"]) == 4
    assert losses["plain"] == losses["drawn"]
    assert same_weights(tmp_path / "plain", tmp_path / "drawn")
    encoder = "net.smp.encoder.model.stages"
    pictures = {p.name for p in (tmp_path / "drawn" / "logs" / "version_0" / "pictures").iterdir()}
    for layer in ("predictions", f"{encoder}_1.blocks.0.attn", f"{encoder}_2"):
        assert f"{layer}_epoch001_step000004.png" in pictures


class Module(LightningModule):
    """A training module around a network."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net


def test_layers_that_are_not_there_and_compiled_models_are_refused(tmp_path) -> None:
    trainer: Any = SimpleNamespace(loggers=[])
    plain = Module(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no layers \['net.nothing'\]"):
        FeaturePictures(layers=["net.nothing"], folder=str(tmp_path)).on_fit_start(trainer, plain)
    with pytest.raises(ValueError, match="neither stages nor our operators"):
        FeaturePictures(folder=str(tmp_path)).on_fit_start(trainer, plain)
    plain.net._compiled_call_impl = plain.net.forward  # as Module.compile leaves it
    with pytest.raises(ValueError, match="set compile to false"):
        FeaturePictures(layers=["net"], folder=str(tmp_path)).on_fit_start(trainer, plain)


def test_a_layer_that_gives_no_map_is_named(tmp_path, image_folder, capsys) -> None:
    callbacks = [{"class_path": PICTURES, "init_args": {"images": 1, "layers": ["net.head"]}}]
    config = make_classification(
        tmp_path / "config.yaml", image_folder, trainer={"callbacks": callbacks, "max_epochs": 1}
    )
    assert classification.main(["fit", "--config", str(config)]) == 1
    assert "layer net.head is no map but [1, 3]" in capsys.readouterr().err


def test_a_run_without_logs_needs_a_folder_and_other_verbs_draw_nothing(
    tmp_path, trained, image_folder, capsys
) -> None:
    callbacks = [{"class_path": PICTURES}]
    config = make_classification(
        tmp_path / "config.yaml", image_folder, trainer={"callbacks": callbacks, "logger": False}
    )
    assert classification.main(["fit", "--config", str(config)]) == 1
    assert "give the callback a folder" in capsys.readouterr().err
    last = str(trained / "checkpoints" / "last.ckpt")
    assert classification.main(["validate", "--config", str(config), "--ckpt_path", last]) == 0


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (FeaturePictures, {"images": 0}),
        (FeaturePictures, {"query": (0.5, 1.5)}),
        (PredictionPictures, {"every_n_epochs": 0}),
        (Throughput, {"skip": -1}),
    ],
)
def test_arguments_out_of_range_are_refused(kind, arguments) -> None:
    with pytest.raises(ValueError, match=str(next(iter(arguments)))):
        kind(**arguments)
