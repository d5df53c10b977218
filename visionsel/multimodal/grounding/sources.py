"""Where heatmaps and masks of words come from: attention and a segmenter, or a trained head.

A source has `heats(mentions)`, for each a function that gives its heatmap, and `segment(mentions, heats)`,
for each the proposals of all rounds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visionsel.multimodal.grounding.heatmaps import HEATMAPS
from visionsel.multimodal.grounding.mask_head import MaskHead
from visionsel.multimodal.grounding.prompts import sample_prompt
from visionsel.multimodal.grounding.proposals import KINDS, Heat, Proposal, best_proposal, propose
from visionsel.multimodal.grounding.reading import Method, ReadBatch, Reading
from visionsel.multimodal.grounding.segmenters import Segmenter
from visionsel.multimodal.intervention import parse
from visionsel.multimodal.shipped import shipped

__all__ = ["FromAttention", "FromHead", "Mention", "Source", "later", "read_heatmap"]

HEAD = "mask_head"
Propose = Callable[[], Proposal | None]


@dataclass(frozen=True, eq=False)
class Mention:
    """Some tokens of an answer that stand for one thing.

    Attributes:
        reading: of the answer.
        tokens: numbers of its new tokens; there may be none.
        image: that is segmented, in RGB, of the size of the one that the model saw.
    """

    reading: Reading
    tokens: tuple[int, ...]
    image: Image.Image


class Source(Protocol):
    """See the top of the file."""

    @property
    def method(self) -> Method | None:
        """Of the heatmaps that a reading needs; None: none."""

    def heats(self, mentions: Sequence[Mention]) -> list[Heat]:
        """Functions that give heatmaps, float32 `[H, W]`, one a mention."""

    def segment(self, mentions: Sequence[Mention], heats: Sequence[Heat]) -> list[list[Proposal]]:
        """Proposals, for each mention those of all rounds; none where nothing stands out."""


@dataclass(frozen=True, eq=False)
class FromAttention:
    """Maps of a heatmap method, and masks that a segmenter makes of their points and boxes.

    Args:
        method: of heatmaps.
        segmenter: None: there are no masks.
        prompts, threshold, refine: see `propose`.
        merge: of the maps of tokens, `"mean"` or `"max"`.

    Raises:
        ValueError: for an unknown value.
    """

    method: Method
    segmenter: Segmenter | None
    prompts: str
    threshold: float | str
    refine: Sequence[str]
    merge: str

    def __post_init__(self) -> None:
        for name, value, choice in (("prompts", self.prompts, KINDS), ("merge", self.merge, ("mean", "max"))):
            if value not in choice:
                raise ValueError(f"{name} must be one of {', '.join(choice)}, got {value!r}")

    def heats(self, mentions: Sequence[Mention]) -> list[Heat]:
        """Each map is put on the pixels when it is asked for."""
        return [partial(self._heat, mention) for mention in mentions]

    def segment(self, mentions: Sequence[Mention], heats: Sequence[Heat]) -> list[list[Proposal]]:
        """Mentions in one image go to the segmenter together.

        Raises:
            RuntimeError: without a segmenter.
        """
        if self.segmenter is None:
            raise RuntimeError("this grounder has no segmenter, so it has heatmaps but no masks")
        found: list[list[Proposal]] = []
        pairs = zip(mentions, heats, strict=True)
        for _, group in groupby(pairs, key=lambda pair: id(pair[0].image)):
            members = list(group)
            self.segmenter.set_image(members[0][0].image)
            own = [heat for _, heat in members]
            found += propose(self.segmenter, own, self.prompts, self.threshold, self.refine)
        return found

    def _heat(self, mention: Mention) -> np.ndarray:
        reading = mention.reading
        return reading.grid.rasterize(reading.merged(mention.tokens, self.merge)).numpy()


@dataclass(frozen=True, eq=False)
class FromHead:
    """Masks of a `MaskHead`: heatmaps are its coarse masks, and its refiner has the last word, if it has one.

    Args:
        head: trained for the model.
        threshold: of the points that are reported.
    """

    head: MaskHead
    threshold: float | str
    method: Method | None = field(default=None, init=False)

    def heats(self, mentions: Sequence[Mention]) -> list[Heat]:
        """Probabilities of the U-Net; all are made when the first is asked for."""
        coarse = cache(lambda: self._logits(mentions, refined=False))
        return [partial(_probability, coarse, row, mention.image) for row, mention in enumerate(mentions)]

    def segment(self, mentions: Sequence[Mention], heats: Sequence[Heat]) -> list[list[Proposal]]:
        """One proposal a mention; the quality of its mask is the mean probability of its pixels."""
        logits = self._logits(mentions, refined=self.head.refiner is not None)
        found: list[list[Proposal]] = []
        for one, heat in zip(logits, heats, strict=True):
            prompt = None if one is None else sample_prompt(heat(), self.threshold)
            if one is None or prompt is None:
                found.append([])
                continue
            inside = one > 0
            sure = float(one[inside].sigmoid().mean()) if bool(inside.any()) else 0.0
            found.append([Proposal(sure, prompt, partial(_as_array, one))])
        return found

    def _logits(self, mentions: Sequence[Mention], refined: bool) -> list[Tensor | None]:
        """For each mention logits `[H, W]`; None without tokens."""
        found: list[Tensor | None] = [None] * len(mentions)
        numbers = [number for number, mention in enumerate(mentions) if mention.tokens]
        batches = {number: cast(ReadBatch, mentions[number].reading.batch) for number in numbers}
        for batch in {id(one): one for one in batches.values()}.values():
            own = [number for number in numbers if batches[number] is batch]
            words: list[list[tuple[int, ...]]] = [[] for _ in batch.grids]
            images, places = list(batch.images), []
            for number in own:
                mention = mentions[number]
                row = mention.reading.row
                images[row] = mention.image
                places.append((row, len(words[row])))
                words[row].append(mention.tokens)
            masks = self.head.predict(batch.replay, words, batch.grids, images if refined else None)
            for number, (row, place) in zip(own, places, strict=True):
                found[number] = masks[row][place].float().cpu()
        return found


def later(source: Source, mentions: Sequence[Mention]) -> list[tuple[Heat, Propose]]:
    """For each mention its heatmap and its best proposal; all masks are made when one is asked for.

    Args:
        source: of them.
        mentions: that are segmented together.
    """
    heats = source.heats(mentions)
    every = cache(lambda: source.segment(mentions, heats))
    return [(heat, partial(_best, every, row)) for row, heat in enumerate(heats)]


def read_heatmap(heatmap: Any) -> Method | MaskHead:
    """A heatmap method or a mask head: by name with options as text (`"mean:layers=(2,)"`), or as it is.

    Raises:
        TypeError: for what is neither text nor callable.
        ValueError: for an unknown method or hyperparameter.
    """
    if heatmap == HEAD:
        head: MaskHead = shipped("load_mask_head")
        return head
    if isinstance(heatmap, str):
        return cast(Method, parse(heatmap, HEATMAPS))
    if not callable(heatmap) or isinstance(heatmap, type):
        raise TypeError(
            f"heatmap is a name such as 'mean' or a method such as Mean(), got {heatmap!r}"
            + ("; call it first to make one" if isinstance(heatmap, type) else "")
        )
    return cast(Method | MaskHead, heatmap)


def _best(every: Callable[[], list[list[Proposal]]], row: int) -> Proposal | None:
    return best_proposal(every()[row])


def _probability(logits: Callable[[], Sequence[Tensor | None]], row: int, image: Image.Image) -> np.ndarray:
    one = logits()[row]
    if one is None:
        return np.zeros((image.height, image.width), dtype=np.float32)
    return _as_array(torch.sigmoid(one))


def _as_array(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.numpy()
    return array
