"""Mixed precision: products in bfloat16, weights, optimizer and losses in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.train import detection_mini, test_segmentation
from tests.train.conftest import make_config, make_image_folder, record_losses
from tests.train.test_segmentation_data import make_ade20k
from train.classification import ClassificationCLI, ImageClassifier
from train.detection import DetectionCLI, Detector
from train.segmentation import SegmentationCLI, SemanticSegmentation

TRAINER = {
    "precision": "bf16-mixed",
    "max_epochs": 1,
    "limit_train_batches": 1,
    "limit_val_batches": 1,
    "enable_checkpointing": False,
    "logger": False,
}
PROGRAMS: dict[str, tuple[Any, type]] = {
    "classification": (ClassificationCLI, ImageClassifier),
    "detection": (DetectionCLI, Detector),
    "segmentation": (SegmentationCLI, SemanticSegmentation),
}


def write_config(program: str, folder: Path) -> Path:
    """A configuration of one update of a tiny network."""
    path, model = folder / "config.yaml", {"warmup_steps": 0}
    if program == "classification":
        # all images in one batch: a limit of 1 may be read as the share 1.0
        data = {"batch_size": 24}
        return make_config(path, make_image_folder(folder / "images"), trainer=TRAINER, data=data)
    if program == "segmentation":
        root = make_ade20k(folder / "data", val=1)
        return test_segmentation.make_config(path, root, trainer=TRAINER, model=model)
    root = detection_mini.make_coco(folder / "data", train=2, val=1)
    config = detection_mini.make_config(root, folder / "run", trainer=TRAINER, model=model)
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_update_in_bfloat16_has_finite_losses_and_float32_weights(program, tmp_path, monkeypatch) -> None:
    start, kind = PROGRAMS[program]
    products: list[torch.dtype] = []

    def listen(self: Any) -> None:
        """The precision of what convolutions of the network give."""
        convolution = next(m for m in self.net.modules() if isinstance(m, torch.nn.Conv2d))
        convolution.register_forward_hook(lambda module, inputs, output: products.append(output.dtype))

    monkeypatch.setattr(kind, "on_fit_start", listen)
    losses = record_losses(monkeypatch, kind)
    cli = start(["fit", "--config", str(write_config(program, tmp_path))])
    assert torch.tensor(list(losses.values())).isfinite().all()
    assert len(losses) == cli.trainer.global_step == 1
    assert products
    assert set(products) == {torch.bfloat16}
    measured = cli.trainer.callback_metrics
    assert any(name.startswith("val/") for name in measured)
    assert all(value.isfinite() for value in measured.values())
    floats = [tensor for tensor in cli.model.state_dict().values() if tensor.is_floating_point()]
    states = cli.trainer.optimizers[0].state.values()
    floats += [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    assert {tensor.dtype for tensor in floats} == {torch.float32}
