"""Two processes train and measure as one with the batch of both: DDP, and FSDP2 as Lightning offers it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from timm.layers import SyncBatchNormAct
from torch import nn

from tests.train.conftest import make_config, make_image_folder, rows, run_in_two
from tests.train.test_resume import checkpoints
from train.classification import ClassificationCLI, ImageClassifier, main
from train.classifier_net import shard
from visionsel.data.resumable import EvenSampler

MODEL = {
    "model": "nat_mini",
    "model_args": {"embed_dim": 32, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]},
    "lr": 2e-3,
    "lr_batch_size": 8,
    "optimizer_args": {"eps": 1e-4},  # the first updates of Adam would magnify float noise
}
TRAINER = {"max_epochs": 1, "gradient_clip_val": 0.5}  # three batches
FSDP2 = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {
        "data_parallel_size": 2,
        "tensor_parallel_size": 1,
        "save_distributed_checkpoint": False,
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs: `one` process; `ddp`, `fsdp2` and `resumed`, each in two."""
    folder = tmp_path_factory.mktemp("distributed")
    images = make_image_folder(folder / "images")
    steps = folder / "steps"

    def arguments(name: str, devices: int, strategy: Any = "auto", **model: Any) -> list[str]:
        trainer = TRAINER | {"devices": devices, "strategy": strategy}
        if name in ("fsdp2", "resumed"):
            (callback,) = checkpoints(steps)[:1]
            callback["init_args"]["filename"] = name + "-{step}"
            trainer["callbacks"] = [callback]
        path = make_config(
            folder / f"{name}.yaml",
            images,
            output=str(folder / name),
            model=MODEL | model,
            trainer=trainer,
            # nine images to validate: five for one process and four for the other
            data={"batch_size": 8 // devices, "val_batch_size": 2},
        )
        return ["fit", "--config", str(path)]

    lines = [
        arguments("ddp", 2, "ddp"),
        arguments("fsdp2", 2, FSDP2, grad_checkpointing=True),
        [*arguments("resumed", 2, FSDP2), "--ckpt_path", str(steps / "fsdp2-2.ckpt")],
    ]
    run_in_two(main, lines, folder)
    assert main(arguments("one", 1)) == 0
    return folder


def last(folder: Path) -> dict[str, Any]:
    path = folder.parent / "steps" / f"{folder.name}-3.ckpt"
    return torch.load(path if path.exists() else folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "resumed"])
def test_two_processes_have_the_losses_the_measures_and_the_weights_of_one(runs, strategy) -> None:
    assert len(rows(runs / "one", "train/loss_step")) == 3
    for column in ("train/loss_step", "lr", "val/loss", "val/top1", "val/top5"):
        expected, found = rows(runs / "one", column), rows(runs / strategy, column)
        if strategy == "resumed":  # the last of the three updates
            expected = expected[-len(found) :]
        assert found == pytest.approx(expected, abs=2e-5), column
    one, two = last(runs / "one"), last(runs / strategy)
    assert two["global_step"] == one["global_step"] == 3
    assert two["state_dict"].keys() == one["state_dict"].keys()
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=0, atol=1e-4, msg=key)
    assert one["optimizer_states"][0]["state"].keys() == two["optimizer_states"][0]["state"].keys()


@pytest.mark.slow
def test_what_sharded_processes_saved_is_measured_by_one(runs) -> None:
    given = ["--config", str(runs / "one.yaml")]
    given += ["--ckpt_path", str(runs / "steps" / "fsdp2-3.ckpt")]
    metrics = ClassificationCLI(["validate", *given]).trainer.callback_metrics
    for name in ("val/loss", "val/top1"):
        assert metrics[name].item() == pytest.approx(rows(runs / "fsdp2", name)[-1], abs=1e-5)


def test_each_index_is_on_one_device_and_all_have_equally_many() -> None:
    for size in (1, 7, 8, 9):
        parts = [list(EvenSampler(range(size), 4, rank)) for rank in range(4)]
        assert len({len(part) for part in parts}) == 1
        assert all(len(EvenSampler(range(size), 4, rank)) == len(part) for rank, part in enumerate(parts))
        seen = [index for part in parts for index in part if index >= 0]
        assert sorted(seen) == list(range(size))


def test_what_does_not_go_with_sharding_is_refused(write_config, monkeypatch, capsys) -> None:
    whole = {"class_path": FSDP2["class_path"], "init_args": {"data_parallel_size": 1}}
    assert main(["fit", "--config", str(write_config(trainer={"strategy": whole}))]) == 1
    assert "save_distributed_checkpoint to false" in capsys.readouterr().err
    preprocessing = {"input_size": (3, 32, 32)}
    model = ImageClassifier("test_vit", ["ant", "bee"], preprocessing, ema_decay=0.9)
    monkeypatch.setattr(ImageClassifier, "trainer", SimpleNamespace(strategy=ModelParallelStrategy()))
    with pytest.raises(ValueError, match="ema_decay averages whole models"):
        model.configure_callbacks()
    mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2)}
    with pytest.raises(ValueError, match="tensor_parallel_size to 1"):
        shard(model.net, mesh)


def test_batch_norm_is_synchronized_by_the_conversion_that_keeps_activations(
    write_config, capsys, monkeypatch
) -> None:
    config = write_config(trainer={"sync_batchnorm": True})
    assert main(["fit", "--config", str(config)]) == 1
    assert "model.sync_batchnorm" in capsys.readouterr().err

    preprocessing = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    model = ImageClassifier("test_efficientnet", ["ant", "bee"], preprocessing, sync_batchnorm=True).eval()
    images = torch.randn(2, 3, 32, 32)
    before, keys = model(images), model.state_dict().keys()
    for devices in (1, 2):
        monkeypatch.setattr(ImageClassifier, "trainer", SimpleNamespace(world_size=devices))
        model.spread = False
        model.configure_model()
        found = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
        assert bool(found) == (devices == 2)
    assert {type(module) for module in found} == {SyncBatchNormAct}
    assert model.state_dict().keys() == keys
    torch.testing.assert_close(model(images), before)
