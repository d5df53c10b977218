"""RITUAL+: the model names the transform, and all goes on as if it had been given."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.multimodal.runs import run, tiny
from tests.multimodal.tiny import make_inputs
from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.generation import parse_methods
from visionsel.multimodal.decoding import ChosenTransform, RandomTransform, Ritual
from visionsel.multimodal.decoding.chosen import kind_named
from visionsel.multimodal.decoding.views import KINDS
from visionsel.multimodal.modulation import VHR
from visionsel.multimodal.prompts import chat_inputs, user_turn
from visionsel.multimodal.pruning import FastV


class Scripted:
    """A processor without a chat template whose words are what a test wants a model's tokens to say."""

    chat_template = None
    image_mean = image_std = (0.5, 0.5, 0.5)

    def __init__(self, replies: list[str]) -> None:
        self.replies, self.tokenizer = replies, self
        self.read: list[Tensor] = []

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert "mirror" in text
        assert not add_special_tokens
        return {"input_ids": [21, 22, 23, 24]}

    def batch_decode(self, tokens: Tensor) -> list[str]:
        self.read.append(tokens)
        return self.replies


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_it_equals_ritual_with_the_transforms_named_and_drawn_where_none_is(name: str) -> None:
    model, inputs = tiny(name), make_inputs(name, batch=3)
    processor = Scripted(["I would crop it.", "no idea", "Blur, not mirror"])
    view = ChosenTransform.of(model, processor, seed=3)
    fixed = {
        row: RandomTransform.of(model, kinds=kinds, seed=3, processor=processor)(inputs)["pixel_values"]
        for row, kinds in enumerate((("crop",), KINDS, ("blur",)))
    }
    parts = [1, 1, 1]
    if "image_grid_thw" in inputs:
        parts = inputs["image_grid_thw"].prod(1).tolist()
    expected = torch.cat([fixed[row].split(parts)[row] for row in range(3)])
    with FastV(0.5, 1)(model), VHR(3.0)(model) as heads:
        with Ritual(view=lambda given: given | {"pixel_values": expected})(model):
            wanted = run(model, inputs, 4)
            chosen_heads = {layer: mask.clone() for layer, mask in heads.heads.items()}
        with Ritual(view=view)(model) as views:
            found = run(model, inputs, 4)
        assert all(torch.equal(heads.heads[layer], chosen_heads[layer]) for layer in chosen_heads)
    assert torch.equal(views.inputs["pixel_values"], expected)
    assert torch.equal(found.tokens, wanted.tokens)
    # before the two views comes the choice, of as many forwards as it has tokens
    assert torch.equal(found.logits[-len(wanted.logits) :], wanted.logits)
    [replies] = processor.read
    assert len(found.logits) == len(wanted.logits) + replies.shape[1]


def test_the_model_is_asked_at_the_end_of_the_users_turn_and_sees_the_whole_image() -> None:
    model, processor = load_lvlm()
    images = [one.image for one in ShapesWorld("balanced", 4, 2)]
    prompts = [CAPTION_PROMPT, "is there a star in the image?"]
    inputs = chat_inputs(processor, [[user_turn(one)] for one in prompts], [[one] for one in images])
    view = ChosenTransform.of(model, processor, kinds=("blur", "crop"))
    seen: list[dict[str, Any]] = []
    stock = model.generate
    model.generate = lambda **given: seen.append(given) or stock(**given)
    try:
        kinds = view.kinds(dict(inputs))
    finally:
        del model.generate
    assert kinds == [None, None], "the small model has no words for it"
    request = view.request.format(words="blur, crop")
    expected = chat_inputs(
        processor, [[user_turn(one + request)] for one in prompts], [[one] for one in images]
    )
    for row in range(2):
        real = seen[0]["attention_mask"][row].bool()
        wanted = expected["attention_mask"][row].bool()
        assert torch.equal(seen[0]["input_ids"][row, real], expected["input_ids"][row, wanted])
    assert torch.equal(seen[0]["pixel_values"], inputs["pixel_values"])
    drawn = view.transform(dict(inputs))["pixel_values"]
    assert torch.equal(view(dict(inputs))["pixel_values"], drawn)


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ("Crop", "crop"),
        ("upside-down.", "vflip"),
        ("I'd recolour, or blur", "jitter"),
        ("rotating it a little", "rotate"),
        ("The best is MIRROR", "hflip"),
        ("", None),
        ("one one one", None),
        ("outcrop", None),
    ],
)
def test_a_reply_names_the_first_of_the_transforms_in_it(reply: str, kind: str | None) -> None:
    assert kind_named(reply, KINDS) == kind


def test_only_what_there_is_to_choose_counts() -> None:
    assert kind_named("crop, then blur", ("hflip", "blur")) == "blur"
    assert kind_named("crop", ("hflip", "blur")) is None


def test_several_images_of_a_sample_change_alike() -> None:
    model, inputs = tiny("llava"), make_inputs("llava", images=(1, 2))
    view = ChosenTransform.of(model, Scripted([]))
    changed = view.apply(inputs, ["hflip", "vflip"])["pixel_values"]
    pixels = inputs["pixel_values"]
    assert torch.equal(changed[0], pixels[0].flip(-1))
    assert torch.equal(changed[1:], pixels[1:].flip(-2))


def test_plus_takes_the_processor_beside_the_model_or_the_given_one() -> None:
    model, processor = load_lvlm()
    sample = ShapesWorld("balanced", 4, 1)[0]
    inputs = chat_inputs(processor, [[user_turn(CAPTION_PROMPT)]], [[sample.image]])
    drawn = RandomTransform.of(model, processor=processor)(dict(inputs))["pixel_values"]
    [from_text] = parse_methods(model, processor, decode="ritual:plus=True")
    for method in (Ritual(plus=True), from_text):
        with method(model) as views:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
        assert torch.equal(views.inputs["pixel_values"], drawn)
    with pytest.raises(ValueError, match="plus=True or view=, not both"):
        Ritual(view=lambda given: given, plus=True)
    model.name_or_path = ""
    with pytest.raises(ValueError, match=r"view=ChosenTransform\.of\(model, processor\)"):
        Ritual(plus=True)(model).__enter__()
    with pytest.raises(ValueError, match=r"request needs \{words\}"):
        ChosenTransform(model, processor, RandomTransform(), request="choose")


def test_prompts_that_the_template_did_not_make_are_refused() -> None:
    model, processor = load_lvlm()
    inputs = {"input_ids": torch.tensor([[1, 4, 5, 7, 8]])}
    with pytest.raises(ValueError, match="not as the chat template ends a user's turn, with ' <assistant>'"):
        ChosenTransform.of(model, processor).kinds(inputs)
