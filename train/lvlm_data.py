"""Conversations about scenes of the shapes world, packed so that one image serves all of them.

A sequence is `<s> image tokens`, then turns `<user> question <assistant> answer </s>`, the caption first.
Each turn sees the image and itself only, at the positions that it would have alone; in a share of the samples
the turns are one dialogue and see what came before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.shapes_data import ShapesStreamData, training_seed
from visionsel.data.shapes import (
    CAPTION_PROMPT,
    COLORS,
    SHAPES,
    Question,
    Sample,
    ShapesWorld,
    split_words,
)
from visionsel.data.shapes.language import vocabulary
from visionsel.embedded.tokenizer import ASSISTANT, BEGIN, END, IMAGE, SPECIAL, USER

__all__ = ["KINDS", "LVLMData", "Stage", "dense_targets"]

KINDS = ("exist", "color", "absent", "count", "where", "what", "relation", "refer")
IGNORED = -100
PADDING = -1  # the turn of a padding token


@dataclass
class Stage:
    """A part of the curriculum.

    Attributes:
        epochs: its length.
        lr: peak learning rate of the matrices (Muon); warmed up over `warmup` of the stage, then a cosine to
            `final` of it.
        text: train on captions and questions; without, only the tower and its auxiliary heads.
        caption_noise, co_occurrence: of the training scenes, see `ShapesWorld`.
        train_share: share of the "train" distribution in the scenes.
        blind: share of the samples whose words do not see the image in the first layer of the Llama. That
            layer knows a word but not what came before it: it looks for "red", and finds the wrong one of two
            red objects. Blind, the model learns to look where it knows which one is meant.
        questions: number of questions an image.
        kinds: how often each kind of question is drawn; kinds that are left out have weight 1.
    """

    epochs: int
    lr: float = 4e-3
    warmup: float = 0.05
    final: float = 0.02
    text: bool = True
    caption_noise: float = 0.0
    co_occurrence: float = 0.8
    train_share: float = 0.5
    blind: float = 0.0
    questions: int = 8
    kinds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"a stage has at least one epoch, got {self.epochs}")
        if not 0 <= self.blind <= 1:
            raise ValueError(f"blind is a share from 0 to 1, got {self.blind}")
        if unknown := set(self.kinds) - set(KINDS):
            raise ValueError(f"unknown kinds of questions {sorted(unknown)}; there are {', '.join(KINDS)}")


class LVLMData(ShapesStreamData):
    """Packed conversations for `train.lvlm`.

    Args:
        stages: the curriculum; its scenes and questions are those of the epoch's stage.
        patch_size: pixels a side of an image token.
        dialogue: share of the samples whose turns see the turns before.
        cover: a patch shows the object that covers more of it than this; every object has one patch at least.
        batch_size, epoch_size, val_size, image_size, num_workers, seed: see `ShapesStreamData`.
    """

    def __init__(
        self,
        stages: list[Stage],
        patch_size: int = 8,
        dialogue: float = 0.1,
        cover: float = 0.4,
        batch_size: int = 32,
        epoch_size: int = 3200,
        val_size: int = 200,
        image_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, epoch_size, val_size, image_size, 0.0, 6, num_workers, seed)
        if not stages:
            raise ValueError("give at least one stage")
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        self.stages = stages
        self.patch_size = patch_size
        self.dialogue = dialogue
        self.cover = cover
        self.words = {word: i for i, word in enumerate([*SPECIAL, *vocabulary()])}
        self.image_tokens = (image_size // patch_size) ** 2

    def stage(self, epoch: int) -> Stage:
        """The stage of an epoch; the last one after the end, and for validation (-1)."""
        for stage in self.stages:
            if 0 <= epoch < stage.epochs:
                return stage
            epoch -= stage.epochs
        return self.stages[-1]

    def scene(self, epoch: int, index: int) -> Sample:
        """Training scene `index` of an epoch, from the worlds of its stage."""
        stage, share = self.stage(epoch), self.stage(epoch).train_share
        number, seed = epoch * self.epoch_size + index, training_seed(self.seed)
        if int((index + 1) * share) > int(index * share):
            return ShapesWorld(
                "train",
                seed,
                2**32 - 1,
                self.image_size,
                co_occurrence=stage.co_occurrence,
                caption_noise=stage.caption_noise,
            )[number]
        return ShapesWorld("balanced", seed, 2**32 - 1, self.image_size)[number]

    def make(self, sample: Sample, generator: np.random.Generator, epoch: int) -> dict[str, Any]:
        """Pixels, dense targets and, where the stage has text, the packed conversation."""
        stage = self.stage(epoch)
        item: dict[str, Any] = {"pixels": sample.pixels, **dense_targets(sample, self.patch_size, self.cover)}
        if not stage.text and epoch >= 0:
            return item
        asked = _ask(sample.questions, stage, generator)
        turns = [(CAPTION_PROMPT, sample.captions[0], -1)]
        turns += [(q.text, q.answer, KINDS.index(q.kind)) for q in asked]
        item["text"] = self.pack(turns, joined=epoch >= 0 and generator.random() < self.dialogue)
        return item

    def pack(self, turns: Sequence[tuple[str, str, int]], joined: bool = False) -> np.ndarray:
        """Rows token, label, position, turn and kind of question (-1 for captions), int64 `[5, N]`."""
        encode = self.words.__getitem__
        prefix = [encode(BEGIN)] + [encode(IMAGE)] * self.image_tokens
        start = len(prefix)
        rows: list[list[int]] = [prefix, [IGNORED] * start, list(range(start)), [0] * start, [-1] * start]
        if joined:  # the caption comes anywhere in a dialogue
            turns = [*turns[1:2], turns[0], *turns[2:]]
        for number, (question, answer, kind) in enumerate(turns, 1):
            asks = [encode(USER), *map(encode, split_words(question)), encode(ASSISTANT)]
            says = [*map(encode, split_words(answer)), encode(END)]
            first = len(rows[0]) if joined else start
            length = len(asks) + len(says)
            rows[0] += asks + says
            rows[1] += [IGNORED] * len(asks) + says
            rows[2] += range(first, first + length)
            rows[3] += [0 if joined else number] * length
            rows[4] += [kind] * length
        return np.array(rows, dtype=np.int64)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Stacked; texts are padded on the right."""
        batch = {
            key: torch.from_numpy(np.stack([item[key] for item in items]))
            for key in items[0]
            if key != "text"
        }
        if "text" not in items[0]:
            return batch
        length = max(item["text"].shape[1] for item in items)
        fill = np.array([self.words["<pad>"], IGNORED, 0, PADDING, -1])[:, None]
        texts = np.stack(
            [
                np.concatenate([t, np.repeat(fill, length - t.shape[1], axis=1)], axis=1)
                for t in (item["text"] for item in items)
            ],
            axis=1,
        )
        names = ("tokens", "labels", "positions", "turns", "kinds")
        return batch | {name: torch.from_numpy(row) for name, row in zip(names, texts, strict=True)}


def _ask(questions: list[Question], stage: Stage, generator: np.random.Generator) -> list[Question]:
    """Some of the questions, the kinds by their weight and none twice."""
    often = {kind: sum(q.kind == kind for q in questions) for kind in KINDS}
    weights = np.array([stage.kinds.get(q.kind, 1.0) / often[q.kind] for q in questions])
    count = min(stage.questions, int(np.count_nonzero(weights)))
    order = generator.choice(len(questions), size=count, replace=False, p=weights / weights.sum())
    return [questions[i] for i in order]


def dense_targets(sample: Sample, patch_size: int, least: float = 0.4) -> dict[str, np.ndarray]:
    """What each patch shows, and what the image holds.

    A patch shows the object that covers the largest part of it, if that is more than `least`; an object
    that no patch would show has the one that it covers most.

    Returns:
        `shape` and `color` int64 `[h, w]` (0 for background, else 1 + the index in `SHAPES` or `COLORS`),
        `box` float32 `[h, w, 4]` (of the patch's object, in sides of the image) and `presence` float32
        `[18]`: which shapes and colours there are.
    """
    side = sample.labels.shape[0]
    cells, count = side // patch_size, len(sample.objects)
    patches = sample.labels.reshape(cells, patch_size, cells, patch_size).transpose(0, 2, 1, 3)
    labels = patches.reshape(cells * cells, -1)
    cover = np.stack([(labels == j + 1).mean(-1) for j in range(count)], axis=-1)  # [h * w, objects]
    owner = np.where(cover.max(-1) > least, cover.argmax(-1) + 1, 0)
    for j in range(count):
        if not (owner == j + 1).any():
            owner[cover[:, j].argmax()] = j + 1
    shapes = np.array([0, *(1 + SHAPES.index(o.shape) for o in sample.objects)])
    colors = np.array([0, *(1 + COLORS.index(o.color) for o in sample.objects)])
    boxes = np.array([(0, 0, 0, 0), *(o.box for o in sample.objects)], dtype=np.float32) / side
    presence = np.zeros(len(SHAPES) + len(COLORS), dtype=np.float32)
    presence[shapes[1:] - 1] = 1
    presence[colors[1:] - 1 + len(SHAPES)] = 1
    owner = owner.reshape(cells, cells)
    return {"shape": shapes[owner], "color": colors[owner], "box": boxes[owner], "presence": presence}
