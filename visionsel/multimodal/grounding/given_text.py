"""Which tokens of a given text, read as if a model had said it, stand for which of its characters."""

from typing import Any

from visionsel.multimodal.grounding.words import Span, token_spans

__all__ = ["text_spans"]


def text_spans(tokenizer: Any, text: str) -> list[Span]:
    """The characters of a text that each of its tokens stands for.

    Unlike `token_spans` it counts in the text as it is given, also where a tokenizer changes it: writes it in
    lower case, or does not know a word.

    Args:
        tokenizer: of the model.
        text: tokenised without special tokens around it.

    Returns:
        `(start, end)` for each token, one past the last character.

    Raises:
        ValueError: for a tokenizer that neither keeps offsets nor gives the text back.
    """
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [(int(start), int(end)) for start, end in found["offset_mapping"]]
    written, spans = token_spans(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    if written != text:
        raise ValueError(
            f"the tokenizer keeps no offsets and makes {written!r:.80} of the text {text!r:.80}: use a fast "
            "tokenizer, or give the text as the model writes it"
        )
    return spans
