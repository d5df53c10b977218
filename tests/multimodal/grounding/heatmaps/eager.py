"""What eager attention says about the image, one row at a time; and the scenes of a trained model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.multimodal.runs import tiny
from tests.multimodal.tiny import IMAGE, LAYERS, grow, make_inputs
from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.multimodal.evaluation.segmentation import peak_inside
from visionsel.multimodal.grounding import Replay, TokenGrid
from visionsel.multimodal.prompts import chat_inputs, user_turn

NAMES = ("llava", "qwen2_5_vl")
NEW, HEADS = 3, 4
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@dataclass(frozen=True)
class Case:
    """A left-padded batch with its answers: two images in the first sample, one in the second.

    Attributes:
        weights: `[layers, B, heads, L + T, L + T]`, of the eager forward.
        hidden: `[layers, B, L + T, C]`, as it enters each layer.
        columns: for each sample the places of its image tokens.
        grids: for each sample height and width of the token grid of each image.
    """

    model: Any
    inputs: dict[str, Any]
    tokens: Tensor
    weights: Tensor
    hidden: Tensor
    columns: list[list[int]]
    grids: list[list[tuple[int, int]]]

    @property
    def replay(self) -> Replay:
        return Replay(self.model, self.inputs, self.tokens)

    def place(self, row: str, t: int) -> int:
        """Where the row of new token t is."""
        length = self.inputs["input_ids"].shape[1]
        return {"predict": length - 1 + t, "token": length + t, "prompt": length - 1}[row]

    def attention(self, layer: int, head: int, row: str, b: int, t: int) -> Tensor:
        """One row, on the image tokens of its sample."""
        return self.weights[layer, b, head, self.place(row, t)][self.columns[b]]


@lru_cache
def case(name: str, after: tuple[int, int] = (5, 4), images: tuple[int, int] = (2, 1)) -> Case:
    """Of a tiny random model with eager attention."""
    model = tiny(name, "eager")
    inputs = make_inputs(name, images=images, after=after, dtype=torch.float32)
    tokens = torch.randint(2, 90, (2, NEW), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = model(**grow(inputs, tokens), output_attentions=True, output_hidden_states=True)
    columns = [(ids == IMAGE).nonzero()[:, 0].tolist() for ids in inputs["input_ids"]]
    sizes = [(4, 4)] * sum(images)
    if "image_grid_thw" in inputs:
        sizes = [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]
    grids = [sizes[: images[0]], sizes[images[0] :]]
    assert (inputs["attention_mask"] == 0).any()
    assert [len(one) for one in columns] == [sum(h * w for h, w in one) for one in grids]
    return Case(
        model,
        inputs,
        tokens,
        torch.stack(out.attentions),
        torch.stack(out.hidden_states[:LAYERS]),
        columns,
        grids,
    )


def padded(maps: Sequence[Sequence[Tensor]]) -> Tensor:
    """`[B, T, n]` of maps for each sample and token, 0 behind the last image token of a sample."""
    longest = max(len(row[0]) for row in maps)
    return torch.stack(
        [torch.stack([torch.nn.functional.pad(one, (0, longest - len(one))) for one in row]) for row in maps]
    )


@dataclass(frozen=True)
class Scenes:
    """Pictures of the shapes world and what is said of them.

    Attributes:
        replay: of the trained model.
        reference: of the same pictures under the prompt of captions.
        words: row, new token and mask of each name.
    """

    replay: Replay
    reference: Replay
    words: list[tuple[int, int, np.ndarray]]
    grids: list[TokenGrid]

    def hits(self, maps: Tensor) -> float:
        """The pointing game."""
        heats = [(self.grids[b].rasterize(maps[b, t]).numpy(), mask) for b, t, mask in self.words]
        return float(np.mean([peak_inside(heat, mask) for heat, mask in heats]))


@lru_cache
def captions() -> Scenes:
    """True captions as answers; the first mention of each shape counts."""
    samples = list(ShapesWorld("balanced", 3, 20))
    answers = [sample.captions[0] for sample in samples]
    words = []
    for b, sample in enumerate(samples):
        said = answers[b].replace(".", " .").split()
        for shape in {item.shape for item in sample.objects} & set(said):
            mask = np.any([item.mask for item in sample.objects if item.shape == shape], 0)
            words.append((b, said.index(shape), mask))
    return _scenes(samples, [CAPTION_PROMPT] * len(samples), answers, words)


@lru_cache
def questions() -> Scenes:
    """Questions about the colour of one object; the last token of the prompt is to look at it."""
    asked = [
        (sample, question.text)
        for sample in ShapesWorld("balanced", 3, 40)
        for question in sample.questions
        if question.kind == "color"
    ][:40]
    words = []
    for b, (sample, text) in enumerate(asked):
        named = [item.mask for item in sample.objects if item.shape in text.replace("?", "").split()]
        words.append((b, 0, np.any(named, 0)))
    return _scenes([sample for sample, _ in asked], [text for _, text in asked], ["red"] * len(asked), words)


def _scenes(
    samples: list[Any], prompts: list[str], answers: list[str], words: list[tuple[int, int, np.ndarray]]
) -> Scenes:
    model, processor = load_lvlm()
    images = [[sample.image] for sample in samples]
    tokens = processor.tokenizer(
        answers, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt"
    )["input_ids"]
    asked, described = (
        chat_inputs(processor, [[user_turn(text)] for text in texts], images)
        for texts in (prompts, [CAPTION_PROMPT] * len(samples))
    )
    sizes = [(sample.image.height, sample.image.width) for sample in samples]
    return Scenes(
        Replay(model, asked, tokens),
        Replay(model, described, tokens[:, :1]),
        words,
        [TokenGrid.from_inputs(model, processor, asked, sizes, b) for b in range(len(samples))],
    )
