"""What a grounder answers: words, each with what the model looked at, and the mask of it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from visionsel.data.shapes.masks import encode_rle
from visionsel.multimodal.grounding.proposals import Proposal, attention_consistency
from visionsel.viz import OKABE_ITO, draw_boxes, draw_points, enlarge, overlay_heatmap, overlay_masks

__all__ = ["Box", "Grounding", "Word"]

Box = tuple[int, int, int, int]


@dataclass(frozen=True, eq=False)
class Word:
    """A word of an answer, or an expression, on the image.

    Nothing is made before it is asked for; heatmap and mask are made each time and not held.

    Attributes:
        text: as the answer has it.
        span: its first character in the answer and one past its last.
        prob: the probability that the model gave it.
        name: of the object, in lower case or as a list of names has it; None for words that name nothing.
        heat: gives float32 `[h, w]`: what the model looked at, in pixels of the window.
        image: in RGB, upright.
        propose: gives the mask that was made of it; None where nothing stands out in it.
        window: the part of the image that the model saw, (x0, y0, x1, y1); None: all.
        consistency: threshold of the attention consistency that joins the score; None: it does not.
    """

    text: str
    span: tuple[int, int]
    prob: float
    name: str | None
    heat: Callable[[], np.ndarray]
    image: Image.Image
    propose: Callable[[], Proposal | None]
    window: Box | None = None
    consistency: float | str | None = None

    @property
    def heatmap(self) -> np.ndarray:
        """float32 `[H, W]`: what the model looked at, in pixels of the image; 0 outside of the window."""
        return self._placed(self.heat())

    @cached_property
    def proposal(self) -> Proposal | None:
        """What the segmenter said, in pixels of the window."""
        return self.propose()

    @property
    def points(self) -> np.ndarray:
        """float32 `[P, 2]`: (x, y) in pixels that the segmenter was shown, the positive first."""
        if self.proposal is None:
            return np.zeros((0, 2), dtype=np.float32)
        shift = np.array((self.window or (0, 0))[:2], dtype=np.float32)
        moved: np.ndarray = self.proposal.prompt.points + shift
        return moved

    @property
    def labels(self) -> np.ndarray:
        """int64 `[P]` of the points: 1 inside, 0 outside."""
        return np.zeros(0, dtype=np.int64) if self.proposal is None else self.proposal.prompt.labels

    @property
    def mask(self) -> np.ndarray:
        """bool `[H, W]`; empty where nothing stands out."""
        if self.proposal is None:
            return np.zeros((self.image.height, self.image.width), dtype=bool)
        return self._placed(self.proposal.mask())

    @cached_property
    def box(self) -> Box | None:
        """(x0, y0, x1, y1) around the mask, the last two one past the end; None for an empty mask."""
        mask = self.mask
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            return None
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1

    @cached_property
    def score(self) -> float:
        """The IoU that the segmenter predicts times the word's probability; 0 for an empty mask."""
        if self.proposal is None or self.box is None:
            return 0.0
        score = self.proposal.iou * self.prob
        if self.consistency is not None:
            score *= attention_consistency(self.mask, self.heatmap, self.consistency)
        return score

    def plot(self, scale: int = 1, legend: bool = True) -> Image.Image:
        """The heatmap over the image, and the points: filled where inside, hollow where outside.

        Args:
            scale: how many times as wide and high as the image.
            legend: a strip below it says what the colours mean.
        """
        heatmap = self.heatmap.repeat(scale, 0).repeat(scale, 1)
        heated = overlay_heatmap(enlarge(self.image, scale), heatmap, legend=legend)
        points = (self.points + 0.5) * scale - 0.5
        return draw_points(heated, points.tolist(), self.labels.tolist())

    def __repr__(self) -> str:
        return f"Word({self.text!r}, span={self.span}, prob={self.prob:.3g})"

    def _placed(self, inside: np.ndarray) -> np.ndarray:
        """A map of the window on the whole image."""
        if self.window is None:
            return inside
        x0, y0, x1, y1 = self.window
        whole = np.zeros((self.image.height, self.image.width), dtype=inside.dtype)
        whole[y0:y1, x0:x1] = inside
        return whole


@dataclass(frozen=True, eq=False)
class Grounding:
    """An answer about an image, word by word.

    Attributes:
        answer: the text.
        words: of `ask`, all words of the answer in order; of `detect`, the objects, the surest first.
        image: in RGB, upright.
    """

    answer: str
    words: list[Word]
    image: Image.Image

    @property
    def objects(self) -> list[Word]:
        """The words that name something."""
        return [word for word in self.words if word.name is not None]

    def to_coco(
        self,
        image_id: int = 1,
        categories: Mapping[str, int] | None = None,
        words: Sequence[Word] | None = None,
    ) -> list[dict[str, Any]]:
        """Results in COCO's format, as JSON takes them: `pycocotools`' `loadRes` reads them.

        Args:
            image_id: of this image.
            categories: ids by name; None: numbered from 1 in the order of the names in this answer, which
                does for one image only.
            words: None: the objects. Those with empty masks are left out, for COCO has no such results.

        Returns:
            for each word `image_id`, `category_id`, `segmentation` (compressed run lengths), `bbox` (x, y,
            width, height), `area`, `score`, and beyond the format `name` and `text`.

        Raises:
            ValueError: for a name that has no category.
        """
        found = [word for word in (self.objects if words is None else words) if word.box is not None]
        if categories is None:
            names = dict.fromkeys(_label(word) for word in found)
            categories = {name: number for number, name in enumerate(names, 1)}
        results = []
        for word in found:
            name = _label(word)
            if name not in categories:
                raise ValueError(f"{name!r} is none of the categories {', '.join(categories)}")
            assert word.box is not None
            mask, (x0, y0, x1, y1) = word.mask, word.box
            results.append(
                {
                    "image_id": image_id,
                    "category_id": categories[name],
                    "segmentation": encode_rle(mask),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "score": word.score,
                    "name": name,
                    "text": word.text,
                }
            )
        return results

    def plot(self, words: Sequence[Word] | None = None, alpha: float = 0.5, scale: int = 1) -> Image.Image:
        """The image with masks, boxes and names.

        Args:
            words: None: the objects, which keep their colours when they are drawn alone. Colours repeat after
                the seventh.
            alpha: share of the colours of masks.
            scale: how many times as wide and high as the image; names want some 200 pixels.
        """
        shown = [word for word in (self.objects if words is None else words) if word.box is not None]
        palette = list(OKABE_ITO.values())
        known = [id(word) for word in self.objects if word.box is not None]
        known += [id(word) for word in shown if id(word) not in known]
        colors = [palette[known.index(id(word)) % len(palette)] for word in shown]
        masks = [word.mask.repeat(scale, 0).repeat(scale, 1) for word in shown]
        picture = overlay_masks(enlarge(self.image, scale), masks, colors, alpha)
        boxes = [[side * scale for side in word.box] for word in shown if word.box is not None]
        return draw_boxes(picture, boxes, colors, [word.text for word in shown])

    def __repr__(self) -> str:
        names = Counter(_label(word) for word in self.objects)
        said = ", ".join(f"{number} {name}" if number > 1 else name for name, number in names.items())
        return f"Grounding({self.answer!r}, objects: {said or 'none'})"


def _label(word: Word) -> str:
    return word.text.lower() if word.name is None else word.name
