"""Sentences as vectors, for `SentenceAttentionNet`, by frozen encoders.

| name               | vectors                                                                             |
|--------------------|-------------------------------------------------------------------------------------|
| `words`            | which words of the shapes world it has, scaled to length 1                          |
| a name or a folder | an encoder of transformers, such as sentence-transformers/all-MiniLM-L6-v2 (384)    |

`embedding_means` takes the input embeddings of any language model in place of an encoder.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

__all__ = ["bag_of_words", "embedding_means", "load_sentence_encoder", "pooled_sentences"]

Encode = Callable[[Sequence[str], torch.device], Tensor]


@torch.no_grad()
def pooled_sentences(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Sentence vectors of sentence-transformers: the mean of the last hidden states, scaled to length 1.

    Args:
        model: an encoder of transformers (`AutoModel`).
        tokenizer: its own; texts longer than it allows are cut off.
        texts: the sentences.

    Returns:
        float32 `[B, D]`.
    """
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    inputs = inputs.to(next(model.parameters()).device)
    hidden = model(**inputs).last_hidden_state.float()
    return normalize(_mean(hidden, inputs["attention_mask"]), dim=-1)


@torch.no_grad()
def embedding_means(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The mean of the input embeddings of a sentence's tokens, scaled to length 1: no model is run.

    Args:
        model: a model of transformers with `get_input_embeddings`, such as a vision-language model.
        tokenizer: its own.
        texts: the sentences.

    Returns:
        float32 `[B, D]`.
    """
    inputs = tokenizer(list(texts), padding=True, add_special_tokens=False, return_tensors="pt")
    table = model.get_input_embeddings()
    vectors = table(inputs["input_ids"].to(table.weight.device)).float()
    return normalize(_mean(vectors, inputs["attention_mask"]), dim=-1)


def bag_of_words(texts: Sequence[str], words: Sequence[str], split: Callable[[str], list[str]]) -> Tensor:
    """Which words each text has, scaled to length 1; words that are not listed have a place together.

    Args:
        texts: the sentences.
        words: the vocabulary.
        split: from a text to its words.

    Returns:
        float32 `[B, len(words) + 1]`.
    """
    place = {word: number for number, word in enumerate(words)}
    vectors = torch.zeros(len(texts), len(place) + 1)
    for row, text in enumerate(texts):
        for word in split(text):
            vectors[row, place.get(word, len(place))] += 1
    return normalize(vectors, dim=-1)


def load_sentence_encoder(name: str) -> tuple[Encode, int]:
    """A frozen encoder by name, see the table above, and the length of its vectors.

    Args:
        name: of the table.

    Returns:
        a function from texts and a device to float32 `[B, D]` there, and D.

    Raises:
        OSError: when transformers has no such encoder.
    """
    if name == "words":
        from visionsel.data.shapes import split_words, vocabulary

        words = vocabulary()
        return lambda texts, device: bag_of_words(texts, words, split_words).to(device), len(words) + 1
    from transformers import AutoModel, AutoTokenizer

    try:
        model, tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise OSError(
            f'no sentence encoder {name!r}: "words", or a folder or name of transformers; {error}'
        ) from error
    model.requires_grad_(False)
    length = int(model.config.hidden_size)
    return lambda texts, device: pooled_sentences(model.to(device), tokenizer, texts), length


def _mean(vectors: Tensor, mask: Tensor) -> Tensor:
    """The mean over real tokens, `[B, N, D]` -> `[B, D]`."""
    real = mask.to(vectors)[..., None]
    return (vectors * real).sum(1) / real.sum(1).clamp(min=1)
