"""What a model says of annotated images: captions scored by CHAIR, answers to yes-or-no questions by POPE.

A sample has `image` (PIL) and `objects`: names, or things with `name`, or `shape` as in
`visionsel.data.shapes`. It may have `questions`, with `text` and `answer`; of those that have a `kind` too,
the ones of kind `"exist"` are asked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from visionsel.data.shapes import CAPTION_PROMPT
from visionsel.multimodal.evaluation import chair, pope
from visionsel.multimodal.evaluation.synonyms import Synonyms
from visionsel.multimodal.prompts import chat_texts

__all__ = ["ask", "describe", "generate"]


def describe(
    model: Any,
    processor: Any,
    samples: Sequence[Any],
    synonyms: Synonyms | None = None,
    prompt: str = CAPTION_PROMPT,
    batch_size: int = 50,
    max_new_tokens: int = 64,
    **options: Any,
) -> dict[str, Any]:
    """Scores of captions, see `chair.score`.

    Args:
        model: a vision-language model, with interventions or without.
        processor: its own, with a chat template.
        samples: see above.
        synonyms: what their objects are called; None: the 80 classes of COCO.
        prompt: that asks for a description.
        batch_size: captions at a time.
        max_new_tokens: of a caption.
        options: of `generate()`; it is greedy where they say no other.

    Raises:
        ValueError: for no samples, or an object that is not in the table.
    """
    images = [sample.image for sample in samples]
    captions = generate(
        model, processor, images, [prompt] * len(images), batch_size, max_new_tokens, **options
    )
    return chair.score(captions, [_names(sample) for sample in samples], synonyms)


def ask(
    model: Any,
    processor: Any,
    samples: Sequence[Any],
    batch_size: int = 100,
    max_new_tokens: int = 8,
    **options: Any,
) -> Mapping[str, Any] | None:
    """Scores of answers, see `pope.score`; None for samples without questions.

    Args:
        model, processor, samples: see `describe`.
        batch_size: questions at a time.
        max_new_tokens: of an answer.
        options: of `generate()`; it is greedy where they say no other.
    """
    asked = [
        (sample.image, question)
        for sample in samples
        for question in getattr(sample, "questions", ())
        if getattr(question, "kind", "exist") == "exist"
    ]
    if not asked:
        return None
    images, questions = [image for image, _ in asked], [question for _, question in asked]
    texts = [question.text for question in questions]
    answers = generate(model, processor, images, texts, batch_size, max_new_tokens, **options)
    return pope.score(answers, [question.answer for question in questions])


@torch.inference_mode()
def generate(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    prompts: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
    **options: Any,
) -> list[str]:
    """Answers, one for each pair of image and prompt; greedy where `options` say no other."""
    options = {"do_sample": False, **options}
    answers: list[str] = []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        inputs = processor(
            images=[[image] for image in images[part]],
            text=chat_texts(processor, prompts[part]),
            return_tensors="pt",
            padding=True,
        ).to(model.device, model.dtype)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
        answers += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def _names(sample: Any) -> set[str]:
    """What the objects of a sample are called."""
    names = (
        thing if isinstance(thing, str) else getattr(thing, "name", None) or thing.shape
        for thing in sample.objects
    )
    return {name.lower() for name in names}
