"""Training data as a function of seed, epoch and position.

Order and augmentation of a training sample depend on nothing else: not on the number of worker processes, not
on what ran before, not on where a run was interrupted. A run resumed from a checkpoint, also one written in
the middle of an epoch, therefore sees the same tensors as a run that was never stopped.

`EpochSampler` yields keys (epoch, position, index), `SeededDataset` turns a key into a sample under
generators seeded from it, `ResumableLoader` remembers how many batches it gave.
"""
# ruff: noqa: NPY002  (timm's augmentations and mixup draw from NumPy's global generator)

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

__all__ = [
    "EpochSampler",
    "EvenSampler",
    "Filled",
    "ResumableLoader",
    "SeededDataset",
    "seed_generators",
    "seeded",
]

Key = tuple[int, int, int]


def seed_generators(*key: int) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices) with a mix of the numbers of `key`."""
    words = np.random.SeedSequence(key).generate_state(2, np.uint32)
    random.seed(int(words[0]))
    np.random.seed(words[0])
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """`seed_generators(*key)` for the CPU inside the block; afterwards the generators are as they were."""
    words = np.random.SeedSequence(key).generate_state(2, np.uint32)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(words[0])
    torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class SeededDataset(Dataset[Any]):
    """A dataset whose sample for a key (epoch, position, index) is drawn under generators seeded from it.

    Args:
        dataset: gives the sample of an index.
        seed: of the run.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Key) -> Any:
        epoch, position, index = key
        with seeded(self.seed, epoch, position):
            return self.dataset[index]


class EpochSampler(DistributedSampler[Any]):
    """A shuffle fixed by seed and epoch, as keys for `SeededDataset`; the devices share each epoch.

    Deriving from `DistributedSampler` tells Lightning to leave it in place. The last samples of an epoch that
    do not fill a round of all devices are left out.

    Args:
        dataset: its length counts.
        seed: of the run.
        repeats: repeated augmentation (Hoffer et al. 2020): each sample appears `repeats` times in a row with
            different augmentation, on different devices where there are several, and an epoch sees
            `1 / repeats` of the samples. DeiT and BiFormer train with 3.
        num_replicas, rank: the devices and which one this is.
    """

    def __init__(
        self, dataset: Dataset[Any], seed: int, repeats: int = 1, num_replicas: int = 1, rank: int = 0
    ) -> None:
        if repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {repeats}")
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)
        self.repeats = repeats
        self.skip = 0  # samples that the next iteration leaves out, for a resumed epoch
        self.length = len(dataset) // num_replicas  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Key]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
        order = order.repeat_interleave(self.repeats)
        skip, self.skip = self.skip, 0
        for turn in range(skip, self.length):
            position = turn * self.num_replicas + self.rank
            yield self.epoch, position, int(order[position])


class EvenSampler(DistributedSampler[Any]):
    """Each index once on one of the devices; -1 fills up those with fewer, so that all take equally many.

    PyTorch's own gives some indices twice, which a measure would count twice; and devices that run out before
    others would hold up those that exchange something in every forward pass.

    Args:
        dataset: its length counts.
        num_replicas, rank: the devices and which one this is.
    """

    def __init__(self, dataset: Dataset[Any], num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)  # type: ignore[arg-type]
        for index in range(self.rank, self.num_samples * self.num_replicas, self.num_replicas):
            yield index if index < size else -1


class Filled(Dataset[Any]):
    """Samples for `EvenSampler`: an index of -1 gives one that only fills up a batch.

    Args:
        dataset: of the samples.
        mark: makes such a sample of a real one.
    """

    def __init__(self, dataset: Dataset[Any], mark: Callable[[Any], Any]) -> None:
        self.dataset = dataset
        self.mark = mark

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index] if index >= 0 else self.mark(self.dataset[0])


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` over `EpochSampler` that continues in the middle of an epoch.

    The epoch is read when the first batch is asked for: Lightning makes iterators before it tells the sampler
    the epoch, and worker processes would fetch ahead from the wrong one.
    """

    given: tuple[int, int] = (0, 0)  # epoch and batches of it
    _resume: tuple[int, int] | None = None

    def state_dict(self) -> dict[str, int]:
        """The epoch and how many of its batches were given."""
        return {"epoch": self.given[0], "batches": self.given[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Leave out the batches given, if the next epoch asked for is the one that was interrupted."""
        self._resume = state["epoch"], state["batches"]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler = self.sampler
        assert isinstance(sampler, EpochSampler)
        assert self.batch_size is not None
        epoch = sampler.epoch
        resumed = self._resume is not None and self._resume[0] == epoch
        done = self._resume[1] if resumed and self._resume else 0
        self._resume = None
        sampler.skip = done * self.batch_size
        self.given = epoch, done
        for batch in super().__iter__():
            self.given = epoch, self.given[1] + 1
            yield batch
