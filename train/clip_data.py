"""Scenes as the training of the small CLIP sees them: images, texts, and what is true of them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.shapes_data import ShapesStreamData
from visionsel.data.shapes import COLORS, SHAPES, SIZES, Sample, ShapesWorld
from visionsel.embedded.clip import PREPROCESSING, ClipTokenizer
from visionsel.embedded.clip_quality import Phrase, choose_phrase, phrase_text, quality_texts, wrong_caption

__all__ = ["CLASSES", "ClipData", "pairs_present", "truth_of_phrases"]

_PARTS = (SIZES, COLORS, SHAPES)
CLASSES = [1 + len(words) for words in _PARTS]  # 0 is the background


class ClipData(ShapesStreamData):
    """Images with captions, wrong captions and phrases.

    Args:
        batch_size: on each device.
        epoch_size: scenes of an epoch, on all devices together.
        val_size: scenes of each validation world; retrieval is among 100 of them in turn.
        image_size: pixels a side.
        train_share: share of the "train" distribution; the rest is "balanced".
        max_objects: of the "balanced" scenes.
        easy_epochs: the first epochs, in which all scenes are "balanced" with few objects: words are learned
            from scenes that show little else.
        easy_objects: the most objects of these scenes.
        wrong_kinds: how often the wrong word of a caption is a color, shape, size, background.
        grid: points a side of the dense targets; it divides `image_size`.
        context_length: of the texts, linked to the model's.
        num_workers: processes that make samples on each device; 0 makes them in the main process.
        seed: of the run.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        batch_size: int = 64,
        epoch_size: int = 6400,
        val_size: int = 200,
        image_size: int = 64,
        train_share: float = 0.3,
        max_objects: int = 6,
        easy_epochs: int = 0,
        easy_objects: int = 1,
        wrong_kinds: tuple[float, float, float, float] = (0.4, 0.4, 0.1, 0.1),
        grid: int = 16,
        context_length: int = 40,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if easy_epochs < 0:
            raise ValueError(f"easy_epochs must be at least 0, got {easy_epochs}")
        if not 1 <= easy_objects <= max_objects:
            raise ValueError(f"easy_objects must be from 1 to max_objects {max_objects}, got {easy_objects}")
        self.easy_epochs = easy_epochs
        self.easy_objects = easy_objects
        super().__init__(
            batch_size, epoch_size, val_size, image_size, train_share, max_objects, num_workers, seed
        )
        if min(wrong_kinds) < 0 or abs(sum(wrong_kinds) - 1) > 1e-6:
            raise ValueError(f"wrong_kinds must be probabilities with sum 1, got {wrong_kinds}")
        if grid < 1 or image_size % grid:
            raise ValueError(f"grid must divide image_size {image_size}, got {grid}")
        self.wrong_kinds = wrong_kinds
        self.grid = grid
        self.tokenizer = ClipTokenizer(context_length)

    def world(self, distribution: str, seed: int, epoch: int | None = None) -> ShapesWorld:
        """An endless world; of few objects in the easy epochs."""
        if epoch is not None and epoch < self.easy_epochs:
            objects = self.easy_objects
            return ShapesWorld("balanced", seed, 2**32 - 1, self.image_size, max_objects=objects)
        return super().world(distribution, seed, epoch)

    def make(self, sample: Sample, generator: np.random.Generator, epoch: int) -> dict[str, Any]:
        """One scene; in validation its texts are those of `measure_clip`."""
        mean, std = (np.array(PREPROCESSING[name], dtype=np.float32) for name in ("mean", "std"))
        pixels = (sample.pixels.astype(np.float32) / 255 - mean) / std
        item: dict[str, Any] = {"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy())}
        if epoch < 0:
            return item | {"texts": quality_texts(sample, generator)}
        caption = sample.captions[generator.integers(2)]
        kind = generator.choice(["color", "shape", "size", "background"], p=self.wrong_kinds)
        right, wrong = choose_phrase(sample.objects, generator)
        item["texts"] = {
            "right": caption,
            "caption_wrong": wrong_caption(caption, str(kind), generator),
            "phrase": phrase_text(right),
            "wrong": phrase_text(wrong),
        }
        codes = np.array([_codes((o.size, o.color, o.shape)) for o in sample.objects])
        item["objects"] = torch.zeros(6, 3, dtype=torch.int64)
        item["objects"][: len(codes)] = torch.from_numpy(codes)
        item["phrases"] = torch.tensor([_codes(right), _codes(wrong)])
        step = sample.labels.shape[0] // self.grid
        points = sample.labels[step // 2 :: step, step // 2 :: step]
        table = np.concatenate([np.zeros((1, 3), dtype=np.int64), codes])
        item["dense"] = torch.from_numpy(table[points].transpose(2, 0, 1).copy())
        return item

    def collate(self, items: list[Any]) -> dict[str, Any]:
        """`make`'s tensors stacked, and `{name: ids [B, context_length]}` of the texts."""
        lines = [item.pop("texts") for item in items]
        batch = super().collate(items)
        batch["texts"] = {name: self.tokenizer([line[name] for line in lines]) for name in lines[0]}
        return batch


def _codes(phrase: Phrase) -> list[int]:
    """Size, colour and shape counted from 1; 0 is not said."""
    return [0 if word is None else 1 + words.index(word) for words, word in zip(_PARTS, phrase, strict=True)]


def truth_of_phrases(phrases: Tensor, objects: Tensor) -> Tensor:
    """Which phrase is true of which image.

    Args:
        phrases: int64 `[P, 3]`: size, colour and shape counted from 1; 0 is not said.
        objects: int64 `[B, 6, 3]`, likewise; an object that is not there is all 0.

    Returns:
        bool `[P, B]`.
    """
    asked = phrases[:, None, None]
    fits = ((asked == objects) | (asked == 0)).all(-1)
    return (fits & (objects[..., 0] > 0)).any(-1)


def pairs_present(objects: Tensor) -> Tensor:
    """Which pairs of colour and shape a scene has: objects as above -> bool `[B, colours x shapes]`."""
    pair = (objects[..., 1] - 1) * len(SHAPES) + objects[..., 2] - 1
    pairs = torch.arange(len(COLORS) * len(SHAPES), device=objects.device)
    return (pair[..., None] == pairs).any(1)
