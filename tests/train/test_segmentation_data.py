"""Images and label maps: found, read, checked, augmented together, and what happens to bad ones."""

import csv
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train.conftest import make_image_folder
from train.callbacks_bad_samples import (
    BadSampleError,
    ReplaceBadSamples,
    good_samples,
    open_sample,
    read_bad_samples,
)
from train.segmentation_data import SegmentationData, collate_alike
from train.segmentation_files import (
    LabelledImages,
    find_pairs,
    read_ade20k_names,
    read_class_names,
    write_shapes,
)
from train.segmentation_transforms import EvalTransform, TrainTransform, scaled_size
from visionsel.data.imagefolder import read_image_folder
from visionsel.data.resumable import SeededDataset
from visionsel.data.shapes import SHAPES, ShapesWorld

ADE20K_TABLE = (
    "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
    "1\t0.1576\t11664\t1172\t1\twall\n"
    "2\t0.1072\t6046\t612\t1\tbuilding, edifice\n"
    "3\t0.0878\t8265\t796\t1\tsky\n"
)
"""The head of `objectInfo150.txt`, as it is."""
COLORS = np.array([[30, 30, 30], [120, 120, 120], [180, 60, 60], [60, 60, 220]], dtype=np.uint8)


def make_pair(root: Path, split: str, name: str, size: tuple[int, int], seed: int) -> tuple[Path, Path]:
    """A picture of flat blocks and its label map as ADE20K writes it: 0 unlabelled, 1 to 3."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 4, (-(-size[0] // 8), -(-size[1] // 8)))
    blocks[0, 0] = 1  # never without a label
    labels = blocks.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]].astype(np.uint8)
    image, mask = root / "images" / split / f"{name}.jpg", root / "annotations" / split / f"{name}.png"
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(COLORS[labels]).save(image, quality=95)
    Image.fromarray(labels).save(mask)
    return image, mask


def make_ade20k(root: Path, train: int = 2, val: int = 2, size: tuple[int, int] = (40, 56)) -> Path:
    """A data set in the layout of ADEChallengeData2016."""
    for index in range(train):
        make_pair(root, "training", f"ADE_train_{index + 1:08d}", size, index)
    for index in range(val):
        make_pair(root, "validation", f"ADE_val_{index + 1:08d}", (size[0] + 4 * index, size[1]), 100 + index)
    (root / "objectInfo150.txt").write_text(ADE20K_TABLE)
    return root


def read(path: Path) -> np.ndarray:
    """Pixels of an image."""
    with Image.open(path) as image:
        return np.array(image)


def make_data(root: Path, **arguments: Any) -> SegmentationData:
    common = {"crop_size": 32, "image_scale": (80, 40), "batch_size": 2}
    return SegmentationData(str(root), **{**common, **arguments})


def spoil(root: Path, split: str, index: int, kind: str) -> Path:
    """Break one sample; returns the file that is to be named."""
    image, mask = find_pairs(root / "images" / split, root / "annotations" / split)[index]
    labels = read(mask)
    if kind == "missing mask":
        mask.unlink()
    elif kind == "size":
        Image.fromarray(labels[:-1]).save(mask)
    elif kind == "range":
        labels[0, 0] = 4
        Image.fromarray(labels).save(mask)
    elif kind == "colour mask":
        Image.fromarray(COLORS[labels]).save(mask)
    elif kind == "cut mask":
        mask.write_bytes(mask.read_bytes()[:60])
    elif kind == "nothing labelled":
        Image.fromarray(np.zeros_like(labels)).save(mask)
    else:
        assert kind == "cut image"
        image.write_bytes(image.read_bytes()[:200])
        return image
    return mask


KINDS = {
    "missing mask": "no label map at",
    "size": "39 x 56 pixels, its image 40 x 56",
    "range": r"has the labels \[4\]; allowed are 0 to 3 and 255",
    "colour mask": "has mode RGB",
    "cut mask": "not an image that Pillow can read",
    "nothing labelled": "labels no pixel",
    "cut image": "not an image that Pillow can read",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_sample_is_named_where_the_run_stops_at_it(kind, tmp_path) -> None:
    root = make_ade20k(tmp_path)
    bad = spoil(root, "training", 1, kind)
    data = make_data(root)
    if kind == "missing mask":  # known without reading
        with pytest.raises(ValueError, match=f"1 of 2 images.*no label map, first {bad}"):
            data.setup("fit")
        return
    data.setup("fit")
    with pytest.raises(BadSampleError, match=KINDS[kind]) as raised:
        list(data.train_dataloader())
    assert str(bad) in str(raised.value)
    with pytest.raises(ValueError, match="1 bad samples.*" + KINDS[kind]):
        make_data(root, verify=True).setup("fit")


@pytest.mark.parametrize("workers", [0, 2])
def test_reported_samples_are_replaced_by_the_next_good_one_in_any_process(workers, tmp_path) -> None:
    root = make_ade20k(tmp_path, train=9, val=1)
    for index, kind in enumerate(KINDS):
        spoil(root, "training", index, kind)
    clean = make_data(root, on_bad="report", bad_samples=str(tmp_path / "clean.csv"), batch_size=1)
    clean.setup("fit")
    data = make_data(
        root,
        on_bad="report",
        num_workers=workers,
        batch_size=3,
        bad_samples=str(tmp_path / "run" / "bad_samples.csv"),
    )
    data.setup("fit")
    images, labels = (torch.cat(parts) for parts in zip(*data.train_dataloader(), strict=True))
    good = SeededDataset(clean.train_set.dataset.dataset, 0)  # type: ignore[attr-defined]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).tolist()
    for position, index in enumerate(order):
        # the augmentation of its place, the picture of the next good one
        expected = good[0, position, max(index, len(KINDS))]
        assert torch.equal(images[position], expected[0])
        assert torch.equal(labels[position], expected[1])
    report = read_bad_samples(tmp_path / "run" / "bad_samples.csv")
    assert len(report) == len(KINDS)
    for message in KINDS.values():
        assert any(re.search(message, text) for text in report.values())
    with (tmp_path / "run" / "bad_samples.csv").open() as stream:
        assert len(list(csv.reader(stream))) == len(KINDS) + 1  # the header, and no file twice


def test_evaluation_leaves_bad_samples_out_and_counts_no_good_one_twice(tmp_path) -> None:
    root = make_ade20k(tmp_path, val=4)
    spoil(root, "validation", 1, "nothing labelled")
    spoil(root, "validation", 2, "missing mask")
    data = make_data(root, on_bad="report", bad_samples=str(tmp_path / "bad.csv"))
    data.setup("validate")
    assert [labels.shape[1] for _, labels in data.val_dataloader()] == [40, 52]
    assert len(read_bad_samples(tmp_path / "bad.csv")) == 2
    spoil(root, "validation", 0, "cut image")
    spoil(root, "validation", 3, "cut image")
    with pytest.raises(ValueError, match="all 4 samples are bad"):
        data.setup("validate")


def test_replacement_starts_at_the_next_index_and_goes_round(tmp_path) -> None:
    class Numbers(torch.utils.data.Dataset):
        reads: list[int] = []  # noqa: RUF012

        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> int:
            self.reads.append(index)
            if index in (2, 3, 4):
                raise BadSampleError(f"number {index}\nis bad", f"{index}.png")
            return index

    numbers = ReplaceBadSamples(Numbers(), tmp_path / "bad.csv")
    assert [numbers[index] for index in (3, 2, 1, 3)] == [0, 0, 1, 0]
    assert Numbers.reads == [3, 4, 0, 2, 0, 1, 0]  # no bad one is read again
    assert read_bad_samples(tmp_path / "bad.csv") == {
        f"{index}.png": f"number {index} is bad" for index in (3, 4, 2)
    }


def test_a_bad_picture_of_an_image_folder_is_replaced_too(tmp_path) -> None:
    images = make_image_folder(tmp_path / "images")
    bad = images / "train" / "ant" / "2.png"
    bad.write_bytes(b"no picture")
    folder = read_image_folder(images / "train")
    folder.loader = open_sample
    replaced = ReplaceBadSamples(folder, tmp_path / "bad.csv")
    assert replaced[2][0].tobytes() == folder[3][0].tobytes()
    assert list(read_bad_samples(tmp_path / "bad.csv")) == [str(bad)]
    kept = good_samples(
        lambda index: folder.loader(folder.samples[index][0]), len(folder), tmp_path / "bad.csv"
    )
    assert kept == [index for index in range(24) if index != 2]


def test_labels_of_ade20k_are_reduced_and_its_table_names_the_classes(tmp_path) -> None:
    root = make_ade20k(tmp_path)
    data = make_data(root)
    data.setup("validate")
    assert data.class_names == ["wall", "building", "sky"]
    file = read(root / "annotations" / "validation" / "ADE_val_00000001.png")
    _, labels = next(iter(data.val_dataloader()))
    assert set(np.unique(file)) == {0, 1, 2, 3}
    assert np.array_equal(labels[0].numpy(), np.where(file == 0, 255, file.astype(int) - 1))
    (root / "objectInfo150.txt").write_text("Idx\n2 0.1 1 1 1 wall\n")
    with pytest.raises(ValueError, match="line 2"):
        read_ade20k_names(root / "objectInfo150.txt")
    with pytest.raises(FileNotFoundError, match=r"objectInfo150\.txt"):
        make_data(tmp_path / "nothing")


def test_folders_of_ones_own_need_names_and_may_keep_label_0(tmp_path) -> None:
    root = make_ade20k(tmp_path)
    (root / "names.txt").write_text("nothing\nwall\nbuilding\nsky\n\n")
    data = make_data(root, dataset="folders", classes="names.txt")
    data.setup("fit")
    assert data.class_names == ["nothing", "wall", "building", "sky"]
    file = read(root / "annotations" / "validation" / "ADE_val_00000001.png")
    assert np.array_equal(next(iter(data.val_dataloader()))[1][0].numpy(), file)
    for wrong, message in (("one\n", "1 classes"), ("a\nb\na\n", r"\['a'\] more than once")):
        (root / "names.txt").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            read_class_names(root / "names.txt")
    for arguments in ({"dataset": "folders"}, {"classes": "names.txt"}):
        with pytest.raises(ValueError, match="give classes"):
            make_data(root, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": 0}, "crop_size must be at least 1"),
        ({"ratio_range": (0.0, 1.0)}, "ratio_range"),
        ({"ratio_range": (2.0, 1.0)}, "ratio_range"),
        ({"cat_max_ratio": 0.0}, "cat_max_ratio"),
        ({"image_scale": (0, 10)}, "image_scale"),
        ({"std": (0.2, 0.0, 0.2)}, "std"),
        ({"batch_size": 3}, "2 training images are fewer than batch_size 3"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        make_data(make_ade20k(tmp_path), **arguments).setup("fit")


def test_two_images_with_one_name_are_refused(tmp_path) -> None:
    image, _ = make_pair(tmp_path, "training", "a", (16, 16), 0)
    image.with_suffix(".png").write_bytes(image.read_bytes())
    with pytest.raises(ValueError, match="differ in their ending"):
        find_pairs(tmp_path / "images" / "training", tmp_path / "annotations" / "training")


def test_devices_share_the_images_to_measure_on_and_count_none_twice(tmp_path) -> None:
    data = make_data(make_ade20k(tmp_path, val=3))
    data.setup("validate")
    whole = [labels for _, labels in data.val_dataloader()]
    shares: list[list[torch.Tensor]] = []
    for rank in range(2):
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank)  # type: ignore[assignment]
        shares.append([labels for _, labels in data.val_dataloader()])
    assert [len(share) for share in shares] == [2, 2]
    assert torch.equal(shares[0][0], whole[0])
    assert torch.equal(shares[1][0], whole[1])
    assert torch.equal(shares[0][1], whole[2])
    assert (shares[1][1] == 255).all()


def test_images_of_several_sizes_make_no_batch() -> None:
    items = [(torch.zeros(3, 8, size), torch.zeros(8, size)) for size in (8, 9)]
    with pytest.raises(ValueError, match="val_batch_size 1"):
        collate_alike(items)
    assert collate_alike(items[:1] * 2)[0].shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("size", "scale", "ratio", "expected"),
    [
        ((512, 683), (2048, 512), 1.0, (512, 683)),
        ((512, 683), (2048, 512), 0.5, (256, 342)),
        ((300, 400), (2048, 512), 1.0, (512, 683)),
        ((100, 1000), (2048, 512), 1.0, (205, 2048)),  # the longer side stops it
        ((1000, 100), (2048, 512), 2.0, (4096, 410)),
        ((64, 48), None, 1.25, (80, 60)),
    ],
)
def test_sizes_are_those_of_mmsegmentation(size, scale, ratio, expected) -> None:
    assert scaled_size(*size, scale, ratio) == expected


def train_transform(**changes: Any) -> TrainTransform:
    plain = {"crop_size": 24, "image_scale": None, "ratio_range": (0.5, 2.0), "cat_max_ratio": 0.75}
    plain |= {"hflip": 0.5, "photometric": False, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    return TrainTransform(**{**plain, **changes})  # type: ignore[arg-type]


def test_image_and_labels_are_scaled_cropped_and_flipped_together() -> None:
    labels = torch.zeros(40, 30, dtype=torch.uint8)
    labels[:20, :10], labels[20:, :10], labels[:, 20:] = 1, 2, 3
    image = (labels * 80)[None].repeat(3, 1, 1)
    sizes = set()
    for seed in range(30):
        torch.manual_seed(seed)
        pixels, found = train_transform()(image, labels)
        assert pixels.shape == (3, 24, 24)
        assert found.shape == (24, 24)
        inside = found != 255
        sizes.add(int(inside.sum()))
        assert (pixels[:, ~inside] == 0).all()
        near = (pixels[0] * 255 / 80 - found.float()).abs() < 0.2
        assert near[inside].float().mean() > 0.75  # all but the smooth borders
    assert len(sizes) > 3


def test_no_class_has_more_than_its_share_of_a_crop_where_one_can_be_had() -> None:
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:, 44:] = 1
    labels[:16] = 255
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    shares = {}
    for limit in (0.75, 1.0):
        transform = train_transform(cat_max_ratio=limit, ratio_range=(1.0, 1.0))
        shares[limit] = []
        for seed in range(40):
            torch.manual_seed(seed)
            found = transform(image, labels)[1]
            counts = torch.bincount(found[found != 255].long(), minlength=2)
            shares[limit].append(float(counts.max() / counts.sum()) if counts.sum() else 1.0)
    mixed = {limit: np.mean(np.array(values) < 0.75) for limit, values in shares.items()}
    assert mixed[0.75] > 0.9
    assert mixed[1.0] < 0.6


def test_photometric_distortion_changes_colours_only_and_follows_the_seed() -> None:
    image = torch.arange(3 * 32 * 32).reshape(3, 32, 32).remainder(251).to(torch.uint8)
    labels = torch.zeros(32, 32, dtype=torch.uint8)
    still = {"hflip": 0.0, "ratio_range": (1.0, 1.0), "cat_max_ratio": 1.0, "crop_size": 32}
    plain = train_transform(**still)(image, labels)[0]
    results = []
    for seed in (0, 1, 2, 2):
        torch.manual_seed(seed)
        pixels, found = train_transform(**still, photometric=True)(image, labels)
        assert torch.equal(found, labels)
        assert pixels.min() >= 0
        assert pixels.max() <= 1
        results.append(pixels)
    assert torch.equal(results[2], results[3])
    assert any(not torch.equal(plain, pixels) for pixels in results)
    assert not torch.equal(results[0], results[1])


def test_evaluation_resizes_the_image_and_normalizes() -> None:
    image = torch.full((3, 20, 40), 51, dtype=torch.uint8)
    pixels = EvalTransform((64, 30), (0.1, 0.2, 0.3), (0.5, 0.5, 0.5))(image)
    assert pixels.shape == (3, 30, 60)
    assert pixels[:, 3, 3].tolist() == pytest.approx([0.2, 0.0, -0.2], abs=1e-6)


def test_the_shapes_world_is_written_with_the_visible_pixels_of_each_shape(tmp_path) -> None:
    root = write_shapes(tmp_path / "shapes", (3, 2, 2), 32)
    pairs = {s: find_pairs(root / "images" / s, root / "annotations" / s) for s in ("training", "testing")}
    data = LabelledImages(pairs["training"], 11)
    sample = ShapesWorld("balanced", 2**30 - 1, 3, 32)[2]
    image, labels = data.read(2)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), sample.pixels)
    expected = np.zeros((32, 32), dtype=np.uint8)
    for thing in sample.objects:
        expected[thing.mask] = 1 + SHAPES.index(thing.shape)
    assert np.array_equal(labels.numpy(), expected)
    assert not np.array_equal(image, LabelledImages(pairs["testing"], 11).read(0)[0])
    assert read_class_names(root / "classes.txt") == ["background", *SHAPES]
    assert write_shapes(root, (3, 2, 2), 32) == root
    with pytest.raises(ValueError, match="was written with"):
        write_shapes(root, (4, 2, 2), 32)
