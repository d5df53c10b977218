"""Every shipped configuration of a detector parses, and takes a step with a small backbone on a miniature."""

from pathlib import Path

import pytest
import timm
import yaml
from lightning import Trainer

from tests.train.conftest import TRAINER
from tests.train.detection_mini import HEADS, make_coco
from train.detection import DetectionCLI, Detector
from train.detection_data import CocoData
from visionsel.models import registered_names

CONFIGS = Path(__file__).parents[2] / "configs"
COCO = sorted(CONFIGS.glob("coco/*.yaml"))
SHAPES = sorted([*CONFIGS.glob("shapes/mask_rcnn_*.yaml"), *CONFIGS.glob("shapes/retinanet_*.yaml")])

FEW = {
    "rpn_pre_nms_top_n_train": 50,
    "rpn_post_nms_top_n_train": 20,
    "rpn_batch_size_per_image": 32,
    "box_batch_size_per_image": 16,
}
QUERIES = {
    "d_model": 32,
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_layers": 2,
    "num_queries": 10,
    "num_denoising": 4,
}
SMALLER = {
    "biformer_small": {"embed_dims": [32, 32, 32, 32], "depths": [1, 1, 1, 1]},
    "nat_tiny": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]},
    "dinat_mini": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1] * 4, "dilations": [[1]] * 4},
}


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    return make_coco(tmp_path_factory.mktemp("coco"), train=2, val=2)


ONE_UPDATE = {
    **TRAINER,
    "max_steps": 1,
    "limit_val_batches": 0,
    "precision": "32-true",
    "enable_checkpointing": False,
    "logger": False,
}


def write(path: Path, output: Path, root: Path, model: dict, data: dict) -> str:
    """A configuration with parts made smaller; returns the file."""
    content = yaml.safe_load(path.read_text())
    content["model"] |= {"warmup_steps": 0, "pretrained": False, "pictures": 0, **model}
    content["data"] |= {"root": str(root), "num_workers": 0, "batch_size": 2, **data}
    content["trainer"] |= ONE_UPDATE
    small = output / "config.yaml"
    small.write_text(yaml.safe_dump({**content, "output": str(output / "run")}))
    return str(small)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> DetectionCLI:
    """The command line after it wrote a small world and took a step there; its parser serves the others."""
    folder = tmp_path_factory.mktemp("shapes")
    config = write(SHAPES[0], folder, folder / "world", {}, {"shapes_size": 10})
    return DetectionCLI(["fit", "--config", config])


def step(cli: DetectionCLI, config: str) -> tuple[Trainer, Detector]:
    """One update of a configuration."""
    parsed = cli.parser.parse_args(["fit", "--config", config])["fit"].as_dict()
    data = CocoData(**parsed["data"])
    shared = {name: getattr(data, name) for name in ("categories", "size", "max_size", "batch_size")}
    model = Detector(**parsed["model"], **shared)
    clip = parsed["trainer"]["gradient_clip_val"]
    trainer = Trainer(**ONE_UPDATE, gradient_clip_val=clip)
    trainer.fit(model, data)
    return trainer, model


def test_there_is_a_configuration_for_each_published_recipe() -> None:
    assert [path.stem for path in COCO] == [
        "mask_rcnn_biformer_small_1x",
        "mask_rcnn_dinat_mini_3x",
        "mask_rcnn_focalnet_tiny_1x",
        "mask_rcnn_focalnet_tiny_3x",
        "mask_rcnn_nat_tiny_3x",
        "retinanet_biformer_small_1x",
        "rt_detr_v2_nat_mini",
    ]
    assert [path.stem for path in SHAPES] == ["mask_rcnn_biformer", "mask_rcnn_nat", "retinanet_biformer"]


@pytest.mark.parametrize("path", [*COCO, *SHAPES], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_shipped_configuration_says_what_it_is(path) -> None:
    text = path.read_text()
    assert "class_path" not in text
    header = text[: text.index("output:")]
    assert header.startswith("# ")
    assert f"train.detection fit --config configs/{path.parent.name}/{path.name}" in header
    if path.parent.name == "coco":
        assert "not run by us" in header.lower()
        assert "AP" in header
    config = yaml.safe_load(text)
    assert config["output"] == f"runs/{path.parent.name}/{path.stem}"
    assert config["model"]["backbone"] in [*registered_names(), "focalnet_tiny_lrf"]


@pytest.mark.parametrize("path", COCO, ids=lambda path: path.stem)
def test_a_recipe_takes_a_step_on_a_miniature_of_coco(path, coco, shapes, tmp_path) -> None:
    given = yaml.safe_load(path.read_text())["model"]
    whole = timm.create_model(given["backbone"], device="meta", **given.get("backbone_args", {}))
    assert [row["reduction"] for row in whole.feature_info] == [4, 8, 16, 32]
    if given["detector"] == "rt_detr_v2":
        model = {"backbone": "selectformer_pico", "detector_args": QUERIES, "checkpoint": None}
    else:
        few = {**given.get("detector_args", {}), **FEW} if given["detector"] == "mask_rcnn" else {}
        # the functions of timm's FocalNets do not let their sizes be given
        backbone = "nat_tiny" if "focalnet" in given["backbone"] else given["backbone"]
        args = {**given["backbone_args"], **SMALLER[backbone]}
        model = {**HEADS, "backbone": backbone, "backbone_args": args, "detector_args": few}
        model["checkpoint"] = None
    data = {"size": 64, "sizes": [64], "max_size": 96}
    trainer, detector = step(shapes, write(path, tmp_path, coco, model, data))
    assert trainer.global_step == 1
    assert float(trainer.callback_metrics["train/loss"]) > 0
    assert detector.hparams["lr_batch_size"] == 16


@pytest.mark.parametrize("path", SHAPES, ids=lambda path: path.stem)
def test_a_detector_of_shapes_writes_its_world_and_takes_a_step(path, shapes, tmp_path) -> None:
    assert yaml.safe_load(path.read_text())["model"]["checkpoint"].startswith("embedded:")
    root = shapes.datamodule.root
    assert (root / "shapes.json").is_file()
    if path == SHAPES[0]:
        assert shapes.trainer.global_step == 1
    else:
        trainer, _ = step(shapes, write(path, tmp_path, root, {}, {"shapes_size": 10}))
        assert trainer.global_step == 1
