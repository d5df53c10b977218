"""Order and augmentation are functions of seed, epoch and position."""
# ruff: noqa: NPY002  (what timm draws from)

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from visionsel.data.resumable import EpochSampler, ResumableLoader, SeededDataset, seed_generators, seeded


class Noisy(Dataset):
    """Sample i is (i, noise of Python, of NumPy, of torch)."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = [random.random(), float(np.random.rand()), float(torch.rand(1))]
        return torch.tensor([index, *noise], dtype=torch.float64)


def loader(workers: int = 0, seed: int = 3, batch: int = 2, **sampler) -> ResumableLoader:
    data = SeededDataset(Noisy(), seed)
    sampler = EpochSampler(data, seed, **sampler)
    return ResumableLoader(data, batch, sampler=sampler, drop_last=True, num_workers=workers)


def epoch(source: ResumableLoader, number: int) -> torch.Tensor:
    source.sampler.set_epoch(number)
    return torch.cat(list(source))


def test_an_epoch_is_the_same_whatever_ran_before_and_however_many_workers_load_it() -> None:
    first = epoch(loader(), 1)
    assert sorted(first[:, 0].tolist()) == list(range(10))
    other = loader()
    epoch(other, 0)
    torch.manual_seed(7)
    assert torch.equal(epoch(other, 1), first)
    assert torch.equal(epoch(loader(workers=2), 1), first)


def test_epochs_and_seeds_differ_in_order_and_noise() -> None:
    one = loader()
    first, second, reseeded = epoch(one, 0), epoch(one, 1), epoch(loader(seed=4), 0)
    for other in (second, reseeded):
        assert first[:, 0].tolist() != other[:, 0].tolist()
        noise = {round(value, 12) for value in first[:, 1:].flatten().tolist()}
        assert noise.isdisjoint(round(value, 12) for value in other[:, 1:].flatten().tolist())
        assert len(noise) == 30


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_continues_where_another_stopped(workers) -> None:
    whole = epoch(loader(), 5)
    stopped = loader(workers)
    stopped.sampler.set_epoch(5)
    batches = iter(stopped)
    seen = [next(batches) for _ in range(2)]
    resumed = loader(workers)
    resumed.load_state_dict(stopped.state_dict())
    rest = iter(resumed)  # Lightning makes the iterator before it sets the epoch
    resumed.sampler.set_epoch(5)
    assert torch.equal(torch.cat([*seen, *rest]), whole)
    assert resumed.state_dict() == {"epoch": 5, "batches": 5}
    assert torch.equal(epoch(resumed, 6), epoch(loader(), 6))


def test_a_finished_epoch_is_not_skipped_again_in_the_next() -> None:
    done = loader()
    epoch(done, 2)
    resumed = loader()
    resumed.load_state_dict(done.state_dict())
    assert torch.equal(epoch(resumed, 3), epoch(loader(), 3))


def test_devices_share_an_epoch_without_overlap() -> None:
    parts = [epoch(loader(num_replicas=3, rank=rank, batch=1), 0) for rank in range(3)]
    assert [len(part) for part in parts] == [3, 3, 3]
    together = torch.stack(parts, 1).flatten(0, 1)
    assert torch.equal(together, epoch(loader(batch=1), 0)[:9])


def test_repeated_augmentation_shows_a_sample_several_times_with_other_noise() -> None:
    rows = epoch(loader(repeats=3, batch=1), 0)
    assert len(rows) == 10
    _, counts = rows[:, 0].unique(return_counts=True)
    assert sorted(counts.tolist()) == [1, 3, 3, 3]
    assert len({tuple(row) for row in rows[:, 1:].tolist()}) == 10
    parts = [epoch(loader(repeats=3, num_replicas=3, rank=rank, batch=1), 0) for rank in range(3)]
    assert all(torch.equal(part[:, 0], parts[0][:, 0]) for part in parts)
    with pytest.raises(ValueError, match="repeats"):
        loader(repeats=0)


def test_seeded_leaves_the_generators_as_they_were() -> None:
    seed_generators(1, 2)
    expected = random.random(), np.random.rand(), torch.rand(1)
    seed_generators(1, 2)
    with seeded(5):
        inside = random.random(), np.random.rand(), torch.rand(1)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert inside != expected
    with seeded(5):
        assert (random.random(), np.random.rand(), torch.rand(1)) == inside
