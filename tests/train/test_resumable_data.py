"""What data modules of all programs share: where training goes on, and when it cannot."""

from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import Dataset

from train.resumable_data import ResumableData
from visionsel.data.resumable import EpochSampler


class Keys(Dataset[int]):
    """Its samples are their indices."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, key: Any) -> int:
        return key[2]


class Data(ResumableData):
    """24 samples."""

    def __init__(self, batch_size: int, devices: int = 1, rank: int = 0) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.seed = batch_size, 0, 3
        if devices > 1:
            self.trainer: Any = SimpleNamespace(world_size=devices, global_rank=rank)

    def train_dataloader(self) -> Any:
        """Batches of indices."""
        return self.training_loader(Keys())


def batches(data: Data, count: int | None = None) -> list[list[int]]:
    loader = data.train_loader or data.train_dataloader()
    assert isinstance(loader.sampler, EpochSampler)
    loader.sampler.set_epoch(1)
    found = []
    for batch in loader:
        found.append(batch.tolist())
        if len(found) == count:
            break
    return found


def test_an_epoch_goes_on_where_it_was_left_before_and_after_there_is_a_loader() -> None:
    whole = batches(Data(4))
    assert sorted(chain(*whole)) == list(range(24))
    for early in (True, False):
        stopped, data = Data(4), Data(4)
        assert batches(stopped, 2) == whole[:2]
        state = stopped.state_dict()
        assert state == {"epoch": 1, "batches": 2, "global_batch": 4}
        if not early:
            data.train_dataloader()
        data.load_state_dict(state)
        assert batches(data) == whole[2:]


def test_devices_share_what_is_left_and_another_batch_of_all_is_refused_inside_an_epoch() -> None:
    whole, stopped = batches(Data(4)), Data(4)
    batches(stopped, 2)
    state = stopped.state_dict()
    rest: list[int] = []
    for rank in range(2):
        data = Data(2, devices=2, rank=rank)
        data.load_state_dict(state)
        rest += chain(*batches(data))
    assert sorted(rest) == sorted(chain(*whole[2:]))
    for wrong in (Data(4, devices=2), Data(3)):
        wrong.load_state_dict(state)
        with pytest.raises(ValueError, match="middle of an epoch with 4 images a batch on all devices, not"):
            wrong.train_dataloader()
    done = {**state, "batches": 6}  # the end of the epoch
    other = Data(3)
    other.load_state_dict(done)
    other.train_dataloader()
