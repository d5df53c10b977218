"""Small classifiers in files: round trip, the transform that they bring along, measuring, errors."""

import json
from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import nn

from visionsel.data.shapes import SHAPES, ShapesWorld
from visionsel.embedded import classifier
from visionsel.embedded.classifier import load_classifier, measure_classifier, save_classifier

ARGUMENTS = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "kernel_size": 3}
INPUT = {"input_size": (3, 64, 64), "mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.3)}


def small(labels: int = len(SHAPES)) -> nn.Module:
    return timm.create_model(
        "nat_mini", num_classes=labels, pretrained_cfg_overlay={**INPUT, "crop_pct": 1.0}, **ARGUMENTS
    ).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_classifier(small(), tmp_path / "small", "nat_mini", ARGUMENTS, SHAPES)


def test_a_classifier_comes_back_as_it_was_saved(tmp_path) -> None:
    model = small()
    folder = save_classifier(model, tmp_path / "small", "nat_mini", ARGUMENTS, SHAPES)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_classifier(folder=folder)
    assert not loaded.training
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value.half().float(), rtol=0, atol=0)


def test_a_classifier_by_name_is_read_from_the_package(folder, monkeypatch) -> None:
    monkeypatch.setattr(classifier, "WEIGHTS", folder.parent)
    folder.rename(folder.parent / "classifier_selectformer")
    assert load_classifier().num_classes == len(SHAPES)


def test_a_classifier_brings_its_transform_and_labels_along(folder) -> None:
    model = load_classifier(folder=folder)
    config = resolve_data_config(model=model)
    assert {key: config[key] for key in INPUT} == INPUT
    assert config["crop_pct"] == 1.0
    assert model.pretrained_cfg["label_names"] == SHAPES
    assert "url" not in model.pretrained_cfg  # these are not the release's weights
    sample = ShapesWorld("balanced", 0, 1, 64, max_objects=1)[0]
    pixels = torch.from_numpy(sample.pixels).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(INPUT[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(create_transform(**config)(sample.image), (pixels - mean) / std)


class Oracle(nn.Module):
    """Says the colour-blind truth about solid shapes and "circle" about faint ones."""

    def __init__(self, samples: list) -> None:
        super().__init__()
        self.pretrained_cfg = {**INPUT, "crop_pct": 1.0, "label_names": SHAPES}
        self.weight = nn.Parameter(torch.zeros(1))
        self.answers = iter([0 if s.objects[0].faint else SHAPES.index(s.objects[0].shape) for s in samples])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.eye(len(SHAPES))[[next(self.answers) for _ in images]]


def test_measuring_tells_the_easy_from_the_hard() -> None:
    samples = list(ShapesWorld("balanced", 3, 60, 64, max_objects=1))
    things = [sample.objects[0] for sample in samples]
    right = [not thing.faint or thing.shape == SHAPES[0] for thing in things]

    def share(*chosen: bool) -> float:
        return sum(r for r, c in zip(right, chosen, strict=True) if c) / sum(chosen)

    assert measure_classifier(Oracle(samples), samples, batch_size=7) == {
        "count": 60,
        "top1": sum(right) / 60,
        "solid": 1.0,
        "faint": share(*(thing.faint for thing in things)),
        "small": share(*(thing.size == "small" for thing in things)),
        "large": share(*(thing.size == "large" for thing in things)),
    }


def test_a_group_without_images_is_left_out_and_the_mode_of_the_model_is_kept(folder) -> None:
    model = load_classifier(folder=folder).train()
    sample = next(s for s in ShapesWorld("balanced", 0, 50, max_objects=1) if not s.objects[0].faint)
    assert set(measure_classifier(model, [sample])) == {"count", "top1", "solid", sample.objects[0].size}
    assert model.training


def test_what_cannot_be_measured_is_refused(folder) -> None:
    model = load_classifier(folder=folder)
    with pytest.raises(ValueError, match="no samples"):
        measure_classifier(model, [])
    several = next(s for s in ShapesWorld("balanced", 0, 50) if len(s.objects) > 1)
    with pytest.raises(ValueError, match="a classifier is measured on single ones"):
        measure_classifier(model, [several])
    model.pretrained_cfg["label_names"] = ["cat"]
    with pytest.raises(ValueError, match="the model knows cat"):
        measure_classifier(model, ShapesWorld("balanced", 0, 1, max_objects=1))


def test_an_unknown_name_is_answered_with_the_three() -> None:
    with pytest.raises(ValueError, match=r"unknown classifier 'nut'; choose .* biformer, nat, selectformer"):
        load_classifier("nut")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"small.*reinstall visionsel"):
        load_classifier(folder=folder)


def test_weights_of_another_model_are_refused(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    for change in ({"model_args": {**ARGUMENTS, "embed_dim": 32}}, {"model": "nat_none"}):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=r"model.safetensors does not fit nat_.*config.json"):
            load_classifier(folder=folder)


def test_a_configuration_that_is_not_whole_is_refused(folder) -> None:
    (folder / "config.json").write_text('{"model": "nat_mini"}')
    with pytest.raises(ValueError, match="it lacks model_args, label_names"):
        load_classifier(folder=folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_classifier(folder=folder)


def test_names_that_are_not_as_many_as_the_classes_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="10 label_names for a model of 3 classes"):
        save_classifier(small(3), tmp_path / "small", "nat_mini", ARGUMENTS, SHAPES)
    assert not (tmp_path / "small").exists()
