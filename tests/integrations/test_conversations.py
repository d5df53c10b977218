"""What the harnesses share: batches, options, where answers end."""

from typing import Any

import pytest
import torch

from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.embedded.lvlm_quality import generate_answers
from visionsel.integrations.conversations import (
    Conversation,
    answer_conversations,
    cut,
    sampling_options,
    specs,
)
from visionsel.multimodal.decoding import VCD
from visionsel.multimodal.modulation import VHR
from visionsel.multimodal.prompts import user_turn
from visionsel.multimodal.pruning import FastV

NEW = 8
GREEDY = sampling_options(NEW)


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return load_lvlm()


def asked(count: int) -> tuple[list[Any], list[str]]:
    """Images and prompts of different lengths."""
    samples = list(ShapesWorld("balanced", 3, count))
    prompts = [one.questions[0].text if number % 2 else CAPTION_PROMPT for number, one in enumerate(samples)]
    return [one.image for one in samples], prompts


def test_answers_in_batches_are_those_of_one_at_a_time_with_any_methods(small: tuple[Any, Any]) -> None:
    model, processor = small
    images, prompts = asked(3)
    talk = [Conversation([user_turn(p)], [i], GREEDY) for i, p in zip(images, prompts, strict=True)]
    with FastV(0.5, 1)(model), VHR(3.0)(model), VCD(2.0)(model):
        alone = [
            generate_answers(model, processor, [i], [p], max_new_tokens=NEW)[0]
            for i, p in zip(images, prompts, strict=True)
        ]
    assert alone != generate_answers(model, processor, images, prompts, max_new_tokens=NEW), (
        "the methods change something"
    )
    methods = [FastV(0.5, 1), VHR(3.0), VCD(2.0)]
    assert answer_conversations(model, processor, methods, talk, 2) == [one.strip() for one in alone]
    processor.tokenizer.padding_side = "right"
    try:
        found = answer_conversations(model, processor, [], talk, 3)
    finally:
        processor.tokenizer.padding_side = "left"
    assert found == [
        one.strip() for one in generate_answers(model, processor, images, prompts, max_new_tokens=NEW)
    ]


def test_texts_images_and_options_that_do_not_go_together_run_apart_and_keep_their_order(
    small: tuple[Any, Any],
) -> None:
    model, processor = small
    images, prompts = asked(3)
    short = sampling_options(2)
    talk = [
        Conversation([user_turn(prompts[0])], [images[0]], GREEDY),
        Conversation([user_turn(CAPTION_PROMPT, 0)], [], GREEDY),
        Conversation([user_turn(prompts[2])], [images[2]], short),
        Conversation([user_turn(prompts[1], 2)], images[:2], GREEDY),
    ]
    alone = [answer_conversations(model, processor, [], [one])[0] for one in talk]
    assert answer_conversations(model, processor, [], talk, 4) == alone
    assert len(alone[2].split()) <= 2 < len(alone[0].split())
    with pytest.raises(ValueError, match="1 places for images and 2 images"):
        answer_conversations(model, processor, [], [Conversation([user_turn("a")], images[:2], GREEDY)])


def test_an_answer_ends_at_the_first_of_its_texts_and_no_token_is_made_after(small: tuple[Any, Any]) -> None:
    model, processor = small
    images, _ = asked(2)
    talk = [Conversation([user_turn(CAPTION_PROMPT)], [image], GREEDY) for image in images]
    whole = answer_conversations(model, processor, [], talk, 2)
    word = whole[0].split()[3]
    ended = [Conversation(one.turns, one.images, GREEDY, ("nowhere", f" {word}")) for one in talk]
    made: list[int] = []
    hook = model.register_forward_hook(lambda *call: made.append(1))
    try:
        found = answer_conversations(model, processor, [], ended, 2)
        both, made[:] = len(made), []
        assert answer_conversations(model, processor, [], ended[:1])[0] == found[0]
    finally:
        hook.remove()
    assert found == [one.partition(f" {word}")[0].strip() for one in whole]
    assert found[0] == " ".join(whole[0].split()[:3])
    assert len(made) == 4 <= both
    assert cut("one\n\ntwo", ("two", "\n\n")) == "one"
    assert cut("one", ("\n\n",)) == cut("one", ()) == "one"


@pytest.mark.parametrize(
    ("given", "drawn"),
    [
        ({}, None),
        ({"temperature": 0}, None),
        ({"temperature": 0.0, "do_sample": True, "top_p": 0.9}, None),
        ({"temperature": 0.7, "do_sample": False}, None),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.2}, 0.2),
    ],
)
def test_tokens_are_drawn_at_temperatures_above_0(given: dict[str, Any], drawn: float | None) -> None:
    options = sampling_options(7, **given, num_beams=3)
    assert options["max_new_tokens"] == 7
    assert options["num_beams"] == 3
    assert options["do_sample"] is (drawn is not None)
    assert options["temperature"] == drawn
    assert options.get("top_p") is None


def test_what_is_drawn_is_what_generate_draws(small: tuple[Any, Any]) -> None:
    model, processor = small
    images, _ = asked(1)
    options = sampling_options(6, temperature=1.5, top_p=0.9, top_k=20)
    torch.manual_seed(4)
    found = answer_conversations(
        model, processor, [], [Conversation([user_turn(CAPTION_PROMPT)], images, options)]
    )
    torch.manual_seed(4)
    hot = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 20}
    expected = generate_answers(model, processor, images, [CAPTION_PROMPT], max_new_tokens=6, **hot)
    assert found == [expected[0].strip()]
    assert found != answer_conversations(
        model,
        processor,
        [],
        [Conversation([user_turn(CAPTION_PROMPT)], images, sampling_options(6))],
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, []),
        ("", []),
        ("vhr:alpha=2", ["vhr:alpha=2"]),
        ('"vhr:alpha=2,layers=(1,2); pai"', ["vhr:alpha=2,layers=(1,2)", "pai"]),
        ("[fastv:keep=0.25,layer=2]", ["fastv:keep=0.25,layer=2"]),
        (["fastv:keep=0.5", "random"], ["fastv:keep=0.5", "random"]),
    ],
)
def test_methods_come_as_text_in_quotes_or_brackets_or_as_lists(given: Any, expected: list[str]) -> None:
    assert specs(given) == expected


def test_numbers_out_of_range_are_refused(small: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        sampling_options(0)
    with pytest.raises(ValueError, match=r"temperature must be 0 or more, got -1"):
        sampling_options(1, temperature=-1)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        answer_conversations(*small, [], [], 0)
    with pytest.raises(ValueError, match="methods must be text"):
        specs([1])
