"""Training of the small SAM: it learns, it resumes, it refuses what is wrong."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.train.conftest import record_losses, run_writer
from train.segmenter import PromptData, SegmenterTraining, _jitter, main
from visionsel.data.shapes import ShapesWorld
from visionsel.embedded.segmentation_quality import measure_segmenter
from visionsel.embedded.segmenter import build_sam, load_segmenter

SIZES = {
    "patch_size": 8,
    "encoder_dim": 32,
    "encoder_depth": 2,
    "window_size": 4,
    "global_layers": [1],
    "embed_dim": 32,
    "decoder_depth": 1,
    "decoder_mlp_dim": 64,
}
"""A SAM of 80 thousand parameters with masks of 32 pixels a side."""
CONFIG = Path(__file__).parents[2] / "configs" / "shapes" / "segmenter.yaml"


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration of a short run; keyword arguments are merged into its parts."""
    return run_writer(
        tmp_path,
        model={"sam": SIZES, "warmup_steps": 0},
        data={"batch_size": 4, "epoch_size": 12, "val_size": 4},
    )


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], float]:
    return record_losses(monkeypatch, SegmenterTraining)


@pytest.mark.slow
def test_a_short_run_lowers_the_loss_and_beats_an_untrained_model_on_fresh_scenes(
    tmp_path, write_run, losses
) -> None:
    config = write_run(
        trainer={"max_epochs": 4, "gradient_clip_val": 1.0},
        model={"lr": 3e-3, "warmup_steps": 20, "ema_decay": 0.9, "optimizer_args": {"betas": [0.9, 0.98]}},
        data={"batch_size": 16, "epoch_size": 480, "max_objects": 1},
    )
    assert main(["fit", "--config", str(config)]) == 0
    values = list(losses.values())
    assert sum(values[-20:]) < 0.5 * sum(values[:20])

    fresh = ShapesWorld("balanced", seed=11, size=60, max_objects=1)
    trained = measure_segmenter(load_segmenter(tmp_path / "run" / "export"), fresh)
    chance = measure_segmenter(build_sam(SIZES), fresh)
    for name in ("point", "box", "refined"):
        assert trained[f"{name}_iou"] > chance[f"{name}_iou"] + 0.3, (name, trained, chance)


def test_a_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(
    tmp_path, write_run, losses
) -> None:
    recipe = {"ema_decay": 0.8, "refinements": 2, "refine_share": 0.7, "mask_share": 0.5}
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
    whole = write_run("whole", model={"sam": SIZES, **recipe}, trainer={"callbacks": [every]})
    assert main(["fit", "--config", str(whole)]) == 0
    expected = dict(losses)
    assert list(expected) == [(epoch, batch) for epoch in range(2) for batch in range(3)]
    for step in (4, 2):  # in this order: a resumed run writes the later checkpoints again
        losses.clear()
        resumed = write_run(f"from{step}", model={"sam": SIZES, **recipe}, trainer={"callbacks": [every]})
        checkpoint = tmp_path / "checkpoints" / f"step{step}.ckpt"
        assert main(["fit", "--config", str(resumed), "--ckpt_path", str(checkpoint)]) == 0
        assert losses == {key: expected[key] for key in list(expected)[step:]}
        exported = (load_segmenter(tmp_path / run / "export") for run in ("whole", f"from{step}"))
        for one, other in zip(*(sam.state_dict().values() for sam in exported), strict=True):
            assert torch.equal(one, other)


def test_a_checkpoint_is_validated_and_that_of_another_model_refused(tmp_path, write_run, capsys) -> None:
    config = write_run(trainer={"max_epochs": 1})
    assert main(["fit", "--config", str(config)]) == 0
    checkpoint = str(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["sam"]["encoder_dim"] == 32
    capsys.readouterr()
    assert main(["validate", "--config", str(config), "--ckpt_path", checkpoint]) == 0
    assert "val/point_iou" in capsys.readouterr().out
    other = write_run("other", model={"sam": {**SIZES, "encoder_depth": 3}})
    assert main(["validate", "--config", str(other), "--ckpt_path", checkpoint]) == 1
    assert "was trained with sam" in capsys.readouterr().err
    assert main(["validate", "--config", str(config)]) == 1
    assert "give --ckpt_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model", "sam", {"depth": 3}),
        ("model", "box_share", 1.5),
        ("model", "refinements", -1),
        ("model", "lr", 0.0),
        ("model", "ema_decay", 1.0),
        ("model", "optimizer", "adamv"),
        ("model", "warmup_steps", 6),
        ("data", "prompts_per_image", 0),
        ("data", "batch_size", 0),
        ("data", "image_size", 62),
    ],
)
def test_a_value_out_of_range_is_named_and_leaves_no_folder(
    tmp_path, write_run, capsys, part, name, value
) -> None:
    config = write_run(**{part: {name: value}})
    assert main(["fit", "--config", str(config)]) == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train.segmenter: ")
    assert (name if name != "sam" else "unknown size 'depth'") in line
    assert not (tmp_path / "run").exists()


def test_an_image_size_of_sam_that_is_not_that_of_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size 32 is not that of the data, 64"):
        SegmenterTraining(sam={"image_size": 32})


def test_every_parameter_gets_a_gradient_but_those_of_masks_that_are_never_the_best_of_three() -> None:
    model = SegmenterTraining(sam={**SIZES, "rel_pos": True}, refinements=1, mask_share=0.5)
    data = PromptData()
    batch = data.collate([data.make(data.scene(0, i), np.random.default_rng(i), -1) for i in range(4)])
    embeddings = model.sam.image_encoder(model.sam.preprocess(batch.images.float()))
    for by_box in (True, False):
        for seed in range(3):  # with the mask prompt and without
            torch.manual_seed(seed)
            loss, _ = model._ask(embeddings, batch.masks, batch.owners, by_box)
            loss.sum().backward(retain_graph=True)
    still = [name for name, p in model.sam.named_parameters() if p.grad is None or not p.grad.any()]
    heads = {name.split(".layers")[0] for name in still}
    assert heads < {f"mask_decoder.output_hypernetworks_mlps.{index}" for index in (1, 2, 3)}


def test_training_asks_for_a_few_objects_and_validation_for_all() -> None:
    data = PromptData(batch_size=8, epoch_size=8, val_size=8, prompts_per_image=2)
    (validation,) = data.val_dataloader()
    for batch, most in ((next(iter(data.train_dataloader())), 2), (next(iter(validation)), 6)):
        counts = batch.owners.bincount(minlength=8)
        assert counts.max() == most
        assert counts.min() >= 1
        assert batch.masks.flatten(1).sum(1).min() >= 12
        assert len(batch.masks) == len(batch.owners)


def test_half_of_the_boxes_are_moved_and_none_is_turned_around_or_leaves_the_image() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([[0.0, 10.0, 20.0, 64.0]]).repeat(1000, 1)
    moved = _jitter(boxes, 0.3, (64, 64))
    assert 0.45 < (moved == boxes).all(1).float().mean() < 0.55
    assert moved.min() >= 0
    assert moved.max() <= 64
    assert (moved[:, 2:] > moved[:, :2]).all()
    assert torch.equal(_jitter(boxes, 0.0, (64, 64)), boxes)


def test_the_shipped_configuration_parses_and_names_no_class_of_ours(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(CONFIG), "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["output"] == "runs/shapes/segmenter"
    build_sam(config["model"]["sam"])
    text = CONFIG.read_text()
    assert "class_path" not in text
    assert text.startswith("# ")
    assert "train.segmenter fit --config configs/shapes/segmenter.yaml" in text
