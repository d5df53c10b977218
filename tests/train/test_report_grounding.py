"""The grounding of the report: words placed by hand, and what the shipped models look at."""

import numpy as np
import pytest
from PIL import Image

from tests.train.pages import Reader
from train.report import fresh_scenes, load_models
from train.report_grounding import ground_scene, grounding_section
from train.report_marks import INVENTED, PALETTE
from visionsel.data.shapes import CAPTION_PROMPT, SHAPES, ShapesWorld
from visionsel.multimodal import Grounder
from visionsel.multimodal.grounding.prompts import Prompt
from visionsel.multimodal.grounding.proposals import Proposal
from visionsel.multimodal.grounding.results import Grounding, Word


def _word(text: str, span: tuple[int, int], mask: np.ndarray, heat: np.ndarray, image: Image.Image) -> Word:
    logits = np.where(mask, 1.0, -1.0)
    prompt = Prompt(np.zeros((1, 2), dtype=np.float32), np.ones(1, dtype=np.int64), (0, 0, 1, 1), mask)
    proposal = Proposal(0.5, prompt, lambda: logits)
    return Word(text, span, 0.8, text, lambda: heat, image, lambda: proposal)


def test_words_are_compared_with_the_objects_that_they_name() -> None:
    sample = next(
        s for s in ShapesWorld("balanced", 3) if len({o.shape for o in s.objects}) == len(s.objects) == 2
    )
    one, two = sample.objects
    absent = next(s for s in ("ring", "cross", "bar") if s not in (one.shape, two.shape))
    answer, words = "", []
    for color, shape, mask, heat in (
        (one.color, one.shape, one.mask, one.mask),
        (two.color, two.shape, one.mask | two.mask, one.mask),  # too much of a mask, and it looked elsewhere
        ("red", absent, two.mask, two.mask),
    ):
        answer += f"a {color} "
        span = len(answer), len(answer) + len(shape)
        words.append(_word(shape, span, mask, heat.astype(np.float32), sample.image))
        answer += f"{shape} "
    first, second, third = ground_scene(Grounding(answer, words, sample.image), sample)
    assert (first.phrase, first.iou, first.hit) == (f"{one.color} {one.shape}", 1.0, True)
    assert second.iou == pytest.approx(two.area / (one.area + two.area))
    assert not second.hit
    assert (third.phrase, third.iou, third.hit) == (f"red {absent}", None, False)


def test_the_section_has_the_numbers_and_the_colours_of_the_shipped_models() -> None:
    model, processor, sam = load_models()
    samples = [
        s for s in fresh_scenes("balanced", 1, 8) if len({o.shape for o in s.objects}) == len(s.objects)
    ]
    section = grounding_section(model, processor, sam, samples[:2], 0)
    page = Reader(section.body)
    grounder = Grounder(model, processor, sam, "mean", names=list(SHAPES))
    ious, told, colors = [], [], []
    for sample in samples[:2]:
        result, palette = grounder.ask(sample.image, CAPTION_PROMPT), iter(PALETTE)
        assert result.answer in page.texts["said answer"]
        truth = {o.shape: o.mask for o in sample.objects}  # each is there once
        for word in result.objects:
            end = f"score {word.score:.2f} not in the image, invented"
            colors.append(INVENTED)
            if word.text in truth:
                both = word.mask & truth[word.text]
                ious.append(both.sum() / (word.mask | truth[word.text]).sum())
                end, colors[-1] = f"score {word.score:.2f} IoU {ious[-1]:.2f}", next(palette)
            told.append(f"{word.text} {end}")
    assert len(ious) > 3
    assert section.figure == f"{np.mean(ious):.2f}"
    assert page.rows[1][:3] == ["attention (mean)", str(len(ious)), f"{np.mean(ious):.2f}"]
    assert page.rows[1][3] == f"{np.mean(np.array(ious) > 0.5):.0%}"
    for row in page.rows[2:]:  # chance, about the same words
        assert row[1] == str(len(ious))
        assert float(row[2]) < np.mean(ious)
    assert [caption.split(" ", 1)[1] for caption in page.texts["figcaption"]] == told  # behind the colour
    frames = [value for name, value in page.attributes if name == "style" and "--frame" in value]
    assert frames == [f"--frame:{color}" for color in colors]
    overlay = page.pictures[1].reshape(-1, 3).astype(int)
    for color in colors[: len(samples[0].objects)]:  # the boxes
        assert (overlay == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(1).any()
