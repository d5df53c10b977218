"""Work that several processes share, as `torchrun` starts them: on one machine or on many.

    torchrun --nproc-per-node 8 -m visionsel evaluate pope --data shapes --out answers.jsonl

accelerate joins them (nccl on GPUs, gloo on CPUs). Nothing here joins by itself: a function that is not
handed `Processes` works alone, also inside somebody else's distributed program.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

__all__ = ["ALONE", "Processes", "join_processes"]

Item = TypeVar("Item")
Result = TypeVar("Result")
_PATIENCE = timedelta(days=7)  # a process that is done waits for the slowest; torch gives up after minutes


@dataclass(frozen=True)
class Processes:
    """Which one this process is, and of how many.

    Attributes:
        rank: from 0 on.
        count: of processes that run the same program.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that prints and writes what all have found."""
        return self.rank == 0

    def gather(self, value: Result) -> list[Result]:
        """The value of each process, by rank; all processes must call it, and wait for one another.

        Args:
            value: anything that pickles.
        """
        if self.count == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def share(self, items: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
        """`work` of each item, done by one process each and known to all; in the order of the items."""
        own = [work(item) for item in items[self.rank :: self.count]]
        parts = self.gather(own)
        return [parts[number % self.count][number // self.count] for number in range(len(items))]

    def part(self) -> None:
        """End what joined them, when all is done; on GPUs torch complains of a program that does not."""
        if self.count > 1:
            from torch import distributed

            distributed.destroy_process_group()


ALONE = Processes()


def join_processes() -> Processes:
    """The processes that `torchrun` started with this one; `ALONE` in an ordinary program.

    On GPUs each process gets its own: "cuda" is that one from then on.

    Raises:
        ImportError: without the extra "multimodal", which brings accelerate.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError('several processes need accelerate: pip install "visionsel[multimodal]"') from error
    import torch

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    return Processes(state.process_index, state.num_processes)
