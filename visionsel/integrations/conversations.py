"""Answers to conversations about images, in batches, with any interventions: what all harnesses ask for."""

import ast
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from visionsel.multimodal.intervention import Intervention, Stack
from visionsel.multimodal.prompts import chat_inputs

__all__ = ["Conversation", "answer_conversations", "cut", "sampling_options", "specs"]


@dataclass(frozen=True)
class Conversation:
    """One request.

    Attributes:
        turns: of `role` and `content`, a list of `{"type": "image"}` and `{"type": "text", "text": ...}`.
        images: in the order of their places.
        options: of `generate()`.
        until: texts at the first of which the answer ends.
    """

    turns: list[dict[str, Any]]
    images: list[Image.Image]
    options: Mapping[str, Any] = field(default_factory=dict)
    until: tuple[str, ...] = ()


@torch.inference_mode()
def answer_conversations(
    model: Any,
    processor: Any,
    methods: Sequence[Intervention],
    conversations: Sequence[Conversation],
    batch_size: int = 1,
) -> list[str]:
    """The model's answers, in the order of the conversations.

    Those of equal options run together, and those with images apart from those without.

    Args:
        model, processor: of `visionsel.generation.load_lvlm`.
        methods: the interventions, of `visionsel.generation.parse_methods`; none: the model as it is.
        conversations: what to answer.
        batch_size: how many at a time; they are padded on the left.

    Raises:
        ValueError: for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    groups: dict[Any, list[int]] = {}
    for number, one in enumerate(conversations):
        alike = (tuple(sorted(one.options.items())), one.until, bool(one.images))
        groups.setdefault(alike, []).append(number)
    answers = [""] * len(conversations)
    with Stack(*methods)(model) if methods else nullcontext():
        for group in groups.values():
            for start in range(0, len(group), batch_size):
                part = group[start : start + batch_size]
                found = _answer(model, processor, [conversations[number] for number in part])
                for number, answer in zip(part, found, strict=True):
                    answers[number] = answer
    return answers


def _answer(model: Any, processor: Any, batch: Sequence[Conversation]) -> list[str]:
    inputs = chat_inputs(processor, [one.turns for one in batch], [one.images for one in batch])
    inputs = inputs.to(model.device, model.dtype)
    length, tokenizer = inputs["input_ids"].shape[1], processor.tokenizer
    options: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, **batch[0].options}
    if until := batch[0].until:
        options["stopping_criteria"] = [_Until(tokenizer, length, until)]
    tokens = model.generate(**inputs, **options)
    answers = tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
    return [cut(answer, until).strip() for answer in answers]


class _Until:
    """Ends a row when its answer holds one of some texts."""

    def __init__(self, tokenizer: Any, prompt: int, until: Sequence[str]) -> None:
        self._tokenizer, self._prompt, self._until = tokenizer, prompt, until

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        answers = self._tokenizer.batch_decode(input_ids[:, self._prompt :], skip_special_tokens=True)
        ended = [any(text in answer for text in self._until) for answer in answers]
        return torch.tensor(ended, device=input_ids.device)


def cut(answer: str, until: Sequence[str]) -> str:
    """An answer up to the first of some texts."""
    return answer[: min((answer.find(text) for text in until if text in answer), default=len(answer))]


def sampling_options(
    max_new_tokens: int,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    num_beams: int | None = None,
    repetition_penalty: float | None = None,
) -> dict[str, Any]:
    """Options of `generate()` from those of a harness, where a temperature of 0 means greedy decoding.

    Tokens are drawn when the temperature is above 0, which it is not unless given, or `do_sample` is true
    without one; `do_sample=False` always means greedy.

    Raises:
        ValueError: for a number out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature is not None and temperature < 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    heat = (1.0 if do_sample else 0.0) if temperature is None else float(temperature)
    drawn = heat > 0 and do_sample is not False
    options: dict[str, Any] = {
        "max_new_tokens": int(max_new_tokens),
        "do_sample": drawn,
        "num_beams": num_beams,
        "repetition_penalty": repetition_penalty,
    }
    if drawn:
        options |= {"temperature": heat, "top_p": top_p, "top_k": top_k}
    options = {name: value for name, value in options.items() if value is not None}
    # the model's own settings of sampling mean nothing to greedy decoding, and give warnings
    return options if drawn else options | {"temperature": None, "top_p": None, "top_k": None}


def specs(value: Any) -> list[str]:
    """Methods as a harness hands them on: `"vhr:alpha=2; pai"`, in quotes or brackets, or a list.

    Raises:
        ValueError: for what is no text.
    """
    if value is None:
        return []
    if isinstance(value, str):
        text = value.strip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
            text = str(ast.literal_eval(text))
        elif text.startswith("[") and text.endswith("]"):
            text = text[1:-1]
        value = text.split(";")
    if not all(isinstance(one, str) for one in value):
        raise ValueError(f"methods must be text such as 'fastv:keep=0.25,layer=2', got {value!r}")
    return [one.strip() for one in value if one.strip()]
