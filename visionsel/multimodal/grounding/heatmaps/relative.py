"""Relative attention: what a question makes the model look at more than a general description does.

Zhang et al. 2025, "MLLMs Know Where to Look" (ViCrop), ICLR 2025, arXiv:2502.17422. The attention
under the question is divided by that under a general one, so that tokens that are looked at whatever is asked
lose their weight. In the paper both are rows of the token that begins the answer, `row="prompt"` here; by
default each token of the answer has its own row, and the divisor is the same for all.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from visionsel.multimodal.grounding.heatmaps.mean import mean_rows
from visionsel.multimodal.grounding.heatmaps.rows import (
    check_row,
    decoder_layers,
    existing,
    finished,
    middle_layers,
)
from visionsel.multimodal.grounding.heatmaps.sinks import SinkFilter, sink_columns, without_sinks
from visionsel.multimodal.grounding.replay import Replay

__all__ = ["PUBLISHED_LAYERS", "Relative", "relative"]

PUBLISHED_LAYERS = {("llava", 32): 14, ("qwen2_5_vl", 28): 22}
"""By type of model and number of decoder layers the layer that the authors read."""


@dataclass(frozen=True)
class Relative:
    """Attention under the question divided by attention under a general description.

    Args:
        layers: numbers of decoder layers, whose mean is taken, negative ones count from the last; None: the
            published layer of the model (`PUBLISHED_LAYERS`), of others the middle ones, see `middle_layers`.
        row: which row is a token's: `"predict"`, the one that predicts it; `"token"`, its own; `"prompt"`,
            for all the last one of the prompt, as in the paper.
        sinks: columns to leave out: `"hidden"`, `"border"`, `"median"`, or a filter of `sinks.py`.
        reference: the general prompt; the default is the authors'. Models that know few prompts want one of
            theirs.

    Raises:
        ValueError: for another row.
    """

    layers: tuple[int, ...] | None = None
    row: str = "predict"
    sinks: str | SinkFilter | None = None
    reference: str = "Write a general description of the image."

    def __post_init__(self) -> None:
        check_row(self.row)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    def __call__(self, replay: Replay, reference: Replay | None = None) -> Tensor:
        """Read a prompt and its answers, and the general prompt.

        Args:
            replay: the prompt and its answers.
            reference: the same images under the prompt `reference` with any answer, of which only the last
                row of the prompt is read; for each answer, or for each prompt of several answers.

        Returns:
            float32 `[B, T, n]`: for each new token its map over the image tokens, around 1 where the question
            makes no difference.

        Raises:
            ValueError: without a reference or for one of other images, for layers that do not exist, a prompt
                without images, or sinks that do not go with the model.
        """
        if reference is None:
            raise ValueError(
                f"relative attention needs a replay of the same images under {self.reference!r} as reference"
            )
        layers = self._layers(replay)
        below = mean_rows(reference, layers, row="prompt")
        sizes, others = (replay.image >= 0).sum(1), (reference.image >= 0).sum(1)
        if len(sizes) % len(others) or not torch.equal(
            sizes.cpu(), others.cpu().repeat_interleave(len(sizes) // len(others))
        ):
            raise ValueError(
                f"the reference is of other images: image tokens {others.tolist()} beside {sizes.tolist()}; "
                "replay the same images in the same order"
            )
        below = below.repeat_interleave(len(sizes) // len(others), 0)
        maps = relative(mean_rows(replay, layers, row=self.row), below)
        return finished(replay, without_sinks(maps, sink_columns(replay, self.sinks, layers)))

    def _layers(self, replay: Replay) -> list[int]:
        number, config = len(decoder_layers(replay)), cast(Any, replay.model).config
        published = PUBLISHED_LAYERS.get((config.model_type, number))
        default = middle_layers(number) if published is None else [published]
        return existing("layers", default if self.layers is None else self.layers, number)


def relative(attention: Tensor, reference: Tensor) -> Tensor:
    """`attention / reference`, and 0 where the reference is."""
    seen = reference > 0
    return torch.where(seen, attention / reference.masked_fill(~seen, 1), 0)
