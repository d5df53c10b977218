"""Prompts as the chat template of a model's processor writes them: one image and one text."""

from collections.abc import Sequence
from typing import Any

__all__ = ["chat_texts"]


def chat_texts(
    processor: Any, prompts: Sequence[str], answers: Sequence[str] | None = None, images: int = 1
) -> list[str]:
    """The text of each sample, for `processor(images=..., text=...)`.

    Args:
        processor: with a chat template.
        prompts: the user's turns; the images come before them.
        answers: the model's turns, one a prompt; None: they are to be generated.
        images: how many a sample has.
    """
    texts = []
    for number, prompt in enumerate(prompts):
        content = [*[{"type": "image"}] * images, {"type": "text", "text": prompt}]
        turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answers is not None:
            said = [{"type": "text", "text": answers[number]}]
            turns.append({"role": "assistant", "content": said})
        texts.append(processor.apply_chat_template(turns, add_generation_prompt=answers is None))
    return texts
