"""V-Max: a rollout of attention whose heads weigh as much as they look at the image, against the background.

Han, Hyun et al. 2026, "Decomposed Attention Fusion in MLLMs for Training-Free Video Reasoning Segmentation"
(DecAF), ICLR 2026, arXiv:2510.19592; release HYUNJS/DecAF.

1. A head weighs as much as its queries look at one image token: the maximum over the image, in the mean over
   all queries of the prompt, and this divided by that of the heaviest head.
2. The weighted heads of a layer are averaged, and half of this and half of the identity are the layer's
   matrix. The product of the upper half of the layers is the rollout.
3. Of its maps the ones that the same images have under a prompt about the background are subtracted; what is
   left above 0 is stretched to 0 to 1.

The authors read the last token of the prompt, `row="prompt"` here, and of videos fuse the maps of whole clips
and of frames, which is left out; they name the object in the prompt about the background, where it is known.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visionsel.multimodal.grounding.heatmaps.propagation import Climb, climb
from visionsel.multimodal.grounding.heatmaps.rows import (
    check_row,
    decoder_layers,
    existing,
    finished,
    image_columns,
    image_views,
)
from visionsel.multimodal.grounding.heatmaps.sinks import SinkFilter, sink_columns, without_sinks
from visionsel.multimodal.grounding.heatmaps.spatial import blur
from visionsel.multimodal.grounding.replay import Replay

__all__ = ["VMax", "contrasted", "image_rollout", "rollout"]

BACKGROUND = "Describe the background scene of the image."


@dataclass(frozen=True)
class VMax:
    """The rollout of attention to the image, less what the background has of it.

    It is exact, in float32 (float64 where the model is), and makes no `[heads, N, N]`; `propagation.py` says
    what memory it takes.

    Args:
        layers: numbers of the decoder layers, negative ones count from the last; None: the upper half, as
            in the paper (14 to 27 of 28).
        row: which row is a token's: `"predict"`, the one that predicts it; `"token"`, its own; `"prompt"`,
            for all the last one of the prompt, as in the paper.
        contrast: subtract the maps of a reference, where one is given. When False, none is asked for
            (`reference` is None).
        sigma: of the Gaussian filter of 7 x 7 tokens for each map before they are subtracted, in tokens, as
            in the release for images; 0: none, which points better on grids of few tokens.
        sinks: columns to leave out, before maps are smoothed: `"hidden"`, `"border"`, `"median"`, or a filter
            of `sinks.py`.

    Raises:
        ValueError: for another row, or a sigma below 0.
    """

    layers: tuple[int, ...] | None = None
    row: str = "predict"
    contrast: bool = True
    sigma: float = 1.0
    sinks: str | SinkFilter | None = None
    reference: ClassVar[str | None] = BACKGROUND

    def __post_init__(self) -> None:
        check_row(self.row)
        if not 0 <= self.sigma < float("inf"):
            raise ValueError(f"sigma must be at least 0 tokens, got {self.sigma}")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        if not self.contrast:
            object.__setattr__(self, "reference", None)

    def __call__(self, replay: Replay, reference: Replay | None = None) -> Tensor:
        """Read a prompt and its answers, and the prompt about the background.

        Args:
            replay: the prompt and its answers.
            reference: the same images under the prompt `reference` with any answer, of which only the last
                row of the prompt is read; for each answer, or for each prompt of several answers. None: the
                rollout as it is.

        Returns:
            float32 `[B, T, n]`: for each new token its map over the image tokens; from 0 to 1 with contrast.

        Raises:
            ValueError: for a reference of other images, layers that do not exist, a prompt without images,
                or sinks that do not go with the model.
        """
        number = len(decoder_layers(replay))
        layers = existing(
            "layers", range(number // 2, number) if self.layers is None else self.layers, number
        )
        sinks = sink_columns(replay, self.sinks, layers)
        maps = self._maps(replay, layers, self.row, sinks)
        if reference is not None and self.contrast:
            copies = _same_images(replay, reference)
            first = None if sinks is None else sinks[::copies]
            below = self._maps(reference, layers, "prompt", first).repeat_interleave(copies, 0)
            real = (replay.image >= 0).to(maps.device)[:, None]
            maps = contrasted(maps, below.to(maps.device), real)
        return finished(replay, maps)

    def _maps(self, replay: Replay, layers: list[int], row: str, sinks: Tensor | None) -> Tensor:
        """The rollout `[B, t, n]`, without sinks, smoothed."""
        maps = without_sinks(image_rollout(replay, layers, row), sinks)
        if self.sigma == 0:
            return maps
        smooth = torch.zeros_like(maps)  # tokens that are on no grid have none
        for sample, views in enumerate(image_views(replay)):
            for view in views:
                index = view.to(maps.device)
                smooth[sample][:, index] = blur(maps[sample][:, index], self.sigma)
        return smooth


def image_rollout(replay: Replay, layers: list[int], row: str = "predict") -> Tensor:
    """The image columns of `rollout`, `[B, t, n]`, in float32 (float64 where the model is).

    Args:
        replay: a prompt and its answers.
        layers: numbers of decoder layers, rising.
        row: see `query_places`.

    Raises:
        ValueError: for another row, or a prompt without images.
    """

    def peak(rows: Tensor) -> Tensor:
        return image_columns(replay, rows).amax(-1)

    def step(here: Climb) -> Tensor:
        heaviest = here.peaks.amax(1, keepdim=True).clamp(min=torch.finfo(here.peaks.dtype).tiny)
        weights = here.peaks / heaviest / here.peaks.shape[1]
        below = here.identity() if here.below is None else here.below
        return here.through(below, weights).add_(here.wanted(below)).div_(2)

    return climb(replay, layers, row, peak, step, answer=False)


def _same_images(replay: Replay, reference: Replay) -> int:
    """How many answers of the replay go with each of the reference.

    Raises:
        ValueError: when they are of other images.
    """
    sizes, others = (replay.image >= 0).sum(1).tolist(), (reference.image >= 0).sum(1).tolist()
    copies = len(sizes) // len(others)
    if sizes != [other for other in others for _ in range(copies)]:
        raise ValueError(
            f"the reference is of other images: image tokens {others} beside {sizes}; replay the same images "
            "in the same order"
        )
    return copies


def rollout(attention: Tensor, image: Tensor, prompt: int | None = None) -> Tensor:
    """The rollout of one sample without padding, plainly.

    Args:
        attention: `[layers, heads, N, N]`, queries before keys, of the layers that count.
        image: bool `[N]`: the image tokens.
        prompt: how many tokens are the prompt; None: all.

    Returns:
        `[N, N]`: row i is what token i looks at.
    """
    total = torch.eye(attention.shape[-1], dtype=attention.dtype, device=attention.device)
    identity = total
    for rows in attention:
        weights = rows[:, :prompt, image].amax(-1).mean(-1)
        matrix = (rows * (weights / weights.amax())[:, None, None]).mean(0)
        total = (0.5 * matrix + 0.5 * identity) @ total
    return total


def contrasted(maps: Tensor, background: Tensor, real: Tensor) -> Tensor:
    """What maps have more than those of the background, from 0 to 1.

    Args:
        maps: `[..., n]`.
        background: broadcasts to it.
        real: bool, broadcasts to it: the columns that count; others are 0.

    Returns:
        `[..., n]`; 0 where the background has more everywhere.
    """
    more = (maps - background).clamp(min=0)
    low = more.masked_fill(~real, torch.inf).amin(-1, keepdim=True)
    high = more.masked_fill(~real, -torch.inf).amax(-1, keepdim=True)
    span = high - low
    return torch.where(real & (span > 0), (more - low) / span.masked_fill(span <= 0, 1), 0)
