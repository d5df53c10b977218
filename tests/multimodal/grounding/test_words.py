"""Words of answers: which characters each token writes, whatever pieces a tokenizer has."""

import math
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from visionsel.embedded.tokenizer import build_tokenizer
from visionsel.multimodal.grounding.nouns import find_names
from visionsel.multimodal.grounding.words import (
    find_words,
    split_answer,
    token_spans,
    tokens_between,
    word_prob,
)


def byte_level() -> Any:
    """Every byte is a token, and `do`, `dog`, ` dog` are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: n for n, piece in enumerate([*alphabet, "do", "dog", "\u0120dog"])}
    base = Tokenizer(models.BPE(vocabulary, [("d", "o"), ("do", "g"), ("\u0120", "dog")]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token="</s>", pad_token="<pad>")


def sentencepiece() -> Any:
    pieces = ["\u2581a", "\u2581str", "iped", "\u2581cat", ",", "\u2581sit", "ting", "."]
    base = Tokenizer(models.WordLevel({p: n for n, p in enumerate(pieces)}, unk_token="."))
    base.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=base, eos_token="</s>")


def test_pieces_of_words_and_marks_are_placed_and_the_first_blank_is_left_out() -> None:
    tokenizer = sentencepiece()
    text, spans = token_spans(tokenizer, [*range(8), tokenizer.eos_token_id])
    assert text == "a striped cat, sitting."
    written = ["a", " str", "iped", " cat", ",", " sit", "ting", ".", ""]
    assert [text[start:end] for start, end in spans] == written
    words = split_answer(text, spans, [0.5, 0.5, 0.4, 0.9, 1, 0.8, 0.5, 1, 1])
    assert [word.text for word in words] == ["a", "striped", "cat", "sitting"]
    assert [word.tokens for word in words] == [(0,), (1, 2), (3,), (5, 6)]
    assert [word.prob for word in words] == pytest.approx([0.5, 0.2, 0.9, 0.4])
    assert [text[slice(*word.span)] for word in words] == [word.text for word in words]
    assert split_answer(text, spans, [0.5, 0.5, 0.4, 0.9, 1, 0.8, 0.5, 1, 1], "mean")[1].prob == 0.45
    assert all(math.isnan(word.prob) for word in split_answer(text, spans))


@pytest.mark.parametrize("text", ["a dog", "ein B\u00e4r, 3.5 m", "\u72d7\u3068\U0001f415 dogdog", "\u00e9"])
def test_a_token_of_bytes_has_the_characters_that_its_bytes_are_part_of(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer(text)["input_ids"]
    sizes = [len(tokenizer.convert_ids_to_tokens(one)) for one in ids]  # one character a byte
    owner = [n for n, character in enumerate(text) for _ in character.encode()]
    expected, byte = [], 0
    for size in sizes:
        expected.append((owner[byte], owner[byte + size - 1] + 1))
        byte += size
    assert token_spans(tokenizer, ids) == (text, expected)


def test_special_tokens_write_nothing_wherever_they_stand() -> None:
    tokenizer = build_tokenizer()
    words = tokenizer("red star . a ring", add_special_tokens=False)["input_ids"]
    ids = [tokenizer.bos_token_id, *words[:1], tokenizer.pad_token_id, *words[1:], tokenizer.eos_token_id]
    text, spans = token_spans(tokenizer, ids)
    assert text == "red star. a ring"
    assert [text[start:end] for start, end in spans] == ["", "red", "", " star", ".", " a", " ring", ""]
    assert token_spans(tokenizer, [tokenizer.eos_token_id]) == ("", [(0, 0)])
    assert token_spans(tokenizer, []) == ("", [])


def test_a_span_has_the_tokens_that_write_a_part_of_it() -> None:
    spans = [(0, 2), (2, 2), (2, 6), (6, 7)]
    assert tokens_between(spans, (0, 2)) == (0,)
    assert tokens_between(spans, (1, 7)) == (0, 2, 3)
    assert tokens_between(spans, (7, 9)) == ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a dog's t-shirt, 3.5 m.", ["a", "dog's", "t-shirt", "3.5", "m"]),
        ("'quoted' - and--so; x_y", ["quoted", "and", "so", "x", "y"]),
        ("\u72d7\u548cdog", ["\u72d7", "\u548c", "dog"]),
        (
            "\u0915\u093f\u0924\u093e\u092c e\u0301t\u00e9",
            ["\u0915\u093f\u0924\u093e\u092c", "e\u0301t\u00e9"],
        ),
        ("... !", []),
    ],
)
def test_words_are_letters_digits_and_marks_inside_of_them(text: str, words: list[str]) -> None:
    assert [text[start:end] for start, end in find_words(text)] == words


def test_probabilities_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one probability for each token, got 1 for 2"):
        split_answer("a b", [(0, 1), (1, 3)], [0.5])
    with pytest.raises(ValueError, match="the product or the mean of its tokens', got 'max'"):
        word_prob([0.5], [0], "max")


def test_the_rule_takes_the_last_word_of_a_run_for_its_noun() -> None:
    text = "A small red ring and two Dogs sitting on the wooden park bench, near a fire-engine."
    assert find_names(text) == [
        (name.lower(), (text.index(name), text.index(name) + len(name)))
        for name in ("ring", "Dogs", "bench", "fire-engine")
    ]
    assert find_names("yes, there are three of them.") == []


def test_names_of_a_list_are_found_in_the_plural_and_the_longer_comes_first() -> None:
    text = "Two fire hydrants, a fire and a hydrant; children and knives."
    found = find_names(text, ["fire", "fire hydrant", "Hydrant", "child", "knife", "cat"])
    assert [name for name, _ in found] == ["fire hydrant", "fire", "Hydrant", "child", "knife"]
    assert [text[slice(*span)] for _, span in found] == [
        "fire hydrants",
        "fire",
        "hydrant",
        "children",
        "knives",
    ]
    assert find_names("a cat", lambda text: [("animal", (2, 5))]) == [("animal", (2, 5))]


def test_names_that_cannot_be_are_refused() -> None:
    with pytest.raises(TypeError, match=r"write \['cat'\]"):
        find_names("a cat", "cat")
    with pytest.raises(ValueError, match="the name '--' holds no word"):
        find_names("a cat", ["--"])
    with pytest.raises(ValueError, match=r"span \(2, 9\) is not in a text of 5 characters"):
        find_names("a cat", lambda text: [("cat", (2, 9))])
