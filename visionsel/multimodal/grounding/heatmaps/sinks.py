"""Image tokens that draw attention whatever is said, and are left out of heatmaps.

Such sinks often hold more attention than the object (Kang et al. 2025, arXiv:2503.03321). They are told in
one of three ways, which every method takes as its option `sinks`, by name or as an object with other numbers:

- `"hidden"`, `HiddenSinks`: by dimensions of their hidden states that are huge, as `VAR` does;
- `"border"`, `BorderSinks`: by where they are: on the border of the image;
- `"median"`, `MedianSinks`: by attention: far above the median in most rows of most heads.

The first and the last look at the layers that a method reads, and a column that is a sink in most of them is
0 in the maps. That takes one more forward.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.multimodal.grounding.heatmaps.rows import (
    decoder_layers,
    existing,
    image_rows,
    image_views,
)
from visionsel.multimodal.grounding.replay import Replay
from visionsel.multimodal.session import open_session
from visionsel.multimodal.sinks import discover_sink_dims, massiveness, published_sink_dims

__all__ = [
    "SINKS",
    "BorderSinks",
    "HiddenSinks",
    "MedianSinks",
    "SinkFilter",
    "above_median",
    "on_border",
    "sink_columns",
    "without_sinks",
]


@dataclass(frozen=True)
class HiddenSinks:
    """Tokens whose hidden states are huge in a sink dimension, as they enter most of the layers.

    Args:
        tau: how many times the root mean square (Kang et al. 2025: 20). It cannot exceed the square root of
            the width: choose it lower for narrow models.
        dims: the dimensions; None: the published ones of the language model, or what `discover_sink_dims`
            finds, which runs the model on one token.
    """

    tau: float = 20.0
    dims: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"tau must be more than 0, got {self.tau}")
        if self.dims is not None and not len(self.dims):
            raise ValueError("dims is empty; name dimensions of the hidden states, or None to find them")

    def __call__(self, replay: Replay, layers: Sequence[int]) -> Tensor:
        """bool `[B, n]`; see `sink_columns`."""
        device, size = replay.image.device, len(replay.tokens)
        counts = torch.zeros(replay.image.shape, dtype=torch.long, device=device)
        # the forward has all samples once, then all of them again, and so on for each copy
        order = torch.arange(size, device=device).view(replay.copies, -1).T.flatten()
        with open_session(replay.model) as session, ExitStack() as stack:
            dims = self._dims(session)

            def look(module: nn.Module, args: tuple[Any, ...]) -> None:
                if session.aside or session.untapped:  # another prompt, that a modulator runs
                    return
                hidden = args[0]
                places = replay.image.clamp(min=0)[..., None].to(hidden.device)
                hidden = hidden[order.to(hidden.device)].gather(1, places.expand(-1, -1, hidden.shape[-1]))
                counts.add_((massiveness(hidden, dims) >= self.tau).long().to(device))

            for layer in layers:
                norm = session.layers[layer].input_layernorm
                stack.callback(norm.register_forward_pre_hook(look).remove)
            replay.run()
        return 2 * counts > len(layers)

    def _dims(self, session: Any) -> tuple[int, ...]:
        width = int(session.decoder.config.hidden_size)
        dims = self.dims if self.dims is not None else published_sink_dims(session.decoder.config)
        if dims is None:
            with session.beside():
                return discover_sink_dims(session.model)
        if min(dims) < 0 or max(dims) >= width:
            raise ValueError(
                f"dims {tuple(dims)} do not exist: the hidden states have dimensions 0 to {width - 1}; "
                "discover_sink_dims(model) finds those of a model"
            )
        return tuple(dims)


@dataclass(frozen=True)
class BorderSinks:
    """Tokens on the border of the grids that show whole images (see `image_views`).

    Of an image that was cut into tiles beside a thumbnail, the tiles stay as they are.

    Args:
        width: of the border in tokens.
    """

    width: int = 1

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1 token, got {self.width}")

    def __call__(self, replay: Replay, layers: Sequence[int]) -> Tensor:
        """bool `[B, n]`; see `sink_columns`."""
        if replay.scope is None:
            replay.run()
        found = torch.zeros(replay.image.shape, dtype=torch.bool)
        for number, views in enumerate(image_views(replay, whole=True)):
            for view in views:
                found[number, view[on_border(view.shape[0], view.shape[1], self.width)]] = True
        return found.to(replay.image.device)


@dataclass(frozen=True)
class MedianSinks:
    """Tokens whose attention is far above the median of the image, in most rows of all heads of the layers.

    A rule of visionsel's own: an object is looked at when it is spoken of, a sink at all times. The rows are
    those of all text after the last image, question and answer, whichever row a method reads; where that is
    little text about one object, the object may be taken for a sink.

    Args:
        times: how many times the median.
        share: of the rows, from 0 to 1, in which it must be so.
    """

    times: float = 10.0
    share: float = 0.5

    def __post_init__(self) -> None:
        if not self.times > 1 or not 0 <= self.share < 1:
            raise ValueError(
                f"times must be more than 1 and share in [0, 1), got {self.times} and {self.share}"
            )

    def __call__(self, replay: Replay, layers: Sequence[int]) -> Tensor:
        """bool `[B, n]`; see `sink_columns`."""
        high = torch.zeros_like(replay.image)
        real, every = replay.image >= 0, torch.zeros_like(replay.image[:, :1])
        places, valid = _text_after(replay)

        def see(layer: int, rows: Tensor) -> None:
            here = above_median(rows, real[:, None, None].to(rows.device), self.times)
            here &= valid[:, None, :, None].to(rows.device)
            high.add_(here.sum((1, 2)).to(high.device))
            every.add_(rows.shape[1] * valid.sum(1, keepdim=True))

        image_rows(replay, see, layers, places=places)
        return high > self.share * every


def _text_after(replay: Replay) -> tuple[Tensor, Tensor]:
    """Places `[B, m]` of the text after the last image and of the answer; which of them are no filling."""
    first, ends = replay.image.amax(1, keepdim=True) + 1, replay.sequences.shape[1]
    places = first + torch.arange(ends - int(first.min()), device=first.device)
    inside, places = places < ends, places.clamp(max=ends - 1)
    said = places - replay.length
    answer = replay.valid.gather(1, said.clamp(min=0))
    return places, inside & (answer | (said < 0))


SinkFilter = HiddenSinks | BorderSinks | MedianSinks
SINKS: dict[str, type[HiddenSinks] | type[BorderSinks] | type[MedianSinks]] = {
    "hidden": HiddenSinks,
    "border": BorderSinks,
    "median": MedianSinks,
}


def on_border(height: int, width: int, border: int = 1) -> Tensor:
    """bool `[height, width]`: the outer cells of a grid.

    Raises:
        ValueError: when the border leaves nothing.
    """
    if min(height, width) <= 2 * border:
        raise ValueError(
            f"a border of {border} leaves nothing of a grid of {height} x {width} tokens; choose a narrower "
            "one, or no filter"
        )
    found = torch.ones(height, width, dtype=torch.bool)
    found[border:-border, border:-border] = False
    return found


def above_median(rows: Tensor, real: Tensor, times: float) -> Tensor:
    """What is at least some times the median of its row.

    Args:
        rows: `[..., n]`, nothing negative.
        real: bool, broadcasts to it: the columns that count.
        times: how many times.

    Returns:
        bool `[..., n]`; zeros are not above a median of 0.
    """
    middle = rows.masked_fill(~real, torch.nan).nanmedian(-1, keepdim=True).values
    return (rows >= times * middle) & (rows > 0) & real


def sink_columns(replay: Replay, sinks: str | SinkFilter | None, layers: Sequence[int]) -> Tensor | None:
    """The image columns that are sinks.

    Args:
        replay: a prompt and its answers.
        sinks: one of `SINKS`, or such a filter; None: there are none.
        layers: numbers of the decoder layers that a method reads.

    Returns:
        bool `[B, n]`, on the device of the replay; None for None.

    Raises:
        ValueError: for another name, or a filter that does not fit the model.
    """
    if sinks is None:
        return None
    if isinstance(sinks, str):
        if sinks not in SINKS:
            raise ValueError(f"sinks must be None or one of {', '.join(SINKS)}, got {sinks!r}")
        sinks = SINKS[sinks]()
    return sinks(replay, existing("layers", layers, len(decoder_layers(replay))))


def without_sinks(maps: Tensor, columns: Tensor | None) -> Tensor:
    """Maps `[B, ..., n]` with 0 in the columns `[B, n]` that are sinks."""
    if columns is None:
        return maps
    columns = columns.view(len(columns), *[1] * (maps.ndim - 2), -1).to(maps.device)
    return maps.masked_fill(columns, 0)
