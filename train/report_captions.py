"""Captions: what the vision-language model says of scenes, and where; its boxes are prompts of the SAM."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from string import Template
from typing import Any

import numpy as np

from train.report_marks import (
    FACTOR,
    INVENTED,
    PALETTE,
    Drawn,
    best_iou,
    draw_over_grey,
    mark_caption,
    missed,
    phrases,
)
from train.report_page import Section, picture, table
from visionsel.data.shapes import CAPTION_PROMPT, Sample, answer_to_box
from visionsel.embedded.lvlm_quality import caption_scores, generate_answers
from visionsel.viz import enlarge

__all__ = ["NamedObject", "SceneAnswers", "answer_scenes", "captions_section"]


@dataclass(frozen=True)
class NamedObject:
    """An object that a caption names.

    Attributes:
        phrase: its colour and shape, "red star".
        answer: to `locate the red star.`
        box: that it says, (x0, y0, x1, y1) in pixels; None when it says none.
        mask: of the SAM for this box, bool `[H, W]`; None without a box.
        iou: of the mask with the truth, 0 without a mask; None when no such shape is in the image.
    """

    phrase: str
    answer: str
    box: tuple[float, float, float, float] | None
    mask: np.ndarray | None
    iou: float | None


@dataclass(frozen=True)
class SceneAnswers:
    """A scene, what the models answered, and the name of the scene's distribution."""

    distribution: str
    sample: Sample
    caption: str
    objects: list[NamedObject]


def captions_section(model: Any, processor: Any, sam: Any, scenes: Sequence[tuple[str, Sample]]) -> Section:
    """Describe scenes, each given with the name of its distribution, and segment what is named."""
    answers = answer_scenes(model, processor, sam, scenes)
    scores = caption_scores([one.caption for one in answers], [one.sample for one in answers])
    groups: dict[str, list[SceneAnswers]] = {}
    for one in answers:
        groups.setdefault(one.distribution, []).append(one)
    heads = ["distribution", "scenes", "F1", "CHAIR<sub>i</sub>", "CHAIR<sub>s</sub>"]
    rows = [_row(name, group) for name, group in (groups | {"all": answers}).items()]
    cards = [_card(number, one) for number, one in enumerate(answers, 1)]
    body = _BODY.substitute(
        count=len(answers),
        table=table("Scores of the captions", [*heads, "right colours", "mean IoU of masks"], rows, _NOTE),
        scenes="\n".join(cards),
    )
    return Section("captions", "Captions", f"{scores['f1']:.2f}", "F1 of the shapes that are named", body)


def answer_scenes(
    model: Any, processor: Any, sam: Any, scenes: Sequence[tuple[str, Sample]]
) -> list[SceneAnswers]:
    """Caption every scene, then locate and segment what the caption names; only the IoU reads the truth."""
    from segment_anything import SamPredictor  # where there is a SAM, this is installed

    images = [sample.image for _, sample in scenes]
    captions = generate_answers(model, processor, images, [CAPTION_PROMPT] * len(images))
    asked = [(i, phrase) for i, caption in enumerate(captions) for phrase in phrases(caption)]
    answers = generate_answers(
        model,
        processor,
        [images[i] for i, _ in asked],
        [f"locate the {phrase}." for _, phrase in asked],
        max_new_tokens=8,
    )
    predictor = SamPredictor(sam)
    results = [
        SceneAnswers(distribution, sample, caption, [])
        for (distribution, sample), caption in zip(scenes, captions, strict=True)
    ]
    for (i, phrase), answer in zip(asked, answers, strict=True):
        scene = results[i]
        if not scene.objects:
            predictor.set_image(scene.sample.pixels)
        box = _read_box(answer, scene.sample.pixels.shape[0])
        mask = None
        if box is not None:
            mask = predictor.predict(box=np.array(box), multimask_output=False)[0][0]
        scene.objects.append(NamedObject(phrase, answer, box, mask, best_iou(mask, phrase, scene.sample)))
    return results


def _read_box(answer: str, image_size: int) -> tuple[float, float, float, float] | None:
    try:
        box = answer_to_box(answer, image_size)
    except ValueError:
        return None
    return box if box[0] < box[2] and box[1] < box[3] else None


def _row(name: str, scenes: list[SceneAnswers]) -> list[str]:
    scores = caption_scores([s.caption for s in scenes], [s.sample for s in scenes])
    ious = [o.iou for s in scenes for o in s.objects if o.iou is not None]
    shares = [f"{scores[key]:.1%}" for key in ("f1", "chair_i", "chair_s", "color_accuracy")]
    return [escape(name), str(len(scenes)), *shares, f"{np.mean(ious):.2f}" if ious else "none"]


def _card(number: int, scene: SceneAnswers) -> str:
    palette = cycle(PALETTE)
    colored = [(thing, INVENTED if thing.iou is None else next(palette)) for thing in scene.objects]
    items = [_item(thing, color) for thing, color in colored]
    drawn = [
        Drawn(thing.mask, thing.box, color, str(place))
        for place, (thing, color) in enumerate(colored, 1)
        if thing.box is not None and thing.mask is not None
    ]
    left_out = missed(scene.caption, scene.sample)
    return _CARD.substitute(
        number=number,
        distribution=escape(scene.distribution),
        image=picture(enlarge(scene.sample.image, FACTOR), f"scene {number}"),
        overlay=picture(
            draw_over_grey(scene.sample.image, drawn), f"scene {number} in grey under boxes and masks"
        ),
        caption=mark_caption(scene.caption, scene.sample) or "<em>an empty caption</em>",
        objects="\n".join(items) or "<li>The caption names no object.</li>",
        missed=f"<b>{escape(', '.join(left_out))}</b>" if left_out else "nothing",
    )


def _item(thing: NamedObject, color: str) -> str:
    if thing.mask is None:
        place = f"no box: the answer was “{escape(thing.answer)}”"
    else:
        place = f"box {escape(thing.answer)}"
    score = "not in the image, invented" if thing.iou is None else f"IoU {thing.iou:.2f}"
    swatch = f'<span class="swatch" style="background:{color}"></span>'
    return f"<li>{swatch} {escape(thing.phrase)}: {place}; {score}</li>"


_BODY = Template("""<p>The small vision-language model describes each image and is asked <q>locate the …</q>
for every object that it named; the box that it answers is the prompt of the small SAM. “balanced” draws its
shapes independently; “anti” leaves out the companion that a shape usually has in training, which tempts a
model to invent it. The truth is used for the marks, the objects missed and the scores only.</p>
$table
<p class="legend">In a caption: <mark class="invented">red star</mark> no such shape is in the image; <mark
class="color">red</mark> star: the shape is there in another colour. Colours and numbers of boxes and masks
are those of the list below them; the image under them is grey.</p>
<div class="cards scenes">
$scenes
</div>""")

_NOTE = (
    "F1: of the shapes named. CHAIR<sub>i</sub>: share of the shapes named that are invented. "
    "CHAIR<sub>s</sub>: share of the captions that invent one. IoU: of a mask with the object of that "
    "name, 0 without a box; of several alike the one that fits best. An object named twice is asked for "
    "once. So few scenes show how the models see; the models' cards say how well, on many more."
)

_CARD = Template("""<article>
<h3>$number, $distribution</h3>
<div class="pictures">
$image
$overlay
</div>
<p class="said caption">$caption</p>
<ol>
$objects
</ol>
<p class="missed">Missed: $missed</p>
</article>""")
