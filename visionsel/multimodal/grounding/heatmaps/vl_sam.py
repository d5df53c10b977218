"""VL-SAM: what a token looks at through all layers, as the regularised flow of attention.

Lin, Wang and Tang 2024, "Training-Free Open-Ended Object Detection and Segmentation via Attention as
Prompts", NeurIPS 2024, arXiv:2410.05963. There is no release. Attention `S [queries, keys]` of each head and
layer is used as follows.

1. A head weighs as much as its queries look at one thing: the maximum over keys, in the mean over queries.
2. The weighted heads of a layer are averaged to one matrix `S'`.
3. The flow through the layers is `S~_l = (I + S'_l) (I + S~_(l-1))`, with `S~_1 = S'_1`.
4. Under a causal mask early tokens are seen by all that follow, and the products pile up on them. So columns
   are regularised: one that `L0` of the `L` tokens see is multiplied by `1 - (L0 - 1) / L`.

The paper does not say to which matrix the regularisation belongs: to `S'` of each layer (the default here)
or to the flow after each layer. `L0` is counted in the masks of each layer, so that images whose tokens see
each other both ways and sliding windows have their own factors.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visionsel.multimodal.grounding.heatmaps.propagation import Climb, climb
from visionsel.multimodal.grounding.heatmaps.rows import check_row, decoder_layers, existing, finished
from visionsel.multimodal.grounding.heatmaps.sinks import SinkFilter, sink_columns, without_sinks
from visionsel.multimodal.grounding.replay import Replay

__all__ = ["VLSAM", "flow", "image_flow"]

REGULARISE = ("layer", "flow", None)


@dataclass(frozen=True)
class VLSAM:
    """The regularised attention flow to the image.

    It is exact, in float32 (float64 where the model is), and makes no `[heads, N, N]`; `propagation.py` says
    what memory it takes.

    Args:
        layers: numbers of the decoder layers that the flow goes through, negative ones count from the last;
            None: all, as in the paper.
        row: which row is a token's: `"predict"`, the one that predicts it; `"token"`, its own; `"prompt"`,
            for all the last one of the prompt.
        regularise_on: `"layer"`: the columns of each layer's matrix; `"flow"`: those of the flow after each
            layer; None: nothing, which the authors find to be of no use.
        weigh_heads: weigh heads by how sharply they look; otherwise all alike.
        sinks: columns to leave out: `"hidden"`, `"border"`, `"median"`, or a filter of `sinks.py`.

    Raises:
        ValueError: for another row or another place of the regularisation.
    """

    layers: tuple[int, ...] | None = None
    row: str = "predict"
    regularise_on: str | None = "layer"
    weigh_heads: bool = True
    sinks: str | SinkFilter | None = None
    reference: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_row(self.row)
        _check_place(self.regularise_on)
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    def __call__(self, replay: Replay, reference: Replay | None = None) -> Tensor:
        """Read a prompt and its answers.

        Args:
            replay: them.
            reference: is not looked at.

        Returns:
            float32 `[B, T, n]`: for each new token its map over the image tokens.

        Raises:
            ValueError: for layers that do not exist, a prompt without images, or sinks that do not go with
                the model.
        """
        number = len(decoder_layers(replay))
        layers = existing("layers", range(number) if self.layers is None else self.layers, number)
        maps = image_flow(replay, layers, self.row, self.regularise_on, self.weigh_heads)
        return finished(replay, without_sinks(maps, sink_columns(replay, self.sinks, layers)))


def image_flow(
    replay: Replay,
    layers: list[int],
    row: str = "predict",
    regularise_on: str | None = "layer",
    weigh_heads: bool = True,
) -> Tensor:
    """The image columns of `flow`, `[B, t, n]`, in float32 (float64 where the model is).

    Args:
        replay: a prompt and its answers.
        layers: numbers of decoder layers, rising.
        row: see `query_places`.
        regularise_on: see `VLSAM`.
        weigh_heads: see `VLSAM`.

    Raises:
        ValueError: for another row or place, or a prompt without images.
    """
    _check_place(regularise_on)

    def step(here: Climb) -> Tensor:
        weights = here.peaks if weigh_heads else torch.ones_like(here.peaks)
        weights = weights / weights.shape[1]
        factor = 1 - (here.seen - 1) / here.lengths[:, None]
        scale = factor if regularise_on == "layer" else None
        if here.below is None:
            above = here.through(here.identity(), weights, scale)
        else:
            below = here.plus_identity(here.below)
            above = here.through(below, weights, scale).add_(here.wanted(below))
        if regularise_on == "flow":
            above.mul_(factor.gather(1, here.places.clamp(min=0))[:, None])
        return above

    return climb(replay, layers, row, lambda rows: rows.amax(-1), step)


def flow(
    attention: Tensor,
    seen: Tensor | None = None,
    regularise_on: str | None = "layer",
    weigh_heads: bool = True,
) -> Tensor:
    """The attention flow of one sample without padding, plainly.

    Args:
        attention: `[layers, heads, N, N]`, queries before keys.
        seen: bool `[layers, N, N]`: what each query sees; None: what has any attention in some head.
        regularise_on: `"layer"`, `"flow"` or None, see `VLSAM`.
        weigh_heads: see `VLSAM`.

    Returns:
        `[N, N]`: row i is what token i looks at.

    Raises:
        ValueError: for another place of the regularisation.
    """
    _check_place(regularise_on)
    length = attention.shape[-1]
    seen = (attention != 0).any(1) if seen is None else seen
    identity = torch.eye(length, dtype=attention.dtype, device=attention.device)
    total = None
    for rows, visible in zip(attention, seen, strict=True):
        weights = rows.amax(-1).mean(-1) if weigh_heads else rows.new_ones(len(rows))
        matrix = (rows * weights[:, None, None]).mean(0)
        factor = 1 - (visible.sum(0).to(rows) - 1) / length
        if regularise_on == "layer":
            matrix = matrix * factor
        total = matrix if total is None else (identity + matrix) @ (identity + total)
        if regularise_on == "flow":
            total = total * factor
    assert total is not None
    return total


def _check_place(place: str | None) -> None:
    if place not in REGULARISE:
        raise ValueError(f'regularise_on must be "layer", "flow" or None, got {place!r}')
