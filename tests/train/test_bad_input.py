"""What is wrong is said in one line that names it, and leaves nothing behind."""

import shutil
from pathlib import Path

import pytest
import torch

from train.classification import main


@pytest.fixture
def refused(tmp_path, write_config, capsys):
    """Run a configuration that must be refused; gives the line on stderr."""

    def run(*options: str, verb: str = "fit", **parts) -> str:
        config = write_config(**parts)
        before = sorted(tmp_path.rglob("*"))
        assert main([verb, "--config", str(config), *options]) == 1
        assert sorted(tmp_path.rglob("*")) == before
        *_, line = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("train.classification: ")
        return line

    return run


def test_an_unknown_model_is_answered_with_names_near_it(refused) -> None:
    line = refused(model={"model": "biformer_tny"})
    assert "unknown model 'biformer_tny'" in line
    assert "biformer_tiny" in line
    assert "unknown release" in refused(model={"model": "nat_tiny.in99k", "model_args": {}})


def test_arguments_that_a_model_does_not_take_are_named(refused) -> None:
    assert "widths" in refused(model={"model_args": {"widths": [1, 2]}})
    assert "biformer_tiny with model_args" in refused(model={"model_args": {"depths": [1, 2]}})


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model", "lr", 0.0),
        ("model", "lr_batch_size", 0),
        ("model", "ema_decay", 1.0),
        ("model", "label_smoothing", 1.0),
        ("model", "optimizer", "adamv"),
        ("data", "batch_size", 0),
        ("data", "num_workers", -1),
        ("data", "image_size", 0),
        ("data", "val_batch_size", 0),
    ],
)
def test_a_value_out_of_range_is_named(refused, part, name, value) -> None:
    line = refused(**{part: {name: value}})
    assert name in line
    assert str(value) in line


def test_an_odd_batch_is_refused_with_mixup_only(refused) -> None:
    assert "batch_size must be even, got 3" in refused(model={"mixup": 0.2}, data={"batch_size": 3})


def test_an_image_size_that_the_model_does_not_take_is_refused(refused) -> None:
    line = refused(model={"model": "vit_tiny_patch16_224", "model_args": {"img_size": 64, "depth": 1}})
    assert "does not take images of 32 x 32" in line


def test_a_schedule_that_does_not_fit_the_run_is_refused(refused) -> None:
    assert "warmup_epochs 2" in refused(model={"warmup_epochs": 2})
    assert "max_epochs" in refused(trainer={"max_epochs": -1})


def test_a_missing_folder_is_named(refused, image_folder) -> None:
    assert "nowhere" in refused(data={"root": str(image_folder / "nowhere")})


def test_a_missing_split_is_named(refused, image_folder) -> None:
    shutil.rmtree(image_folder / "val")
    assert str(image_folder / "val") in refused()


def test_an_empty_class_is_named(refused, image_folder) -> None:
    for path in (image_folder / "train" / "bee").iterdir():
        path.unlink()
    assert str(image_folder / "train" / "bee") in refused()


def test_classes_that_differ_between_splits_are_named(refused, image_folder) -> None:
    (image_folder / "val" / "bee").rename(image_folder / "val" / "wasp")
    line = refused()
    assert "bee" in line
    assert "wasp" in line


def test_more_batch_than_images_is_refused(refused) -> None:
    assert "24 images, fewer than batch_size 64" in refused(data={"batch_size": 64})


@pytest.mark.parametrize("verify", [True, False])
def test_a_corrupt_image_is_named_before_training_or_when_it_is_met(refused, image_folder, verify) -> None:
    for path in (image_folder / "train").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:100])
    line = refused(data={"verify": verify})
    assert ".png is not an image" in line
    assert str(image_folder / "train") in line


def test_an_unknown_key_is_refused_by_the_parser(write_config, tmp_path, capsys) -> None:
    config = write_config(model={"learning_rate": 0.1})
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config)])
    assert stop.value.code == 2
    assert "learning_rate" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def checkpoint(trained) -> Path:
    return trained / "checkpoints" / "last.ckpt"


def test_a_truncated_checkpoint_is_named(refused, checkpoint, tmp_path) -> None:
    short = tmp_path / "short.ckpt"
    short.write_bytes(checkpoint.read_bytes()[:-1000])
    for option in ("--ckpt_path", "--model.checkpoint"):
        assert f"{short} is not a checkpoint, or is cut off" in refused(option, str(short))
    text = tmp_path / "text.safetensors"
    text.write_text("not weights")
    assert "text.safetensors" in refused("--model.checkpoint", str(text))
    assert "missing.ckpt" in refused("--ckpt_path", str(tmp_path / "missing.ckpt"))


def test_a_checkpoint_of_something_else_is_refused(refused, checkpoint, tmp_path) -> None:
    for options in (("--model.model_args", "{depths: [1, 1, 2, 1]}"), ("--model.model", "test_vit")):
        line = refused("--ckpt_path", str(checkpoint), *options, model={"model_args": {}})
        assert "was trained with model" in line
    line = refused("--model.checkpoint", str(checkpoint), model={"model": "test_resnet", "model_args": {}})
    assert f"test_resnet with model_args {{}} and the weights of {checkpoint}" in line
    torch.save({"state_dict": {"head.fc.weight": torch.zeros(3, 32)}}, tmp_path / "part.pth")
    assert "part.pth" in refused("--model.checkpoint", str(tmp_path / "part.pth"))
    assert "not a checkpoint of this program" in refused("--ckpt_path", str(tmp_path / "part.pth"))


def test_code_in_a_checkpoint_is_not_run(refused, tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "evil",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    assert "evil.ckpt" in refused("--ckpt_path", str(tmp_path / "evil.ckpt"))
    assert "evil.ckpt" in refused("--model.checkpoint", str(tmp_path / "evil.ckpt"))


def test_evaluation_without_weights_is_refused(refused) -> None:
    for verb in ("validate", "test", "predict"):
        assert "needs weights" in refused(verb=verb)


def test_a_folder_that_holds_a_run_is_not_trained_into(refused, trained) -> None:
    line = refused(output=str(trained))
    assert "already holds a run" in line
    assert "last.ckpt" in line


def test_predictions_that_cannot_be_made_leave_no_file(refused, checkpoint, tmp_path, image_folder) -> None:
    (image_folder / "test" / "ant" / "1.png").write_bytes(b"broken")
    line = refused("--ckpt_path", str(checkpoint), "--predictions", str(tmp_path / "out.csv"), verb="predict")
    assert "ant/1.png is not an image" in line
