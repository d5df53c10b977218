"""Cache layers that remember what was dropped.

A pruned decoder layer caches fewer keys than the prompt has tokens. What asks for its length (masks,
positions, the next chat turn, assisted decoding) wants the length of the prompt. These layers answer with
that one, and carry which tokens of the prompt their keys are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

_L = TypeVar("_L", bound=DynamicLayer)

__all__ = [
    "Dropped",
    "Note",
    "PrunedLayer",
    "PrunedSlidingLayer",
    "cache_of",
    "mark_dropped",
    "notes_of",
    "seen_tokens",
]


@dataclass(frozen=True)
class Dropped:
    """What became of a prompt in a decoder layer.

    Attributes:
        length: tokens of the prompt.
        columns: int64 `[B, kept]`: the place in the prompt of each key.
        real: bool `[B, kept]`: False for padding and for dropped tokens that fill up a shorter sample.
        complete: whether all of `real` is True, so that no mask is needed.
    """

    length: int
    columns: Tensor
    real: Tensor
    complete: bool

    @property
    def number(self) -> int:
        """How many tokens are missing."""
        return self.length - self.columns.shape[1]

    def rows(self, index: Tensor) -> "Dropped":
        """The same for other rows of the batch."""
        index = index.to(self.columns.device)
        return replace(self, columns=self.columns[index], real=self.real[index])

    def until(self, length: int) -> "Dropped":
        """The same for a shorter prompt, whose tokens from `length` on are all there.

        Raises:
            ValueError: when one of them was dropped.
        """
        last = torch.arange(length, self.length, device=self.columns.device)
        columns, real = self.columns[:, -len(last) :], self.real[:, -len(last) :]
        if length < 1 or columns.shape[1] < len(last) or not bool(((columns == last) & real).all()):
            raise ValueError(
                f"a pruned prompt of {self.length} tokens cannot be cropped to {length}: which of its tokens "
                "are left was decided for the whole prompt; run the shorter prompt anew"
            )
        columns, real = self.columns[:, : -len(last)], self.real[:, : -len(last)]
        return Dropped(length, columns, real, bool(real.all()))


def _with_rows(cls: type[_L]) -> type[_L]:
    """Let `dropped` follow when the rows of a layer move.

    Not a mixin: the class of an instance can be exchanged only along single inheritance.
    """
    base: Any = cls.__mro__[1]

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        base.reorder_cache(self, beam_idx)
        self.dropped = self.dropped.rows(beam_idx)

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        base.batch_repeat_interleave(self, repeats)
        rows = torch.arange(len(self.dropped.columns), device=self.dropped.columns.device)
        self.dropped = self.dropped.rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self: Any, indices: Tensor) -> None:
        base.batch_select_indices(self, indices)
        self.dropped = self.dropped.rows(indices)

    for method in (reorder_cache, batch_repeat_interleave, batch_select_indices):
        setattr(cls, method.__name__, method)
    return cls


@_with_rows
class PrunedLayer(DynamicLayer):
    """A `DynamicLayer` whose length counts the tokens that were dropped."""

    dropped: Dropped
    expected = False  # whether the hook before the decoder layer has seen to the mask of this forward

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        check_expected(self, key_states.shape[-2])
        return super().update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        length = super().get_seq_length()
        return length + self.dropped.number if length else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens.

        Args:
            tokens_to_remove: negative: how many; positive, as transformers before 5.20 sends it: the length
                to leave.

        Raises:
            ValueError: where tokens would have to go that were read with dropped ones.
        """
        length = self.get_seq_length()
        left = length + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, length)
        if left == length:
            return
        if left < self.dropped.length:  # candidates of assisted decoding may have come with the prompt
            self.dropped = self.dropped.until(left)
        assert self.keys is not None
        assert self.values is not None
        self.keys = self.keys[..., : left - self.dropped.number, :]
        self.values = self.values[..., : left - self.dropped.number, :]

    def reset(self) -> None:
        """Forget everything: an ordinary layer again."""
        restore_layer(self)
        self.reset()


@_with_rows
class PrunedSlidingLayer(DynamicSlidingWindowLayer):
    """A `DynamicSlidingWindowLayer` after pruning; `cumulative_length` counts what was dropped."""

    dropped: Dropped
    expected = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        check_expected(self, key_states.shape[-2])
        if self.cumulative_length + key_states.shape[-2] > self.sliding_window:
            raise NotImplementedError(
                f"{self.cumulative_length + key_states.shape[-2]} tokens pass the sliding window of "
                f"{self.sliding_window}: with a pruned prompt the window would reach too far back; generate "
                "fewer tokens or leave pruning out"
            )
        return super().update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """See `PrunedLayer.crop`."""
        PrunedLayer.crop(self, tokens_to_remove)  # type: ignore[arg-type]
        assert self.keys is not None
        self.cumulative_length = self.keys.shape[-2] + self.dropped.number

    def reset(self) -> None:
        """Forget everything: an ordinary layer again."""
        restore_layer(self)
        self.reset()


def check_expected(layer: PrunedLayer | PrunedSlidingLayer, queries: int) -> None:
    """Refuse a forward that knows nothing of what was dropped, where it would need a mask that does.

    Raises:
        RuntimeError: outside of the context of a pruner.
    """
    if not layer.expected and (queries > 1 or not layer.dropped.complete):
        raise RuntimeError(
            "this cache holds a pruned prompt, and masks must know what was dropped: go on inside the "
            "context of a pruner, with any keep"
        )
    layer.expected = False


def mark_dropped(layer: Any, dropped: Dropped) -> None:
    """Make a finished layer one that counts what was dropped.

    Raises:
        NotImplementedError: for a kind of layer whose length has another meaning.
    """
    if type(layer) in (DynamicLayer, PrunedLayer):
        layer.__class__ = PrunedLayer
    elif type(layer) in (DynamicSlidingWindowLayer, PrunedSlidingLayer):
        layer.__class__ = PrunedSlidingLayer
        layer.cumulative_length = dropped.length
    else:
        raise NotImplementedError(
            f"pruning cannot keep its account in a cache layer of type {type(layer).__name__}; use the "
            "default DynamicCache"
        )
    layer.dropped = dropped


def restore_layer(layer: PrunedLayer | PrunedSlidingLayer) -> None:
    """Make it the layer that it was, without an account of what was dropped."""
    layer.__class__ = DynamicLayer if isinstance(layer, PrunedLayer) else DynamicSlidingWindowLayer  # type: ignore[assignment]
    del layer.dropped


def cache_of(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments or outputs of a forward; transformers renamed it in 5.24."""
    named = dict(arguments)  # outputs themselves warn when they are asked for the old name
    cache = named.get("cache")
    return cache if cache is not None else named.get("past_key_values")


def seen_tokens(cache: Cache | None, layer: int = 0) -> int:
    """Tokens that a layer has seen before this forward, dropped ones counted."""
    if cache is None or layer >= len(cache.layers):
        return 0
    return int(cache.get_seq_length(layer))


class Note(Protocol):
    """What an intervention knows of a prompt, row by row."""

    def __len__(self) -> int:
        """How many rows there are."""

    def rows(self, index: Tensor) -> "Note":
        """The same for other rows of the batch."""


def notes_of(cache: Cache) -> dict[Any, Any]:
    """Notes on the prompt in a cache, each under a key; they follow when the rows of the cache move."""
    following: Any = cache
    if not hasattr(following, "notes"):
        following.__class__ = _following(following.__class__)
        following.notes = {}
    notes: dict[Any, Any] = following.notes
    return notes


@lru_cache
def _following(kind: Any) -> Any:
    """A kind of cache whose `notes` have the rows that the cache has."""

    def moved(name: str, rows: Callable[[int, Any], Tensor]) -> Callable[..., Any]:
        def method(self: Any, argument: Any) -> None:
            getattr(kind, name)(self, argument)
            for key, note in self.notes.items():
                self.notes[key] = note.rows(rows(len(note), argument))

        return method

    methods = {
        "reorder_cache": moved("reorder_cache", lambda number, index: index),
        "batch_select_indices": moved("batch_select_indices", lambda number, index: index),
        "batch_repeat_interleave": moved(
            "batch_repeat_interleave", lambda number, times: torch.arange(number).repeat_interleave(times)
        ),
    }
    return type(kind.__name__, (kind,), methods)
