"""The digits as an image folder."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionsel.data import folders
from visionsel.data.digits import write_digits


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits", image_size=16)


def test_every_scan_is_in_exactly_one_part_under_its_label(written) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    files = sorted(written.rglob("*.png"))
    assert sorted(int(path.stem) for path in files) == list(range(1797))
    assert all(data.target[int(path.stem)] == int(path.parent.name) for path in files)
    counts = {part: len(list((written / part).rglob("*.png"))) for part in ("train", "val", "test")}
    assert counts == {"train": 1259, "val": 179, "test": 359}
    for part in counts:
        assert sorted(path.name for path in (written / part).iterdir()) == list("0123456789")


def test_an_image_is_its_scan_enlarged(written) -> None:
    from sklearn.datasets import load_digits

    path = next((written / "test" / "7").iterdir())
    with Image.open(path) as image:
        assert image.size == (16, 16)
        pixels = np.asarray(image, dtype=float)
    scan = load_digits().images[int(path.stem)] * 255 / 16
    blocks = pixels.reshape(8, 2, 8, 2).mean((1, 3))
    assert np.corrcoef(blocks.ravel(), scan.ravel())[0, 1] > 0.98


def test_the_split_depends_on_the_seed_and_on_nothing_else(written, tmp_path) -> None:
    def tests(root: Path) -> set[str]:
        return {path.stem for path in (root / "test").rglob("*.png")}

    assert tests(write_digits(tmp_path / "again", image_size=8)) == tests(written)
    assert tests(write_digits(tmp_path / "other", image_size=8, seed=1)) != tests(written)


def test_a_finished_folder_is_reused_and_another_one_refused(written, tmp_path) -> None:
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    assert write_digits(written, image_size=16) == written
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before
    with pytest.raises(ValueError, match="image_size"):
        write_digits(written, image_size=24)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="mine"):
        write_digits(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch) -> None:
    count = 0

    def fail_later(self, path, *args, **kwargs):
        nonlocal count
        count += 1
        if count == 50:
            raise KeyboardInterrupt
        Path(path).write_bytes(b"")

    monkeypatch.setattr(Image.Image, "save", fail_later)
    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(tmp_path) -> None:
    (tmp_path / "digits").mkdir()
    write_digits(tmp_path / "digits", image_size=8)
    assert json.loads((tmp_path / "digits" / "digits.json").read_text())["image_size"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 7}, "image_size"),
        ({"test_ratio": 0.0}, "test_ratio"),
        ({"val_ratio": 0.5, "test_ratio": 0.5}, "leave some to train on"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        write_digits(tmp_path / "digits", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_without_scikit_learn_the_extra_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "visionsel\[train\]"'):
        write_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_that_is_late_keeps_the_folder_of_the_first(tmp_path, monkeypatch) -> None:
    rename = folders.os.rename

    def late(source, target):
        monkeypatch.setattr(folders.os, "rename", rename)
        write_digits(tmp_path / "digits", image_size=8)
        rename(source, target)

    monkeypatch.setattr(folders.os, "rename", late)
    assert write_digits(tmp_path / "digits", image_size=8) == tmp_path / "digits"
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
