"""Asking a vision-language model, and where it looked: answers, words and maps over image tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from visionsel.multimodal.grounding.grid import TokenGrid
from visionsel.multimodal.grounding.replay import Replay
from visionsel.multimodal.grounding.words import AnswerWord, split_answer, token_spans
from visionsel.multimodal.prompts import chat_inputs, user_turn

__all__ = ["Method", "ReadBatch", "Reading", "open_upright", "read"]

Method = Callable[..., Tensor]
"""A heatmap method: see `heatmaps`."""

ENDS = ("eos_token_id", "pad_token_id", "generation_config")


@dataclass(frozen=True, eq=False)
class ReadBatch:
    """Answers that were read together.

    Attributes:
        replay: of them.
        grids: of the images, one an answer.
        images: that the model saw, likewise.
    """

    replay: Replay
    grids: list[TokenGrid]
    images: list[Image.Image]


@dataclass(frozen=True, eq=False)
class Reading:
    """An answer about an image, and where the model looked.

    Attributes:
        answer: the text, without blanks at its ends.
        words: of it.
        spans: the characters that each new token writes; empty for special ones.
        probs: of each new token.
        maps: float32 `[T, n]`: for each new token its map over the image tokens; None without a method.
        grid: of the image.
        batch: that it was read in; None where maps were made, for it holds the inputs of the model.
        row: which of the batch it is.
    """

    answer: str
    words: list[AnswerWord]
    spans: list[tuple[int, int]]
    probs: list[float]
    maps: Tensor | None
    grid: TokenGrid
    batch: ReadBatch | None
    row: int

    @property
    def written(self) -> tuple[int, ...]:
        """The tokens that write something."""
        return tuple(number for number, (start, end) in enumerate(self.spans) if end > start)

    def merged(self, tokens: Sequence[int], merge: str = "mean") -> Tensor:
        """`[n]`: the `"mean"` or `"max"` of the maps of some tokens; 0 for none of them."""
        if not tokens:
            return torch.zeros(self.grid.n)
        assert self.maps is not None
        maps = self.maps[list(tokens)]
        return maps.mean(0) if merge == "mean" else maps.amax(0)


def read(
    model: nn.Module,
    processor: Any,
    method: Method | None,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    answers: Sequence[str] | None = None,
    merge_probs: str = "product",
    batch_size: int = 8,
    **options: Any,
) -> list[Reading]:
    """Ask about images, and read the answers once more for their maps.

    Args:
        model: a vision-language model of transformers.
        processor: of the model.
        method: of heatmaps; None: no maps are made.
        images: one a prompt, RGB.
        prompts: what is asked.
        answers: read these as if the model had said them, and generate none.
        merge_probs: see `split_answer`.
        batch_size: how many are asked together.
        options: of `generate()`; one answer a prompt.

    Raises:
        ValueError: for several answers a prompt, an answer without tokens, or what the model, the method and
            the processor refuse.
    """
    if (number := options.get("num_return_sequences") or 1) != 1:
        raise ValueError(f"num_return_sequences={number}: one answer is read for each prompt; leave it out")
    readings: list[Reading] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        said = None if answers is None else answers[part]
        given = images[part], prompts[part], said, merge_probs
        readings += _read_batch(model, processor, method, *given, options)
    return readings


@torch.no_grad()
def _read_batch(
    model: nn.Module,
    processor: Any,
    method: Method | None,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    answers: Sequence[str] | None,
    merge_probs: str,
    options: Mapping[str, Any],
) -> list[Reading]:
    inputs = _encode(model, processor, images, prompts)
    if answers is None:
        out = cast(Any, model).generate(**inputs, **options)
        tokens = getattr(out, "sequences", out)
    else:
        tokens = torch.cat((inputs["input_ids"], _answer_ids(processor, answers).to(inputs["input_ids"])), 1)
    replay = Replay(model, dict(inputs) | {name: options[name] for name in ENDS if name in options}, tokens)
    if len(replay.tokens) != len(prompts):
        raise ValueError(f"{replay.copies} answers a prompt were generated: one is read; ask for one")
    maps = None if method is None else method(replay, _reference(model, processor, method, images))
    logits = replay.run(logits=True).logits
    assert logits is not None
    probs = torch.stack([_probs(row, own) for row, own in zip(logits, replay.tokens, strict=True)])
    sizes = [(image.height, image.width) for image in images]
    grids = [TokenGrid.from_inputs(model, processor, inputs, sizes, image=row) for row in range(len(prompts))]
    batch = None if method is not None else ReadBatch(replay, grids, list(images))
    readings = []
    for row, grid in enumerate(grids):
        number = int(replay.valid[row].sum())
        ids, own = replay.tokens[row, :number].tolist(), probs[row, :number].tolist()
        answer, spans = token_spans(processor.tokenizer, ids)
        start = cast(int, grid.start)
        readings.append(
            Reading(
                answer,
                split_answer(answer, spans, own, merge_probs),
                spans,
                own,
                None if maps is None else maps[row, :number, start : start + grid.n].float().cpu(),
                grid,
                batch,
                row,
            )
        )
    return readings


def open_upright(image: Any) -> Image.Image:
    """An image in RGB, turned as its EXIF data say; what is transparent is mixed with white.

    Args:
        image: a file, a PIL image of any 8-bit mode, or uint8 `[H, W]`, `[H, W, 3]` or `[H, W, 4]`.

    Raises:
        FileNotFoundError: when there is no such file.
        TypeError: for another kind of image.
        ValueError: for an array of another shape.
    """
    if isinstance(image, str | Path):
        if not Path(image).is_file():
            raise FileNotFoundError(f"there is no image {image}")
        with Image.open(image) as opened:
            opened.load()
            return open_upright(opened)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise TypeError(f"the image is an array of {image.dtype}; expected uint8 from 0 to 255")
        colored = image.ndim == 3 and image.shape[2] in (3, 4)
        if not (colored or image.ndim == 2) or not image.size:
            raise ValueError(f"the image has shape {list(image.shape)}; expected [H, W], [H, W, 3] or 4")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"the image is a {type(image).__name__}; expected a file, a PIL image or an array")
    if image.mode[0] in "IF":
        raise TypeError(f"an image of mode {image.mode} has more than 8 bits; scale it to RGB first")
    if 0 in image.size:
        raise ValueError(f"the image has {image.width} x {image.height} pixels")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return image.convert("RGB")


def _probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """float32 `[T]`: the probabilities of tokens under logits `[T, vocabulary]`, one answer at a time."""
    logits = logits.float()
    chosen = logits.gather(1, tokens.to(logits.device)[:, None])[:, 0]
    return (chosen - logits.logsumexp(1)).exp().cpu()


def _encode(model: nn.Module, processor: Any, images: Sequence[Image.Image], prompts: Sequence[str]) -> Any:
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"the question is {prompt!r}; expected a text")
    conversations = [[user_turn(prompt)] for prompt in prompts]
    inputs = chat_inputs(processor, conversations, [[image] for image in images])
    return inputs.to(model.device, model.dtype)


def _answer_ids(processor: Any, answers: Sequence[str]) -> Tensor:
    """int64 `[B, T]`: answers as tokens, padded at the end."""
    tokenizer = processor.tokenizer
    rows = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    if not all(rows):
        raise ValueError(f"the text {answers[rows.index([])]!r} has no tokens")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


def _reference(
    model: nn.Module, processor: Any, method: Method, images: Sequence[Image.Image]
) -> Replay | None:
    """A replay of the images under the prompt that a method compares with, if it has one."""
    prompt = getattr(method, "reference", None)
    if prompt is None:
        return None
    inputs: Mapping[str, Any] = _encode(model, processor, images, [prompt] * len(images))
    out = cast(Any, model).generate(**inputs, max_new_tokens=1, do_sample=False)
    return Replay(model, inputs, getattr(out, "sequences", out))
