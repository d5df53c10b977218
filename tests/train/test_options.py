"""What the programs take beside their recipes: a compiled model, an early stop, other towers of CLIP."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.train.conftest import rows, run_writer
from train import classification, clip


@pytest.mark.slow
def test_a_compiled_model_trains_as_it_is_and_its_checkpoint_is_that_of_any(
    tmp_path, write_config, monkeypatch
) -> None:
    """The graph is that of the compiler; what it would generate from it is not what is tested."""
    calls: list[nn.Module] = []
    compile = nn.Module.compile

    def traced(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        calls.append(self)
        compile(self, backend="eager", fullgraph=True)

    monkeypatch.setattr(nn.Module, "compile", traced)
    # A compiler sees PyTorch's own gradients of depthwise kernels. Where the true gradient is zero, of biases
    # before a batch norm, rounding is all that there is, and Adam makes steps of it.
    monkeypatch.setattr("visionsel.ops.depthwise.why_not", lambda *_: "compared with a compiled model")
    small = {"embed_dims": [32, 32], "depths": [1, 1], "num_windows": [2, 2], "topks": [1, 2]}
    model = {"model_args": {**small, "drop_path_rate": 0.2}}
    losses, states = [], []
    for name in ("plain", "compiled"):
        run = tmp_path / name
        config = write_config(
            f"{name}.yaml",
            output=str(run),
            model={**model, "compile": name == "compiled"},
            data={"batch_size": 12},
            trainer={"max_epochs": 1},
        )
        assert classification.main(["fit", "--config", str(config)]) == 0
        losses.append(rows(run, "train/loss_step"))
        states.append(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    assert len(calls) == 1
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=1e-4)
    last = str(tmp_path / "compiled" / "checkpoints" / "last.ckpt")
    config = write_config("none.yaml", output=str(tmp_path / "none"), model=model)
    assert classification.main(["validate", "--config", str(config), "--ckpt_path", last]) == 0


def test_a_run_stops_early_by_lightnings_callback(tmp_path, write_config) -> None:
    stop = {
        "class_path": "lightning.pytorch.callbacks.EarlyStopping",
        "init_args": {"monitor": "val/top1", "mode": "max", "patience": 2},
    }
    # weights that hardly change
    config = write_config(model={"lr": 1e-9}, trainer={"max_epochs": 30, "callbacks": [stop]})
    cli = classification.ClassificationCLI(["fit", "--config", str(config)])
    found = rows(tmp_path / "run", "val/top1")
    assert cli.trainer.current_epoch == len(found) == found.index(max(found)) + 3 < 30
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.parametrize("tower", ["biformer_tiny", "nat_mini", "dinat_mini", "focalnet_tiny_srf"])
def test_other_backbones_are_towers_of_clip(tmp_path, tower) -> None:
    path = run_writer(tmp_path)(
        trainer={"fast_dev_run": True},
        model={"vision_args": {"timm_model_name": tower}, "warmup": 0.0},
        data={"batch_size": 2, "epoch_size": 4, "val_size": 2},
    )
    built: list[clip.ClipTraining] = []
    step = clip.ClipTraining.training_step

    def recorded(self: clip.ClipTraining, *args: Any) -> Any:
        built.append(self)
        loss = step(self, *args)
        assert loss.isfinite()
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip.ClipTraining, "training_step", recorded)
        assert clip.main(["fit", "--config", str(path)]) == 0
    [model] = built
    assert model.config["vision_cfg"]["timm_model_name"] == tower
