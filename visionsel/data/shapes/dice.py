"""Random draws that are the same on every machine and with every NumPy.

NumPy keeps the raw words of PCG64 and the hash of SeedSequence fixed for ever, but not what `Generator` makes
of them. So draws are made here, in integers, from the raw words.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_BATCH = 64


class Dice:
    """A stream of draws named by integers: the same key gives the same stream.

    Args:
        *key: integers from 0 to 2**32 - 1.
    """

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))
        self._words: list[int] = []

    def _word(self) -> int:
        if not self._words:
            self._words = self._bits.random_raw(_BATCH).tolist()
        return self._words.pop()

    def below(self, count: int) -> int:
        """An integer from 0 to `count - 1`."""
        return self._word() * count >> 64

    def between(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._word() < probability * 2.0**64

    def choose(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def draw(self, items: Sequence[T], count: int, weights: Sequence[int] | None = None) -> list[T]:
        """`count` different items in random order; by weight, one after another, where weights are given."""
        left, shares = list(items), list(weights or [1] * len(items))
        drawn = []
        for _ in range(count):
            place, position = self.below(sum(shares)), 0
            while place >= shares[position]:
                place -= shares[position]
                position += 1
            drawn.append(left.pop(position))
            shares.pop(position)
        return drawn

    def noise(self, *shape: int) -> np.ndarray:
        """Integers from -15 to 15 with a peak at 0, int16 `shape`."""
        count = int(np.prod(shape))
        octets = self._bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]
        return ((octets & 15).astype(np.int16) + (octets >> 4) - 15).reshape(shape)
