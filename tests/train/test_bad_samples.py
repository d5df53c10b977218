"""`on_bad: report`: what cannot be used is replaced or left out, listed once, and changes nothing else."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.conftest import record_losses
from tests.train.detection_mini import make_coco
from tests.train.test_classification import rows
from tests.train.test_resume import checkpoints
from train.callbacks_bad_samples import read_bad_samples
from train.classification import ImageClassifier, main
from train.detection_data import CocoData
from train.image_data import IGNORED, ImageFolderData
from visionsel.data.imagefolder import open_image

SIZES: dict[str, Any] = {"size": 48, "max_size": 64, "batch_size": 2}


def spoil(*files: Path) -> set[str]:
    """Empty the first file, cut the second off, make the third a link to nothing, and so on; their names."""
    for number, file in enumerate(files):
        content = file.read_bytes()
        file.unlink()
        if number % 3 == 2:
            file.symlink_to(file.with_name("nowhere.png"))
        else:
            file.write_bytes(content[:100] if number % 3 else b"")
    return {str(file) for file in files}


def spoil_training(root: Path) -> set[str]:
    """Two neighbours, and the last of all."""
    return spoil(*(root / "train" / name for name in ("ant/2.png", "ant/3.png", "cat/7.png")))


def make_data(root: Path, report: Path, **arguments: Any) -> ImageFolderData:
    options = {"image_size": 32, "batch_size": 4, "on_bad": "report", "bad_samples": str(report)}
    return ImageFolderData(str(root), **{**options, **arguments})


def on_device(data: Any, rank: int) -> None:
    """Let data be those of one of two devices."""
    data.trainer = SimpleNamespace(world_size=2, global_rank=rank)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_replaced_by_the_next_good_one_and_all_others_stay(
    workers, image_folder, tmp_path
) -> None:
    good = ImageFolderData(str(image_folder), image_size=32, batch_size=4)
    good.setup("fit")
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    instead = {2: 4, 3: 4, 23: 0}
    # the augmentation of its place, the picture of the next good one
    samples = [good.train_set[0, place, instead.get(index, index)] for place, index in enumerate(order)]
    bad, report = spoil_training(image_folder), tmp_path / "run" / "bad_samples.csv"
    data = make_data(image_folder, report, num_workers=workers)
    data.setup("fit")
    images, labels = (torch.cat(parts) for parts in zip(*data.train_dataloader(), strict=True))
    assert torch.equal(images, torch.stack([image for image, _ in samples]))
    assert labels.tolist() == [label for _, label in samples]
    with report.open() as stream:
        listed = [row["file"] for row in csv.DictReader(stream)]
    assert sorted(listed) == sorted(bad)  # none twice
    shares = []
    for rank in range(2):
        on_device(data, rank)
        shares.append(torch.cat([images for images, _ in data.train_dataloader()]))
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), images)


def test_evaluation_leaves_bad_images_out_and_measures_each_other_one_once(image_folder, tmp_path) -> None:
    report = tmp_path / "bad_samples.csv"
    bad = spoil(*(image_folder / "val" / name for name in ("ant/0.png", "bee/1.png")))
    data = make_data(image_folder, report)
    data.setup("validate")
    images, labels = (torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True))
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 2]
    shares = []
    for rank in range(2):
        on_device(data, rank)
        shares.append([torch.cat(parts) for parts in zip(*data.val_dataloader(), strict=True)])
    seen, names = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*shares, strict=True))
    assert torch.equal(seen[:7], images)
    assert names.tolist() == [*labels.tolist(), IGNORED]
    assert set(read_bad_samples(report)) == bad
    # all of them before anything starts
    bad |= spoil_training(image_folder)
    make_data(image_folder, report, verify=True).setup("fit")
    assert set(read_bad_samples(report)) == bad
    assert "is not an image that Pillow can read" in read_bad_samples(report)[min(bad)]
    spoil(*(path for path in (image_folder / "val").rglob("*.png") if str(path) not in bad))
    with pytest.raises(ValueError, match=r"all 9 samples are bad; the first of .*/ant/"):
        make_data(image_folder, report).setup("validate")


def test_a_run_goes_on_without_bad_images_and_its_resumed_part_is_the_same(
    image_folder, write_config, tmp_path, monkeypatch, capsys
) -> None:
    bad = spoil_training(image_folder) | spoil(image_folder / "val" / "bee" / "1.png")
    losses = record_losses(monkeypatch, ImageClassifier)
    steps, seen, states, listed = tmp_path / "steps", [], [], []
    trainer = {"max_epochs": 1, "callbacks": checkpoints(steps)[:1]}  # after each of six updates
    for name, options in (("whole", []), ("resumed", ["--ckpt_path", str(steps / "step3.ckpt")])):
        run = tmp_path / name
        run.mkdir()
        monkeypatch.chdir(run)
        config = write_config(f"{name}.yaml", output=str(run), trainer=trainer, data={"on_bad": "report"})
        losses.clear()
        assert main(["fit", "--config", str(config), *options]) == 0
        listed.append(set(read_bad_samples(run / "bad_samples.csv")))
        assert f"{len(listed[-1])} bad samples in " in capsys.readouterr().out
        assert np.isfinite(rows(run, "val/loss")).all()
        seen.append(list(losses.values()))
        states.append(torch.load(steps / "step6.ckpt", weights_only=True)["state_dict"])
        (steps / "step6.ckpt").unlink()
    assert listed[0] == bad
    assert listed[1] <= bad  # what the second half met
    assert len(seen[0]) == 6
    assert np.isfinite(seen[0]).all()
    assert seen[1] == pytest.approx(seen[0][3:], abs=1e-6)
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=1e-6)


def test_predictions_are_those_of_the_images_that_can_be_read(
    trained, image_folder, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["predict", "--config", str(trained / "config.yaml"), "--output", str(tmp_path)]
    given += ["--ckpt_path", str(trained / "checkpoints" / "last.ckpt"), "--data.root", str(image_folder)]

    def predictions(arguments: list[str]) -> list[dict[str, str]]:
        assert main(arguments) == 0
        with (tmp_path / "predictions.csv").open() as stream:
            return list(csv.DictReader(stream))

    whole = predictions(given)
    expected = [row for number, row in enumerate(whole) if number not in (1, 8)]
    bad = spoil(*(image_folder / "test" / name for name in ("ant/1.png", "cat/2.png")))
    assert [row["file"] for row in whole if row not in expected] == sorted(bad)
    capsys.readouterr()
    found = predictions([*given, "--data.on_bad", "report"])
    said = capsys.readouterr().out
    assert "7 predictions in" in said
    assert "2 bad samples in" in said
    for key in ("file", "class"):
        assert [row[key] for row in found] == [row[key] for row in expected]
    probabilities = [[float(row["probability"]) for row in table] for table in (found, expected)]
    assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-5)
    assert set(read_bad_samples(tmp_path / "bad_samples.csv")) == bad


def test_bad_images_of_a_detector_are_replaced_or_left_out_with_their_objects(tmp_path) -> None:
    root = make_coco(tmp_path / "coco")
    good = CocoData(str(root), **SIZES)
    good.setup("fit")
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0)).tolist()
    samples = [good.train_set[0, place, max(index, 4)] for place, index in enumerate(order)]
    files = sorted((root / "train2017").iterdir())
    bad = spoil(*files[:3], sorted((root / "val2017").iterdir())[1]) | {str(files[3])}
    open_image(files[3]).resize((60, 40)).save(files[3])
    with pytest.raises(FileNotFoundError, match=f"lists 1: {files[2].name}, not in"):
        CocoData(str(root), **SIZES).setup("fit")

    report = tmp_path / "bad_samples.csv"
    options: dict[str, Any] = {**SIZES, "on_bad": "report", "bad_samples": str(report)}
    data = CocoData(str(root), **options)
    data.setup("fit")
    found = [pair for batch in data.train_dataloader() for pair in zip(*batch, strict=True)]
    for (image, target), (expected, objects) in zip(found, samples, strict=True):
        assert torch.equal(image, expected)
        assert target["image_id"] == objects["image_id"]
        assert torch.equal(target["boxes"], objects["boxes"])
    assert [target["image_id"] for _, targets in data.val_dataloader() for target in targets] == [100, 102]
    listed = read_bad_samples(report)
    assert set(listed) == bad
    assert "no image at" in listed[str(files[2])]
    assert "(40, 60) pixels, its annotation file says (48, 64)" in listed[str(files[3])]
    shown = CocoData(str(root), **options, predict_folder=str(root / "val2017")).predict_files
    assert [path.stem for path in shown] == ["000000000100", "000000000102"]


def test_shards_cannot_report() -> None:
    with pytest.raises(ValueError, match="on_bad report needs dataset imagefolder"):
        ImageFolderData("shards", dataset="shards", classes="imagenet-1k", on_bad="report")
