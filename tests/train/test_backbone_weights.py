"""First weights: files of every kind, read alike by all programs, and left out where a checkpoint follows."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from tests.train.detection_mini import CATEGORIES, make_config
from train.backbone_weights import build_backbone, counterparts, read_backbone_weights, undecayed
from train.classification import main
from train.classifier_net import build_classifier
from train.detection import Detector
from train.detection_recipe import backbone_of
from train.segmentation_net import SegmentationNet, load_encoder
from visionsel.data.shapes import SHAPES
from visionsel.embedded import load_classifier

NAT: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 1, 2], "kernel_size": 3}
BIFORMER = {"embed_dims": [32, 64, 128], "depths": [1, 2, 2], "num_windows": [4, 4, 1], "topks": [4, 4, -1]}
"""The architecture of the classifier that ships with the package."""
PREPROCESSING = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


def nat(classes: int = 7) -> nn.Module:
    return timm.create_model("nat_mini", num_classes=classes, **NAT)


def same(found: nn.Module, expected: nn.Module) -> bool:
    """Whether a network, or its features_only form, has the weights of another."""
    state, weights = found.state_dict(), expected.state_dict()
    names = counterparts(state, weights)
    return len(names) > 4 and all(torch.equal(state[name], weights[old]) for name, old in names.items())


def write(kind: str, state: dict[str, torch.Tensor], folder: Path) -> str:
    """A file of weights of seven classes."""
    path = folder / f"weights.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "authors":
        torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    elif kind == "bare":
        torch.save(state, path)
    else:
        held = {f"net.{key}": value for key, value in state.items()}
        held["net.auxiliary.0.weight"] = torch.zeros(3)
        hparams = {"class_names": list("abcdefg"), "preprocessing": PREPROCESSING, "model": "nat_mini"}
        torch.save({"state_dict": held, "hyper_parameters": hparams}, path)
    return str(path)


@pytest.mark.parametrize("kind", ["bare", "authors", "safetensors", "run"])
def test_files_of_every_kind_start_every_program_and_classifiers_of_other_classes_are_left_out(
    kind, tmp_path
) -> None:
    trained = nat()
    path = write(kind, trained.state_dict(), tmp_path)
    weights = read_backbone_weights(path, "nat_mini")
    assert weights.classes == 7
    whole = build_backbone("nat_mini", NAT, weights)
    assert same(whole, trained)
    assert "state_dict" not in whole.pretrained_cfg

    classifier = build_classifier("nat_mini", ["x", "y"], {"input_size": (3, 32, 32)}, NAT, checkpoint=path)
    assert classifier.num_classes == 2
    for part in ("stem", "stages"):
        assert same(classifier.get_submodule(part), trained.get_submodule(part))
    net = SegmentationNet("upernet", "nat_mini", 3, NAT, {"decoder_channels": 8})
    load_encoder(net, "nat_mini", NAT, False, path)
    assert same(net.smp.encoder.model, trained)
    model = {**make_config(Path(), Path())["model"], "backbone_args": NAT, "checkpoint": path}
    detector = Detector(categories=CATEGORIES, size=48, max_size=64, **model)
    assert same(backbone_of(detector.net), trained)
    for mean in (classifier.pretrained_cfg["mean"], detector.hparams["mean"]):
        assert (tuple(mean) == PREPROCESSING["mean"]) == (kind == "run")


def test_weights_without_a_classifier_are_a_backbone(tmp_path) -> None:
    trained = nat()
    state = {key: value for key, value in trained.state_dict().items() if not key.startswith("head.")}
    weights = read_backbone_weights(write("bare", state, tmp_path), "nat_mini")
    assert weights.classes is None
    assert same(build_backbone("nat_mini", NAT, weights), trained)


def test_the_classifiers_of_the_package_start_every_program(tmp_path) -> None:
    shipped = load_classifier("biformer")
    net = SegmentationNet("upernet", "biformer_tiny", 3, BIFORMER, {"decoder_channels": 8})
    load_encoder(net, "biformer_tiny", BIFORMER, False, "embedded:biformer")
    assert same(net.smp.encoder.model, shipped)
    preprocessing = {"input_size": (3, 64, 64)}
    arguments: Any = (BIFORMER, False, "embedded:biformer", None, True)
    classifier = build_classifier("biformer_tiny", SHAPES, preprocessing, *arguments)
    assert same(classifier, shipped)
    assert tuple(classifier.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"embedded:biformer was trained on 10 classes, \['circle'.* not on"):
        build_classifier("biformer_tiny", SHAPES[::-1], preprocessing, *arguments)
    bare = write("bare", nat().state_dict(), tmp_path)
    with pytest.raises(ValueError, match="was trained on 7 classes, not on those of the data, 2"):
        build_classifier("nat_mini", ["a", "b"], preprocessing, NAT, False, bare, None, True)
    with pytest.raises(ValueError, match="unknown classifier 'resnet'; choose one of biformer"):
        read_backbone_weights("embedded:resnet", "resnet18")
    with pytest.raises(ValueError, match=r"nat_mini with model_args .* and the weights of embedded:biformer"):
        build_backbone("nat_mini", NAT, read_backbone_weights("embedded:biformer", "nat_mini"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "holds no weights; expected a state dict of nat_mini"),
        (
            {"state_dict": {"net.rpn.weight": torch.zeros(1)}, "hyper_parameters": {"detector": "mask_rcnn"}},
            "is a checkpoint of another program: expected one of train.classification, a release",
        ),
        (
            {"state_dict": {"net.smp.encoder.model.stem_0.weight": torch.zeros(1)}, "hyper_parameters": {}},
            "they are an encoder of train.segmentation",
        ),
    ],
)
def test_files_of_something_else_are_named_with_what_was_expected(content, message, tmp_path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"other\.ckpt.*{message}"):
        build_backbone("nat_mini", NAT, read_backbone_weights(str(path), "nat_mini"))


def test_names_of_the_features_only_form_have_one_counterpart_in_the_whole_model() -> None:
    known = {"stages.0.blocks.1.w", "w"}
    assert counterparts(["stages_0.blocks.1.w"], known) == {"stages_0.blocks.1.w": "stages.0.blocks.1.w"}
    for name in ("model.w", "body.w", "w"):
        assert counterparts([name], known) == {name: "w"}
    with pytest.raises(ValueError, match=r"the backbone has stages_1\.w, which the whole model has not"):
        counterparts(["w", "stages_1.w"], known)


def test_what_takes_no_weight_decay_may_be_told_by_patterns() -> None:
    model = nat()
    names = {name for name, _ in model.named_parameters() if name.endswith(".rpb")}
    assert undecayed(model) == names != set()
    model.no_weight_decay = lambda: {"*.rpb", "head.fc.weight"}
    assert undecayed(model) == names | {"head.fc.weight"}
    assert undecayed(nn.Linear(2, 2)) == set()


def test_a_checkpoint_makes_first_weights_superfluous(trained, tmp_path) -> None:
    given = ["--config", str(trained / "config.yaml"), "--output", str(tmp_path)]
    given += ["--ckpt_path", str(trained / "checkpoints" / "last.ckpt")]
    gone = ["--model.checkpoint", "gone.pth", "--model.checkpoint_classes", "gone.txt"]
    for first in (gone, ["--model.pretrained", "true"]):
        assert main(["validate", *given, *first]) == 0
