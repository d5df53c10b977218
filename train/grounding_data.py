"""Words and the pixels that they mean: captions and expressions of the shapes world, or of folders.

A `Text` is one prompt about one image: a caption with some of its words, or a referring expression.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from train.shapes_data import ShapesStreamData, _Fixed
from visionsel.data.narratives import Narrative, read_narratives
from visionsel.data.refcoco import Reference, read_references
from visionsel.data.shapes import Sample
from visionsel.embedded.mask_head import caption_spans

__all__ = ["Text", "WordData"]

Source = Sample | Reference | Narrative


class Text(NamedTuple):
    """What is said about an image, and the masks of what it means.

    Attributes:
        image: uint8 `[H, W, 3]`.
        text: a caption, or a referring expression.
        spans: characters of the caption's words; None for an expression, which is one word.
        masks: bool `[words, H, W]`.
    """

    image: np.ndarray
    text: str
    spans: list[tuple[int, int]] | None
    masks: np.ndarray


class WordData(ShapesStreamData):
    """Batches of `Text`s.

    Without folders: fresh scenes of the shapes world, each with its caption, of whose every mention one word
    or all of them is asked for, and with some of its referring expressions.

    Args:
        expressions: of a training scene, at most; validation has three.
        refcoco: folders in the format of RefCOCO, see `visionsel.data.refcoco`; one sentence is a sample.
        refs: the file of refs of each of these folders, where they hold several.
        sentences: `"all"` or only the `"first"` of each ref in training; validation has the first (F-LMM).
        narratives: folder of Panoptic Narrative Grounding; one narrative is a sample.
        images: folders in which the images of refcoco and narratives are looked for by their names.
        train_split, val_split: of refcoco; narratives have train2017 alone.
        batch_size: of scenes, sentences and narratives.
        epoch_size: of scenes; folders have their own.
        val_size: of scenes, or the most of the sentences in the folders.
        image_size, train_share, max_objects, num_workers, seed: see `ShapesStreamData`.

    Raises:
        FileNotFoundError: when a folder lacks a file.
        ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        batch_size: int = 8,
        epoch_size: int = 1600,
        val_size: int = 64,
        image_size: int = 64,
        expressions: int = 3,
        refcoco: list[str] | None = None,
        refs: list[str] | None = None,
        sentences: str = "all",
        narratives: str | None = None,
        images: list[str] | None = None,
        train_split: str = "train",
        val_split: str = "val",
        train_share: float = 0.2,
        max_objects: int = 6,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if expressions < 1:
            raise ValueError(f"expressions must be at least 1, got {expressions}")
        self.expressions, self.images = expressions, [Path(folder) for folder in images or ()]
        self.sources: list[Source] = []
        self.held_out: list[Source] = []
        if narratives is not None and not refcoco:
            raise ValueError("narratives have no validation split here; give refcoco folders beside them")
        if refcoco:
            if not self.images:
                raise ValueError("refcoco and narratives need images, the folders of COCO's")
            if lost := [folder for folder in self.images if not folder.is_dir()]:
                raise FileNotFoundError(f"there is no folder of images {lost[0]}")
            if refs is not None and len(refs) != len(refcoco):
                raise ValueError(f"{len(refs)} refs for {len(refcoco)} folders of refcoco; give one for each")
            files: Sequence[str | None] = refs or [None] * len(refcoco)
            for folder, file in zip(refcoco, files, strict=True):
                self.sources += read_references(folder, train_split, sentences, file)
                self.held_out += read_references(folder, val_split, "first", file)
            if narratives is not None:
                self.sources += read_narratives(narratives, "train2017")
            self.held_out = self.held_out[:val_size]
            epoch_size, val_size = len(self.sources), len(self.held_out)
        super().__init__(
            batch_size, epoch_size, val_size, image_size, train_share, max_objects, num_workers, seed
        )

    def scene(self, epoch: int, index: int) -> Any:
        """A scene, or a sample of the folders."""
        return self.sources[index] if self.sources else super().scene(epoch, index)

    def make(self, sample: Source, generator: np.random.Generator, epoch: int) -> list[Text]:
        """The texts of a scene, a sentence or a narrative."""
        if isinstance(sample, Reference):
            return [Text(self._open(sample.file_name), sample.text, None, sample.mask()[None])]
        if isinstance(sample, Narrative):
            spans = [phrase.span for phrase in sample.phrases]
            masks = np.stack(sample.masks())
            return [Text(self._open(sample.file_name), sample.caption, spans, masks)]
        spans = [
            (end - len(o.shape), end) if epoch < 0 else _part((start, end), o.color, o.shape, generator)
            for o, (start, end) in zip(sample.objects, caption_spans(sample), strict=True)
        ]
        masks = np.stack([o.mask for o in sample.objects])
        texts = [Text(sample.pixels, sample.captions[0], spans, masks)]
        known = sample.expressions
        for number in generator.permutation(len(known))[: self.expressions if epoch >= 0 else 3]:
            mask = sample.objects[known[number].object].mask
            texts.append(Text(sample.pixels, known[number].text, None, mask[None]))
        return texts

    def collate(self, items: list[list[Text]]) -> list[Text]:
        """One list: the processor of the model makes tensors of it."""
        return [text for texts in items for text in texts]

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Scenes of the "balanced" distribution, or the first sentences of the folders' validation splits."""
        if not self.held_out:
            return super().val_dataloader()[1:]
        fixed: Any = self.held_out
        return [DataLoader(_Fixed(self, fixed), self.batch_size, shuffle=False, **self.loading())]

    def _open(self, name: str) -> np.ndarray:
        path = next((folder / name for folder in self.images if (folder / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"there is no image {name} in {', '.join(map(str, self.images))}")
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))


def _part(span: tuple[int, int], color: str, shape: str, generator: np.random.Generator) -> tuple[int, int]:
    """All of `small red ring`, or half of the time the ring alone, or its colour."""
    end = span[1]
    ring = end - len(shape)
    choices: Sequence[tuple[int, int]] = (span, (ring, end), (ring, end), (ring - 1 - len(color), ring - 1))
    return choices[int(generator.integers(4))]
