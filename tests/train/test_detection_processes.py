"""Detection in two processes (DDP over gloo) is detection in one with the batch of both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.train.conftest import rows, run_in_two
from tests.train.detection_mini import BACKBONE, CATEGORIES, make_coco, make_config
from train.detection import Detector, main
from visionsel.data.coco import read_json

MODEL: dict[str, Any] = {
    # it samples no anchors, and its losses are means over images: two devices can have those of one
    "detector": "retinanet",
    "detector_args": {"score_thresh": 0.0, "topk_candidates": 20, "detections_per_img": 5},
    "backbone_args": {**BACKBONE["backbone_args"], "drop_path_rate": 0.0},
    "optimizer_args": {"eps": 1e-4},  # the first updates of Adam would magnify float noise
    "lr_batch_size": 2,
}
IMAGES = 5  # to validate on: three for one process and two for the other
WRONG = torch.tensor([[1.0, 2.0, 9.0, 30.0]])
detect = Detector._detect


def nearly(self: Detector, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The truth of each image moved by a few pixels, and a box that is wrong, after the network has run."""
    detect(self, images)
    truth = {image.numpy().tobytes(): target for image, target in self.trainer.datamodule.measured["val"]}
    found = []
    for image in images:
        target = truth[image.numpy().tobytes()]
        generator = torch.Generator().manual_seed(target["image_id"])
        count = len(target["boxes"])
        boxes = target["boxes"] + torch.rand(count, 4, generator=generator) * 4 - 2
        labels = torch.cat([target["labels"], torch.tensor([1])])
        scores = torch.rand(count + 1, generator=generator)
        found.append({"boxes": torch.cat([boxes, WRONG]), "labels": labels, "scores": scores})
    return found


def main_nearly(arguments: list[str]) -> int:
    """The program, in a process of its own, where detections are `nearly` the truth."""
    Detector._detect = nearly  # type: ignore[method-assign]
    return main(arguments)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs `one` and `two`, by processes: an epoch of three updates, then `validate`."""
    folder = tmp_path_factory.mktemp("detection_processes")
    root = make_coco(folder / "coco", train=6, val=IMAGES)

    def lines(name: str, devices: int) -> list[list[str]]:
        trainer = {"max_epochs": 1, "devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
        data = {"batch_size": 2 // devices, "val_batch_size": 2}
        config = make_config(root, folder / name, model=MODEL, trainer=trainer, data=data)
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        given = ["--config", str(path)]
        last = str(folder / name / "checkpoints" / "last.ckpt")
        return [["fit", *given], ["validate", *given, "--ckpt_path", last]]

    run_in_two(main_nearly, lines("two", 2), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Detector, "_detect", nearly)
        for line in lines("one", 1):
            assert main(line) == 0
    return folder


@pytest.mark.slow
def test_two_processes_have_the_losses_the_weights_and_the_precision_of_one(runs) -> None:
    for column in ("train/loss_step", "train/classification", "train/bbox_regression", "lr"):
        expected, found = rows(runs / "one", column), rows(runs / "two", column)
        assert len(expected) == 3
        assert found == pytest.approx(expected, abs=1e-5), column
    for column in ("val/box_ap", "val/box_ap50", "val/box_ap75"):
        (expected,), (found,) = rows(runs / "one", column), rows(runs / "two", column)
        assert found == pytest.approx(expected, abs=1e-6), column
    assert 0.1 < rows(runs / "one", "val/box_ap")[0] < 0.9
    one, two = (
        torch.load(runs / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("one", "two")
    )
    assert two["global_step"] == one["global_step"] == 3
    assert two["state_dict"].keys() == one["state_dict"].keys()
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=0, atol=1e-6, msg=key)


@pytest.mark.slow
def test_the_results_of_two_processes_lose_no_image_and_double_none(runs) -> None:
    one, two = (json.loads((runs / name / "val_results.json").read_text()) for name in ("one", "two"))
    assert two == one
    content = read_json(runs / "coco" / "annotations" / "instances_val2017.json")
    objects = [row["image_id"] for row in content["annotations"]]
    expected = {row["id"]: objects.count(row["id"]) + 1 for row in content["images"]}
    assert len(expected) == IMAGES
    found = [row["image_id"] for row in two]
    assert {number: found.count(number) for number in found} == expected
    assert {row["category_id"] for row in two} <= set(CATEGORIES)
