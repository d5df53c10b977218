"""The classifiers of single shapes: dense targets, training, exact resume, export, bad input."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from train.shapes_classifier import (
    IGNORED,
    ShapesClassifier,
    SingleShapesData,
    dense_targets,
    export_classifier,
    main,
)
from visionsel.data.shapes import SHAPES
from visionsel.embedded.classifier import load_classifier

from .conftest import SMALL, TRAINER, merged, rows

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a configuration of a run of seconds; keyword arguments are merged into its parts."""

    def write(name: str = "config.yaml", **parts: Any) -> Path:
        config: dict[str, Any] = {
            "output": str(tmp_path / "run"),
            "trainer": TRAINER,
            "model": {**SMALL, "lr": 1e-3},
            "data": {"image_size": 32, "batch_size": 4, "epoch_size": 16, "val_size": 8},
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump(merged(config, parts)))
        return path

    return write


def build(**arguments: Any) -> ShapesClassifier:
    data = SingleShapesData(image_size=32)
    return ShapesClassifier(
        SMALL["model"], data.class_names, data.preprocessing, model_args=SMALL["model_args"], **arguments
    )


def test_a_sample_is_a_normalized_image_its_label_and_the_label_of_each_pixel() -> None:
    data = SingleShapesData(image_size=64)
    for index in range(5):
        scene = data.scene(0, index)
        image, label, labels = data.make(scene, None, 0)
        restored = (image.permute(1, 2, 0) * 0.25 + 0.5) * 255
        torch.testing.assert_close(restored, torch.from_numpy(scene.pixels).float(), rtol=0, atol=1e-3)
        assert SHAPES[label] == scene.objects[0].shape
        assert torch.equal(labels == label + 1, torch.from_numpy(scene.objects[0].mask))
        assert set(labels.unique().tolist()) == {0, label + 1}


def test_every_image_holds_one_shape_and_validation_is_never_trained_on() -> None:
    data = SingleShapesData(image_size=32, epoch_size=64, val_size=64, batch_size=64)
    trained = {data.scene(epoch, index).pixels.tobytes() for epoch in range(2) for index in range(64)}
    loader = data.val_dataloader()
    validated = [loader.dataset.world[index] for index in range(64)]
    assert len(trained) == 128
    assert all(len(sample.objects) == 1 for sample in validated)
    assert not trained & {sample.pixels.tobytes() for sample in validated}


def test_a_share_of_the_images_may_hold_several_shapes_and_has_no_label() -> None:
    data = SingleShapesData(image_size=32, epoch_size=64, dense_share=0.25, batch_size=64)
    scenes = [data.scene(1, index) for index in range(64)]
    several = [scene for scene in scenes[3::4] if len(scene.objects) > 1]
    assert len(several) > 8
    assert all(len(scene.objects) == 1 for i, scene in enumerate(scenes) if i % 4 != 3)
    assert {data.make(scene, None, 0)[1] for scene in several} == {IGNORED}
    _, _, labels = data.make(several[0], None, 0)
    for thing in several[0].objects:
        assert set(labels[torch.from_numpy(thing.mask)].tolist()) == {1 + SHAPES.index(thing.shape)}
    assert all(
        len(sample.objects) == 1 for sample in (data.val_dataloader().dataset.world[i] for i in range(20))
    )


def test_a_position_has_to_predict_the_shape_that_has_most_pixels_in_its_cell() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    labels[0, 0, 3:5] = 7  # one pixel in the first cell, one in the second
    labels[0, 3, 4:7] = 2  # three more in the second
    expected = torch.tensor([[[7, 2], [0, 0]]])
    assert torch.equal(dense_targets(labels, torch.zeros(1, 11, 2, 2)), expected)
    assert not dense_targets(torch.zeros(2, 8, 8, dtype=torch.uint8), torch.zeros(2, 11, 4, 4)).any()


def step(model: ShapesClassifier, batch: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The losses of one batch."""
    logged: dict[str, float] = {}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monkeypatch.setattr(model, "_trainer", SimpleNamespace(optimizers=[optimizer]))
    monkeypatch.setattr(
        model, "log", lambda name, value, **_: logged.update({name: torch.as_tensor(value).item()})
    )
    logged["sum"] = model.eval().training_step(batch, 0).item()
    return logged


def test_the_loss_is_that_of_the_labels_that_there_are_plus_the_weighted_dense_one(monkeypatch) -> None:
    data = SingleShapesData(image_size=32, dense_share=0.5)
    model = build(dense_weight=0.5)
    batch = default_collate([data.make(data.scene(0, index), None, 0) for index in range(12)])
    images, target, labels = batch
    single = target != IGNORED
    assert 0 < single.sum() < 12
    logged = step(model, batch, monkeypatch)
    assert logged["sum"] == pytest.approx(logged["train/loss"] + 0.5 * logged["train/dense_loss"])
    with torch.no_grad():
        expected = cross_entropy(model(images)[single], target[single])
    assert logged["train/loss"] == pytest.approx(expected.item(), rel=1e-5)
    unlabeled = step(model, (images, torch.full_like(target, IGNORED), labels), monkeypatch)
    assert unlabeled["train/loss"] == 0
    assert unlabeled["train/dense_loss"] == pytest.approx(logged["train/dense_loss"])
    with pytest.raises(ValueError, match="set dense_share to 0"):
        step(build(dense_weight=0), batch, monkeypatch)


def test_the_default_head_has_a_position_for_every_eight_pixels_and_learns() -> None:
    model = build()
    images = torch.randn(2, 3, 32, 32)
    features, (maps,) = model.net.forward_intermediates(images, indices=[1])
    positions = model.net.auxiliary(maps)
    assert positions.shape == (2, 1 + len(SHAPES), 4, 4)
    (positions.square().mean() + model.net.forward_head(features).square().mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_without_dense_targets_there_is_no_head() -> None:
    model = build(dense_weight=0)
    assert not hasattr(model.net, "auxiliary")
    assert {key.split(".")[0] for key in model.state_dict()} == {"net"}


def test_the_background_counts_as_much_as_it_is_weighted() -> None:
    assert build(background_weight=0.25).dense_class_weights.tolist() == [0.25] + [1.0] * len(SHAPES)


@pytest.mark.slow
def test_a_run_of_seconds_lowers_the_losses_and_beats_chance(tmp_path, write) -> None:
    model = {
        "model": "test_resnet",  # timm's smallest learns faster than ours
        "model_args": {},
        "dense_stage": 2,
        "optimizer": "muon",
        "optimizer_args": {"adjust_lr_fn": "match_rms_adamw"},
        "lr": 5e-3,
    }
    data = {
        "image_size": 64,
        "batch_size": 32,
        "epoch_size": 3200,
        "val_size": 300,
        "dense_share": 0.5,
    }
    config = write(model=model, data=data, trainer={"max_epochs": 2, "log_every_n_steps": 10})
    assert main(["fit", "--config", str(config)]) == 0
    for name in ("train/loss_epoch", "train/dense_loss_epoch"):
        first, last = rows(tmp_path / "run", name)
        assert last < first
    # of 300 images chance names 30, and 51 once in 30 thousand times
    assert rows(tmp_path / "run", "val/top1")[-1] > 0.17


@pytest.mark.slow
@pytest.mark.parametrize("dense_weight", [0.0, 1.0])
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, write, dense_weight) -> None:
    model = {"dense_weight": dense_weight, "ema_decay": 0.8}
    whole = write("whole.yaml", output=str(tmp_path / "whole"), model=model)
    callback = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "dirpath": str(tmp_path / "steps"),
            "filename": "{step}",
            "every_n_train_steps": 3,
            "enable_version_counter": False,
            "save_top_k": -1,
        },
    }
    config = yaml.safe_load(whole.read_text())
    config["trainer"]["callbacks"] = [callback]
    whole.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(whole)]) == 0
    final = torch.load(tmp_path / "steps" / "step=6.ckpt", weights_only=True)
    config["output"] = str(tmp_path / "resumed")
    whole.write_text(yaml.safe_dump(config))
    (tmp_path / "steps" / "step=6.ckpt").unlink()
    stopped = tmp_path / "steps" / "step=3.ckpt"
    assert main(["fit", "--config", str(whole), "--ckpt_path", str(stopped)]) == 0
    again = torch.load(tmp_path / "steps" / "step=6.ckpt", weights_only=True)
    assert rows(tmp_path / "resumed", "train/loss_step") == pytest.approx(
        rows(tmp_path / "whole", "train/loss_step")[3:], abs=1e-6
    )
    for part in ("state_dict", "current_model_state"):
        for key, value in final[part].items():
            torch.testing.assert_close(again[part][key], value, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_an_exported_checkpoint_is_the_validated_model_without_the_head(tmp_path, write) -> None:
    # BatchNorm's statistics and the average are what export must not lose
    assert main(["fit", "--config", str(write(model={"ema_decay": 0.5}))]) == 0
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    trained = ShapesClassifier.load_from_checkpoint(path, weights_only=True).eval()
    assert hasattr(trained.net, "auxiliary")
    model = load_classifier(folder=export_classifier(path, tmp_path / "exported"))
    assert not hasattr(model, "auxiliary")
    assert model.pretrained_cfg["label_names"] == SHAPES
    data = SingleShapesData(image_size=32)
    images = torch.stack([data.make(data.scene(9, index), None, 9)[0] for index in range(8)])
    with torch.no_grad():
        torch.testing.assert_close(model(images), trained(images), rtol=0, atol=5e-3)  # half precision


def test_another_file_is_not_exported(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        export_classifier(tmp_path / "none.ckpt", tmp_path / "exported")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt is not a checkpoint of train.shapes_classifier"):
        export_classifier(tmp_path / "other.ckpt", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dense_weight": -1.0}, "dense_weight must be at least 0, got -1.0"),
        ({"background_weight": 0.0}, "background_weight must be above 0"),
        ({"dense_stage": 4}, "biformer_tiny has no map 4"),
        ({"dense_stage": -1}, "dense_stage counts from 0, got -1"),
        ({"mixup": 0.2}, "mixup and cutmix leave no dense targets"),
        ({"lr": 0.0}, "lr must be above 0"),
    ],
)
def test_an_argument_that_is_wrong_is_named(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        build(**arguments)


def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path, write, capsys) -> None:
    for parts, message in (
        ({"model": {"model": "biformer_tny"}}, "unknown model 'biformer_tny'"),
        ({"data": {"image_size": 16}}, "image_size must be from 32 to 1024, got 16"),
        ({"data": {"dense_share": 1.0}}, "dense_share must be at least 0 and below 1"),
        ({"data": {"std": [0.5, 0.0, 0.5]}}, "std must be above 0"),
    ):
        assert main(["fit", "--config", str(write(**parts))]) == 1
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("train.shapes_classifier: ")
        assert message in line
        assert not (tmp_path / "run").exists()
