"""Training the small CLIP: it learns, a resumed run is the uninterrupted one, what is wrong is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.train.conftest import TRAINER, merged, rows
from train.clip import ClipCLI, ClipTraining, export_clip, main, phrase_loss
from train.clip_data import ClipData, truth_of_phrases
from visionsel.data.shapes import ShapesWorld
from visionsel.embedded.clip import load_clip
from visionsel.embedded.clip_quality import measure_clip

CONFIG = Path(__file__).parents[2] / "configs/shapes/clip.yaml"


def write(path: Path, **parts: Any) -> Path:
    """A configuration of two epochs of two batches; keyword arguments are merged into its parts."""
    config: dict[str, Any] = {
        "output": str(path.parent / "run"),
        "trainer": TRAINER,
        "model": {"ema_decay": 0.8},
        "data": {"batch_size": 8, "epoch_size": 16, "val_size": 8},
    }
    path.write_text(yaml.safe_dump(merged(config, parts)))
    return path


@pytest.mark.slow
def test_a_short_run_learns_and_its_export_measures_what_the_run_logged(tmp_path) -> None:
    config = write(
        tmp_path / "config.yaml",
        trainer={"max_epochs": 1, "gradient_clip_val": 1.0},
        model={"ema_decay": None},
        data={"batch_size": 16, "epoch_size": 640, "val_size": 100, "train_share": 0.0, "max_objects": 1},
    )
    assert main(["fit", "--config", str(config)]) == 0
    run = tmp_path / "run"
    for name in ("train/presence_loss_step", "train/dense_loss_step", "train/loss_step"):
        losses = rows(run, name)
        assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5]), name
    folder = export_clip(run / "checkpoints/best.ckpt", tmp_path / "exported")
    world = ShapesWorld("balanced", seed=2**29, size=100, max_objects=1)
    measured = measure_clip(*load_clip(folder), world, seed=2**29)
    for name, value in measured.items():
        assert value == pytest.approx(rows(run, f"val/balanced/{name}")[-1], abs=0.03), name


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path) -> None:
    folder = tmp_path / "checkpoints"
    arguments = {"dirpath": str(folder), "filename": "step{step}", "every_n_train_steps": 1, "save_top_k": -1}
    arguments |= {"auto_insert_metric_name": False, "enable_version_counter": False}
    path = "lightning.pytorch.callbacks.ModelCheckpoint"

    def run(name: str, *options: str) -> dict[str, Any]:
        trainer = {"callbacks": [{"class_path": path, "init_args": arguments}]}
        config = write(tmp_path / f"{name}.yaml", output=str(tmp_path / f"run_{name}"), trainer=trainer)
        assert main(["fit", "--config", str(config), *options]) == 0
        return torch.load(folder / "step4.ckpt", weights_only=True)

    expected = run("whole")
    # in the middle of an epoch, then at its end: no resumed run has written what a later one starts from
    for done in (3, 2):
        resumed = run(f"from{done}", "--ckpt_path", str(folder / f"step{done}.ckpt"))
        assert resumed["lr_schedulers"] == expected["lr_schedulers"]
        for part in ("state_dict", "current_model_state"):
            for key, value in expected[part].items():
                torch.testing.assert_close(resumed[part][key], value, rtol=0, atol=1e-6)


def test_a_training_item_is_true_of_its_scene() -> None:
    data = ClipData()
    sample = ShapesWorld("balanced", seed=4)[2]
    item = data.make(sample, np.random.default_rng(0), 0)
    assert item["texts"]["right"] in sample.captions
    assert item["texts"]["caption_wrong"] not in sample.captions
    assert truth_of_phrases(item["phrases"], item["objects"][None])[:, 0].tolist() == [True, False]
    sampled = sample.labels[2::4, 2::4]
    assert ((item["dense"] > 0) == torch.from_numpy(sampled > 0)).all()
    batch = data.collate([item])
    assert batch["image"].shape == (1, 3, 64, 64)
    assert {name: ids.shape for name, ids in batch["texts"].items()} == dict.fromkeys(
        ("right", "caption_wrong", "phrase", "wrong"), (1, 40)
    )


def test_items_depend_on_seed_epoch_and_index_only() -> None:
    first, second = (
        next(iter(ClipData(batch_size=4, epoch_size=8, seed=5).train_dataloader())) for _ in "ab"
    )
    assert torch.equal(first["image"], second["image"])
    assert all(torch.equal(first["texts"][name], second["texts"][name]) for name in first["texts"])
    other = next(iter(ClipData(batch_size=4, epoch_size=8, seed=6).train_dataloader()))
    assert not torch.equal(first["image"], other["image"])


def test_the_easy_epochs_show_few_objects() -> None:
    data = ClipData(epoch_size=64, easy_epochs=1, easy_objects=2)
    easy, later = (max(len(data.scene(epoch, i).objects) for i in range(30)) for epoch in (0, 1))
    assert easy == 2
    assert later > 2


def test_cutting_texts_where_they_end_changes_no_feature() -> None:
    model = ClipTraining(dense_weight=0.0)
    texts = {"right": ClipData().tokenizer(["a red star", "a small blue ring"])}
    whole = model.net.encode_text(texts["right"], normalize=True)
    torch.testing.assert_close(model._encode_texts(texts, ["right"])["right"], whole)
    torch.testing.assert_close(model.net.encode_text(texts["right"], normalize=True), whole)


def test_a_phrase_is_true_where_one_object_has_all_that_it_says() -> None:
    objects = torch.zeros(2, 6, 3, dtype=torch.int64)
    objects[0, :2] = torch.tensor([[1, 2, 3], [2, 4, 5]])
    objects[1, :1] = torch.tensor([[1, 4, 3]])
    phrases = torch.tensor([[0, 0, 3], [0, 2, 3], [0, 4, 3], [2, 4, 5], [0, 2, 5]])
    expected = [[True, True], [True, False], [False, True], [True, False], [False, False]]
    assert truth_of_phrases(phrases, objects).tolist() == expected


def test_the_phrase_loss_shares_among_true_images_and_leaves_out_what_tells_nothing() -> None:
    logits = torch.tensor([[2.0, 2.0, -50.0], [0.0, 0.0, 0.0], [5.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    truth = torch.tensor([[True, True, False], [True, False, False], [False] * 3, [True] * 3])
    expected = (np.log(2) + np.log(3)) / 2
    assert phrase_loss(logits, truth).item() == pytest.approx(expected, abs=1e-6)
    assert phrase_loss(logits[2:], truth[2:]).item() == 0


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model", "lr", 0.0),
        ("model", "warmup", 1.0),
        ("model", "ema_decay", 1.0),
        ("model", "optimizer", "adamv"),
        ("model", "hard_weight", -1.0),
        ("model", "background_weight", 0.0),
        ("model", "dense_stage", 9),
        ("model", "dense_stage", -1),
        ("model", "name", "clap"),
        ("model", "text_args", {"depth": 2}),
        ("data", "grid", 7),
        ("data", "easy_objects", 7),
        ("data", "easy_epochs", -1),
        ("data", "wrong_kinds", [0.5, 0.5, 0.5, 0.5]),
        ("data", "batch_size", 0),
        ("data", "context_length", 39),
    ],
)
def test_a_value_that_is_wrong_is_named_and_leaves_no_run(tmp_path, capsys, part, name, value) -> None:
    config = write(tmp_path / "config.yaml", **{part: {name: value}})
    assert main(["fit", "--config", str(config)]) == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train.clip: ")
    assert str(next(iter(value)) if isinstance(value, dict) else value)[:5].strip("[]") in line
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_something_else_is_refused(tmp_path, capsys) -> None:
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}}, other)
    config = write(tmp_path / "config.yaml")
    assert main(["fit", "--config", str(config), "--ckpt_path", str(other)]) == 1
    assert "is not a checkpoint of train.clip" in capsys.readouterr().err
    assert main(["validate", "--config", str(config)]) == 1
    assert "validate needs weights" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"is not a checkpoint of train\.clip"):
        export_clip(other, tmp_path)


def test_the_shipped_configuration_parses_and_builds_its_model(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        ClipCLI(["fit", "--config", str(CONFIG), "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["output"] == "runs/shapes/clip"
    model = ClipTraining(**config["model"])
    assert sum(p.numel() for p in model.net.parameters()) < 1.5e6
    assert "class_path" not in CONFIG.read_text()
