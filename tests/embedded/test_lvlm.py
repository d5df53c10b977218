"""The shipped vision-language model: ordinary files, `generate`, batches, left padding, and what it knows."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.embedded.files import WEIGHTS
from visionsel.embedded.lvlm_quality import caption_scores, generate_answers, question_scores

WORLD = ShapesWorld("balanced", 123, 40)


@pytest.fixture(scope="module")
def lvlm():
    return load_lvlm()


def prompt(processor, text: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_plain_auto_classes_load_the_same_model_without_visionsel(lvlm) -> None:
    model, _ = lvlm
    code = f"""
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(WEIGHTS / "lvlm")!r})
processor = AutoProcessor.from_pretrained({str(WEIGHTS / "lvlm")!r})
assert "visionsel" not in sys.modules
total = sum(p.sum().item() for p in model.parameters())
print(type(model).__name__, type(processor).__name__, model.dtype, total)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    total = sum(p.sum().item() for p in model.parameters())
    name, processor, dtype, found = done.stdout.split()
    assert (name, processor, dtype) == ("LlavaForConditionalGeneration", "LlavaProcessor", "torch.float32")
    assert float(found) == pytest.approx(total, rel=1e-6)


def test_it_describes_and_answers(lvlm) -> None:
    samples = list(WORLD)
    captions = generate_answers(*lvlm, [s.image for s in samples], [CAPTION_PROMPT] * len(samples))
    scores = caption_scores(captions, samples)
    assert scores["f1"] > 0.88
    assert scores["color_accuracy"] > 0.9
    asked = [(s.image, q) for s in samples[:20] for q in s.questions]
    answers = generate_answers(*lvlm, [i for i, _ in asked], [q.text for _, q in asked], 100, 8)
    scores = question_scores(answers, [q for _, q in asked])
    for kind, least in {"exist": 0.9, "color": 0.85, "where": 0.75, "relation": 0.7, "refer": 0.5}.items():
        assert scores[kind] > least, kind


def test_a_left_padded_batch_says_what_each_prompt_says_alone(lvlm) -> None:
    model, processor = lvlm
    texts = [CAPTION_PROMPT, "is there a star in the image?", "how many objects are there?"]
    images = [WORLD[i].image for i in range(3)]
    together = generate_answers(model, processor, images, texts)
    assert together == [
        generate_answers(model, processor, [image], [text])[0]
        for image, text in zip(images, texts, strict=True)
    ]
    inputs = processor(
        images=images, text=[prompt(processor, t) for t in texts], return_tensors="pt", padding=True
    )
    assert inputs["attention_mask"][0, 0] == 0 or inputs["attention_mask"][1, 0] == 0
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
        for b in range(3):
            alone = processor(images=[images[b]], text=[prompt(processor, texts[b])], return_tensors="pt")
            torch.testing.assert_close(logits[b], model(**alone).logits[0, -1], rtol=1e-4, atol=1e-4)


def test_with_and_without_a_cache_it_says_the_same(lvlm) -> None:
    model, processor = lvlm
    inputs = processor(images=[WORLD[4].image], text=[prompt(processor, CAPTION_PROMPT)], return_tensors="pt")
    first = model.generate(**inputs, max_new_tokens=40, use_cache=True)
    assert torch.equal(first, model.generate(**inputs, max_new_tokens=40, use_cache=False))
    assert first[0, -1] == processor.tokenizer.eos_token_id


def test_a_second_turn_follows_the_first(lvlm) -> None:
    model, processor = lvlm
    sample = WORLD[2]
    shape = sample.objects[0].shape
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": CAPTION_PROMPT}]},
        {"role": "assistant", "content": [{"type": "text", "text": sample.captions[0]}]},
        {"role": "user", "content": [{"type": "text", "text": f"is there a {shape} in the image?"}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text.count("<image>") == 1
    assert text.count("<user>") == 2
    inputs = processor(images=[sample.image], text=[text], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=4)
    assert processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == "yes"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_other_modes_are_made_rgb(lvlm, mode) -> None:
    _, processor = lvlm
    image = WORLD[0].image
    text = [prompt(processor, CAPTION_PROMPT)]
    given = processor(images=[image.convert(mode)], text=text, return_tensors="pt")["pixel_values"]
    expected = processor(images=[image.convert(mode).convert("RGB")], text=text, return_tensors="pt")
    assert torch.equal(given, expected["pixel_values"])


def test_larger_images_are_scaled_and_their_middle_is_taken(lvlm) -> None:
    model, processor = lvlm
    large = ShapesWorld("balanced", 123, 40, image_size=256)
    scenes = list(range(12))
    captions = generate_answers(model, processor, [large[i].image for i in scenes], [CAPTION_PROMPT] * 12)
    assert caption_scores(captions, [large[i] for i in scenes])["f1"] > 0.75
    wide = Image.fromarray(np.pad(WORLD[0].pixels, ((0, 0), (32, 32), (0, 0))))
    text = [prompt(processor, CAPTION_PROMPT)]
    pixels = [
        processor(images=[i], text=text, return_tensors="pt")["pixel_values"] for i in (wide, WORLD[0].image)
    ]
    torch.testing.assert_close(*pixels)


def test_unknown_words_and_a_prompt_without_an_image_give_an_answer(lvlm) -> None:
    model, processor = lvlm
    (answer,) = generate_answers(model, processor, [WORLD[0].image], ["is there a zebra in the image?"])
    assert isinstance(answer, str)
    text = processor.apply_chat_template(
        [{"role": "user", "content": CAPTION_PROMPT}], add_generation_prompt=True
    )
    inputs = processor(text=[text], return_tensors="pt")
    assert "pixel_values" not in inputs
    out = model.generate(**inputs, max_new_tokens=30)
    assert out.shape[1] > inputs["input_ids"].shape[1]


def test_roles_are_user_and_assistant(lvlm) -> None:
    with pytest.raises(Exception, match="roles are user and assistant, got system"):
        lvlm[1].apply_chat_template([{"role": "system", "content": "red"}])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path, name) -> None:
    folder = tmp_path / "lvlm"
    shutil.copytree(WEIGHTS / "lvlm", folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {name} in .*make embedded"):
        load_lvlm(folder)


def test_auto_classes_and_the_loader_agree_on_logits(lvlm) -> None:
    model, processor = lvlm
    plain = AutoModelForImageTextToText.from_pretrained(WEIGHTS / "lvlm").eval()
    inputs = AutoProcessor.from_pretrained(WEIGHTS / "lvlm")(
        images=[WORLD[1].image], text=[prompt(processor, CAPTION_PROMPT)], return_tensors="pt"
    )
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, model(**inputs).logits)
