"""What detectors read: COCO's format, its faults, and augmentation that keeps boxes on their objects."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.train.detection_mini import CATEGORIES, make_coco, make_config
from train.detection import main
from train.detection_data import CocoData
from visionsel.boxes import mask_boxes
from visionsel.data.coco_objects import read_objects
from visionsel.data.imagefolder import open_image

SIZES: dict[str, Any] = {"size": 48, "max_size": 64, "batch_size": 2}


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    return make_coco(tmp_path_factory.mktemp("coco"))


def file_of(root: Path, split: str = "train") -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


def read(root: Path, **options: Any) -> CocoData:
    data = CocoData(str(root), **{**SIZES, **options})
    data.setup("fit")
    return data


def test_ids_of_categories_become_labels_without_gaps_and_back(coco) -> None:
    data = read(coco)
    assert data.categories == CATEGORIES
    assert list(data.categories)[:3] == [1, 4, 7]
    rows = read_objects(file_of(coco, "val"), masks=True).rows
    for image, target in data.val_dataloader().dataset:
        ids = [list(data.categories)[label - 1] for label in target["labels"].tolist()]
        assert ids == [row["category_id"] for row in rows[target["image_id"]]]
        assert image.dtype == torch.uint8
        assert image.shape == (3, 48, 64)
        assert target["masks"].shape == (len(ids), 48, 64)
        torch.testing.assert_close(mask_boxes(target["masks"]), target["boxes"])
        torch.testing.assert_close(target["masks"].sum((1, 2)).double(), target["area"])


@pytest.mark.parametrize("augmentation", ["resize", "crop", "jitter"])
def test_boxes_stay_on_their_objects(coco, augmentation) -> None:
    options = {"sizes": [40, 48, 60], "size": 60, "max_size": 90, "color_jitter": 0.4, "jitter": (0.5, 1.5)}
    data = read(coco, augmentation=augmentation, **options)
    seen = set()
    for epoch in range(6):
        image, target = data.train_set[(epoch, 0, 1)]
        seen.add(tuple(image.shape[1:]))
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].shape == target["boxes"].shape[:1] == target["masks"].shape[:1]
        assert target["masks"].shape[1:] == image.shape[1:]
        # of an object that is cut, the box can be larger than what is left of the mask
        slack = 2 if augmentation == "resize" else math.inf
        around = mask_boxes(target["masks"])
        assert bool(((around - target["boxes"]).abs() <= slack).all())
        assert bool((around[:, :2] >= target["boxes"][:, :2] - 2).all())
        assert bool((around[:, 2:] <= target["boxes"][:, 2:] + 2).all())
    if augmentation == "jitter":
        assert seen == {(60, 60)}
    else:
        assert len(seen) > 1


def test_a_sample_depends_on_seed_epoch_and_position_only(coco) -> None:
    first, again, other = read(coco, color_jitter=0.4), read(coco, color_jitter=0.4), read(coco, seed=1)
    torch.rand(7)
    for key in ((0, 0, 2), (3, 1, 2)):
        for one, two in zip(first.train_set[key], again.train_set[key], strict=True):
            if isinstance(one, dict):
                assert all(torch.equal(one[name], two[name]) for name in one if name != "image_id")
            else:
                assert torch.equal(one, two)
    different = [
        not torch.equal(first.train_set[(e, 0, 2)][0], other.train_set[(e, 0, 2)][0]) for e in range(4)
    ]
    assert any(different)


def test_annotations_that_cannot_be_used_are_left_out_and_named(tmp_path) -> None:
    def spoil(split: str, content: Any) -> None:
        if split == "train":
            good = {**content["annotations"][0], "iscrowd": 0}
            faults: list[dict[str, Any]] = [
                {"bbox": [5, 5, 0, 9]},
                {"bbox": [70, 5, 9, 9]},
                {"bbox": [5, math.nan, 9, 9]},
                {"segmentation": []},
                {"segmentation": [[1, 1, 9, 9]]},
                {"segmentation": {"size": [9, 9], "counts": [81]}},
                {"bbox": [-4, -6, 14, 16]},  # over the border: usable
            ]
            content["annotations"] += [{**good, **fault, "id": 1 + i} for i, fault in enumerate(faults)]

    root = make_coco(tmp_path / "coco", edit=spoil)
    with pytest.warns(
        UserWarning, match="left out 6: annotation 1 of 000000000100.jpg: .* has no area"
    ) as caught:
        data = read(root)
    for part in (
        "annotation 2 [^;]* outside",
        "annotation 3 [^;]* four numbers",
        "annotation 4 [^;]* no segmentation",
    ):
        assert any(re.search(part, str(w.message)) for w in caught), part
    assert len(data._read["train"].left_out) == 6
    used = {row["id"] for rows in data._read["train"].rows.values() for row in rows}
    assert used & set(range(1, 8)) == {7}
    boxes = data.train_set[(0, 0, 0)][1]["boxes"]
    assert bool((boxes >= 0).all())
    assert bool((boxes <= torch.tensor([64.0, 48, 64, 48])).all())
    # without masks only boxes are asked for
    assert len(read_objects(file_of(root)).left_out) == 3


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("file", "there is no file"),
        ("json", "is not JSON"),
        ("category", "annotation 1000 of 000000000100.jpg has category_id 999"),
        ("duplicate", "two rows of annotations have the id 1000"),
        ("key", "a row lacks 'image_id'"),
        ("size", "image 100 has no height and width"),
        ("categories", "has categories"),
        ("image", "lists 1: 000000000100.jpg, not in"),
        ("folder", "no folder of images at"),
        ("nothing", "no image has an object to train on"),
        ("pixels", "has (50, 64) pixels, its annotation file says (48, 64)"),
        ("jpeg", "is not an image that Pillow can read"),
    ],
)
def test_faulty_data_is_refused_by_name(fault, message, tmp_path) -> None:
    def spoil(split: str, content: Any) -> None:
        if split != "train":
            return
        if fault == "category":
            content["annotations"][0]["category_id"] = 999
        elif fault == "duplicate":
            content["annotations"].append(dict(content["annotations"][0]))
        elif fault == "key":
            del content["annotations"][0]["image_id"]
        elif fault == "size":
            del content["images"][0]["height"]
        elif fault == "categories":
            content["categories"].append({"id": 500, "name": "dodo"})
        elif fault == "nothing":
            content["annotations"] = []

    root = make_coco(tmp_path / "coco", edit=spoil)
    picture = root / "train2017" / "000000000100.jpg"
    if fault == "file":
        file_of(root).unlink()
    elif fault == "json":
        file_of(root).write_text("{")
    elif fault == "image":
        picture.unlink()
    elif fault == "folder":
        (root / "train2017").rename(root / "elsewhere")
    elif fault == "pixels":
        open_image(picture).resize((64, 50)).save(picture)
    elif fault == "jpeg":
        picture.write_bytes(picture.read_bytes()[:300])
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read(root, verify=fault == "jpeg").train_set[(0, 0, 0)]
    assert message in str(caught.value)
    where = {"image": "100.jpg", "pixels": "100.jpg", "jpeg": "100.jpg"}.get(fault, "train2017")
    assert where in str(caught.value)


def test_a_run_over_faulty_data_ends_with_one_line_and_no_folder(tmp_path, capsys) -> None:
    root = make_coco(tmp_path / "coco", train=2)
    for path in (root / "train2017").iterdir():
        path.write_bytes(path.read_bytes()[:300])
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(make_config(root, tmp_path / "run")))  # JSON is YAML
    assert main(["fit", "--config", str(config)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("train.detection: ")
    assert "is not an image that Pillow can read" in said[-1]
    assert "0000001" in said[-1]
    assert not (tmp_path / "run").exists()


def test_crowds_and_empty_images_are_for_evaluation(tmp_path) -> None:
    def crowd(split: str, content: Any) -> None:
        first = content["images"][0]["id"]
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] != first]
        runs = {"size": [48, 64], "counts": [100, 300, 48 * 64 - 400]}
        row = {"id": 1, "image_id": content["images"][1]["id"], "category_id": 1, "bbox": [2, 0, 8, 48]}
        content["annotations"].append({**row, "area": 300, "iscrowd": 1, "segmentation": runs})

    root = make_coco(tmp_path / "coco", edit=crowd)
    data = read(root)
    assert len(data.train_set) == 5
    for index in range(5):
        assert not data.train_set[(0, index, index)][1]["iscrowd"].any()
    targets = [target for _, target in data.val_dataloader().dataset]
    assert len(targets[0]["boxes"]) == 0
    assert targets[0]["masks"].shape == (0, 48, 64)
    assert [int(target["iscrowd"].sum()) for target in targets] == [0, 1, 0]
    everything = read(root, empty_images=True)
    assert len(everything.train_set) == 6
    image, target = everything.train_set[(0, 0, 0)]
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, *image.shape[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"max_size": 40}, "max_size must be at least 48"),
        ({"sizes": [40, 100]}, "sizes up to 100 do not fit into max_size 64"),
        ({"hflip": 2}, "hflip is a probability"),
        ({"jitter": (0, 1)}, "jitter is a range of scales above 0"),
        ({"color_jitter": 2}, "color_jitter must be from 0 to 1"),
        ({"augmentation": "blur"}, "choose one of resize, crop, jitter"),
        ({"test_images": "test2017"}, "go together"),
        ({"categories": {}}, "no categories"),
        ({"categories": {1: "dodo"}}, "has categories"),
        ({"batch_size": 7}, "has 6 images with objects, fewer than batch_size 7"),
    ],
)
def test_arguments_are_checked(options, message, coco) -> None:
    with pytest.raises(ValueError, match=message):
        read(coco, **options)


def test_every_image_is_measured_on_one_device_only_and_all_have_as_many_batches(coco) -> None:
    whole = [target["image_id"] for _, targets in read(coco).val_dataloader() for target in targets]
    seen, counts = [], set()
    for rank in range(len(whole) - 1):
        data = read(coco)
        data.trainer = SimpleNamespace(world_size=len(whole) - 1, global_rank=rank)
        batches = [targets for _, targets in data.val_dataloader()]
        seen += [target["image_id"] for targets in batches for target in targets if "filler" not in target]
        counts.add(tuple(len(targets) for targets in batches))
    assert sorted(seen) == sorted(whole)
    assert len(counts) == 1
