"""Products of whole attention matrices over layers, of which a few columns are wanted.

Rollouts and flows multiply the matrices of all layers, each a sum over heads. Only the columns of the `n`
image tokens are looked at in the end, so these alone are carried from the lowest layer to the top: what goes
from layer to layer is `[B, N, n]`, and a layer's matrix is made some rows at a time, from queries and keys as
the model runs. Nothing of a layer is kept once it is through, and no sum is rounded to less than the model
computes in.

Memory: two `[B, N, n]` in float32 beside each other (N = 2,950 and n = 2,880: 34 MB each, whatever the
number of layers and heads), and some ten times `[B, heads, rows, N]`, at most `ELEMENTS` numbers (40 MB in
all; `ON_ACCELERATORS` times as many there) unless a single row has more.

Shapes: `B` answers, `N` tokens of prompt and answer, `n` image tokens, `t` rows that are looked at.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from visionsel.multimodal.attention import AttentionCall, attention_logits, attention_rows
from visionsel.multimodal.grounding.heatmaps.rows import query_places
from visionsel.multimodal.grounding.replay import Replay
from visionsel.multimodal.session import session_of

__all__ = ["Climb", "Peak", "carried", "climb", "layer_peaks"]

ELEMENTS = 2**20  # float32: 4 MB; larger pieces are no faster on a CPU
ON_ACCELERATORS = 16  # times as many, for fewer kernels
Peak = Callable[[Tensor], Tensor]
"""From rows `[B, heads, r, N]` of attention the `[B, heads, r]` that tells how sharply each of them looks."""


class Climb:
    """What a method gets of a layer as the columns are carried through it.

    Attributes:
        peaks: `[B, heads]`: mean over queries of what the method's `Peak` says of their rows.
        seen: `[B, N]`: how many of these queries see each key, by the masks of this layer.
        lengths: `[B]`: how many queries these are.
        places: int64 `[B, n]`, those of the columns; -1 where a sample has fewer.
        below: `[B, N, n]`: what came out of the layer below; None for the first.
        rows: int64 `[B, t]`: the only rows that are wanted of the last layer; None before it.
    """

    def __init__(
        self, call: AttentionCall, replay: Replay, peak: Peak, counted: Tensor, below: Tensor | None
    ) -> None:
        device = call.query.device
        self.peaks, self.seen = layer_peaks(call, counted.to(device), peak)
        self.lengths = counted.sum(1).to(self.peaks)
        self.places = replay.image.to(device)
        self.below = None if below is None else below.to(device)
        self.rows: Tensor | None = None
        self._call = call

    def identity(self) -> Tensor:
        """`[B, N, n]`: the columns of the identity."""
        batch, number = self.places.shape
        return self.plus_identity(self.peaks.new_zeros(batch, self.seen.shape[1], number))

    def plus_identity(self, columns: Tensor) -> Tensor:
        """The columns with those of the identity added, in place."""
        ones = (self.places >= 0).to(columns)[:, None]
        return columns.scatter_add_(1, self.places.clamp(min=0)[:, None], ones)

    def through(self, columns: Tensor, weights: Tensor, scale: Tensor | None = None) -> Tensor:
        """`sum over heads of weights * attention * scale` of this layer, times columns; see `carried`."""
        return carried(self._call, columns, weights, scale, self.rows)

    def wanted(self, columns: Tensor) -> Tensor:
        """The rows of columns `[B, N, n]` that `through` gives."""
        if self.rows is None:
            return columns
        return columns.gather(1, self.rows[..., None].expand(-1, -1, columns.shape[2]))


def climb(
    replay: Replay,
    layers: Sequence[int],
    row: str,
    peak: Peak,
    step: Callable[[Climb], Tensor],
    answer: bool = True,
) -> Tensor:
    """Carry the columns of the image tokens through layers, from the lowest to the top.

    Args:
        replay: a prompt and its answers.
        layers: numbers of decoder layers, rising.
        row: which rows are wanted of the last, see `query_places`.
        peak: what the weights of heads are made of.
        step: gets a layer and gives the columns above it, with the rows that `Climb.through` gives.
        answer: the queries that count are those of prompt and answer; otherwise of the prompt alone.

    Returns:
        `[B, t, n]`, float32 (float64 where the model is).

    Raises:
        ValueError: for another row, or a prompt without images.
    """
    rows = query_places(replay, row)
    if not replay.image.shape[1]:
        raise ValueError("the prompts have no tokens of images, so there is nothing to make a map of")
    state: list[Tensor] = []

    def tap(layer: int, call: AttentionCall) -> None:
        counted = _real_tokens(replay)
        if not answer:
            counted = counted & (torch.arange(counted.shape[1], device=counted.device) < replay.length)
        here = Climb(call, replay, peak, counted, state.pop() if state else None)
        if layer == layers[-1]:
            here.rows = rows.to(call.query.device)
        state.append(step(here))

    replay.run({layer: partial(tap, layer) for layer in layers})
    return state[0]


def layer_peaks(call: AttentionCall, counted: Tensor, peak: Peak) -> tuple[Tensor, Tensor]:
    """How sharply each head looks, and how many queries see each key.

    Args:
        call: of the kernel, queries and keys of the same `N` tokens.
        counted: bool `[B, N]`: the queries that count, none of them padding.
        peak: what is averaged over them.

    Returns:
        `[B, heads]` and `[B, N]`.
    """
    peaks = seen = None
    for places in _pieces(call):
        logits = attention_logits(call, places)
        counts = counted.gather(1, places)
        sharp = (peak(logits.softmax(-1).nan_to_num(0.0)) * counts[:, None]).sum(2)
        visible = ((logits[:, 0] > -torch.inf) & counts[..., None]).sum(1).to(sharp)
        peaks = sharp if peaks is None else peaks + sharp
        seen = visible if seen is None else seen + visible
    assert peaks is not None
    assert seen is not None
    return peaks / counted.sum(1, keepdim=True), seen


def carried(
    call: AttentionCall,
    columns: Tensor,
    weights: Tensor,
    scale: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """`sum over heads of weights * attention * scale`, times columns.

    Args:
        call: of the kernel, queries and keys of the same `N` tokens.
        columns: `[B, N, n]`.
        weights: `[B, heads]`.
        scale: `[B, N]`, for the keys; None: 1.
        rows: int64 `[B, t]`: the queries whose rows are made; None: all `N`.

    Returns:
        `[B, t, n]`.
    """
    number = call.query.shape[2] if rows is None else rows.shape[1]
    out, start = columns.new_empty(len(columns), number, columns.shape[2]), 0
    for places in _pieces(call, rows):
        attention = attention_rows(call, places)
        matrix = (weights[:, None] @ attention.flatten(2)).view(*places.shape, -1)
        if scale is not None:
            matrix = matrix * scale[:, None]
        out[:, start : start + places.shape[1]] = matrix @ columns
        start += places.shape[1]
    return out


def _pieces(call: AttentionCall, rows: Tensor | None = None) -> Iterator[Tensor]:
    """Places of queries, int64 `[B, r]`, so many at a time that their rows hold at most `ELEMENTS`."""
    batch, heads, queries, _ = call.query.shape
    if rows is None:
        rows = torch.arange(queries, device=call.query.device).expand(batch, -1)
    numbers = ELEMENTS * (1 if call.query.device.type == "cpu" else ON_ACCELERATORS)
    size = max(1, numbers // (batch * heads * call.key.shape[2]))
    yield from rows.split(size, 1)


def _real_tokens(replay: Replay) -> Tensor:
    """bool `[B, N]`: what is not padding, in the forward of a replay that runs now."""
    session = session_of(replay.model)
    assert session is not None
    assert session.scope is not None
    # the forward has all samples once, then all of them again, and so on for each copy
    order = torch.arange(len(replay.tokens)).view(replay.copies, -1).T.flatten()
    return session.scope.real[order.to(session.scope.real.device)]
