"""A run that was stopped and resumed is the run that was never stopped."""

from pathlib import Path

import pytest
import torch

from train.classification import ImageClassifier, main

RECIPE = {"mixup": 0.4, "cutmix": 0.5, "label_smoothing": 0.1, "ema_decay": 0.8, "warmup_epochs": 1}


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
    """Loss of every batch (epoch, index) trained on; empty it before a run."""
    seen: dict[tuple[int, int], float] = {}
    step = ImageClassifier.training_step

    def recorded(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        assert (self.current_epoch, batch_idx) not in seen
        seen[self.current_epoch, batch_idx] = loss.item()
        return loss

    monkeypatch.setattr(ImageClassifier, "training_step", recorded)
    return seen


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

    # in this order, so that no resumed run has written a checkpoint that a later one starts from
    names = {"step7": 14, "end1": 12, "step3": 6, "validated0": 6}
    for name, done in names.items():
        losses.clear()
        resumed = write_config(f"{name}.yaml", output=str(tmp_path / name), model=RECIPE, trainer=trainer)
        assert main(["fit", "--config", str(resumed), "--ckpt_path", str(folder / f"{name}.ckpt")]) == 0
        assert list(losses) == list(expected)[done:], name
        assert list(losses.values()) == pytest.approx(list(expected.values())[done:], abs=1e-6), name
        end = torch.load(folder / "end2.ckpt", weights_only=True)
        assert end["global_step"] == final["global_step"] == 9
        assert end["epoch"] == final["epoch"]
        for part in ("state_dict", "current_model_state"):
            for key, value in final[part].items():
                torch.testing.assert_close(end[part][key], value, rtol=0, atol=1e-6)
        assert end["lr_schedulers"] == final["lr_schedulers"]
