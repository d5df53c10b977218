"""Mean attention to the image over heads and layers: what other methods are measured against.

By default over the middle layers (`middle_layers`: 5 to 26 of 32), which are those that look at what is said.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visionsel.multimodal.grounding.heatmaps.rows import (
    check_row,
    decoder_layers,
    existing,
    finished,
    image_rows,
    middle_layers,
)
from visionsel.multimodal.grounding.heatmaps.sinks import SinkFilter, sink_columns, without_sinks
from visionsel.multimodal.grounding.replay import Replay

__all__ = ["Mean", "mean_rows"]


@dataclass(frozen=True)
class Mean:
    """Mean of the attention rows over heads and layers.

    Args:
        layers: numbers of decoder layers, negative ones count from the last; None: the middle
            ones, see `middle_layers`.
        heads: numbers of query heads, the same in all layers; None: all.
        row: which row is a token's: `"predict"`, the one that predicts it; `"token"`, its own; `"prompt"`,
            for all the last one of the prompt.
        sinks: columns to leave out: `"hidden"`, `"border"`, `"median"`, or a filter of `sinks.py`.

    Raises:
        ValueError: for another row.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    row: str = "predict"
    sinks: str | SinkFilter | None = None
    reference: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_row(self.row)
        for name in ("layers", "heads"):  # lists are taken too, but a method can be hashed
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))

    def __call__(self, replay: Replay, reference: Replay | None = None) -> Tensor:
        """Read a prompt and its answers.

        Args:
            replay: them.
            reference: is not looked at.

        Returns:
            float32 `[B, T, n]`: for each new token its map over the image tokens.

        Raises:
            ValueError: for layers or heads that do not exist, a prompt without images, or sinks that do not
                go with the model.
        """
        number = len(decoder_layers(replay))
        layers = existing("layers", middle_layers(number) if self.layers is None else self.layers, number)
        maps = mean_rows(replay, layers, self.heads, self.row)
        return finished(replay, without_sinks(maps, sink_columns(replay, self.sinks, layers)))


def mean_rows(
    replay: Replay, layers: list[int], heads: tuple[int, ...] | None = None, row: str = "predict"
) -> Tensor:
    """Mean attention over heads and layers, float32 `[B, t, n]`.

    Args:
        replay: a prompt and its answers.
        layers: numbers of decoder layers.
        heads: numbers of query heads; None: all.
        row: see `query_places`.

    Raises:
        ValueError: for layers or heads that do not exist.
    """
    found: list[Tensor] = []

    def see(layer: int, rows: Tensor) -> None:
        if heads is not None:
            rows = rows[:, existing("heads", heads, rows.shape[1])]
        mean = rows.mean(1)
        found[:] = [found[0] + mean.to(found[0].device)] if found else [mean]

    image_rows(replay, see, layers, row)
    return torch.div(found[0], len(layers))
