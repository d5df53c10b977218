"""AGLA's second view, made by a model that matches images with texts."""

from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import BlipImageProcessor

from tests.multimodal.decoding.test_agla import tiny_blip
from tests.multimodal.runs import tiny
from tests.multimodal.tiny import make_inputs
from visionsel.data.shapes import ShapesWorld
from visionsel.embedded import load_clip, load_lvlm
from visionsel.generation import generate_answer
from visionsel.multimodal.decoding import AGLA, BlipMatcher, ClipMatcher, matching_view
from visionsel.multimodal.decoding.agla import image_relevance, masked, pixel_mask
from visionsel.multimodal.prompts import chat_inputs, user_turn

QUESTIONS = ["is there a star in the image?", "what color is the ring?"]


class Halves:
    """A matcher that cares for the left half of a picture when asked for stars, else for the right one."""

    def __init__(self) -> None:
        self.asked: list[tuple[Image.Image, str]] = []

    def __call__(self, picture: Image.Image, text: str) -> tuple[Tensor, float]:
        self.asked.append((picture, text))
        left = torch.tensor([[1.0, 0.0]])
        return (left if "star" in text else left.flip(1)), 1.0


class Processor:
    """Of a tiny model: it only normalises."""

    chat_template = None
    image_mean, image_std = (0.5,) * 3, (0.25,) * 3


def encoded(processor: Any) -> tuple[list[Image.Image], Any]:
    pictures = [one.image for one in ShapesWorld("balanced", 4, 2)]
    turns = [[user_turn(question)] for question in QUESTIONS]
    return pictures, chat_inputs(processor, turns, [[one] for one in pictures])


def test_each_picture_keeps_what_its_own_question_is_about() -> None:
    model, processor = load_lvlm()
    pictures, inputs = encoded(processor)
    matcher = Halves()
    view = matching_view(model, processor, matcher)(dict(inputs))
    assert [text for _, text in matcher.asked] == QUESTIONS
    for number, (seen, _) in enumerate(matcher.asked):
        assert seen.tobytes() == pictures[number].tobytes(), "pixels of 64 are those of the picture"
        local = masked(pictures[number], *Halves()(seen, QUESTIONS[number]))
        expected = processor.image_processor(images=local, return_tensors="pt")["pixel_values"][0]
        assert torch.allclose(view["pixel_values"][number], expected, atol=1e-6)
        kept = pixel_mask(*Halves()(seen, QUESTIONS[number]), 64, 64)
        assert 0.3 < float(kept.float().mean()) < 0.7
        assert torch.equal(view["pixel_values"][number][:, kept], inputs["pixel_values"][number][:, kept])
    assert all(view[name] is inputs[name] for name in ("input_ids", "attention_mask"))
    given = [[one] for one in pictures]
    anew = matching_view(model, processor, Halves(), given, QUESTIONS)(dict(inputs))["pixel_values"]
    assert torch.allclose(anew, view["pixel_values"], atol=1e-6)


def test_qwens_patches_are_masked_as_the_picture_and_frames_alike() -> None:
    name = "qwen2_5_vl"
    model, inputs = tiny(name), make_inputs(name, batch=2)
    view = matching_view(model, Processor(), Halves(), texts=["star", "ring"])
    changed = view(inputs)["pixel_values"]
    sizes = inputs["image_grid_thw"].prod(1).tolist()
    for row, (old, new) in enumerate(
        zip(inputs["pixel_values"].split(sizes), changed.split(sizes), strict=True)
    ):
        black = torch.isclose(new, torch.full_like(new, -2.0), atol=1e-12)
        assert bool(((new == old) | black).all())
        assert 0.3 < float((black & (old != new)).double().mean()) < 0.7, row
        frames = black.unflatten(1, (3, 2, 4, 4))
        assert torch.equal(frames[:, :, 0], frames[:, :, 1])


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("llava_next", {"batch": 1}, r"are tiles, or several images a sample; pass matching_view"),
        ("llava", {"images": 2}, r"several images a sample"),
        ("qwen2_5_vl", {"video": True}, r"masks images: pass pixel_values, and no videos"),
    ],
)
def test_pixels_that_are_no_whole_pictures_are_refused(name: str, options: Any, match: str) -> None:
    inputs = make_inputs(name, **options)
    view = matching_view(tiny(name), Processor(), Halves(), texts=["star"] * len(inputs["input_ids"]))
    with pytest.raises(NotImplementedError, match=match):
        view(inputs)


def test_texts_and_images_must_be_those_of_the_inputs() -> None:
    model, processor = load_lvlm()
    pictures, inputs = encoded(processor)
    with pytest.raises(ValueError, match="texts must be one for each of 2 samples, got 1"):
        matching_view(model, processor, Halves(), texts=["star"])(dict(inputs))
    with pytest.raises(ValueError, match=r"the images make pixel values \[3, 3, 64, 64\]"):
        matching_view(model, processor, Halves(), [[pictures[0]] * 2, [pictures[1]]])(dict(inputs))


def test_blip_matches_as_its_processor_reads() -> None:
    model = tiny_blip().float()

    class Reader:
        images = BlipImageProcessor(size={"height": 16, "width": 16})

        def __call__(self, images: Any, text: str, truncation: bool, return_tensors: str) -> dict[str, Any]:
            ids = torch.tensor([[5, *(10 + len(word) for word in text.split()), 6]])
            pixels = self.images(images=images, return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    picture = next(iter(ShapesWorld("balanced", 4, 1))).image
    given = Reader()(picture, QUESTIONS[0], True, "pt")
    expected, match = image_relevance(model, **given, layer=1)
    with torch.inference_mode():
        relevance, cosine = BlipMatcher(model, Reader(), layer=1)(picture, QUESTIONS[0])
    assert torch.equal(relevance, expected[0])
    assert cosine == float(match[0])


def nudged(clip: Any, module: Any, picture: Image.Image, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer gives, and by finite differences what the cosine gains by each of its numbers."""
    change: dict[str, Tensor] = {}
    outputs: list[Tensor] = []

    def shift(one: Any, args: Any, output: Tensor) -> Tensor:
        outputs[:] = [output.detach()]
        return output + change["by"] if "by" in change else output

    known = open_clip.get_model_preprocess_cfg(clip)
    size = known["size"] if isinstance(known["size"], int) else known["size"][0]
    small = picture.resize((size, size), Image.Resampling.BICUBIC)
    mean, std = (torch.tensor(known[name])[:, None, None] for name in ("mean", "std"))
    values = torch.tensor(list(small.tobytes())).view(size, size, 3).permute(2, 0, 1) / 255
    pixels = ((values - mean) / std)[None].double()
    words = F.normalize(clip.encode_text(ids), dim=-1)

    def score() -> float:
        return float((F.normalize(clip.encode_image(pixels), dim=-1) * words).sum())

    hook = module.register_forward_hook(shift)
    score()
    plain = outputs[0]
    slope = torch.zeros_like(plain)
    for place in range(plain.numel()):
        step = torch.zeros_like(plain).flatten()
        step[place] = 1e-4
        change["by"] = step.view_as(plain)
        up = score()
        change["by"] = -change["by"]
        slope.view(-1)[place] = (up - score()) / 2e-4
    hook.remove()
    return plain, slope


VISION: dict[str, dict[str, Any]] = {
    "its own": {"image_size": 12, "layers": 2, "width": 8, "head_width": 4, "patch_size": 6},
    "timm": {
        "image_size": 32,
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "token",
        "timm_proj": "linear",
    },
}


@pytest.mark.parametrize("tower", ["its own", "timm"])
def test_clip_relevance_is_what_a_layer_gives_times_what_the_cosine_gains_by_it(
    tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    stock = timm.create_model  # a vision transformer small enough for finite differences
    sizes = {"embed_dim": 8, "depth": 2, "num_heads": 2, "img_size": 32}
    monkeypatch.setattr(
        timm, "create_model", lambda name, *args, **given: stock(name, *args, **(given | sizes))
    )
    text = {"context_length": 8, "vocab_size": 40, "width": 8, "heads": 2, "layers": 1}
    clip: Any = open_clip.CustomTextCLIP(8, VISION[tower], text).double().eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
    open_clip.model.set_model_preprocess_cfg(
        clip, {"size": VISION[tower]["image_size"], "mean": (0.5,) * 3, "std": (0.5,) * 3}
    )
    ids = torch.tensor([[3, 4, 5, 39, 0, 0, 0, 0]])
    picture = next(iter(ShapesWorld("balanced", 4, 1))).image
    with torch.inference_mode():
        relevance, match = ClipMatcher(clip, lambda texts: ids)(picture, "a star")
    own = tower == "its own"
    last = clip.visual.transformer.resblocks[-1].ln_1 if own else clip.visual.trunk.blocks[-1].norm1
    with torch.no_grad():
        plain, slope = nudged(clip, last, picture, ids)
    expected = (plain * slope)[0, 1:].sum(-1).clamp(min=0).view(2, 2)
    assert relevance.shape == (2, 2)
    assert float(expected.max()) > 1e-3
    assert torch.allclose(relevance.double(), expected, rtol=1e-5, atol=1e-7)
    assert -1 <= match <= 1
    assert not any(one._forward_hooks for one in clip.modules())
    assert all(one.grad is None for one in clip.parameters())
    with pytest.raises(ValueError, match="layer 2 does not exist: the tower has 0 to 1"):
        ClipMatcher(clip, lambda texts: ids, layer=2)(picture, "a star")


def test_the_small_clip_points_at_what_is_named() -> None:
    clip, _, tokenizer = load_clip()
    matcher = ClipMatcher(clip, tokenizer)
    hits = chance = number = 0.0
    for sample in ShapesWorld("balanced", 6, 30):
        for expression in sample.expressions[:1]:
            relevance, _ = matcher(sample.image, expression.text)
            assert relevance.shape == (8, 8)
            mask = torch.as_tensor(sample.objects[expression.object].mask).float()
            cells = F.avg_pool2d(mask[None, None], 8)[0, 0] > 0.25
            hits += float(cells.flatten()[relevance.argmax()])
            chance += float(cells.float().mean())
            number += 1
    assert hits / number > 2.5 * chance / number


def test_generate_gives_agla_the_clip_of_the_package_for_its_model() -> None:
    model, processor = load_lvlm()
    clip, _, tokenizer = load_clip()
    sample = ShapesWorld("balanced", 4, 1)[0]
    found = generate_answer(
        model, processor, sample.image, QUESTIONS[0], max_new_tokens=3, decode="agla"
    ).answer
    inputs = chat_inputs(processor, [[user_turn(QUESTIONS[0])]], [[sample.image]])
    view = matching_view(model, processor, ClipMatcher(clip, tokenizer))
    assert not torch.equal(view(dict(inputs))["pixel_values"], inputs["pixel_values"])
    with AGLA(view=view)(model):
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    assert found == processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    model.name_or_path = ""
    with pytest.raises(ValueError, match=r"matching_view\(model, processor, matcher\)"):
        generate_answer(model, processor, sample.image, QUESTIONS[0], decode="agla")
