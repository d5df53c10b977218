"""Localization heads: the few heads of a model that look at what a text is about.

Kang et al. 2025, "Your Large Vision-Language Model Only Needs A Few Attention Heads For Visual Grounding",
CVPR 2025, arXiv:2503.06287. The map is the sum of the rows of three heads, smoothed. Which heads is found
once for a model, with `HeadSelector`; or, without any samples, for each prompt by the same criteria.

In the paper the row is that of the last prompt token, after a question about one object. With
`row="predict"` each token of an answer has its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from visionsel.multimodal.families import find_family
from visionsel.multimodal.grounding.heatmaps.head_selector import (
    HeadSelector,
    HeadStatistics,
    head_statistics,
    order_heads,
)
from visionsel.multimodal.grounding.heatmaps.rows import (
    check_row,
    decoder_layers,
    finished,
    image_rows,
    image_views,
)
from visionsel.multimodal.grounding.heatmaps.sinks import SinkFilter, sink_columns, without_sinks
from visionsel.multimodal.grounding.heatmaps.spatial import bend, blur
from visionsel.multimodal.grounding.replay import Replay

__all__ = ["LocalizationHeads", "choose_heads"]

Head = tuple[int, int]


@dataclass(frozen=True)
class LocalizationHeads:
    """The sum of the maps of some heads, smoothed on the grid of each picture.

    Args:
        heads: pairs of layer and head, all of which are taken; a `HeadSelector`; the name of a preset
            (`"embedded"`) or the path of a file that `HeadSelector.save` wrote; None: for each prompt those
            that pass the criteria on its own last row, which takes one more forward for other rows.
        k: how many heads, where they are not given one by one; the paper takes 3.
        row: which row is a token's: `"prompt"`, for all the last one of the prompt, as in the paper;
            `"predict"`, the one that predicts it; `"token"`, its own.
        sigma: of the Gaussian filter of 7 x 7 tokens, in tokens; 0: none.
        sinks: columns to leave out, before heads are chosen: `"hidden"`, `"border"`, `"median"`, or a filter
            of `sinks.py`.

    Raises:
        ValueError: for a value out of range, or heads that are none of this.
    """

    heads: tuple[Head, ...] | HeadSelector | str | None = None
    k: int = 3
    row: str = "prompt"
    sigma: float = 1.0
    sinks: str | SinkFilter | None = None
    reference: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        check_row(self.row)
        if self.k < 1 or not 0 <= self.sigma < float("inf"):
            raise ValueError(f"k must be at least 1 and sigma at least 0, got {self.k} and {self.sigma}")
        if isinstance(self.heads, Sequence) and not isinstance(self.heads, str):
            pairs = [tuple(pair) for pair in self.heads]
            if not pairs or any(len(pair) != 2 for pair in pairs) or len(set(pairs)) < len(pairs):
                raise ValueError(f"heads must be different pairs of layer and head, got {self.heads!r}")
            object.__setattr__(self, "heads", tuple(pairs))

    def __call__(self, replay: Replay, reference: Replay | None = None) -> Tensor:
        """Read a prompt and its answers.

        Args:
            replay: them.
            reference: is not looked at.

        Returns:
            float32 `[B, T, n]`: for each new token its map over the image tokens.

        Raises:
            ValueError: for heads that do not exist or are of another model, a prompt without images, or
                sinks that do not go with the model.
            FileNotFoundError: for a file of heads that there is not.
        """
        layers, given = decoder_layers(replay), self._given(replay)
        if given is not None:
            columns = sink_columns(replay, self.sinks, sorted({layer for layer, _ in given}))
            maps = _summed(replay, _weights(replay, [given] * len(replay.tokens)), self.row)
        else:
            columns = sink_columns(replay, self.sinks, range(len(layers)))
            seen = head_statistics(replay, columns)
            weights = _weights(replay, choose_heads(seen, self.k))
            if self.row == "prompt":  # they are at hand
                maps = torch.einsum("blhn,blh->bn", seen.maps, weights.to(seen.maps))[:, None]
            else:
                maps = _summed(replay, weights, self.row)
        maps = without_sinks(maps, columns)
        return finished(replay, maps if self.sigma == 0 else _smoothed(replay, maps, self.sigma))

    def _given(self, replay: Replay) -> tuple[Head, ...] | None:
        """The heads; None where each prompt has its own."""
        heads = self.heads
        if heads is None:
            return None
        if isinstance(heads, str):
            file = Path(heads)
            heads = HeadSelector.load(file) if file.suffix == ".json" else HeadSelector.preset(heads)
        if isinstance(heads, HeadSelector):
            heads.check(replay.model)
            return heads.best(self.k)
        return heads


def choose_heads(seen: HeadStatistics, k: int = 3) -> list[list[Head]]:
    """For each prompt the heads that pass the criteria of the paper on it alone, at most `k`.

    Args:
        seen: of its last row.
        k: how many; fewer where fewer pass.

    Raises:
        ValueError: for a prompt on which none does.
    """
    chosen = [
        order_heads(sums, entropy, bend(sums))[:k]
        for sums, entropy in zip(seen.sums, seen.entropy, strict=True)
    ]
    if not all(chosen):
        raise ValueError(
            f"no head passes the criteria on prompt {[bool(one) for one in chosen].index(False)}: its maps "
            "are flat or fill the bottom row; give heads, found over many samples with HeadSelector.fit"
        )
    return chosen


def _weights(replay: Replay, chosen: Sequence[Sequence[Head]]) -> Tensor:
    """`[B, layers, heads]`: 1 for the heads that are chosen for a row.

    Raises:
        ValueError: for heads that do not exist.
    """
    config = cast(Any, find_family(replay.model).decoder(replay.model)).config
    shape = len(decoder_layers(replay)), int(config.num_attention_heads)
    weights = torch.zeros(len(chosen), *shape)
    for row, pairs in enumerate(chosen):
        for layer, head in pairs:
            if not (0 <= layer < shape[0] and 0 <= head < shape[1]):
                raise ValueError(
                    f"head {head} of layer {layer} does not exist: the decoder has {shape[0]} layers of "
                    f"{shape[1]} heads, both counted from 0"
                )
            weights[row, layer, head] = 1
    return weights


def _summed(replay: Replay, weights: Tensor, row: str) -> Tensor:
    """`[B, t, n]`: rows of the heads of each answer, summed."""
    found: list[Tensor] = []

    def see(layer: int, rows: Tensor) -> None:
        part = torch.einsum("bhtn,bh->btn", rows, weights[:, layer].to(rows))
        found[:] = [found[0] + part.to(found[0].device)] if found else [part]

    image_rows(replay, see, weights.sum((0, 2)).nonzero()[:, 0].tolist(), row)
    return found[0]


def _smoothed(replay: Replay, maps: Tensor, sigma: float) -> Tensor:
    """Maps `[B, t, n]`, each grid by itself; 0 for tokens that are on no grid."""
    smooth = torch.zeros_like(maps)
    for row, views in enumerate(image_views(replay)):
        for view in views:
            index = view.to(maps.device)
            smooth[row][..., index] = blur(maps[row][..., index], sigma)
    return smooth
