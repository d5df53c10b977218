"""The page of pictures, from untrained stand-ins of the embedded models and from planted answers."""

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from train import quickstart_shapes
from train.lvlm import build_lvlm
from train.quickstart_shapes import PAGE, answer_scenes, fresh_scenes, main, write_page
from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld, box_to_answer
from visionsel.embedded.lvlm import build_processor
from visionsel.embedded.lvlm_quality import generate_answers
from visionsel.embedded.segmenter import build_sam

SIZES = {"patch_size": 8, "encoder_dim": 32, "encoder_depth": 1, "window_size": 4, "global_layers": [0]}
SIZES |= {"embed_dim": 32, "decoder_depth": 1, "decoder_mlp_dim": 64}


def small_models() -> tuple[Any, Any, Any]:
    """As `load_models`: a LLaVA and a SAM of random weights, large ones so that it babbles."""
    torch.manual_seed(1)
    processor = build_processor()
    small = {"vision_dim": 16, "vision_layers": 2, "vision_heads": 2, "dim": 16, "layers": 1, "heads": 2}
    model = build_lvlm(processor.tokenizer.get_vocab(), **small).eval()
    model.generation_config.update(suppress_tokens=processor.tokenizer.all_special_ids)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(30)
    return model, processor, build_sam(SIZES).eval()


class Reader(HTMLParser):
    """Elements, their attributes and the texts of those with a class."""

    void = ("meta", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag in self.void:
            return
        name = dict(attrs).get("class") or tag
        self.open.append((tag, name))
        self.texts.setdefault(name, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for name in dict.fromkeys(name for _, name in self.open):
            self.texts[name][-1] += data


def read_page(path: Path) -> Reader:
    reader = Reader(path.read_text(encoding="utf-8"))
    assert not reader.open
    return reader


def plant(monkeypatch: pytest.MonkeyPatch, caption: str, answers: dict[str, str]) -> None:
    """Answers of the vision-language model: one caption, and boxes by prompt."""

    def generate(model: Any, processor: Any, images: list[Any], prompts: list[str], **_: Any) -> list[str]:
        return [caption if prompt == CAPTION_PROMPT else answers[prompt] for prompt in prompts]

    monkeypatch.setattr(quickstart_shapes, "generate_answers", generate)


def test_the_page_shows_what_the_models_say_and_needs_no_other_file(tmp_path) -> None:
    model, processor, sam = small_models()
    path = write_page(tmp_path / "new", model, processor, sam)
    assert path == tmp_path / "new" / PAGE
    assert list(path.parent.iterdir()) == [path]
    page = read_page(path)
    samples = [sample for _, sample in fresh_scenes()]
    captions = generate_answers(model, processor, [s.image for s in samples], [CAPTION_PROMPT] * 12)
    assert len(set(captions)) > 6
    assert page.texts["caption"] == captions
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert "url(" not in path.read_text()
    assert "http" not in path.read_text()
    assert len(sources) == 2 * len(samples)
    for number, source in enumerate(sources):
        kind, data = source.split(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            if number % 2 == 0:  # the scene itself, every pixel a square
                assert (np.asarray(picture)[2::4, 2::4] == samples[number // 2].pixels).all()
            else:
                assert picture.size == (256, 256)


def test_scenes_are_of_two_distributions_and_always_the_same() -> None:
    scenes = fresh_scenes()
    assert [name for name, _ in scenes] == ["balanced"] * 6 + ["anti"] * 6
    for (_, one), (_, other) in zip(scenes, fresh_scenes(), strict=True):
        assert (one.pixels == other.pixels).all()


def test_invented_and_miscoloured_and_missed_objects_are_told_apart(tmp_path, monkeypatch) -> None:
    sample = next(s for s in ShapesWorld("balanced", 3) if {"star", "moon"} <= {o.shape for o in s.objects})
    star = next(o for o in sample.objects if o.shape == "star")
    absent = next(s for s in ("ring", "cross", "bar") if s not in {o.shape for o in sample.objects})
    wrong = next(c for c in ("red", "green") if c not in {o.color for o in sample.objects})
    caption = f"a large {star.color} star and a {wrong} star and a blue {absent}, a {star.color} star"
    answers = {
        f"locate the {star.color} star.": box_to_answer(star.grid_box, 64),
        f"locate the {wrong} star.": "no <b>idea</b>",
        f"locate the blue {absent}.": "9 9 3 3",  # numbers, but no box
    }
    plant(monkeypatch, caption, answers)
    scenes = [("balanced", sample)]
    page = read_page(write_page(tmp_path, None, None, build_sam(SIZES).eval(), scenes))
    legend = 1
    assert page.texts["invented"][legend:] == [f"blue {absent}"]
    assert page.texts["color"][legend:] == [wrong]
    items = page.texts["li"]
    assert len(items) == 3
    assert f"{star.color} star: box {box_to_answer(star.grid_box, 64)}; IoU 0." in items[0]
    assert f"{wrong} star: no box: the answer was “no <b>idea</b>”; IoU 0.00" in items[1]
    assert f"blue {absent}: no box: the answer was “9 9 3 3”; not in the image, invented" in items[2]
    assert "moon" in page.texts["missed"][0]
    assert "star" not in page.texts["missed"][0]
    one, two, three = answer_scenes(None, None, build_sam(SIZES).eval(), scenes)[0].objects
    assert one.mask is not None
    assert one.iou == pytest.approx((one.mask & star.mask).sum() / (one.mask | star.mask).sum())
    assert (two.mask, two.iou, three.mask, three.iou) == (None, 0.0, None, None)


def test_a_box_and_its_mask_are_drawn_in_colour_and_a_scene_without_them_stays_grey(
    tmp_path, monkeypatch
) -> None:
    sample = ShapesWorld("balanced", 3, max_objects=1)[0]
    colored = []
    for answer in ("4 4 12 12", "none"):
        plant(monkeypatch, "a red star", {"locate the red star.": answer})
        page = read_page(write_page(tmp_path, None, None, build_sam(SIZES).eval(), [("anti", sample)]))
        source = [value for name, value in page.attributes if name == "src"][1]
        with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as picture:
            pixels = np.asarray(picture).astype(int)
        colored.append(pixels.max(2) != pixels.min(2))
    assert colored[0][32:104, [32, 33, 102, 103]].all()  # the border: bins 4 to 12 of 8 pixels each
    assert not colored[1].any()


def test_a_caption_is_text_and_never_markup(tmp_path, monkeypatch) -> None:
    caption = '<script>alert("1 & 2")</script> $count </p>'
    plant(monkeypatch, caption, {})
    scenes = fresh_scenes(1)
    page = read_page(write_page(tmp_path, None, None, build_sam(SIZES).eval(), scenes))
    assert page.texts["caption"] == [caption] * 2
    assert "script" not in page.tags
    assert page.texts["li"] == ["The caption names no object."] * 2


def test_a_page_that_fails_leaves_the_old_one(tmp_path, monkeypatch) -> None:
    (tmp_path / PAGE).write_text("old")
    plant(monkeypatch, "", {})
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        write_page(tmp_path, None, None, build_sam(SIZES).eval(), fresh_scenes(1))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_the_page_alone_says_what_is_missing(tmp_path, capsys) -> None:
    assert main(["--output", str(tmp_path / "page"), "--lvlm", str(tmp_path)]) == 1
    assert f"no config.json in {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()
