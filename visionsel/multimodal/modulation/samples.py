"""Annotated pictures that heads are judged by: their inputs, their answers, what is in them.

A sample has `image` (PIL), `captions` (the first is true) and `objects`; an object has a name, one word
(`name`, or `shape` as in `visionsel.data.shapes`), and `mask`, bool `[H, W]` over the image.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from visionsel.multimodal.prompts import chat_texts

__all__ = ["batches", "encode", "generate_captions", "object_name", "predicting"]


def object_name(item: Any) -> str:
    """What an object is called."""
    name = getattr(item, "name", None)
    return str(item.shape if name is None else name).lower()


def batches(samples: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """The samples in order, some at a time.

    Raises:
        ValueError: without samples, or for a size below 1.
    """
    if not len(samples) or size < 1:
        raise ValueError(f"there must be samples, a batch of at least 1; got {len(samples)} and {size}")
    for start in range(0, len(samples), size):
        yield [samples[number] for number in range(start, min(start + size, len(samples)))]


def encode(
    model: Any, processor: Any, samples: Sequence[Any], prompt: str, answered: bool
) -> tuple[Any, list[str]]:
    """Inputs of the model, one image and one prompt a sample, and their text.

    Args:
        model: that gets them.
        processor: with a chat template.
        samples: see above.
        prompt: what is asked about each image.
        answered: whether the first caption of each sample follows.
    """
    answers = [sample.captions[0] for sample in samples] if answered else None
    texts = chat_texts(processor, [prompt] * len(samples), answers)
    images = [[sample.image] for sample in samples]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    return inputs.to(model.device, model.dtype), texts


def predicting(
    processor: Any, text: str, answer: str, starts: Sequence[int], mask: Tensor
) -> tuple[list[int], int]:
    """Places in a prompt at which words of an answer are predicted.

    Tokens are counted from the end, so that it does not matter how many stand for the image.

    Args:
        processor: with a tokenizer.
        text: of the sample, by the chat template.
        answer: in it.
        starts: where the words begin, in characters of the answer.
        mask: `[L]` of the sample: 1 for all but padding.

    Returns:
        the place before each word, and the place after the last token.

    Raises:
        ValueError: when the chat template changes the answer.
    """
    begin = text.rfind(answer)
    if begin < 0:
        raise ValueError(f"the chat template does not write the answer as it is: {answer!r} in {text!r}")
    end = int(mask.nonzero()[-1]) + 1

    def length(part: str) -> int:
        return len(processor.tokenizer(part)["input_ids"])

    whole = length(text)
    cuts = [text[: begin + start].rstrip() for start in starts]  # the blank belongs to the word
    return [end - (whole - length(cut)) - 1 for cut in cuts], end


@torch.inference_mode()
def generate_captions(
    model: Any, processor: Any, samples: Sequence[Any], prompt: str, batch_size: int, max_new_tokens: int
) -> list[str]:
    """What the model says of each image, greedily."""
    captions: list[str] = []
    for part in batches(samples, batch_size):
        inputs, _ = encode(model, processor, part, prompt, answered=False)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        captions += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return captions
