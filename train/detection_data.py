"""Images with boxes and masks for Lightning: COCO's format from a folder, or the shapes world written as one.

A sample is an image, uint8 `[3, H, W]`, and a target: `image_id`; `boxes` (x0, y0, x1, y1) in pixels, float32
`[N, 4]`; `labels` from 1, int64 `[N]`; `area` and `iscrowd` `[N]`; with masks, `masks` bool `[N, H, W]`. A
batch is a list of images and a list of targets, since sizes differ.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from train.callbacks_bad_samples import BadSampleError, open_sample
from train.detection_transforms import Augmentation, drop_lost_objects, training_transform
from train.resumable_data import ResumableData
from visionsel.data.coco import annotation_mask, read_json
from visionsel.data.coco_objects import Objects, read_objects
from visionsel.data.imagefolder import list_images, open_image
from visionsel.data.resumable import EvenSampler, Filled, SeededDataset
from visionsel.data.shapes import SHAPES, write_shapes

__all__ = ["CocoData", "CocoSet", "Target"]

Target = dict[str, Any]


class CocoData(ResumableData):
    """Training, validation, test and prediction images of a detector.

    The defaults are COCO's own layout: `annotations/instances_train2017.json`, `train2017/`, and so on.

    Args:
        root: folder of the data; paths below are relative to it.
        dataset: "coco" reads what is in `root`; "shapes" writes the shapes world there first, once, and the
            same for every seed.
        train_annotations, val_annotations, test_annotations: instance files; without the last, the test verb
            measures on the validation split.
        train_images, val_images, test_images: their folders of images.
        predict_folder: images for the predict verb; default those of the test split.
        categories: ids and names; default those of the annotation files, which must agree.
        masks: read segmentations; set by the program from the kind of detector.
        size: shortest side of an image in evaluation.
        sizes: shortest sides to draw from in training; default `size`.
        max_size: the longest side is at most this.
        augmentation: of sizes: "resize" draws from `sizes`; "crop" resizes in half of the cases to 400, 500
            or 600 first and cuts out a window of 384 to 600 a side, as DETR does (Carion et al. 2020);
            "jitter" scales by `jitter` and cuts or pads to a square of `size` (Ghiasi et al. 2021).
        jitter: the scales of "jitter".
        hflip: probability of a horizontal flip.
        color_jitter: strength in brightness, contrast and saturation; hue gets a quarter of it.
        batch_size: on each device, for training.
        val_batch_size: for everything else; default `batch_size`.
        num_workers: processes that load images on each device; 0 loads in the main process.
        empty_images: train on images without objects, too.
        shapes_size, shapes_image_size: images of `train` (each other split has a tenth), and their side.
        verify: decode every image before anything starts.
        on_bad: what an image does that is missing, cannot be read or has another size than the annotations
            say: "stop" ends the run with its name; "report" lists it in `bad_samples.csv` and goes on without
            it, see `train.callbacks_bad_samples`.
        bad_samples: that file; the command line puts it into the run's folder.
        seed: fixes order and augmentation.

    Raises:
        ValueError, FileNotFoundError: naming the argument, file, image or annotation that is wrong.
    """

    def __init__(
        self,
        root: str,
        dataset: Literal["coco", "shapes"] = "coco",
        train_annotations: str = "annotations/instances_train2017.json",
        val_annotations: str = "annotations/instances_val2017.json",
        test_annotations: str | None = None,
        train_images: str = "train2017",
        val_images: str = "val2017",
        test_images: str | None = None,
        predict_folder: str | None = None,
        categories: dict[int, str] | None = None,
        masks: bool = True,
        size: int = 800,
        sizes: Sequence[int] | None = None,
        max_size: int = 1333,
        augmentation: Augmentation = "resize",
        jitter: tuple[float, float] = (0.1, 2.0),
        hflip: float = 0.5,
        color_jitter: float = 0.0,
        batch_size: int = 2,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        empty_images: bool = False,
        shapes_size: int = 3000,
        shapes_image_size: int = 64,
        verify: bool = False,
        on_bad: Literal["stop", "report"] = "stop",
        bad_samples: str = "bad_samples.csv",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        for name, value, least in (
            ("size", size, 1),
            ("max_size", max_size, size),
            ("batch_size", batch_size, 1),
            ("val_batch_size", self.val_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if (test_annotations is None) != (test_images is None):
            raise ValueError("test_annotations and test_images go together; give both or neither")
        self.root = Path(root)
        self.dataset = dataset
        self.shapes_size = shapes_size
        self.shapes_image_size = shapes_image_size
        test = (val_annotations, val_images) if test_annotations is None else (test_annotations, test_images)
        self.splits: dict[str, tuple[str, Any]] = {
            "train": (train_annotations, train_images),
            "val": (val_annotations, val_images),
            "test": test,
        }
        self.predict_folder = predict_folder
        self.masks = masks
        self.size = size
        self.max_size = max_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.empty_images = empty_images
        self.verify = verify
        self.on_bad = on_bad
        self.bad_samples = Path(bad_samples)
        self.seed = seed
        self.transform = training_transform(
            augmentation,
            sizes=list(sizes or [size]),
            size=size,
            max_size=max_size,
            jitter=jitter,
            hflip=hflip,
            color_jitter=color_jitter,
        )
        self._read: dict[str, Objects] = {}
        self.measured: dict[str, Dataset[Any]] = {}
        self.categories = self._categories() if categories is None else dict(sorted(categories.items()))
        if not self.categories:
            raise ValueError("there are no categories to detect")

    def _categories(self) -> dict[int, str]:
        if self.dataset == "shapes":
            return dict(enumerate(SHAPES, 1))
        # validation first: it is the smaller file
        paths = [self.root / self.splits[split][0] for split in ("val", "test", "train")]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"there is no annotation file {paths[0]}")
        content = read_json(path)
        try:
            return dict(sorted((row["id"], row["name"]) for row in content["categories"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no instance file: it lacks {error}") from error

    def prepare_data(self) -> None:
        """Write the shapes world if it is wanted and not there."""
        if self.dataset == "shapes":
            write_shapes(
                self.root,
                self.shapes_size,
                distribution="balanced",
                image_size=self.shapes_image_size,
            )

    def setup(self, stage: str) -> None:
        """Read and check the files that the stage needs."""
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}[stage]
        for split in wanted:
            self._check(split)
        if stage == "fit":
            dataset = self._set("train")
            self.train_set = SeededDataset(self.replaced(dataset, dataset.read, self.verify), self.seed)
            if len(self.train_set) < self.batch_size:
                raise ValueError(
                    f"{self.root / self.splits['train'][0]} has {len(self.train_set)} images with objects, "
                    f"fewer than batch_size {self.batch_size}"
                )
        self.measured = {split: self._measured(split) for split in wanted if split != "train"}

    def _check(self, split: str) -> None:
        path = self.root / self.splits[split][0]
        folder = self.root / self.splits[split][1]
        self._read[split] = objects = read_objects(path, self.masks)
        if objects.categories != self.categories:
            raise ValueError(f"{path} has categories {objects.categories}, not {self.categories}")
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder of images at {folder}")
        names = {number: objects.instances.file_name(number) for number in objects.rows}
        missing = [name for name in names.values() if not (folder / name).is_file()]
        if missing and self.on_bad == "stop":
            raise FileNotFoundError(f"{path} lists {_some(missing)}, not in {folder}")
        if self.verify and self.on_bad == "stop":
            for name in names.values():
                open_image(folder / name)
        if objects.left_out:
            rank_zero_warn(f"{path}: left out {_some(objects.left_out, '; ')}")

    def _measured(self, split: str) -> Dataset[Any]:
        dataset = self._set(split)
        return self.left_out(dataset, dataset.read)

    def _set(self, split: str) -> "CocoSet":
        folder = self.root / self.splits[split][1]
        if split != "train":
            return CocoSet(self._read[split], folder, self.masks)
        return CocoSet(self._read[split], folder, self.masks, self.transform, self.empty_images)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order fixed by seed and epoch; a short last one is dropped."""
        return self.training_loader(self.train_set)

    def val_dataloader(self) -> DataLoader[Any]:
        """All validation images in order."""
        return self._evaluation_loader(self.measured["val"])

    def test_dataloader(self) -> DataLoader[Any]:
        """All test images in order."""
        return self._evaluation_loader(self.measured["test"])

    def predict_dataloader(self) -> DataLoader[Any]:
        """Images of `predict_files` with targets that hold nothing but their position, counted from 1."""
        return self._evaluation_loader(_Files(self.predict_files))

    @cached_property
    def predict_files(self) -> list[Path]:
        """The images of the predict verb, in order; with `on_bad` "report" those that can be read."""
        return self.readable(list_images(self.predict_folder or self.root / self.splits["test"][1]))

    def _evaluation_loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        count, rank = self.devices()
        if count == 1:
            return DataLoader(dataset, batch_size=self.val_batch_size, shuffle=False, **self.loading())
        # as many batches on each: where a model has buffers, a forward waits for all devices
        sampler = EvenSampler(dataset, count, rank)
        return DataLoader(
            Filled(dataset, _filler), batch_size=self.val_batch_size, sampler=sampler, **self.loading()
        )

    def loading(self) -> dict[str, Any]:
        """Those of every loader; images of different sizes make no tensor."""
        return {**super().loading(), "collate_fn": _collate}


class CocoSet(Dataset[tuple[Tensor, Target]]):
    """Images and targets of an instance file.

    Args:
        objects: its usable annotations.
        folder: of the images.
        masks: add the masks.
        transform: of training; then crowds, and images without other objects, are left out, and boxes end at
            the border of the image. Without it, images, boxes and crowds are as they are in the file.
        empty_images: keep images without objects in training.

    Raises:
        ValueError: when there is nothing to train on.
    """

    def __init__(
        self,
        objects: Objects,
        folder: Path,
        masks: bool,
        transform: v2.Transform | None = None,
        empty_images: bool = False,
    ) -> None:
        self.objects = objects
        self.folder = folder
        self.masks = masks
        self.transform = transform
        self.labels = {number: label for label, number in enumerate(objects.categories, 1)}
        self.ids = list(objects.rows)
        if transform is not None:
            filled = [number for number in self.ids if self._rows(number)]
            if not filled:
                raise ValueError(f"{folder}: no image has an object to train on")
            self.ids = self.ids if empty_images else filled

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        number = self.ids[index]
        image = tv_tensors.Image(self.read(index))
        size: tuple[int, int] = (image.shape[-2], image.shape[-1])
        rows = self._rows(number)
        corners = [(x, y, x + w, y + h) for x, y, w, h in (row["bbox"] for row in rows)]
        target: Target = {
            "image_id": number,
            "boxes": tv_tensors.BoundingBoxes(
                torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
                format="XYXY",
                canvas_size=size,
            ),
            "labels": torch.tensor([self.labels[row["category_id"]] for row in rows], dtype=torch.int64),
            "area": torch.tensor(
                [row.get("area", row["bbox"][2] * row["bbox"][3]) for row in rows], dtype=torch.float64
            ),
            "iscrowd": torch.tensor([row.get("iscrowd", 0) for row in rows], dtype=torch.int64),
        }
        if self.masks:
            masks = [annotation_mask(row["segmentation"], *size) for row in rows]
            target["masks"] = tv_tensors.Mask(torch.from_numpy(np.stack(masks)) if masks else _none(size))
        if self.transform is not None:
            image, target = self.transform(image, target)
        target = {k: v.as_subclass(Tensor) if isinstance(v, Tensor) else v for k, v in target.items()}
        return image.as_subclass(Tensor), target if self.transform is None else drop_lost_objects(target)

    def read(self, index: int) -> Image.Image:
        """The image of a position.

        Raises:
            BadSampleError: naming the file that is missing, cannot be read, or has not the size that the
                annotations say.
        """
        number = self.ids[index]
        instances = self.objects.instances
        path, row = self.folder / instances.file_name(number), instances.images[number]
        image = open_sample(path)
        found, expected = (image.height, image.width), (row["height"], row["width"])
        if found != expected:
            raise BadSampleError(f"{path} has {found} pixels, its annotation file says {expected}", path)
        return image

    def _rows(self, number: int) -> list[dict[str, Any]]:
        rows = self.objects.rows[number]
        return rows if self.transform is None else [row for row in rows if not row.get("iscrowd")]


class _Files(Dataset[tuple[Tensor, Target]]):
    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return v2.functional.pil_to_tensor(open_image(self.files[index])), {"image_id": index + 1}


def _filler(sample: tuple[Tensor, Target]) -> tuple[Tensor, Target]:
    image, target = sample
    return image, {**target, "filler": True}


def _collate(samples: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    return [image for image, _ in samples], [target for _, target in samples]


def _none(size: tuple[int, int]) -> Tensor:
    return torch.zeros(0, *size, dtype=torch.bool)


def _some(names: Sequence[str], separator: str = ", ", limit: int = 5) -> str:
    """The first of many, and their number."""
    rest = f"{separator}and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)}: {separator.join(names[:limit])}{rest}"
