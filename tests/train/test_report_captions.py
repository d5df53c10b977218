"""The captions of the report, from untrained stand-ins and from planted answers."""

import numpy as np
import pytest

from tests.train.pages import SAM, Reader, plant, small_models
from train import report_captions
from train.report_captions import answer_scenes, captions_section
from train.report_marks import best_iou, missed, phrases
from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld, box_to_answer
from visionsel.embedded.lvlm_quality import generate_answers
from visionsel.embedded.segmenter import build_sam


def test_the_section_shows_what_the_models_say_beside_the_scenes() -> None:
    model, processor, sam = small_models()
    samples = list(ShapesWorld("balanced", 2026, 4))
    page = Reader(captions_section(model, processor, sam, [("balanced", s) for s in samples]).body)
    captions = generate_answers(model, processor, [s.image for s in samples], [CAPTION_PROMPT] * 4)
    assert len(set(captions)) > 2
    assert page.texts["said caption"] == captions
    assert len(page.pictures) == 8
    for sample, scene, overlay in zip(samples, page.pictures[::2], page.pictures[1::2], strict=True):
        assert (scene[2::4, 2::4] == sample.pixels).all()  # every pixel is a square
        assert overlay.shape == (256, 256, 3)


def test_invented_and_miscoloured_and_missed_objects_are_told_apart(monkeypatch) -> None:
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
    plant(monkeypatch, report_captions, caption, answers)
    scenes = [("balanced", sample)]
    page = Reader(captions_section(None, None, build_sam(SAM).eval(), scenes).body)
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
    one, two, three = answer_scenes(None, None, build_sam(SAM).eval(), scenes)[0].objects
    assert one.mask is not None
    assert one.iou == pytest.approx((one.mask & star.mask).sum() / (one.mask | star.mask).sum())
    assert (two.mask, two.iou, three.mask, three.iou) == (None, 0.0, None, None)


def test_the_table_counts_what_is_named(monkeypatch) -> None:
    sample = next(s for s in ShapesWorld("balanced", 3) if len({o.shape for o in s.objects}) == 3)
    shapes = sorted({o.shape for o in sample.objects})
    absent = next(s for s in ("ring", "cross", "bar", "moon") if s not in shapes)
    caption = f"a {shapes[0]} and a {shapes[1]} and a {absent}"  # two of three are right, one is missed
    plant(monkeypatch, report_captions, caption, {f"locate the {s}.": "none" for s in (*shapes, absent)})
    section = captions_section(None, None, build_sam(SAM).eval(), [("anti", sample)])
    rows = Reader(section.body).rows
    assert rows[1] == ["anti", "1", "66.7%", "33.3%", "100.0%", "0.0%", "0.00"]
    assert rows[2] == ["all", *rows[1][1:]]
    assert section.figure == "0.67"


def test_a_box_and_its_mask_are_drawn_in_colour_and_a_scene_without_them_stays_grey(monkeypatch) -> None:
    sample = ShapesWorld("balanced", 3, max_objects=1)[0]
    colored = []
    for answer in ("4 4 12 12", "none"):
        plant(monkeypatch, report_captions, "a red star", {"locate the red star.": answer})
        page = Reader(captions_section(None, None, build_sam(SAM).eval(), [("anti", sample)]).body)
        pixels = page.pictures[1].astype(int)
        colored.append(pixels.max(2) != pixels.min(2))
    assert colored[0][32:104, [32, 33, 102, 103]].all()  # the border: bins 4 to 12 of 8 pixels each
    assert not colored[1].any()


def test_a_caption_is_text_and_never_markup(monkeypatch) -> None:
    caption = '<script>alert("1 & 2")</script> $count </p>'
    plant(monkeypatch, report_captions, caption)
    scenes = [("anti", sample) for sample in ShapesWorld("anti", 3, 2)]
    page = Reader(captions_section(None, None, build_sam(SAM).eval(), scenes).body)
    assert page.texts["said caption"] == [caption] * 2
    assert "script" not in page.tags
    assert page.texts["li"] == ["The caption names no object."] * 2


def test_a_mask_is_compared_with_the_object_of_its_phrase() -> None:
    sample = next(
        s
        for s in ShapesWorld("balanced", 5)
        if len(s.objects) == 2
        and s.objects[0].shape == s.objects[1].shape
        and s.objects[0].color != s.objects[1].color
    )
    one, two = sample.objects
    assert best_iou(one.mask, f"{one.color} {one.shape}", sample) == 1
    assert best_iou(one.mask, f"{two.color} {one.shape}", sample) == 0  # the other of them is meant
    assert best_iou(one.mask, one.shape, sample) == 1
    assert best_iou(np.zeros_like(one.mask), one.shape, sample) == 0
    assert best_iou(None, one.shape, sample) == 0
    absent = "ring" if one.shape != "ring" else "bar"
    assert best_iou(one.mask, f"red {absent}", sample) is None
    assert missed(f"a {absent}", sample) == [f"{one.color} {one.shape}", f"{two.color} {two.shape}"]
    assert phrases("A red  star, a RED star and a bar") == ["red star", "bar"]
