"""Every segmentation configuration parses, is the published recipe, and trains in small."""

from pathlib import Path
from typing import Any

import pytest
import timm
import yaml

from tests.train.conftest import rows
from tests.train.test_segmentation_data import make_ade20k
from train.segmentation import main
from visionsel.models import registered_names

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = [*sorted((CONFIGS / "ade20k").glob("*.yaml")), CONFIGS / "shapes" / "upernet_biformer.yaml"]
ADE20K = FILES[:-1]

SMALLER: dict[str, dict[str, Any]] = {
    "biformer": {"embed_dims": [32] * 4, "depths": [1] * 4},
    "nat": {"embed_dim": 16, "depths": [1] * 4, "num_heads": [1] * 4},
    "dinat": {"embed_dim": 16, "depths": [1] * 4, "num_heads": [1] * 4, "dilations": [[2], [1], [1], [1]]},
    "focalnet": {},  # timm's names fix depths and widths
}
"""What makes an encoder small; the rest of its arguments stays the configuration's."""


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_there_is_a_recipe_for_each_paper() -> None:
    names = {path.stem for path in ADE20K}
    assert names == {
        "upernet_biformer_small",
        "upernet_biformer_base",
        "upernet_nat_mini",
        "upernet_nat_tiny",
        "upernet_dinat_tiny",
        "upernet_focalnet_tiny_srf",
        "upernet_focalnet_tiny_lrf",
    }


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_configuration_is_the_published_recipe_and_builds_its_encoder(path) -> None:
    config = yaml.safe_load(path.read_text())
    model = config["model"]
    assert config["output"] == f"runs/{name_of(path)}"
    encoder = timm.create_model(model["model"], device="meta", **model["model_args"])
    assert model["model"] in registered_names() or model["model"].startswith("focalnet_")
    assert model["decoder"] == "upernet"
    text = " ".join(path.read_text().replace("\n# ", " ").split())
    assert f"train.segmentation fit --config configs/{name_of(path)}.yaml" in text
    if path in ADE20K:
        assert "Not run by us" in text
        assert "class_path" not in text
        assert config["trainer"]["max_steps"] == 160000
        assert (model["lr"], model["weight_decay"], model["warmup_steps"]) == (6e-5, 0.01, 1500)
        assert (model["auxiliary_weight"], model["power"]) == (0.4, 1.0)
        data = config["data"]
        assert (data["crop_size"], data["image_scale"], data["batch_size"]) == (512, [2048, 512], 2)
        if "focalnet" in path.stem:
            assert encoder.layers[0].blocks[0].modulation.focal_layers[0][0].kernel_size == (9, 9)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_configuration_parses_and_trains_in_small(path, tmp_path, capsys) -> None:
    """Its model, an update and a validation, in the layout and with the names of the real data set."""
    config = yaml.safe_load(path.read_text())
    model, data, trainer = config["model"], config["data"], config["trainer"]
    config["output"] = str(tmp_path / "run")
    data |= {"root": str(tmp_path / "data"), "num_workers": 0, "batch_size": 2, "val_batch_size": 1}
    trainer |= {"max_steps": 1, "accelerator": "cpu", "precision": "32-true", "log_every_n_steps": 1}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer |= {"enable_checkpointing": False}
    model |= {"warmup_steps": 0}
    if path in ADE20K:
        family = model["model"].split("_")[0]
        model["model_args"] |= SMALLER[family]
        model |= {"pretrained": False, "auxiliary_channels": 8, "decoder_args": {"decoder_channels": 8}}
        make_ade20k(tmp_path / "data")
        data |= {"crop_size": 32, "image_scale": [128, 32]}
        trainer |= {"val_check_interval": 1}
    else:
        data |= {"scenes": [2, 2, 1]}
        trainer |= {"max_epochs": 1, "callbacks": None}
    small = tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(small)]) == 0, capsys.readouterr().err
    assert rows(tmp_path / "run", "train/loss_step")[0] > 0
    assert 0 <= rows(tmp_path / "run", "val/miou")[0] <= 1
