"""Labelled images for Lightning: an image folder, tar shards, or the real digits written as a folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from train.callbacks_bad_samples import open_sample
from train.resumable_data import ResumableData
from visionsel.data import digits
from visionsel.data.imagefolder import (
    check_image_folder,
    class_names,
    list_images,
    open_image,
    read_image_folder,
)
from visionsel.data.resumable import EvenSampler, Filled, SeededDataset, seeded
from visionsel.data.shards import ShardLoader, ShardStream, find_shards, index_shards

__all__ = ["IGNORED", "ImageFolderData", "read_class_names"]

IGNORED = -100
"""The label of an image that only fills up a batch; PyTorch's losses leave it out."""


class ImageFolderData(ResumableData):
    """Training, validation, test and prediction images with timm's transforms.

    Args:
        root: folder with one folder a split, with one folder a class in it; for shards, what stands before
            their names.
        dataset: "imagefolder" reads what is in `root`; "digits" writes scikit-learn's digits there first;
            "shards" reads tar files, see `visionsel.data.shards`.
        train_split, val_split, test_split: names of the splits' folders, or of the shards, such as
            "train-{000..146}.tar".
        predict_folder: images to classify with the predict verb; default the test split, or the validation
            split where there is none. Shards have no default.
        classes: of shards: "imagenet-1k" and the other subsets that timm names, or a text file with a name a
            line.
        shard_index: of shards: JSON with their sizes; default `_info.json` in `root`, written there when the
            shards are on a disk and not counted yet.
        shuffle_buffer: of shards: undecoded samples that each worker process mixes.
        image_size: pixels per side that the model sees.
        batch_size: on each device, for training.
        val_batch_size: for everything else; default `batch_size`.
        num_workers: processes that load images on each device; 0 loads in the main process.
        scale, ratio: area and aspect ratio of the random crop.
        hflip: probability of a horizontal flip.
        color_jitter: strength; not applied together with `auto_augment`.
        auto_augment: timm's policy, such as "rand-m9-mstd0.5-inc1".
        random_erasing: probability, filled with noise of each pixel.
        train_interpolation, interpolation: "bilinear", "bicubic" or, for training, "random".
        crop_pct: share of the resized image that the centre crop of evaluation keeps.
        mean, std: of the pixels; timm's for ImageNet by default.
        repeats: see `visionsel.data.resumable.EpochSampler`.
        verify: decode every image before anything starts.
        on_bad: what an image that cannot be read does: "stop" ends the run with its name; "report" lists it
            in `bad_samples.csv` and goes on without it, see `train.callbacks_bad_samples`. Shards only stop.
        bad_samples: that file; the command line puts it into the run's folder.
        seed: fixes order and augmentation.

    Raises:
        ValueError, FileNotFoundError: naming the argument, folder or file that is wrong.
    """

    def __init__(
        self,
        root: str,
        dataset: Literal["imagefolder", "shards", "digits"] = "imagefolder",
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        predict_folder: str | None = None,
        classes: str | None = None,
        shard_index: str | None = None,
        shuffle_buffer: int = 1000,
        image_size: int = 224,
        batch_size: int = 128,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        color_jitter: float = 0.0,
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
        train_interpolation: str = "bicubic",
        interpolation: str = "bicubic",
        crop_pct: float = 0.875,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        repeats: int = 1,
        verify: bool = False,
        on_bad: Literal["stop", "report"] = "stop",
        bad_samples: str = "bad_samples.csv",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        for name, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("val_batch_size", self.val_batch_size, 1),
            ("num_workers", num_workers, 0),
            ("shuffle_buffer", shuffle_buffer, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if dataset == "shards" and repeats > 1:
            raise ValueError(f"repeats {repeats} need dataset imagefolder: shards are read once an epoch")
        if dataset == "shards" and verify:
            raise ValueError("verify needs dataset imagefolder: shards are checked as they are read")
        if dataset == "shards" and on_bad == "report":
            raise ValueError(
                "on_bad report needs dataset imagefolder: what is read in a row has no other image at hand"
            )
        if (dataset == "shards") != (classes is not None):
            raise ValueError(
                'shards, and only they, need classes: "imagenet-1k", or a text file with a name a line'
            )
        self.root = Path(root)
        self.address = root
        self.dataset = dataset
        self.shard_index = shard_index
        self.shuffle_buffer = shuffle_buffer
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.predict_folder = predict_folder
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.repeats = repeats
        self.verify = verify
        self.on_bad = on_bad
        self.bad_samples = Path(bad_samples)
        self.measured: dict[str, Dataset[Any]] = {}
        self.seed = seed
        self.preprocessing: dict[str, Any] = {
            "input_size": (3, image_size, image_size),
            "interpolation": interpolation,
            "mean": tuple(mean),
            "std": tuple(std),
            "crop_pct": crop_pct,
        }
        """What evaluation does to an image, in the words of timm's pretrained configurations."""
        if dataset == "digits":
            self.class_names = list(digits.CLASSES)
        elif classes is not None:  # of shards
            self.class_names = read_class_names(classes)
        else:
            self.class_names = class_names(self.root / train_split)
        self.train_transform = create_transform(
            image_size,
            is_training=True,
            scale=scale,
            ratio=ratio,
            hflip=hflip,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            re_prob=random_erasing,
            re_mode="pixel",
            interpolation=train_interpolation,
            mean=self.preprocessing["mean"],
            std=self.preprocessing["std"],
        )
        self.transform = create_transform(**self.preprocessing, is_training=False)

    def prepare_data(self) -> None:
        """Write the digits if they are wanted and not there; count the shards that were not."""
        if self.dataset == "digits":
            digits.write_digits(self.root)
        if self.dataset == "shards":
            verb = self.trainer.state.fn if self.trainer else None
            for split in self._wanted("fit" if verb is None else verb.value):
                index_shards(self.address, self.splits[split], self.shard_index)

    def setup(self, stage: str) -> None:
        """Check the folders or shards that the stage reads."""
        wanted = self._wanted(stage)
        if self.dataset == "shards":
            for split in wanted:
                self._check_size(split, len(self._shards(split)))
            return
        folders = [self.splits[name] for name in wanted]
        if not folders:
            return
        found = check_image_folder(self.root, folders, self.verify and self.on_bad == "stop")
        if found != self.class_names:
            raise ValueError(f"{self.root / folders[0]} does not have the classes of {self.splits['train']}")
        if stage == "fit":
            dataset = self._read("train", self.train_transform)
            kept = self.replaced(dataset, _reader(dataset), self.verify)
            self.train_set = SeededDataset(kept, self.seed)
            self._check_size("train", len(self.train_set))
        self.measured = {name: self._measured(name) for name in wanted if name != "train"}

    @staticmethod
    def _wanted(stage: str) -> tuple[str, ...]:
        return {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}[stage]

    def _check_size(self, split: str, size: int) -> None:
        """A device without a batch would hold up the others."""
        least = self.batch_size * self.devices()[0] if split == "train" else 1
        if size < least:
            raise ValueError(
                f"{self.address}/{self.splits[split]} has {size} images, "
                f"fewer than batch_size {self.batch_size}"
                + (f" on each of {self.devices()[0]} devices" if least > self.batch_size else "")
            )

    def train_dataloader(self) -> Any:
        """Batches of images and labels, in an order fixed by seed and epoch; a short last one is dropped."""
        if self.dataset != "shards":
            return self.training_loader(self.train_set, self.repeats)
        stream = ShardStream(
            self._shards("train"),
            _Sample(self.train_transform, self.seed),
            len(self.class_names),
            self.batch_size,
            self.shuffle_buffer,
            self.seed,
            *self.devices(),
        )
        return self.resumed(self._shard_loader(stream))

    def val_dataloader(self) -> Any:
        """All validation images, each on one device; those with label -100 only fill up a batch."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> Any:
        """All test images, as for validation."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Images of `predict_folder` with their position in `predict_files`."""
        return self._in_order(_Files(self.predict_files, self.transform))

    @cached_property
    def predict_files(self) -> list[Path]:
        """The images of the predict verb, in order; with `on_bad` "report" those that can be read."""
        return self.readable(list_images(self._predict_folder()))

    def _predict_folder(self) -> str | Path:
        if self.predict_folder is not None:
            return self.predict_folder
        if self.dataset == "shards":
            raise ValueError("shards have no files to name: give --data.predict_folder")
        test = self.root / self.splits["test"]
        return test if test.is_dir() else self.root / self.splits["val"]

    def _measured(self, split: str) -> Dataset[Any]:
        dataset = self._read(split, self.transform)
        return self.left_out(dataset, _reader(dataset))

    def _read(self, split: str, transform: Callable[..., Tensor]) -> ImageFolder:
        folder = read_image_folder(self.root / self.splits[split], transform)
        folder.loader = open_sample  # the same, with an error that `on_bad` knows
        return folder

    def _evaluation_loader(self, split: str) -> Any:
        world_size, rank = self.devices()
        if self.dataset == "shards":
            padding = torch.zeros(self.preprocessing["input_size"]), IGNORED
            stream = ShardStream(
                self._shards(split),
                _Sample(self.transform),
                len(self.class_names),
                self.val_batch_size,
                num_replicas=world_size,
                rank=rank,
                padding=padding,
            )
            return self._shard_loader(stream)
        dataset = self.measured.get(split) or self._measured(split)
        if world_size == 1:
            return self._in_order(dataset)
        return self._in_order(Filled(dataset, _ignored), EvenSampler(dataset, world_size, rank))

    def _in_order(self, dataset: Dataset[Any], sampler: EvenSampler | None = None) -> DataLoader[Any]:
        return DataLoader(
            dataset, batch_size=self.val_batch_size, shuffle=False, sampler=sampler, **self.loading()
        )

    def _shards(self, split: str) -> Any:
        return find_shards(self.address, self.splits[split], self.shard_index)

    def _shard_loader(self, stream: ShardStream) -> ShardLoader:
        loading = self.loading()
        del loading["persistent_workers"]
        return ShardLoader(stream, **loading)


def _reader(dataset: ImageFolder) -> Callable[[int], Any]:
    """Reads the image of a position."""
    return lambda index: open_sample(dataset.samples[index][0])


class _Files(Dataset[tuple[Tensor, int]]):
    """Images of a list of files, with their position in it."""

    def __init__(self, files: Sequence[Path], transform: Callable[..., Tensor]) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(open_image(self.files[index])), index


@dataclass(frozen=True)
class _Sample:
    """What becomes of an image of the shards; with a seed, under generators seeded from it and the place."""

    transform: Callable[..., Tensor]
    seed: int | None = None

    def __call__(self, image: Image.Image, label: int, epoch: int, position: int) -> tuple[Tensor, int]:
        if self.seed is None:
            return self.transform(image), label
        with seeded(self.seed, epoch, position):
            return self.transform(image), label


def _ignored(sample: tuple[Tensor, int]) -> tuple[Tensor, int]:
    return sample[0], IGNORED


def read_class_names(source: str) -> list[str]:
    """Names of classes in the order of their labels.

    Args:
        source: a text file with a name a line, or a subset of ImageNet that timm knows ("imagenet-1k",
            "imagenet-12k", "imagenet-22k", "imagenet-22k-ms", "imagenet-21k"), whose names are synsets.

    Raises:
        ValueError: when it is neither, or two classes share a name.
    """
    if Path(source).is_file():
        names = [line.strip() for line in Path(source).read_text().splitlines() if line.strip()]
    else:
        try:
            names = list(ImageNetInfo(source).label_names())
        except AssertionError:
            raise ValueError(
                f"{source} is neither a file with a class a line nor a subset of ImageNet as imagenet-1k"
            ) from None
    if len(set(names)) != len(names):
        raise ValueError(f"{source} names a class twice")
    return names
