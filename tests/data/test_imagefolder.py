"""Image folders are refused early, and broken images named."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionsel.data.imagefolder import (
    check_image_folder,
    class_names,
    list_images,
    open_image,
    read_image_folder,
)

SPLITS = ("train", "val")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split in SPLITS:
        for name in ("bee", "ant"):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(2):
                Image.fromarray(np.full((8, 8), 100, np.uint8)).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def test_a_good_folder_gives_its_classes_and_rgb_images(root) -> None:
    assert check_image_folder(root, SPLITS, verify=True) == ["ant", "bee"] == class_names(root / "val")
    dataset = read_image_folder(root / "train")
    assert [label for _, label in dataset] == [0, 0, 1, 1]
    assert dataset[0][0].mode == "RGB"
    assert [path.name for path in list_images(root / "val")] == ["0.png", "1.png"] * 2


def test_a_missing_folder_is_named(root) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_image_folder(root / "nowhere", SPLITS)
    with pytest.raises(FileNotFoundError, match="test"):
        check_image_folder(root, ("train", "test"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_images(root / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        open_image(root / "nowhere.png")


def test_a_split_without_classes_is_named(root) -> None:
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    (root / "val" / "0.png").touch()
    with pytest.raises(ValueError, match="val has no class folders"):
        check_image_folder(root, SPLITS)


def test_an_empty_class_is_named(root) -> None:
    for path in (root / "val" / "ant").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(ValueError, match=r"without images: .*val/ant"):
        check_image_folder(root, SPLITS)
    with pytest.raises(ValueError, match="holds no images"):
        list_images(root / "val" / "ant")


def test_classes_that_two_splits_do_not_share_are_named(root) -> None:
    (root / "val" / "ant").rename(root / "val" / "wasp")
    with pytest.raises(ValueError, match="missing ant, only there wasp"):
        check_image_folder(root, SPLITS)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_broken_image_is_named_when_it_is_read_and_when_all_are_verified(root, damage) -> None:
    path = root / "train" / "bee" / "1.png"
    content = {"truncated": path.read_bytes()[:-30], "text": b"not an image", "empty": b""}[damage]
    path.write_bytes(content)
    assert check_image_folder(root, SPLITS) == ["ant", "bee"]
    with pytest.raises(ValueError, match=r"train/bee/1\.png is not an image"):
        check_image_folder(root, SPLITS, verify=True)
    dataset = read_image_folder(root / "train")
    with pytest.raises(ValueError, match=r"train/bee/1\.png is not an image"):
        dataset[3]
