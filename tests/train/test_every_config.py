"""Every configuration that ships takes an update of its own model, on two batches of its own kind of data.

The recipes of ImageNet, COCO and ADE20K are in `test_configs`, `test_detection_configs` and
`test_segmentation_configs`; all others are here, and none is forgotten.
"""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from lightning import Trainer
from PIL import Image

from tests.train import test_configs, test_detection_configs, test_segmentation_configs
from tests.train.conftest import TRAINER
from tests.train.test_grounding_sentence import write_vizwiz
from tests.train.test_webdataset import write_shard
from visionsel.data.shapes.files import write_shapes
from visionsel.data.shards import index_shards

CONFIGS = Path(__file__).parents[2] / "configs"
STEPPED = {
    *test_configs.RECIPES,
    *test_detection_configs.COCO,
    *test_detection_configs.SHAPES,
    *test_segmentation_configs.FILES,
}
PARTS = test_configs.PARTS
FEW = {"batch_size": 2, "epoch_size": 4, "val_size": 2}
SAM = {"patch_size": 8, "encoder_dim": 32, "encoder_depth": 2, "window_size": 4, "global_layers": [1]}
SAM |= {"embed_dim": 32, "decoder_depth": 1, "decoder_mlp_dim": 64}
TINY_LVLM = {"vision_dim": 32, "vision_layers": 3, "vision_heads": 2, "dim": 32, "layers": 2, "heads": 2}

# for each file its program, and what makes its model and data small
ENDLESS: dict[str, tuple[str, dict[str, Any]]] = {
    "shapes/biformer": ("shapes_classifier", {"data": FEW}),
    "shapes/nat": ("shapes_classifier", {"data": FEW}),
    "shapes/selectformer": ("shapes_classifier", {"data": FEW}),
    "shapes/clip": ("clip", {"data": FEW}),
    "shapes/segmenter": ("segmenter", {"data": FEW, "model": {"sam": SAM}}),
    "shapes/explainprune": ("explainprune", {"data": FEW}),
    "shapes/mask_head": ("grounding", {"data": FEW}),
    "shapes/roi_head": ("grounding_roi", {"data": FEW}),
    "shapes/sentence_attention": ("grounding_sentence", {"data": FEW}),
}


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainers that ran."""
    seen: list[Trainer] = []
    fit = Trainer.fit

    def recorded(self: Trainer, *args: Any, **kwargs: Any) -> None:
        seen.append(self)
        fit(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "fit", recorded)
    return seen


@pytest.fixture
def run(tmp_path: Path, fitted: list[Trainer]) -> Callable[..., None]:
    """Fit one batch of configurations, the later over the earlier, and look at the update."""

    def run(program: str, *configs: Path, **parts: dict[str, Any]) -> None:
        # one batch of training, one of validation
        parts["trainer"] = {**TRAINER, "fast_dev_run": True, "devices": 1, **parts.get("trainer", {})}
        last = tmp_path / "small.yaml"
        last.write_text(yaml.safe_dump({"output": str(tmp_path / "run"), **parts}))
        given = [word for path in (*configs, last) for word in ("--config", str(path))]
        assert import_module(f"train.{program}").main(["fit", *given]) == 0
        [trainer] = fitted
        assert trainer.global_step == 1
        losses = {key: value for key, value in trainer.callback_metrics.items() if "loss" in key}
        assert losses
        assert all(torch.isfinite(value) for value in losses.values()), losses

    return run


def test_no_configuration_is_forgotten() -> None:
    here = {CONFIGS / f"{name}.yaml" for name in ENDLESS}
    here |= {CONFIGS / "shapes" / f"{name}.yaml" for name in ("lvlm", "lvlm_selectformer", "sentinel")}
    here |= {CONFIGS / "refcoco" / "mask_head.yaml", CONFIGS / "vizwiz" / "sentence_attention.yaml"}
    here |= set(CONFIGS.glob("digits/*.yaml")) | set(PARTS)
    assert here | STEPPED == set(CONFIGS.rglob("*.yaml"))
    assert not here & STEPPED


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits") / "images"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("digits/*.yaml")), ids=lambda path: path.stem)
def test_a_classifier_of_digits(path, digits, run) -> None:
    run("classification", path, data={"root": str(digits), "batch_size": 4}, model={"warmup_epochs": 0})


@pytest.mark.parametrize("name", ENDLESS)
def test_what_learns_from_endless_scenes(name, run) -> None:
    program, parts = ENDLESS[name]
    path = CONFIGS / f"{name}.yaml"
    model = dict(parts.get("model", {}))
    if "warmup_steps" in yaml.safe_load(path.read_text())["model"]:
        model["warmup_steps"] = 0
    run(program, path, **{**parts, "model": model})


@pytest.mark.parametrize("name", ["lvlm", "lvlm_selectformer"])
@pytest.mark.parametrize("text", [False, True])
def test_the_stages_of_a_vision_language_model(name, text, run) -> None:
    path = CONFIGS / "shapes" / f"{name}.yaml"
    given = yaml.safe_load(path.read_text())
    stage = next(stage for stage in given["data"]["stages"] if stage.get("text", True) is text)
    architecture = TINY_LVLM if name == "lvlm" else {"dim": 32, "layers": 2, "heads": 2}
    architecture = {**given["model"]["architecture"], **architecture}
    run(
        "lvlm",
        path,
        data={**FEW, "stages": [{**stage, "epochs": 1}]},
        model={"architecture": architecture},
    )


def test_preferences_of_the_shipped_model(tmp_path) -> None:
    from train.sentinel import main

    path = CONFIGS / "shapes" / "sentinel.yaml"
    assert main(["fit", "--config", str(path), "--output", str(tmp_path / "run"), "--pairs.size", "6"]) == 0
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses
    assert np.isfinite(losses).all()


def test_a_mask_head_on_folders_of_refcoco_and_narratives(tmp_path, run) -> None:
    root = write_shapes(tmp_path / "shapes", size=2, test_size=1)
    narratives = write_narratives(tmp_path / "png", sorted((root / "images").glob("shapes_train_*"))[0].name)
    run(
        "grounding",
        CONFIGS / "refcoco" / "mask_head.yaml",
        trainer={"strategy": "auto", "precision": "32-true"},
        model={
            **{"lvlm": None, "lvlm_dtype": "float32", "segmenter": None, "sam_checkpoint": None},
            **{"base": 4, "stages": 2, "min_side": 16, "warmup": 0.0},
            **{"refer_prompt": "describe the image.", "caption_prompt": "describe the image."},
        },
        data={
            **{"refcoco": [str(root / "refcoco")], "refs": None, "narratives": str(narratives)},
            **{"images": [str(root / "images")], "val_size": 2, "num_workers": 0},
        },
    )


def write_narratives(folder: Path, image: str) -> Path:
    """Panoptic Narrative Grounding with a sentence of one red square."""
    (folder / "panoptic_train2017").mkdir(parents=True)
    segments = np.zeros((64, 64, 3), dtype=np.uint8)
    segments[10:30, 10:30, 0] = 7
    Image.fromarray(segments).save(folder / "panoptic_train2017" / "1.png")
    parts = [{"utterance": "a"}, {"utterance": "red star", "segment_ids": ["7"]}]
    row = {"image_id": 1, "caption": "a red star", "segments": parts}
    (folder / "png_coco_train2017.json").write_text(json.dumps([row]))
    panoptic = {
        "images": [{"id": 1, "file_name": image}],
        "categories": [{"id": 1, "isthing": 1}],
        "annotations": [
            {"image_id": 1, "file_name": "1.png", "segments_info": [{"id": 7, "category_id": 1}]}
        ],
    }
    (folder / "panoptic_train2017.json").write_text(json.dumps(panoptic))
    return folder


def test_sentence_attention_on_folders_of_vizwiz(tmp_path, run) -> None:
    root = write_vizwiz(tmp_path / "vizwiz", {"train": 2, "val": 2})
    small = {"backbone": "test_efficientnet", "pretrained": False, "sentences": "words", "hidden": 16}
    run(
        "grounding_sentence",
        CONFIGS / "vizwiz" / "sentence_attention.yaml",
        model={**small, "warmup_steps": 0},
        data={"root": str(root), "image_size": 64, "batch_size": 2, "num_workers": 0},
    )


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.stem)
def test_a_part_behind_its_recipe(path, run, tmp_path) -> None:
    """With one process in place of many: `test_distributed` has two, and FSDP2."""
    recipe = next(recipe for recipe in test_configs.RECIPES if recipe.name in path.read_text())
    given = yaml.safe_load(recipe.read_text())["model"]
    family = recipe.stem.partition("_")[0]
    small = {**given.get("model_args", {}), **test_configs.SMALL[family]}
    model: dict[str, Any] = {"model_args": small, "warmup_epochs": 0, "cooldown_epochs": 0}
    data = {"root": str(tmp_path / "data"), "image_size": 32, "batch_size": 2, "num_workers": 0}
    if path.stem == "shards":
        (tmp_path / "data").mkdir()
        write_shard(tmp_path / "data" / "train-000.tar", range(4), size=32)
        write_shard(tmp_path / "data" / "val-000.tar", range(4), size=32)
        classes = tmp_path / "data" / "classes.txt"
        classes.write_text("ant\nbee\ncat\n")
        for split in ("train", "val"):
            index_shards(str(tmp_path / "data"), f"{split}-000.tar")
        data |= {"classes": str(classes), "train_split": "train-000.tar"}
        data |= {"val_split": "val-000.tar", "test_split": "val-000.tar"}
    else:
        for split in ("train", "val"):
            for grey, synset in ((60, "n01440764"), (190, "n01443537")):
                folder = tmp_path / "data" / split / synset
                folder.mkdir(parents=True)
                Image.new("RGB", (48, 40), (grey, 90, 90)).save(folder / f"{synset}_1.JPEG")
    if path.stem == "distill":
        teacher = timm.create_model("test_resnet", num_classes=2)
        torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
        model |= {"teacher": "test_resnet", "teacher_checkpoint": str(tmp_path / "teacher.pth")}
    run(
        "classification",
        recipe,
        path,
        trainer={"strategy": "auto", "num_nodes": 1, "precision": "32-true"},
        model=model,
        data=data,
    )
