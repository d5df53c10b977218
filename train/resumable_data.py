"""Data modules whose training goes on inside an epoch: what those of all programs share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch.utils.data import Dataset, Subset

from train.callbacks_bad_samples import ReplaceBadSamples, good_samples, open_sample, read_bad_samples
from visionsel.data.resumable import EpochSampler, ResumableLoader

__all__ = ["ResumableData"]


class ResumableData(LightningDataModule):
    """Gives the training loader its place, and knows it in checkpoints.

    Subclasses set the attributes, and return `training_loader(...)`, or `resumed(...)` of a loader of their
    own, from `train_dataloader`.

    Attributes:
        batch_size: on each device.
        num_workers: processes that make samples on each device; 0 makes them in the main process.
        seed: of the order of the samples.
        on_bad: what a file that cannot be used does: "stop" ends the run, "report" lists it in `bad_samples`.
        bad_samples: that file, see `train.callbacks_bad_samples`.
    """

    batch_size: int
    num_workers: int
    seed: int
    on_bad: Literal["stop", "report"] = "stop"
    bad_samples: Path = Path("bad_samples.csv")

    def __init__(self) -> None:
        super().__init__()
        self.train_loader: Any = None
        self.resume: dict[str, Any] = {}

    def devices(self) -> tuple[int, int]:
        """How many there are, and which one this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def training_loader(self, dataset: Dataset[Any], repeats: int = 1) -> ResumableLoader:
        """Batches in an order fixed by seed and epoch; a short last one is dropped.

        Args:
            dataset: takes keys of `EpochSampler`.
            repeats: views of each sample in an epoch, see `EpochSampler`.

        Raises:
            ValueError: see `resumed`.
        """
        sampler = EpochSampler(dataset, self.seed, repeats, *self.devices())
        return self.resumed(
            ResumableLoader(
                dataset, batch_size=self.batch_size, sampler=sampler, drop_last=True, **self.loading()
            )
        )

    def resumed(self, loader: Any) -> Any:
        """The training loader, at the place where a checkpoint left it.

        Raises:
            ValueError: for a checkpoint from the middle of an epoch with another batch of all devices
                together: images would be lost or seen twice.
        """
        self.train_loader = loader
        if self.resume:
            self._go_on()
            self.resume = {}
        return loader

    def state_dict(self) -> dict[str, Any]:
        """How far the training loader is.

        Lightning 2.6 saves the loader's own state too, but does not give it back where the number of updates
        was asked for before, as a schedule has to.
        """
        state = {} if self.train_loader is None else self.train_loader.state_dict()
        return {**state, "global_batch": self._global_batch()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Where training continues."""
        self.resume = dict(state_dict)
        if self.train_loader is not None:  # strategies that shard restore when there is one already
            self._go_on()

    def teardown(self, stage: str) -> None:
        """Say how many samples could not be used and where they are listed, on one device."""
        if self.on_bad == "stop" or self.trainer is None or not self.trainer.is_global_zero:
            return
        if bad := read_bad_samples(self.bad_samples):
            print(f"{len(bad)} bad sample{'s' if len(bad) > 1 else ''} in {self.bad_samples}")

    def replaced(self, dataset: Any, read: Callable[[int], Any], verify: bool) -> Dataset[Any]:
        """What to train on: with `on_bad` "report" the next good sample stands for one that is bad.

        Args:
            dataset: raises `BadSampleError` for a bad sample.
            read: a sample as it lies in the files, by its position.
            verify: list the bad ones before anything starts.
        """
        if self.on_bad == "stop":
            return dataset
        if verify:
            good_samples(read, len(dataset), self.bad_samples)
        return ReplaceBadSamples(dataset, self.bad_samples)

    def left_out(self, dataset: Any, read: Callable[[int], Any]) -> Dataset[Any]:
        """What to measure on: with `on_bad` "report" only the samples that can be used; see `replaced`."""
        if self.on_bad == "stop":
            return dataset
        return Subset(dataset, good_samples(read, len(dataset), self.bad_samples))

    def readable(self, files: list[Path]) -> list[Path]:
        """With `on_bad` "report" only the image files that can be read."""
        if self.on_bad == "stop":
            return files
        good = good_samples(lambda index: open_sample(files[index]), len(files), self.bad_samples)
        return [files[index] for index in good]

    def loading(self) -> dict[str, Any]:
        """Arguments of every loader, by name: Lightning makes some loaders again from them."""
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _global_batch(self) -> int:
        return self.batch_size * self.devices()[0]

    def _go_on(self) -> None:
        saved, now = self.resume.get("global_batch"), self._global_batch()
        # loaders of another kind, as of shards, check it themselves
        if isinstance(self.train_loader, ResumableLoader) and saved not in (None, now):
            size = len(self.train_loader.dataset)  # type: ignore[arg-type]
            if 0 < self.resume["batches"] < size // saved:
                raise ValueError(
                    f"the checkpoint is from the middle of an epoch with {saved} images a batch on all "
                    f"devices, not {now}; go on with as many, or from the end of an epoch"
                )
        self.train_loader.load_state_dict(self.resume)
