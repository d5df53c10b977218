"""A run that was stopped, killed or out of disk and resumed is the run that was never stopped."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from tests.train.conftest import clean_processes, record_losses
from train.classification import ImageClassifier, main

RECIPE = {"mixup": 0.4, "cutmix": 0.5, "label_smoothing": 0.1, "ema_decay": 0.8, "warmup_epochs": 1}


def killed(arguments: list[str]) -> None:
    """A run that is killed before batch 4 of its second epoch."""
    start = ImageClassifier.on_train_batch_start

    def kill(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == (1, 4):
            os.kill(os.getpid(), signal.SIGKILL)
        start(self, batch, batch_idx)

    torch.set_num_threads(1)
    ImageClassifier.on_train_batch_start = kill
    main(arguments)


def checkpoints(folder: Path) -> list[dict]:
    """After every update, after every validation and at the end of every epoch."""
    path = "lightning.pytorch.callbacks.ModelCheckpoint"
    common = {"dirpath": str(folder), "auto_insert_metric_name": False, "enable_version_counter": False}
    common |= {"save_top_k": -1}
    every = {"filename": "step{step}", "every_n_train_steps": 1}
    ends = {"filename": "end{epoch}", "save_on_train_epoch_end": True}
    validated = {"filename": "validated{epoch}", "monitor": "val/loss", "save_on_train_epoch_end": False}
    return [{"class_path": path, "init_args": {**common, **args}} for args in (every, ends, validated)]


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], float]:
    return record_losses(monkeypatch, ImageClassifier)


def assert_same_state(found: dict, expected: dict) -> None:
    assert found["global_step"] == expected["global_step"]
    assert found["epoch"] == expected["epoch"]
    for part in ("state_dict", "current_model_state"):
        assert found[part].keys() == expected[part].keys()
        for key, value in expected[part].items():
            torch.testing.assert_close(found[part][key], value, rtol=0, atol=1e-6)
    assert found["lr_schedulers"] == expected["lr_schedulers"]


@pytest.mark.slow
def test_a_resumed_run_has_the_losses_and_weights_of_an_uninterrupted_one(
    tmp_path, write_config, losses
) -> None:
    # 6 batches and 3 updates an epoch
    trainer = {"max_epochs": 3, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    folder = tmp_path / "checkpoints"
    trainer["callbacks"] = checkpoints(folder)
    config = write_config(output=str(tmp_path / "whole"), model=RECIPE, trainer=trainer)
    assert main(["fit", "--config", str(config)]) == 0
    expected = dict(losses)
    assert list(expected) == [(epoch, batch) for epoch in range(3) for batch in range(6)]
    final = torch.load(folder / "end2.ckpt", weights_only=True)
    assert final["global_step"] == 9

    # in this order, so that no resumed run has written a checkpoint that a later one starts from
    names = {"step7": 14, "end1": 12, "step3": 6, "validated0": 6}
    for name, done in names.items():
        losses.clear()
        (folder / "end2.ckpt").unlink()  # what is compared below is this run's
        resumed = write_config(f"{name}.yaml", output=str(tmp_path / name), model=RECIPE, trainer=trainer)
        assert main(["fit", "--config", str(resumed), "--ckpt_path", str(folder / f"{name}.ckpt")]) == 0
        assert list(losses) == list(expected)[done:], name
        assert list(losses.values()) == pytest.approx(list(expected.values())[done:], abs=1e-6), name
        assert_same_state(torch.load(folder / "end2.ckpt", weights_only=True), final)


@pytest.mark.slow
def test_a_run_killed_in_an_epoch_goes_on_to_the_weights_of_one_that_was_not(
    tmp_path, write_config, losses, capsys
) -> None:
    run = tmp_path / "killed"
    config = write_config("killed.yaml", output=str(run), model=RECIPE, save_every=3)
    arguments = ["fit", "--config", str(config), "--ckpt_path", "last"]
    process = clean_processes().Process(target=killed, args=(arguments,))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    last = run / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    assert state["global_step"] == 9  # 6 of the first epoch, 3 of the 4 of the second that were done
    assert state["ImageFolderData"] == {"epoch": 1, "batches": 3, "global_batch": 4}

    assert main([*arguments, "--data.batch_size", "2"]) == 1  # would see some images twice
    assert "middle of an epoch with 4 images a batch" in capsys.readouterr().err

    left = last.with_name(".123.last.ckpt")  # a kill while a checkpoint is written leaves this
    left.write_bytes(b"half")
    assert main(arguments) == 0
    assert list(losses) == [(1, 3), (1, 4), (1, 5)]
    assert sorted(path.name for path in last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    resumed = dict(losses)
    losses.clear()
    whole = write_config("whole.yaml", output=str(tmp_path / "whole"), model=RECIPE)
    assert main(["fit", "--config", str(whole)]) == 0
    assert [losses[key] for key in resumed] == pytest.approx(list(resumed.values()), abs=1e-6)
    expected = torch.load(tmp_path / "whole" / "checkpoints" / "last.ckpt", weights_only=True)
    assert_same_state(torch.load(last, weights_only=True), expected)


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on_from_it(
    tmp_path, write_config, losses, monkeypatch, capsys
) -> None:
    config = write_config()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    start = ImageClassifier.on_train_batch_start

    def full(self, batch, batch_idx):
        if self.current_epoch == 1:  # as little as the logs need; a checkpoint has a megabyte
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
        start(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ImageClassifier, "on_train_batch_start", full)
        try:
            assert main(["fit", "--config", str(config)]) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written, the one before it is untouched" in capsys.readouterr().err
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    for name in ("best", "last"):
        assert torch.load(folder / f"{name}.ckpt", weights_only=True)["global_step"] == 6

    losses.clear()
    assert main(["fit", "--config", str(config), "--ckpt_path", "last"]) == 0
    assert list(losses) == [(1, batch) for batch in range(6)]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 12


def test_last_and_best_are_those_of_the_run(tmp_path, write_config, trained, capsys) -> None:
    config = write_config(save_every=0)
    assert main(["fit", "--config", str(config), "--ckpt_path", "last"]) == 1
    assert "save_every must be at least 1" in capsys.readouterr().err
    callbacks = checkpoints(tmp_path)
    config = write_config(save_every=2, trainer={"callbacks": callbacks})
    assert main(["fit", "--config", str(config)]) == 1
    assert "save_every belongs to our checkpoints" in capsys.readouterr().err
    assert main(["validate", "--config", str(trained / "config.yaml"), "--ckpt_path", "best"]) == 0
    config = write_config()
    assert main(["validate", "--config", str(config), "--ckpt_path", "last"]) == 1
    assert "no checkpoint at" in capsys.readouterr().err
