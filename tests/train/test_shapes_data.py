"""The stream of fresh scenes: what a sample is depends on seed, epoch and index, and none comes twice."""

from itertools import islice

import numpy as np
import pytest
import torch

from train.shapes_data import VALIDATION_SEED, ShapesStreamData, training_seed
from visionsel.data.shapes import Sample, ShapesWorld


class Pixels(ShapesStreamData):
    """Images, their number of objects and a random number."""

    def make(self, sample: Sample, generator: np.random.Generator, epoch: int) -> tuple:
        return sample.pixels, len(sample.objects), generator.random()


def batches(data: ShapesStreamData, epoch: int = 0, count: int | None = None) -> list[list[torch.Tensor]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(islice(loader, count))


def test_an_epoch_is_the_next_scenes_of_the_worlds_each_once() -> None:
    data = Pixels(batch_size=4, epoch_size=12, train_share=0.25, seed=3)
    seen = [{pixels.numpy().tobytes() for b in batches(data, epoch) for pixels in b[0]} for epoch in (0, 1)]
    paired = ShapesWorld("train", training_seed(3), 24)
    balanced = ShapesWorld("balanced", training_seed(3), 24)
    for epoch in (0, 1):
        expected = {
            (paired if index % 4 == 3 else balanced)[12 * epoch + index].pixels.tobytes()
            for index in range(12)
        }
        assert seen[epoch] == expected
    assert not seen[0] & seen[1]


def test_seed_changes_everything_and_workers_change_nothing() -> None:
    first = batches(Pixels(batch_size=4, epoch_size=8, seed=0))
    again = batches(Pixels(batch_size=4, epoch_size=8, seed=0, num_workers=2))
    other = batches(Pixels(batch_size=4, epoch_size=8, seed=1))
    for a, b, c in zip(first, again, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert not torch.equal(a[0], c[0])
        assert not torch.equal(a[2], c[2])


def test_a_loader_goes_on_in_the_middle_of_an_epoch() -> None:
    data = Pixels(batch_size=2, epoch_size=8)
    whole = batches(data)
    batches(data, count=2)
    state = data.state_dict()
    resumed = Pixels(batch_size=2, epoch_size=8)
    resumed.load_state_dict(state)
    rest = batches(resumed)
    assert len(rest) == 2
    for a, b in zip(whole[2:], rest, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_validation_scenes_are_those_of_their_own_seed_in_order() -> None:
    loaders = Pixels(batch_size=4, val_size=5).val_dataloader()
    for loader, name in zip(loaders, ("train", "balanced"), strict=True):
        pixels = torch.cat([batch[0] for batch in loader])
        world = ShapesWorld(name, VALIDATION_SEED, 5)
        assert np.array_equal(pixels.numpy(), np.stack([sample.pixels for sample in world]))
    assert training_seed(2**20 - 1) > VALIDATION_SEED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"batch_size": 8, "epoch_size": 7}, "epoch_size must be at least batch_size 8"),
        ({"train_share": 1.5}, "train_share must be from 0 to 1"),
        ({"seed": 2**20}, "seed must be from 0"),
        ({"image_size": 16}, "image_size must be from 32"),
        ({"max_objects": 7}, "max_objects must be from 1 to 6"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Pixels(**arguments)
