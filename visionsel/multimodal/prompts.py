"""Prompts as the chat template of a model's processor writes them, and the question in such a prompt."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

__all__ = ["chat_inputs", "chat_texts", "conversation_text", "questions", "tail_lengths", "user_turn"]

Turn = dict[str, Any]
_MARK = "QUESTION"


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
        turns = [user_turn(prompt, images)]
        if answers is not None:
            said = [{"type": "text", "text": answers[number]}]
            turns.append({"role": "assistant", "content": said})
        texts.append(processor.apply_chat_template(turns, add_generation_prompt=answers is None))
    return texts


def user_turn(prompt: str, images: int = 1) -> Turn:
    """What a user says about some images, which come first."""
    content: list[dict[str, str]] = [{"type": "image"}] * images
    return {"role": "user", "content": [*content, {"type": "text", "text": prompt}]}


def conversation_text(processor: Any, turns: Sequence[Turn]) -> str:
    """A conversation whose next turn is the model's.

    Args:
        processor: a model without a chat template gets the images, then the text, of a single turn.
        turns: of `role` and `content`, a list of `{"type": "image"}` and `{"type": "text", "text": ...}`.

    Raises:
        ValueError: for several turns where there is no chat template.
    """
    if getattr(processor, "chat_template", None) is not None:
        text: str = processor.apply_chat_template(list(turns), add_generation_prompt=True)
        return text
    if len(turns) != 1:
        raise ValueError(
            f"the processor has no chat template, so {len(turns)} turns cannot be written; give one user turn"
        )
    parts = turns[0]["content"]
    images = getattr(processor, "image_token", "<image>") * sum(part["type"] == "image" for part in parts)
    return images + "\n".join(part["text"] for part in parts if part["type"] == "text")


def chat_inputs(
    processor: Any, conversations: Sequence[Sequence[Turn]], images: Sequence[Sequence[Any]]
) -> Any:
    """What `generate()` takes for a batch of conversations, padded on the left.

    Args:
        processor: of the model.
        conversations: see `conversation_text`.
        images: of each of them, in its order; either all have some or none has.

    Raises:
        ValueError: for conversations with and without images in one batch, which processors do not take, or
            images and places for them that differ in number.
    """
    for turns, pictures in zip(conversations, images, strict=True):
        places = sum(part["type"] == "image" for turn in turns for part in turn["content"])
        if places != len(pictures):
            raise ValueError(f"a conversation has {places} places for images and {len(pictures)} images")
    if len({bool(pictures) for pictures in images}) > 1:
        raise ValueError("some conversations have images and some have none; put them in two batches")
    texts = [conversation_text(processor, turns) for turns in conversations]
    options: dict[str, Any] = {}
    bos = processor.tokenizer.bos_token
    if bos and all(text.startswith(bos) for text in texts):
        options["add_special_tokens"] = False  # the template has begun the prompt already
    if any(images):
        options["images"] = [list(pictures) for pictures in images]
    return processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **options)


def tail_lengths(processor: Any, ids: Tensor, mask: Tensor) -> list[int]:
    """How many tokens at the end of each prompt come after the user's last word.

    Args:
        processor: whose chat template made the prompts; without one, nothing comes after.
        ids, mask: `[B, L]`.

    Raises:
        ValueError: for a prompt that does not end as the chat template ends a user's turn.
    """
    if getattr(processor, "chat_template", None) is None:
        return [0] * len(ids)
    tail = chat_texts(processor, [_MARK])[0].rpartition(_MARK)[2]
    lengths = []
    for row, real in zip(ids, mask.bool(), strict=True):
        tokens = row[real].tolist()
        most = min(len(tokens), len(tail) + 1)
        # decoded, for a tokenizer may join the first characters of the tail with what is before them
        found = [
            number
            for number in range(most + 1)
            if _squeezed(_decoded(processor, tokens[len(tokens) - number :])) == _squeezed(tail)
        ]
        if not found:
            raise ValueError(
                f"a prompt ends with {_decoded(processor, tokens[-12:])!r}, and not as the chat template "
                f"ends a user's turn, with {tail!r}; make prompts with processor.apply_chat_template(..., "
                "add_generation_prompt=True)"
            )
        lengths.append(found[0])
    return lengths


def questions(processor: Any, ids: Tensor, mask: Tensor, image_tokens: Sequence[int]) -> list[str]:
    """What each prompt says after its last image.

    Args:
        processor: whose chat template made the prompts.
        ids, mask: `[B, L]`.
        image_tokens: ids that stand for images and videos.

    Raises:
        ValueError: see `tail_lengths`.
    """
    texts = []
    for row, real, tail in zip(ids, mask.bool(), tail_lengths(processor, ids, mask), strict=True):
        tokens = row[real].tolist()
        last = max((place for place, token in enumerate(tokens) if token in image_tokens), default=-1)
        asked = tokens[last + 1 : len(tokens) - tail]
        text: str = processor.tokenizer.decode(asked, skip_special_tokens=True)
        texts.append(text.strip())
    return texts


def _decoded(processor: Any, tokens: Sequence[int]) -> str:
    text: str = processor.tokenizer.decode(tokens, skip_special_tokens=False)
    return text


def _squeezed(text: str) -> str:
    return "".join(text.split())
