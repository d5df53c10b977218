"""Places of words are found from the end of a prompt, whatever the tokenizer and the padding."""

import re
from types import SimpleNamespace

import pytest
import torch

from visionsel.multimodal.modulation.samples import batches, object_name, predicting

TEXT = "<image> user: what is it? assistant: a red dog. </s>"


def split(text: str) -> list[str]:
    """Pieces of up to two letters, each word with the blank before it, as byte-pair tokenizers have them."""
    words = re.findall(r"<\w+>|</s>|\s?[^\s<]+|\s", text)
    return [
        piece
        for word in words
        for piece in ([word] if word.startswith("<") else re.findall(r"\s?.{1,2}|\s", word))
    ]


@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (0, 2)])
def test_the_place_before_a_word_is_found_when_words_are_several_tokens(left: int, right: int) -> None:
    processor = SimpleNamespace(tokenizer=lambda text: {"input_ids": split(text)})
    pieces = split(TEXT)
    prompt = ["<image>"] * 5 + pieces[1:]  # an image is five tokens of the model
    mask = torch.tensor([0] * left + [1] * len(prompt) + [0] * right)
    answer = "a red dog."
    starts = [answer.index(word) for word in ("a", "red", "dog")]
    places, end = predicting(processor, TEXT, answer, starts, mask)
    assert [prompt[place + 1 - left] for place in places] == [" a", " re", " do"]
    assert end == left + len(prompt)
    with pytest.raises(ValueError, match="does not write the answer as it is"):
        predicting(processor, TEXT, "A red dog.", [0], mask)


def test_objects_have_a_name_or_a_shape() -> None:
    assert object_name(SimpleNamespace(name="Dog", shape="square")) == "dog"
    assert object_name(SimpleNamespace(shape="Ring")) == "ring"


def test_batches_hold_every_sample_once_in_order() -> None:
    assert list(batches("abcde", 2)) == [["a", "b"], ["c", "d"], ["e"]]
    for samples, size in (("", 2), ("abc", 0)):
        with pytest.raises(ValueError, match="there must be samples"):
            list(batches(samples, size))
