"""Images and label maps for Lightning: ADE20K, folders of your own, or the shapes world."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from train.callbacks_bad_samples import BadSampleError, open_sample
from train.resumable_data import ResumableData
from train.segmentation_files import (
    ADE20K_NAMES,
    SHAPE_CLASSES,
    LabelledImages,
    find_pairs,
    read_ade20k_names,
    read_class_names,
    write_shapes,
)
from train.segmentation_transforms import IGNORED, EvalTransform, TrainTransform
from visionsel.data.imagefolder import list_images
from visionsel.data.resumable import EvenSampler, Filled, SeededDataset

__all__ = ["SegmentationData"]


class SegmentationData(ResumableData):
    """Training, validation, test and prediction images of a segmentation data set.

    Args:
        root: folder of the data set.
        dataset: "ade20k" takes the names of the classes from its `objectInfo150.txt` and leaves out label 0;
            "folders" takes them from `classes`; "shapes" writes scenes of the shapes world to `root` first.
        images, masks: folders of a split below `root`; `{split}` stands for its name.
        train_split, val_split, test_split: names of the splits; without a `test_split` the test verb measures
            on the validation split.
        classes: file with one class name a line, below `root` or elsewhere; for "folders".
        reduce_zero_label: 0 in the files is unlabelled and k is class k - 1; default only for "ade20k".
        predict_folder: images of the predict verb; default those of the test split.
        crop_size, image_scale, ratio_range, cat_max_ratio, hflip, photometric: of training, see
            `TrainTransform`; evaluation takes `image_scale` too. The defaults are those of mmsegmentation for
            ADE20K. Scenes of "shapes" have `crop_size` pixels a side.
        mean, std: of the normalization, of pixels from 0 to 1; those of ImageNet by default.
        scenes: of "shapes": images to train on, to validate and to test on.
        batch_size: on each device, for training.
        val_batch_size: for everything else; above 1 all images must have one size.
        num_workers: processes that load images on each device; 0 loads in the main process.
        verify: read all images and label maps before anything starts.
        on_bad: what a file that cannot be used does: "stop" ends the run with its name; "report" lists it in
            `bad_samples.csv` and goes on without it, see `train.callbacks_bad_samples`.
        bad_samples: that file; the command line puts it into the run's folder.
        seed: fixes order and augmentation.

    Raises:
        ValueError, FileNotFoundError: naming the argument, folder or file that is wrong.
    """

    def __init__(
        self,
        root: str,
        dataset: Literal["ade20k", "folders", "shapes"] = "ade20k",
        images: str = "images/{split}",
        masks: str = "annotations/{split}",
        train_split: str = "training",
        val_split: str = "validation",
        test_split: str | None = None,
        classes: str | None = None,
        reduce_zero_label: bool | None = None,
        predict_folder: str | None = None,
        crop_size: int = 512,
        image_scale: tuple[int, int] | None = (2048, 512),
        ratio_range: tuple[float, float] = (0.5, 2.0),
        cat_max_ratio: float = 0.75,
        hflip: float = 0.5,
        photometric: bool = True,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        scenes: tuple[int, int, int] = (6000, 500, 500),
        batch_size: int = 2,
        val_batch_size: int = 1,
        num_workers: int = 0,
        verify: bool = False,
        on_bad: Literal["stop", "report"] = "stop",
        bad_samples: str = "bad_samples.csv",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("crop_size", crop_size, 1),
            ("batch_size", batch_size, 1),
            ("val_batch_size", val_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 < ratio_range[0] <= ratio_range[1]:
            raise ValueError(f"ratio_range must rise from above 0, got {tuple(ratio_range)}")
        if not 0 < cat_max_ratio <= 1:
            raise ValueError(f"cat_max_ratio must be above 0 and at most 1, got {cat_max_ratio}")
        if image_scale is not None and min(image_scale) < 1:
            raise ValueError(f"image_scale must be positive, got {tuple(image_scale)}")
        if min(std) <= 0:
            raise ValueError(f"std must be above 0, got {tuple(std)}")
        if (classes is None) == (dataset == "folders"):
            raise ValueError('give classes, a file of names, with dataset "folders" and only there')
        self.root = Path(root)
        self.dataset = dataset
        self.folders = images, masks
        self.splits = {"train": train_split, "val": val_split, "test": test_split or val_split}
        self.reduce_zero_label = dataset == "ade20k" if reduce_zero_label is None else reduce_zero_label
        self.predict_folder = predict_folder
        self.scenes = scenes
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.verify = verify
        self.on_bad = on_bad
        self.bad_samples = Path(bad_samples)
        self.seed = seed
        mean, std = tuple(mean), tuple(std)
        image_scale = None if image_scale is None else (image_scale[0], image_scale[1])
        self.preprocessing: dict[str, Any] = {
            "input_size": (3, crop_size, crop_size),
            "mean": mean,
            "std": std,
            "image_scale": image_scale,
        }
        """What evaluation does to an image, and the size of a crop."""
        self.train_transform = TrainTransform(
            crop_size, image_scale, ratio_range, cat_max_ratio, hflip, photometric, mean, std
        )
        self.transform = EvalTransform(image_scale, mean, std)
        if dataset == "ade20k":
            self.class_names = read_ade20k_names(self.root / ADE20K_NAMES)
        elif classes is not None:
            below = self.root / classes
            self.class_names = read_class_names(below if below.is_file() else classes)
        else:
            self.class_names = list(SHAPE_CLASSES)
        if self.reduce_zero_label and len(self.class_names) == IGNORED:
            raise ValueError(f"with reduce_zero_label there are at most {IGNORED - 1} classes, got {IGNORED}")

    def prepare_data(self) -> None:
        """Write the scenes if they are wanted and not there."""
        if self.dataset == "shapes":
            write_shapes(self.root, self.scenes, self.preprocessing["input_size"][1])

    def setup(self, stage: str) -> None:
        """Find the files of the stage, and leave out or refuse the bad ones that can be known."""
        if stage == "predict":
            self.predict_set = self._predict_set()
            return
        if stage == "fit":
            train = LabelledImages(
                self._pairs("train"), len(self.class_names), self.reduce_zero_label, self.train_transform
            )
            if len(train) < self.batch_size:
                raise ValueError(f"{len(train)} training images are fewer than batch_size {self.batch_size}")
            self._check(train)
            self.train_set = SeededDataset(self.replaced(train, train.read, self.verify), self.seed)
        split = "test" if stage == "test" else "val"
        measured = LabelledImages(
            self._pairs(split), len(self.class_names), self.reduce_zero_label, self._unlabelled
        )
        self._check(measured)
        self.eval_set = self.left_out(measured, measured.read)

    def _pairs(self, split: str) -> list[tuple[Path, Path]]:
        images, masks = (self.root / folder.format(split=self.splits[split]) for folder in self.folders)
        pairs = find_pairs(images, masks)
        missing = [str(mask) for _, mask in pairs if not mask.is_file()]
        if missing and self.on_bad == "stop":
            raise ValueError(
                f"{len(missing)} of {len(pairs)} images in {images} have no label map, first {missing[0]}; "
                "add them, or give --data.on_bad report to go on without"
            )
        return pairs

    def _unlabelled(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform(image), labels

    def _check(self, dataset: LabelledImages) -> None:
        """Refuse bad samples before anything starts, where that is wanted."""
        if self.on_bad == "report" or not self.verify:
            return
        errors = []
        for index in range(len(dataset)):
            try:
                dataset.read(index)
            except BadSampleError as error:
                errors.append(str(error))
        if errors:
            rest = f" and {len(errors) - 5} more" if len(errors) > 5 else ""
            raise ValueError(f"{len(errors)} bad samples: {'; '.join(errors[:5])}{rest}")

    def _predict_set(self) -> Dataset[Any]:
        files = list_images(self.predict_path)
        names = [path.relative_to(self.predict_path).with_suffix(".png") for path in files]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.predict_path} holds images that differ in their ending only")
        self.predict_files, self.predict_names = files, names
        dataset = _Files(files, self.transform)
        return self.left_out(dataset, dataset.read)

    @property
    def predict_path(self) -> Path:
        """The folder of the predict verb."""
        images = self.folders[0].format(split=self.splits["test"])
        return self.root / images if self.predict_folder is None else Path(self.predict_folder)

    def train_dataloader(self) -> DataLoader[Any]:
        """Crops and their labels, in an order fixed by seed and epoch; a short last batch is dropped."""
        return self.training_loader(self.train_set)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation images as the model sees them, and their labels at the size of the files, in order."""
        return self._shared_loader()

    def test_dataloader(self) -> DataLoader[Any]:
        """The same of the test split."""
        return self._shared_loader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """Images with their position in `predict_files` and the size of the file."""
        return self._evaluation_loader(self.predict_set)

    def _shared_loader(self) -> DataLoader[Any]:
        count, rank = self.devices()
        if count == 1:
            return self._evaluation_loader(self.eval_set)
        sampler = EvenSampler(self.eval_set, count, rank)
        return self._evaluation_loader(Filled(self.eval_set, _unlabelled), sampler=sampler)

    def _evaluation_loader(self, dataset: Dataset[Any], **arguments: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.val_batch_size,
            shuffle=False,
            collate_fn=collate_alike,
            **arguments,
            **self.loading(),
        )


def collate_alike(items: list[Any]) -> Any:
    """A batch of images of one size.

    Raises:
        ValueError: when their sizes differ.
    """
    for part in zip(*items, strict=True):
        sizes = {tuple(tensor.shape) for tensor in part}
        if len(sizes) > 1:
            raise ValueError(f"images of the sizes {sorted(sizes)} make no batch; set val_batch_size 1")
    return default_collate(items)


class _Files(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Images of a list of files, with their position in it and their size `(height, width)`."""

    def __init__(self, files: Sequence[Path], transform: Callable[[Tensor], Tensor]) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Tensor:
        """The image, uint8 `[3, H, W]`."""
        return torch.from_numpy(np.array(open_sample(self.files[index]))).permute(2, 0, 1)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        image = self.read(index)
        return self.transform(image), torch.tensor(index), torch.tensor(image.shape[1:])


def _unlabelled(sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    image, labels = sample
    return image, torch.full_like(labels, IGNORED)
