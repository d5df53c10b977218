"""What a model says to many images and prompts, written to a file as it comes; a stopped run goes on.

    items = [Item({"image_id": 1}, "000000000001.jpg", "Describe this image."), ...]
    rows = generate_all(model, processor, items, "answers.jsonl", interventions=[VHR(alpha=2.0)])

The file has a line for each item, in their order. Beside it stands `answers.jsonl.settings.json` with what
the answers depend on; a file made with other settings is refused.

Batches are fixed by the items and `batch_size`, each has a seed of its own, and the interventions are entered
anew for each. So an answer does not depend on where a run was stopped.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

from visionsel.multimodal.evaluation.resume import finish_rows, own_luck, settings_path
from visionsel.multimodal.intervention import Intervention, Stack
from visionsel.multimodal.prompts import chat_inputs, user_turn
from visionsel.processes import ALONE, Processes

__all__ = ["Item", "generate_all", "settings_path"]

_LONG = 400  # characters of an intervention's name in the settings; some hold a whole model


@dataclass(frozen=True)
class Item:
    """One image and what is asked about it.

    Args:
        fields: what the file says of it beside the answer, such as `{"question_id": 1}`; values of JSON.
        image: a file, or the picture.
        prompt: the user's turn.
        max_new_tokens: after which this answer is cut; None: as for all.
    """

    fields: Mapping[str, Any]
    image: str | Path | Image.Image = field(repr=False)
    prompt: str
    max_new_tokens: int | None = None


def generate_all(
    model: Any,
    processor: Any,
    items: Sequence[Item],
    path: str | Path,
    *,
    interventions: Sequence[Intervention] = (),
    batch_size: int = 8,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    seed: int = 0,
    said: str = "answer",
    settings: Mapping[str, Any] | None = None,
    processes: Processes = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Answers to all items; those that the file has already are not asked for again.

    Args:
        model, processor: a vision-language model of transformers in evaluation mode.
        items: what to ask, in the order of the file.
        path: of the file, JSON lines. A last line that is cut off is dropped.
        interventions: pruners, modulators and a decoding method; all of them together.
        batch_size: items at a time, fewer where `max_new_tokens` changes between them.
        max_new_tokens: after which an answer is cut.
        temperature: of sampling from all tokens; None: the most probable token is chosen.
        seed: of sampling.
        said: the name of the answer in a line.
        settings: what else the answers depend on, such as the name of the model; values of JSON.
        processes: that share the batches (`visionsel.processes.join_processes`); each gets all lines.
        progress: called with the number of answers in the file and of items, first and after each line; of
            several processes, each counts the answers that are its own to give.

    Returns:
        the lines of the file: an item's `fields` and its answer.

    Raises:
        FileNotFoundError: for an image that does not exist.
        ValueError: for a number out of range or no items; a file that was made with other settings, or has
            other lines than this would write; or interventions that do not fit the model or one another.
    """
    if not items:
        raise ValueError("there is nothing to ask: no items")
    if batch_size < 1 or max_new_tokens < 1 or seed < 0 or not (temperature is None or temperature > 0):
        raise ValueError(
            "batch_size and max_new_tokens must be at least 1, seed at least 0 and temperature above 0 "
            f"(None: no sampling); got {batch_size}, {max_new_tokens}, {seed} and {temperature}"
        )
    if processor.tokenizer.pad_token is None:
        raise ValueError(
            "the tokenizer has no token to fill up shorter prompts; set processor.tokenizer.pad_token, "
            "to its eos_token for example"
        )
    _check_images(items)
    path = Path(path)
    used = {
        **(settings or {}),
        "interventions": [_name(one) for one in interventions],
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "items": len(items),
        "asked": _digest(items),
    }
    method = Stack(*interventions) if interventions else None
    with method(model) if method else nullcontext():
        pass  # what does not fit is found before a file is made

    def answers(start: int, stop: int) -> list[dict[str, Any]]:
        limit = items[start].max_new_tokens or max_new_tokens
        with method(model) if method else nullcontext(), own_luck(model.device, seed, start):
            texts = _answer(model, processor, items[start:stop], limit, temperature)
        return [{said: text} for text in texts]

    return finish_rows(
        path,
        [item.fields for item in items],
        used,
        lambda row: list(row) == [said] and isinstance(row[said], str),
        list(_batches(items, batch_size)),
        answers,
        processes=processes,
        progress=progress,
    )


def _check_images(items: Sequence[Item]) -> None:
    paths = {Path(item.image): None for item in items if not isinstance(item.image, Image.Image)}
    if missing := [path for path in paths if not path.is_file()]:
        others = f" (nor {len(missing) - 1} others of {len(paths)})" if len(missing) > 1 else ""
        raise FileNotFoundError(f"no image at {missing[0]}{others}")


def _name(intervention: Intervention) -> str:
    """What an intervention is called in the settings: its hyperparameters, but no addresses of functions."""
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(intervention))
    if len(text) <= _LONG:
        return text
    return f"{text[:_LONG]}... ({hashlib.sha256(text.encode()).hexdigest()[:16]})"


def _digest(items: Sequence[Item]) -> str:
    """What is asked, in short; pictures are known by their fields, files by their names."""
    parts = [
        [item.fields, item.prompt, item.max_new_tokens]
        + ([] if isinstance(item.image, Image.Image) else [Path(item.image).name])
        for item in items
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _batches(items: Sequence[Item], size: int) -> Iterator[tuple[int, int]]:
    """Items in a row with one limit, at most `size`."""
    start = 0
    while start < len(items):
        stop = start + 1
        while (
            stop < min(start + size, len(items)) and items[stop].max_new_tokens == items[start].max_new_tokens
        ):
            stop += 1
        yield start, stop
        start = stop


@torch.inference_mode()
def _answer(
    model: Any, processor: Any, items: Sequence[Item], max_new_tokens: int, temperature: float | None
) -> list[str]:
    """The answers to one batch."""
    turns = [[user_turn(item.prompt)] for item in items]
    inputs = chat_inputs(processor, turns, [[_open(item.image)] for item in items])
    inputs = inputs.to(model.device, model.dtype)
    options: dict[str, Any] = {"do_sample": False}
    if temperature is not None:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def _open(image: str | Path | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{image} is not an image, or is cut off") from error
