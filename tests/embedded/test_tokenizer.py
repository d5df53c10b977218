"""The word-level tokenizer reads every text of the world as the world splits it, and gives it back."""

import pytest
from transformers import AutoTokenizer

from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld, split_words, vocabulary
from visionsel.embedded.tokenizer import SPECIAL, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def texts() -> list[str]:
    found = [CAPTION_PROMPT]
    for sample in ShapesWorld("train", 0, 40):
        found += sample.captions
        found += [e.text for e in sample.expressions]
        for question in sample.questions:
            found += [question.text, question.answer]
    return found


def test_every_text_of_the_world_is_split_as_the_world_splits_it_and_comes_back(tokenizer) -> None:
    for text in texts():
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == split_words(text)
        assert tokenizer.decode(ids) == text


def test_vocabulary_is_special_tokens_then_words(tokenizer) -> None:
    words = [*SPECIAL, *vocabulary()]
    assert len(words) == len(set(words)) == len(tokenizer)
    assert [tokenizer.convert_tokens_to_ids(word) for word in words] == list(range(len(words)))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_case_spaces_and_unknown_words(tokenizer) -> None:
    ids = tokenizer("Is  there\n a ZEBRA in the image ?")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == "is there a <unk> in the image ?".split()
    assert tokenizer.decode(ids, skip_special_tokens=True) == "is there a in the image?"


def test_padding_is_on_the_left_and_files_are_ordinary(tokenizer, tmp_path) -> None:
    batch = tokenizer(["red", "a red star"], padding=True)
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.padding_side == "left"
    for text in texts()[:50]:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
