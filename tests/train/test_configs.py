"""Every shipped configuration parses, names a model that exists, and gives that model arguments it takes."""

from pathlib import Path

import pytest
import timm
import yaml
from PIL import Image

from tests.train.conftest import TRAINER
from train.classification import ClassificationCLI
from train.image_data import ImageFolderData
from train.shapes_classifier import ShapesClassifier, ShapesClassifierCLI, SingleShapesData
from visionsel.models import registered_names

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted([*CONFIGS.glob("digits/*.yaml"), *CONFIGS.glob("imagenet/*.yaml")])
RECIPES = [path for path in FILES if path.parent.name == "imagenet"]
PARTS = sorted(CONFIGS.glob("imagenet/parts/*.yaml"))
SMALL = {
    "biformer": {"embed_dims": [32] * 4, "depths": [1] * 4},
    "nat": {"embed_dim": 32, "depths": [1] * 4, "num_heads": [1] * 4, "dilations": [[2], [1], [1], [1]]},
    "halonet": {"depths": [1] * 4},
    "focalnet": {"embed_dim": 32, "depth": 1},
    "selectformer": {"embed_dims": [32] * 4, "depths": [1] * 4},
}
SMALL["dinat"] = SMALL["nat"]
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
    recipes = [f"biformer_{size}" for size in ("tiny", "small", "base")]
    recipes += [
        f"{family}_{size}" for family in ("nat", "dinat") for size in ("mini", "tiny", "small", "base")
    ]
    recipes += ["dinat_large", "dinat_large_384", "halonet_h0", "selectformer_tiny"]
    recipes += [f"focalnet_{size}_iso" for size in ("tiny", "small", "base")]
    assert names == {f"digits/{n}" for n in families} | {f"imagenet/{n}" for n in recipes}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_configuration_parses_and_builds_its_model(path, capsys) -> None:
    # that the command line takes the recipes is seen below, where they are trained
    config = yaml.safe_load(path.read_text()) if path in RECIPES else printed(path, capsys)
    assert config["model"]["model"].partition(".")[0] in registered_names()
    model = timm.create_model(
        config["model"]["model"], device="meta", num_classes=10, **config["model"].get("model_args") or {}
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
    if config["model"].get("mixup") or config["model"].get("cutmix"):
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


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet with two images a split."""
    root = tmp_path_factory.mktemp("imagenet")
    for split in ("train", "val"):
        for grey, synset in ((60, "n01440764"), (190, "n01443537")):
            folder = root / split / synset
            folder.mkdir(parents=True)
            Image.new("RGB", (48, 40), (grey, 90, 90)).save(folder / f"{synset}_1.JPEG")
    return root


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_takes_a_step_on_a_miniature_of_its_data(path, miniature, tmp_path) -> None:
    config = yaml.safe_load(path.read_text())
    family = path.stem.partition("_")[0]
    arguments = config["model"].get("model_args", {}) | SMALL[family]
    config["output"] = str(tmp_path / "run")
    config["trainer"] |= {
        **TRAINER,
        "max_epochs": 1,
        "devices": 1,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
        "logger": False,
    }
    config["model"] |= {"model_args": arguments, "warmup_epochs": 0, "cooldown_epochs": 0, "checkpoint": None}
    config["data"] |= {"root": str(miniature), "image_size": 32, "batch_size": 2, "num_workers": 0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = ClassificationCLI(["fit", "--config", str(tmp_path / "config.yaml")])
    assert cli.trainer.global_step == 1
    assert cli.trainer.callback_metrics["train/loss"].isfinite()
    assert cli.model.hparams["class_names"] == ["n01440764", "n01443537"]


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.stem)
def test_a_part_goes_behind_a_recipe_and_names_only_what_there_is(path, capsys) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.name in path.read_text())
    with pytest.raises(SystemExit) as stop:
        ClassificationCLI(["fit", "--config", str(recipe), "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    config, alone = yaml.safe_load(capsys.readouterr().out), printed(recipe, capsys)
    for section, values in yaml.safe_load(path.read_text()).items():
        for key, value in values.items() if isinstance(values, dict) else ():
            found = config[section][key]
            if isinstance(value, dict):
                found, value = found["class_path"], value["class_path"]
            assert found == value
    assert config != alone
    assert config["model"]["model"] == alone["model"]["model"]
    assert path.name in path.read_text().partition("\n\n")[0]


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
