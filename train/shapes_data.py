"""Fresh samples of the shapes world for Lightning: no image is ever seen twice.

An epoch is a count of samples, not a data set: sample `index` of epoch `e` is sample `e * epoch_size + index`
of the worlds. Programs derive their data module from `ShapesStreamData` and say what a sample becomes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from train.resumable_data import ResumableData
from visionsel.data.resumable import Key
from visionsel.data.shapes import Sample, ShapesWorld

__all__ = ["VALIDATION_SEED", "ShapesStreamData", "training_seed"]

VALIDATION_SEED = 2**29
"""Of the validation worlds; `visionsel evaluate embedded` and the written splits have others."""

Make = Callable[[Sample, np.random.Generator, int], Any]


def training_seed(seed: int) -> int:
    """The seed of the training worlds of a run: far from the small seeds that people evaluate with.

    Raises:
        ValueError: when `seed` is not from 0 to 2**20 - 1.
    """
    if not 0 <= seed < 2**20:
        raise ValueError(f"seed must be from 0 to 2**20 - 1, got {seed}")
    return 2**30 - 1 - seed


class ShapesStreamData(ResumableData):
    """Batches made from scenes of the "train" and "balanced" distributions.

    Args:
        batch_size: on each device.
        epoch_size: samples of an epoch, on all devices together.
        val_size: scenes of each validation world.
        image_size: pixels a side.
        train_share: share of the "train" distribution in the training scenes; the rest is "balanced".
        max_objects: of the "balanced" scenes.
        num_workers: processes that make samples on each device; 0 makes them in the main process.
        seed: of the run; see `training_seed`.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        batch_size: int = 32,
        epoch_size: int = 3200,
        val_size: int = 200,
        image_size: int = 64,
        train_share: float = 0.0,
        max_objects: int = 6,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("val_size", val_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if epoch_size < batch_size:
            raise ValueError(f"epoch_size must be at least batch_size {batch_size}, got {epoch_size}")
        if not 0 <= train_share <= 1:
            raise ValueError(f"train_share must be from 0 to 1, got {train_share}")
        self.batch_size = batch_size
        self.epoch_size = epoch_size
        self.val_size = val_size
        self.image_size = image_size
        self.train_share = train_share
        self.max_objects = max_objects
        self.num_workers = num_workers
        self.seed = seed
        self.world("balanced", training_seed(seed))  # its errors, before anything starts

    def make(self, sample: Sample, generator: np.random.Generator, epoch: int) -> Any:
        """What training and validation see of a sample; random choices come from `generator` only."""
        raise NotImplementedError

    def collate(self, items: list[Any]) -> Any:
        """A batch of what `make` returned."""
        return torch.utils.data.default_collate(items)

    def world(self, distribution: str, seed: int, epoch: int | None = None) -> ShapesWorld:
        """An endless world; `epoch` is None for validation."""
        limit = {"max_objects": self.max_objects} if distribution == "balanced" else {}
        return ShapesWorld(distribution, seed, 2**32 - 1, self.image_size, **limit)

    def scene(self, epoch: int, index: int) -> Sample:
        """Training scene `index` of an epoch; the shares of the distributions are exact over an epoch."""
        share = self.train_share
        paired = int((index + 1) * share) > int(index * share)
        world = self.world("train" if paired else "balanced", training_seed(self.seed), epoch)
        return world[epoch * self.epoch_size + index]

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches fixed by seed and epoch; a short last one is dropped."""
        return self.training_loader(_Stream(self))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader for "train" and one for "balanced"; the same scenes at every validation."""
        return [
            DataLoader(
                _Fixed(self, self.world(distribution, VALIDATION_SEED)),
                batch_size=self.batch_size,
                shuffle=False,
                **self.loading(),
            )
            for distribution in ("train", "balanced")
        ]

    def loading(self) -> dict[str, Any]:
        """Those of every loader, and how samples become a batch."""
        return {**super().loading(), "collate_fn": self.collate}


class _Stream(Dataset[Any]):
    """Training samples by key (epoch, position, index)."""

    def __init__(self, data: ShapesStreamData) -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.epoch_size

    def __getitem__(self, key: Key) -> Any:
        epoch, _, index = key
        generator = np.random.default_rng((self.data.seed, epoch, index))
        return self.data.make(self.data.scene(epoch, index), generator, epoch)


class _Fixed(Dataset[Any]):
    """The first scenes of a world, made alike every time; `make` is told epoch -1."""

    def __init__(self, data: ShapesStreamData, world: ShapesWorld) -> None:
        self.data = data
        self.world = world

    def __len__(self) -> int:
        return self.data.val_size

    def __getitem__(self, index: int) -> Any:
        return self.data.make(self.world[index], np.random.default_rng((VALIDATION_SEED, index)), -1)
