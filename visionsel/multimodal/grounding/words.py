"""The words of an answer: where they stand in its text, which tokens they are of, how sure the model was.

Tokens are placed in the text by decoding the generated ids step by step. Tokenising the text again would not
do: a model may write a word in other pieces than its tokenizer would.
"""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["AnswerWord", "find_words", "split_answer", "token_spans", "tokens_between", "word_prob"]

Span = tuple[int, int]
MERGES = ("product", "mean")


@dataclass(frozen=True)
class AnswerWord:
    """A word of an answer.

    Attributes:
        text: as the answer has it.
        span: its first character and one past its last.
        tokens: numbers of the new tokens that write it, in order.
        prob: how likely the model found it; NaN where probabilities are not known.
    """

    text: str
    span: Span
    tokens: tuple[int, ...]
    prob: float


def split_answer(
    text: str, spans: Sequence[Span], probabilities: Sequence[float] | None = None, merge: str = "product"
) -> list[AnswerWord]:
    """The words of an answer, in order.

    Args:
        text: of the answer.
        spans: of its tokens, as `token_spans` gives them. A token of two words is in both.
        probabilities: one a token.
        merge: what the probability of a word is: the `"product"` of its tokens', how likely the model was to
            write it; or their `"mean"`, which does not fall with the number of pieces.

    Raises:
        ValueError: for another merge, or another number of probabilities than of tokens.
    """
    if probabilities is not None and len(probabilities) != len(spans):
        raise ValueError(f"one probability for each token, got {len(probabilities)} for {len(spans)}")
    words = []
    for start, end in find_words(text):
        tokens = tokens_between(spans, (start, end))
        prob = math.nan if probabilities is None else word_prob(probabilities, tokens, merge)
        words.append(AnswerWord(text[start:end], (start, end), tokens, prob))
    return words


def word_prob(probabilities: Sequence[float], tokens: Sequence[int], merge: str = "product") -> float:
    """The probability of a word from those of all tokens, see `split_answer`; NaN for no tokens.

    Raises:
        ValueError: for another merge.
    """
    if merge not in MERGES:
        raise ValueError(f"a word's probability is the product or the mean of its tokens', got {merge!r}")
    own = [float(probabilities[token]) for token in tokens]
    if not own:
        return math.nan
    return math.prod(own) if merge == "product" else sum(own) / len(own)


def token_spans(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of tokens, and the characters that each of them writes.

    Pieces of one character, as byte-level tokenizers have, all get that character. Special tokens write
    nothing: their spans are empty. A blank belongs to the token that brings it.

    Args:
        tokenizer: of the model.
        ids: new tokens.

    Returns:
        The text without blanks at its ends, and one span a token.
    """
    ids, special = [int(one) for one in ids], set(tokenizer.all_special_ids)
    whole = _decoded(tokenizer, ids)
    ends, written = [], 0
    for number, token in enumerate(ids, 1):
        if token not in special:
            # what more tokens change, such as a character that is not complete, is not written yet
            written = max(written, _common(_decoded(tokenizer, ids[:number]), whole))
        ends.append(written)
    text = whole.strip()
    cut = len(whole) - len(whole.lstrip())
    spans, start = [], 0
    for number, token in enumerate(ids):
        if token in special:
            spans.append((start, start))
            continue
        end = next((end for end in ends[number:] if end > start), start)
        spans.append((start, end))
        start = ends[number]
    inside = [tuple(min(max(side - cut, 0), len(text)) for side in span) for span in spans]
    return text, [(start, end) for start, end in inside]


def tokens_between(spans: Sequence[Span], span: Span) -> tuple[int, ...]:
    """Numbers of the tokens that write something of a span of the text."""
    start, end = span
    return tuple(n for n, (first, last) in enumerate(spans) if max(first, start) < min(last, end))


def find_words(text: str) -> list[Span]:
    """The spans of the words of a text.

    A word is letters, digits and marks on them; hyphens, apostrophes and, in numbers, points stand inside of
    it (`t-shirt`, `dog's`, `3.5`). Chinese characters and Japanese kana, which are written without blanks,
    are a word each.
    """
    return list(_words(text))


def _words(text: str) -> Iterator[Span]:
    start = 0
    while start < len(text):
        end = start
        while end < len(text) and (_letter(text[end]) or (end > start and _joins(text, end))):
            end += 1
            if _stands_alone(text[end - 1]) or (end < len(text) and _stands_alone(text[end])):
                break
        if end > start:
            yield start, end
        start = max(end, start + 1)


def _letter(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character).startswith("M")


def _joins(text: str, place: int) -> bool:
    """Whether a mark stands inside a word."""
    if place + 1 >= len(text):
        return False
    before, mark, after = text[place - 1], text[place], text[place + 1]
    if mark in ".,":
        return before.isdigit() and after.isdigit()
    return mark in "-'\u2019\u2010" and _letter(before) and _letter(after)


def _stands_alone(character: str) -> bool:
    return unicodedata.name(character, "").startswith(("CJK UNIFIED", "HIRAGANA", "KATAKANA"))


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def _common(first: str, second: str) -> int:
    """How many characters two texts begin with together."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (one, other) in pairs if one != other), min(len(first), len(second)))
