"""Random pruning against a restatement in loops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from visionsel.multimodal.pruning import random
from visionsel.multimodal.pruning.random import RandomPrune

VALID = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]).bool()


def positions(valid: Tensor) -> Tensor:
    return (torch.arange(valid.shape[1]).expand_as(valid)).masked_fill(~valid, 0)


def by_loops(n: int, number: int, seed: int) -> list[bool]:
    """The tokens with the highest of `n` random numbers."""
    luck = np.random.default_rng(seed).random(n).tolist()
    best = sorted(range(n), key=lambda i: -luck[i])[:number]
    return [i in best for i in range(n)]


@pytest.mark.parametrize("seed", [0, 1, 17])
@pytest.mark.parametrize(("keep", "number"), [(0.5, 10), (3, 3), (1.0, 20), (1, 1), (0.01, 1), (99, 20)])
def test_the_luckiest_tokens_are_kept(keep: float | int, number: int, seed: int) -> None:
    index = torch.arange(20)[None]
    assert random.select(index=index, keep=keep, seed=seed)[0].tolist() == by_loops(20, number, seed)


def test_a_sample_alone_gives_the_same_as_in_a_padded_batch() -> None:
    index = positions(VALID).masked_fill(~VALID, 10**6)  # what stands at padding is not looked at
    together = random.select(index, 0.6, 3, VALID)
    for sample, n in enumerate([7, 3, 1]):
        alone = random.select(torch.arange(n)[None], 0.6, 3)
        assert together[sample, :n].equal(alone[0])
        assert not together[sample, n:].any()


def test_the_luck_of_a_token_does_not_depend_on_the_tokens_after_it() -> None:
    # the best of 12 stays the best of 12 whatever else there is: it is the last one standing among these
    short = random.select(torch.arange(12)[None], 1, 5)[0].nonzero().item()
    for number in range(1, 41):
        kept = random.select(torch.arange(40)[None], number, 5)[0, :12]
        if kept.any():
            assert kept.nonzero()[:, 0].tolist() == [short]
            break


def test_tokens_left_by_an_earlier_stage_keep_their_luck() -> None:
    index = torch.tensor([[1, 4, 5, 8, 11]])
    luck = np.random.default_rng(2).random(12)[index[0].numpy()]
    expected = [bool(x >= np.sort(luck)[-2]) for x in luck]
    assert random.select(index, 2, 2)[0].tolist() == expected


def test_another_seed_chooses_other_tokens() -> None:
    index = torch.arange(100)[None]
    assert not random.select(index, 0.5, 0).equal(random.select(index, 0.5, 1))


def test_a_batch_without_image_tokens_stays_without() -> None:
    assert random.select(torch.zeros(2, 0, dtype=torch.int64), 0.5).shape == (2, 0)


def test_the_stage_stands_before_its_layer_and_selects_by_number() -> None:
    pruner = RandomPrune(keep=0.6, layer=3, seed=3)
    (stage,) = pruner.stages(4)
    assert (stage.layer, stage.reads, stage.tower) == (3, None, False)
    tokens = SimpleNamespace(index=positions(VALID), valid=VALID)
    assert stage.select(tokens).equal(random.select(positions(VALID), 0.6, 3, VALID))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        pruner.stages(3)


@pytest.mark.parametrize(
    "arguments",
    [{"keep": 0}, {"keep": 1.5}, {"keep": float("nan")}, {"keep": True}, {"keep": 0.5, "layer": -1}]
    + [{"keep": 0.5, "seed": -1}],
)
def test_values_out_of_range_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        RandomPrune(**arguments)
