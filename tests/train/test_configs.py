"""Every shipped configuration parses, names a model that exists, and gives that model arguments it takes."""

from pathlib import Path

import pytest
import timm
import yaml

from train.classification import ClassificationCLI
from train.image_data import ImageFolderData
from train.shapes_classifier import ShapesClassifier, ShapesClassifierCLI, SingleShapesData
from visionsel.models import registered_names

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted([*CONFIGS.glob("digits/*.yaml"), *CONFIGS.glob("imagenet/*.yaml")])
CLASSIFIERS = [CONFIGS / "shapes" / f"{name}.yaml" for name in ("biformer", "nat", "selectformer")]


def printed(
    path: Path, capsys: pytest.CaptureFixture[str], program: type[ClassificationCLI] = ClassificationCLI
) -> dict:
    """What the command line makes of a configuration."""
    with pytest.raises(SystemExit) as stop:
        program(["fit", "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_there_is_a_configuration_for_each_family_and_each_published_recipe() -> None:
    names = {f"{path.parent.name}/{path.stem}" for path in FILES}
    families = ("biformer", "nat", "dinat", "halonet", "focalnet", "selectformer")
    recipes = ("biformer_tiny", "nat_tiny", "dinat_tiny", "halonet_h0", "selectformer_tiny")
    assert names == {f"digits/{n}" for n in families} | {f"imagenet/{n}" for n in recipes}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_configuration_parses_and_builds_its_model(path, capsys) -> None:
    config = printed(path, capsys)
    assert config["model"]["model"] in registered_names()
    model = timm.create_model(
        config["model"]["model"], device="meta", num_classes=10, **config["model"]["model_args"] or {}
    )
    assert model.num_classes == 10
    assert config["output"] == f"runs/{path.parent.name}/{path.stem}"
    if path.parent.name == "digits":
        assert config["data"]["dataset"] == "digits"
        assert config["data"]["num_workers"] == 0
        assert config["data"]["hflip"] == 0
        ImageFolderData(
            **{key: value for key, value in config["data"].items() if key != "root"}, root="unused"
        )
    if config["model"]["mixup"] or config["model"]["cutmix"]:
        assert config["data"]["batch_size"] % 2 == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_configuration_names_no_class_of_ours_and_says_what_it_is(path) -> None:
    text = path.read_text()
    assert "class_path" not in text
    header = text[: text.index("output:")]
    assert header.startswith("# ")
    if path.parent.name == "imagenet":
        assert "not run" in header.lower()
        assert f"train.classification fit --config configs/imagenet/{path.name}" in header


@pytest.mark.parametrize("path", CLASSIFIERS, ids=lambda path: path.stem)
def test_a_classifier_of_shapes_is_small_and_its_configuration_builds_it(path, capsys) -> None:
    config = printed(path, capsys, ShapesClassifierCLI)
    assert config["output"] == f"runs/shapes/{path.stem}"
    data = SingleShapesData(**config["data"])
    model = ShapesClassifier(
        class_names=data.class_names, preprocessing=data.preprocessing, **config["model"]
    )
    assert 0.3e6 < sum(parameter.numel() for parameter in model.parameters()) < 1e6
    text = path.read_text()
    assert "class_path" not in text
    assert f"train.shapes_classifier fit --config configs/shapes/{path.name}" in text
    assert "--model.dense_weight 0" in text
