"""Training of the mask head: it learns, it resumes, it reads folders, it refuses what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.train.conftest import record_losses, run_writer
from train.grounding import MaskHeadTraining, main, mask_losses
from train.grounding_data import WordData
from visionsel.data.shapes import ShapesWorld
from visionsel.data.shapes.files import write_shapes
from visionsel.embedded import load_lvlm, load_mask_head
from visionsel.embedded.mask_head import measure_mask_head
from visionsel.multimodal.grounding.mask_head import MaskHead

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration of a short run; keyword arguments are merged into its parts."""
    return run_writer(
        tmp_path,
        trainer={"max_epochs": 1},
        model={"base": 4, "stages": 2, "min_side": 16, "row": "predict"},
        data={"batch_size": 1, "epoch_size": 2, "val_size": 1, "expressions": 1},
    )


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], float]:
    return record_losses(monkeypatch, MaskHeadTraining)


@pytest.mark.slow
def test_a_short_run_lowers_the_loss_and_its_export_masks_what_is_meant(tmp_path, write_run, losses) -> None:
    config = write_run(
        trainer={"gradient_clip_val": 1.0},
        model={"base": 8, "lr": 3e-3, "refiner_lr": 0.2},
        data={"batch_size": 4, "epoch_size": 80, "expressions": 2},
    )
    assert main(["fit", "--config", str(config)]) == 0
    values = list(losses.values())
    assert sum(values[-4:]) < 0.75 * sum(values[:4])
    head = load_mask_head(tmp_path / "run" / "export")
    scenes = list(ShapesWorld("balanced", seed=12, size=4))
    measured = measure_mask_head(head, *load_lvlm(), scenes)
    pairs = [(s.objects[e.object].mask, o.mask) for s in scenes for e in s.expressions for o in s.objects]
    chance = np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs])  # a true mask, but of any object
    assert measured["refer_iou"] > chance + 0.1, (measured, chance)


def test_a_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(
    tmp_path, write_run, losses
) -> None:
    every = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "dirpath": str(tmp_path / "checkpoints"),
            "filename": "step{step}",
            "auto_insert_metric_name": False,
            "enable_version_counter": False,
            "every_n_train_steps": 1,
            "save_top_k": -1,
        },
    }
    trainer = {"callbacks": [every], "max_epochs": 2}
    assert main(["fit", "--config", str(write_run("whole", trainer=trainer))]) == 0
    expected = dict(losses)
    assert list(expected) == [(epoch, batch) for epoch in range(2) for batch in range(2)]
    losses.clear()
    checkpoint = str(tmp_path / "checkpoints" / "step1.ckpt")
    assert main(["fit", "--config", str(write_run("again", trainer=trainer)), "--ckpt_path", checkpoint]) == 0
    assert losses == {key: expected[key] for key in list(expected)[1:]}
    heads = (load_mask_head(tmp_path / run / "export") for run in ("whole", "again"))
    for one, other in zip(*(head.state_dict().values() for head in heads), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_holds_the_head_alone_is_validated_and_that_of_another_head_refused(
    tmp_path, write_run, capsys
) -> None:
    config = write_run(model={"refine": False})
    assert main(["fit", "--config", str(config)]) == 0
    assert MaskHead.from_pretrained(tmp_path / "run" / "export").refiner is None
    checkpoint = str(tmp_path / "run" / "checkpoints" / "best.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {key.split(".")[0] for key in state} == {"head"}
    assert sum(value.numel() for value in state.values()) < 5000
    capsys.readouterr()
    assert main(["validate", "--config", str(config), "--ckpt_path", checkpoint]) == 0
    assert "val/refer_iou" in capsys.readouterr().out
    other = write_run("other", model={"refine": False, "stages": 3})
    assert main(["validate", "--config", str(other), "--ckpt_path", checkpoint]) == 1
    assert "was trained with stages 2, not 3" in capsys.readouterr().err
    assert main(["validate", "--config", str(config)]) == 1
    assert "give --ckpt_path" in capsys.readouterr().err
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    assert main(["validate", "--config", str(config), "--ckpt_path", str(foreign)]) == 1
    assert "is not a checkpoint of train.grounding" in capsys.readouterr().err


def test_the_losses_are_cross_entropy_and_dice_of_each_mask() -> None:
    torch.manual_seed(0)
    logits, masks = torch.randn(3, 5, 6, dtype=torch.float64), torch.rand(3, 5, 6) > 0.5
    for found, one, mask in zip(mask_losses(logits, masks), logits, masks, strict=True):
        p, t = one.sigmoid(), mask.double()
        entropy = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
        torch.testing.assert_close(found, entropy + 1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))


def test_scenes_give_their_caption_with_words_and_some_expressions() -> None:
    data = WordData(expressions=2)
    seen = set()
    for index in range(12):
        scene = data.scene(0, index)
        caption, *expressions = data.make(scene, np.random.default_rng(index), 0)
        assert caption.text == scene.captions[0]
        for (start, end), found, mask in zip(caption.spans, scene.objects, caption.masks, strict=True):
            said = caption.text[start:end]
            assert said in (f"{found.size} {found.color} {found.shape}", found.shape, found.color)
            assert (mask == found.mask).all()
            seen.add(len(said.split()) + (said == found.color))
        known = {one.text: one.object for one in scene.expressions}
        assert len(expressions) == min(2, len(known))
        for text in expressions:
            assert text.spans is None
            assert (text.masks[0] == scene.objects[known[text.text]].mask).all()
    assert seen == {1, 2, 3}
    [validation] = WordData(val_size=3).val_dataloader()
    words = [text.text[a:b] for text in next(iter(validation)) for a, b in text.spans or ()]
    assert all(" " not in word for word in words)


def test_folders_of_refcoco_and_narratives_are_trained_on(tmp_path, write_run) -> None:
    root = write_shapes(tmp_path / "shapes", size=2, test_size=1)
    images = root / "images"
    name, png = sorted(images.glob("shapes_train_*"))[0].name, tmp_path / "png"
    (png / "panoptic_train2017").mkdir(parents=True)
    segments = np.zeros((64, 64, 3), dtype=np.uint8)
    segments[10:30, 10:30, 0] = 7
    Image.fromarray(segments).save(png / "panoptic_train2017" / "1.png")
    parts = [{"utterance": "a"}, {"utterance": "red star", "segment_ids": ["7"]}]
    row = {"image_id": 1, "caption": "a red star", "segments": parts}
    (png / "png_coco_train2017.json").write_text(json.dumps([row]))
    info = {"image_id": 1, "file_name": "1.png", "segments_info": [{"id": 7, "category_id": 1}]}
    panoptic = {
        "images": [{"id": 1, "file_name": name}],
        "categories": [{"id": 1, "isthing": 1}],
        "annotations": [info],
    }
    (png / "panoptic_train2017.json").write_text(json.dumps(panoptic))

    folders = {"refcoco": [str(root / "refcoco")], "images": [str(images)], "narratives": str(png)}
    data = WordData(**folders, val_size=3)
    assert len(data.sources) == data.epoch_size
    assert next(len(batch) for batch in data.val_dataloader()[0]) == min(3, len(data.held_out))
    [text] = data.make(data.sources[-1], np.random.default_rng(0), 0)
    assert [text.text[a:b] for a, b in text.spans] == ["red star"]
    assert text.masks.sum() == 400
    [text] = data.make(data.sources[0], np.random.default_rng(0), 0)
    assert text.masks.shape == (1, 64, 64)
    assert (text.masks[0] == data.sources[0].mask()).all()
    config = write_run(
        trainer={"fast_dev_run": True},
        data={**folders, "batch_size": 4},
        model={"refer_prompt": "describe the image."},
    )
    assert main(["fit", "--config", str(config)]) == 0


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model", "lr", 0.0),
        ("model", "warmup", 1.0),
        ("model", "row", "last"),
        ("model", "stages", 1),
        ("model", "lvlm_dtype", "float8"),
        ("model", "sam_checkpoint", "sam.pth"),
        ("model", "segmenter", "nowhere"),
        ("data", "expressions", 0),
        ("data", "refcoco", ["nowhere"]),
    ],
)
def test_a_value_that_is_wrong_is_named_and_leaves_no_folder(
    tmp_path, write_run, capsys, part, name, value
) -> None:
    assert main(["fit", "--config", str(write_run(**{part: {name: value}}))]) == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train.grounding: ")
    assert (value if name == "segmenter" else name) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("folder", ["shapes", "refcoco"])
def test_the_shipped_configurations_parse_and_name_no_class_of_ours(capsys, folder) -> None:
    path = CONFIGS / folder / "mask_head.yaml"
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["output"] == f"runs/{folder}/mask_head"
    text = path.read_text()
    assert "class_path" not in text
    assert text.startswith("# ")
    assert f"train.grounding fit --config configs/{folder}/mask_head.yaml" in text
    if folder == "shapes":
        head = MaskHeadTraining(**config["model"]).head
        assert 2 * sum(parameter.numel() for parameter in head.parameters()) < 1_500_000
    else:
        assert "Not run by us" in text
        expected = {"lr": 1e-4, "weight_decay": 0.01, "warmup": 0.03, "base": 64, "stages": 4, "row": "token"}
        assert {name: config["model"][name] for name in expected} == expected
