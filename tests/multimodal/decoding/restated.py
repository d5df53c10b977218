"""Two-view decoding said plainly: no cache, both views read from the start for every token.

Nothing here is shared with `visionsel.multimodal`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from tests.multimodal.tiny import IMAGE, QWEN, grow

FAMILIES = ("llava", "qwen2_5_vl", "internvl", "gemma3")
CONFUSION = (11, 12, 13)
SEQUENCES = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
Inputs = dict[str, Any]
Formula = Callable[[Tensor, Tensor, int], Tensor]


def single(name: str, inputs: Inputs, row: int) -> Inputs:
    """One sample of a batch with one image each, without padding."""
    real = inputs["attention_mask"][row].bool()
    one = {key: inputs[key][row : row + 1, real] for key in SEQUENCES if key in inputs}
    if name in QWEN:
        one["image_grid_thw"] = inputs["image_grid_thw"][row : row + 1]
        sizes = inputs["image_grid_thw"].prod(1).tolist()
        one["pixel_values"] = inputs["pixel_values"].split(sizes)[row]
    else:
        one["pixel_values"] = inputs["pixel_values"][row : row + 1]
    return one


def without_image(one: Inputs) -> Inputs:
    """A sample whose image tokens are taken out."""
    text = one["input_ids"][0] != IMAGE
    return {key: one[key][:, text] for key in SEQUENCES if key in one}


def confused(one: Inputs) -> Inputs:
    """A sample that begins with `CONFUSION`."""
    front = torch.tensor([CONFUSION])
    other = {"input_ids": front, "attention_mask": torch.ones_like(front)}
    zero = torch.zeros_like(front)
    return one | {
        key: torch.cat((other.get(key, zero).to(one[key]), one[key]), 1) for key in SEQUENCES if key in one
    }


def logits_of(model: Any, inputs: Inputs) -> Tensor:
    """Of the last token `[B, vocabulary]`, everything read anew; positions are the model's own."""
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None
        if "image_grid_thw" not in inputs:  # else the model makes them of the grid
            mask = inputs["attention_mask"]
            inputs = inputs | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    elif not bool(inputs["attention_mask"].all()):
        mask = inputs["attention_mask"]
        inputs = inputs | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[:, -1]


def chosen_by(formula: Formula, main: Tensor, other: Tensor, number: int, beta: float) -> Tensor:
    """The combined logits `[B, vocabulary]`."""
    combined = formula(main, other, number)
    if beta:
        floor = main.max(-1, keepdim=True).values + math.log(beta)
        combined = torch.where(main < floor, -torch.inf, combined)
    return combined


def answer(
    model: Any, main: Inputs, other: Inputs, formula: Formula, beta: float, new: int
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Greedy tokens of one sample, the logits of both views and the combined ones `[new, vocabulary]`."""
    tokens, first, second, combined = [], [], [], []
    for number in range(new):
        z, y = logits_of(model, main), logits_of(model, other)
        scores = chosen_by(formula, z, y, number, beta)
        token = scores.argmax(-1, keepdim=True)
        tokens.append(int(token))
        first, second, combined = [*first, z[0]], [*second, y[0]], [*combined, scores[0]]
        main, other = grow(main, token), grow(other, token)
    return tokens, torch.stack(first), torch.stack(second), torch.stack(combined)


class Recomputed(LogitsProcessor):
    """For beams and sampling: the second view of every row is read anew at every call, alone.

    Args:
        model: that answers.
        samples: of the second view, without padding.
        prompt: length of the main prompt, padding counted.
        formula, beta: how to combine.
        beams: whether scores must be log-probabilities after.
    """

    def __init__(
        self, model: Any, samples: list[Inputs], prompt: int, formula: Formula, beta: float, beams: bool
    ) -> None:
        self.model, self.samples, self.prompt = model, samples, prompt
        self.formula, self.beta, self.beams = formula, beta, beams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        copies = len(input_ids) // len(self.samples)
        held = getattr(self.model.model, "rope_deltas", None)
        rows = [
            logits_of(self.model, grow(self.samples[row // copies], ids[None, self.prompt :]))
            for row, ids in enumerate(input_ids)
        ]
        if hasattr(self.model.model, "rope_deltas"):
            self.model.model.rope_deltas = held
        number = input_ids.shape[1] - self.prompt
        out = chosen_by(self.formula, scores, torch.cat(rows).to(scores), number, self.beta)
        return out.log_softmax(-1) if self.beams else out
