"""Images and their label maps in folders: found, read and checked; the shapes world written as such folders.

    root/images/training/*.jpg        root/annotations/training/*.png
    root/images/validation/*.jpg      root/annotations/validation/*.png

is the layout of ADE20K (ADEChallengeData2016). A label map is a PNG with one number a pixel (mode L, P or I).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from train.callbacks_bad_samples import BadSampleError, open_sample
from train.segmentation_transforms import IGNORED
from train.shapes_data import VALIDATION_SEED, training_seed
from visionsel.data.folders import write_once
from visionsel.data.imagefolder import list_images
from visionsel.data.shapes import SHAPES, ShapesWorld

__all__ = [
    "SHAPE_CLASSES",
    "LabelledImages",
    "find_pairs",
    "read_ade20k_names",
    "read_class_names",
    "write_shapes",
]

ADE20K_NAMES = "objectInfo150.txt"
SHAPE_CLASSES = ("background", *SHAPES)
PNG_MODES = ("L", "P", "I", "I;16", "I;16B")


class LabelledImages(Dataset[tuple[Any, ...]]):
    """Images with their label maps.

    Args:
        pairs: image and label map of each sample.
        classes: number of classes.
        reduce_zero_label: 0 in the file is unlabelled and k is class k - 1, as in ADE20K.
        transform: of the uint8 image `[3, H, W]` and the uint8 labels `[H, W]`; None gives them as they are.

    Raises:
        BadSampleError: on reading, naming the file that is missing, cannot be decoded, is no label map, has
            another size than its image, a label out of range, or no labelled pixel.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        classes: int,
        reduce_zero_label: bool = False,
        transform: Callable[[Tensor, Tensor], tuple[Any, ...]] | None = None,
    ) -> None:
        self.pairs = list(pairs)
        self.classes = classes
        self.reduce_zero_label = reduce_zero_label
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        image, labels = self.read(index)
        return (image, labels) if self.transform is None else self.transform(image, labels)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """The image and the labels of its pixels, 255 where there is none."""
        image_file, label_file = self.pairs[index]
        image = open_sample(image_file)
        labels = self._read_labels(label_file, (image.height, image.width))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(labels)

    def _read_labels(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        if not path.is_file():
            raise BadSampleError(f"no label map at {path}", path)
        try:
            with Image.open(path) as image:
                mode, found = image.mode, np.array(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BadSampleError(f"{path} is not an image that Pillow can read: {error}", path) from error
        if mode not in PNG_MODES:
            raise BadSampleError(
                f"{path} has mode {mode}; a label map has one number a pixel (mode L or P)", path
            )
        if found.shape != size:
            raise BadSampleError(
                f"{path} has {found.shape[0]} x {found.shape[1]} pixels, its image {size[0]} x {size[1]}",
                path,
            )
        labels = found.astype(np.int64)
        highest = self.classes if self.reduce_zero_label else self.classes - 1
        wrong = np.unique(labels[((labels < 0) | (labels > highest)) & (labels != IGNORED)])
        if len(wrong):
            raise BadSampleError(
                f"{path} has the labels {wrong[:5].tolist()}; allowed are 0 to {highest} and {IGNORED}", path
            )
        if self.reduce_zero_label:
            labels = np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)
        if (labels == IGNORED).all():
            raise BadSampleError(f"{path} labels no pixel", path)
        return labels.astype(np.uint8)


def find_pairs(images: str | Path, masks: str | Path) -> list[tuple[Path, Path]]:
    """Each image below a folder with the file that should hold its labels: the same name, ending in `.png`.

    Raises:
        FileNotFoundError: when a folder is not there.
        ValueError: when there is no image, or two have the same name but for the ending.
    """
    images, masks = Path(images), Path(masks)
    if not masks.is_dir():
        raise FileNotFoundError(f"no folder of label maps at {masks}")
    pairs = [(path, masks / path.relative_to(images).with_suffix(".png")) for path in list_images(images)]
    if len({mask for _, mask in pairs}) < len(pairs):
        raise ValueError(f"{images} holds images that differ in their ending only; rename them")
    return pairs


def read_class_names(path: str | Path) -> list[str]:
    """Names of classes from a text file, one a line, in the order of the labels.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for one with less than two names, more than 255, or a name twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of class names at {path}; expected one name a line")
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not 2 <= len(names) <= IGNORED:
        raise ValueError(f"{path} names {len(names)} classes; allowed are 2 to {IGNORED}")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{path} has the names {twice} more than once")
    return names


def read_ade20k_names(path: str | Path) -> list[str]:
    """The first name of each class in ADE20K's table `objectInfo150.txt`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not that table.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path.name} in {path.parent}; it is part of ADEChallengeData2016. "
            "For another data set give --data.dataset folders and --data.classes"
        )
    names = []
    for number, line in enumerate(path.read_text().splitlines()[1:], start=1):
        fields = line.split(maxsplit=5)  # index, ratio, train, val, stuff, names
        if len(fields) != 6 or fields[0] != str(number):
            raise ValueError(f"{path} is not ADE20K's table of classes: line {number + 1} is {line!r}")
        names.append(fields[5].split(",")[0].split(";")[0].strip())
    if not 2 <= len(names) <= IGNORED:
        raise ValueError(f"{path} names {len(names)} classes; allowed are 2 to {IGNORED}")
    return names


def write_shapes(root: str | Path, scenes: tuple[int, int, int], image_size: int = 64) -> Path:
    """Write scenes of the balanced shapes world in the layout above, or reuse a folder with the same ones.

    Labels are 0 for background and 1 + the index in `SHAPES` for the visible pixels of a shape.

    Args:
        root: the folder.
        scenes: of `training`, `validation` and `testing`; no scene is in two of them.
        image_size: pixels a side.

    Returns:
        `root`.

    Raises:
        ValueError: when `root` holds other scenes.
        FileExistsError: when it holds something else.
    """
    seeds = training_seed(0), VALIDATION_SEED, VALIDATION_SEED + 1
    splits = dict(zip(("training", "validation", "testing"), zip(scenes, seeds, strict=True), strict=True))

    def write(folder: Path) -> None:
        for split, (count, seed) in splits.items():
            images, masks = folder / "images" / split, folder / "annotations" / split
            for made in (images, masks):
                made.mkdir(parents=True)
            for index, sample in enumerate(ShapesWorld("balanced", seed, count, image_size)):
                of_object = [0, *(1 + SHAPES.index(thing.shape) for thing in sample.objects)]
                labels = np.array(of_object, dtype=np.uint8)[sample.labels]
                sample.image.save(images / f"{index:05d}.png", compress_level=1)
                Image.fromarray(labels).save(masks / f"{index:05d}.png", compress_level=1)
        (folder / "classes.txt").write_text("\n".join(SHAPE_CLASSES) + "\n")

    card = {"world": "balanced", "scenes": list(scenes), "image_size": image_size}
    return write_once(Path(root), "shapes.json", card, write)
