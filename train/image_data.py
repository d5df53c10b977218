"""Labelled images for Lightning: an image folder, or the real digits written as one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visionsel.data import digits
from visionsel.data.imagefolder import (
    check_image_folder,
    class_names,
    list_images,
    open_image,
    read_image_folder,
)
from visionsel.data.resumable import EpochSampler, ResumableLoader, SeededDataset

__all__ = ["ImageFolderData"]


class ImageFolderData(LightningDataModule):
    """Training, validation, test and prediction images with timm's transforms.

    Args:
        root: folder with one folder a split, with one folder a class in it.
        dataset: "imagefolder" reads what is in `root`; "digits" writes scikit-learn's digits there first.
        train_split, val_split, test_split: names of the splits' folders.
        predict_folder: images to classify with the predict verb; default the test split, or the validation
            split where there is none.
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
        seed: fixes order and augmentation.

    Raises:
        ValueError, FileNotFoundError: naming the argument, folder or file that is wrong.
    """

    def __init__(
        self,
        root: str,
        dataset: Literal["imagefolder", "digits"] = "imagefolder",
        train_split: str = "train",
        val_split: str = "val",
        test_split: str = "test",
        predict_folder: str | None = None,
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
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        for name, value, least in (
            ("image_size", image_size, 1),
            ("batch_size", batch_size, 1),
            ("val_batch_size", self.val_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.root = Path(root)
        self.dataset = dataset
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.predict_folder = predict_folder
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.repeats = repeats
        self.verify = verify
        self.seed = seed
        self.resume: dict[str, int] = {}
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
        """Write the digits if they are wanted and not there."""
        if self.dataset == "digits":
            digits.write_digits(self.root)

    def setup(self, stage: str) -> None:
        """Check the folders that the stage reads."""
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}[stage]
        folders = [self.splits[name] for name in wanted]
        if not folders:
            return
        found = check_image_folder(self.root, folders, self.verify)
        if found != self.class_names:
            raise ValueError(f"{self.root / folders[0]} does not have the classes of {self.splits['train']}")
        if stage == "fit":
            self.train_set = SeededDataset(self._read("train", self.train_transform), self.seed)
            if len(self.train_set) < self.batch_size:
                raise ValueError(
                    f"{self.root / self.splits['train']} has {len(self.train_set)} images, "
                    f"fewer than batch_size {self.batch_size}"
                )

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of images and labels, in an order fixed by seed and epoch; a short last one is dropped."""
        trainer = self.trainer
        world_size, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        sampler = EpochSampler(self.train_set, self.seed, self.repeats, world_size, rank)
        self.train_loader = ResumableLoader(
            self.train_set, batch_size=self.batch_size, sampler=sampler, drop_last=True, **self._loading()
        )
        if self.resume:
            self.train_loader.load_state_dict(self.resume)
            self.resume = {}
        return self.train_loader

    def state_dict(self) -> dict[str, int]:
        """How far the training loader is.

        Lightning 2.6 saves the loader's own state too, but does not give it back where the number of updates
        was asked for before, as a schedule has to.
        """
        return self.train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Where the next training loader continues."""
        self.resume = dict(state_dict)

    def val_dataloader(self) -> DataLoader[Any]:
        """All validation images in order."""
        return self._evaluation_loader(self._read("val", self.transform))

    def test_dataloader(self) -> DataLoader[Any]:
        """All test images in order."""
        return self._evaluation_loader(self._read("test", self.transform))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Images of `predict_folder` with their position in `predict_files`."""
        return self._evaluation_loader(_Files(self.predict_files, self.transform))

    @property
    def predict_files(self) -> list[Path]:
        """The images of the predict verb, in order."""
        if self.predict_folder is not None:
            return list_images(self.predict_folder)
        test = self.root / self.splits["test"]
        return list_images(test if test.is_dir() else self.root / self.splits["val"])

    def _read(self, split: str, transform: Callable[..., Tensor]) -> Dataset[Any]:
        return read_image_folder(self.root / self.splits[split], transform)

    def _evaluation_loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=self.val_batch_size, shuffle=False, **self._loading())

    def _loading(self) -> dict[str, Any]:
        # everything by name: Lightning makes some loaders again from their arguments
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


class _Files(Dataset[tuple[Tensor, int]]):
    """Images of a list of files, with their position in it."""

    def __init__(self, files: Sequence[Path], transform: Callable[..., Tensor]) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(open_image(self.files[index])), index
