"""A page of pictures: what the embedded models say of fresh scenes, and where they see it.

    python -m train.quickstart_shapes --output quickstart

The vision-language model describes each scene and is asked where every object is that it named; its box is
the prompt of the small SAM. Truth is used for marks and scores only. Written is `shapes.html`, one file that
needs no other.
"""

import argparse
import base64
import io
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from train.cli import run_cli
from visionsel.data.shapes import CAPTION_PROMPT, COLORS, SHAPES, Sample, ShapesWorld, answer_to_box
from visionsel.embedded import load_lvlm, load_segmenter
from visionsel.embedded.lvlm_quality import caption_scores, generate_answers
from visionsel.viz import OKABE_ITO, draw_boxes, enlarge, overlay_masks

__all__ = ["PAGE", "SceneAnswers", "answer_scenes", "fresh_scenes", "load_models", "main", "write_page"]

PAGE = "shapes.html"
SEED = 2026  # of the scenes; training and validation have theirs above 2**28
FACTOR = 4
MENTION = re.compile(rf"\b(?:({'|'.join(COLORS)})\s+)?({'|'.join(SHAPES)})\b", re.IGNORECASE)
# vermilion marks what is invented, and nothing else
PALETTE = [color for name, color in OKABE_ITO.items() if name != "vermilion"]


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page alone; returns the exit status."""
    return run_cli("train.quickstart_shapes", _write_alone, arguments)


def _write_alone(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="train.quickstart_shapes", description="Show what the embedded models say of fresh scenes."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart"), help="folder to write [quickstart]"
    )
    parser.add_argument("--lvlm", type=Path, help="folder of another model [the package's]")
    parser.add_argument("--segmenter", type=Path, help="folder of another SAM [the package's]")
    options = parser.parse_args(arguments)
    print(f"written: {write_page(options.output, *load_models(options.lvlm, options.segmenter))}")


def load_models(lvlm: Path | None = None, segmenter: Path | None = None) -> tuple[Any, Any, Any]:
    """The vision-language model, its processor and the SAM; default those in the package.

    Raises:
        ImportError: without the extra "multimodal".
        FileNotFoundError: when a folder lacks a file.
    """
    return (*load_lvlm(lvlm), load_segmenter(segmenter))


def fresh_scenes(count: int = 6) -> list[tuple[str, Sample]]:
    """The first scenes of "balanced" and of "anti", `count` of each, with the name of their distribution."""
    return [(name, sample) for name in ("balanced", "anti") for sample in ShapesWorld(name, SEED, count)]


def write_page(
    output: Path, model: Any, processor: Any, sam: Any, scenes: Sequence[tuple[str, Sample]] | None = None
) -> Path:
    """Let the models answer and write `shapes.html`; returns its path.

    Args:
        output: folder, made if it is not there.
        model, processor, sam: as `load_models` gives them.
        scenes: distribution and sample of each; default `fresh_scenes()`.
    """
    scenes = fresh_scenes() if scenes is None else scenes
    start = time.perf_counter()
    answers = answer_scenes(model, processor, sam, scenes)
    page = _fill_page(answers, time.perf_counter() - start)
    output.mkdir(parents=True, exist_ok=True)
    path = output / PAGE
    partial = path.with_name(f".{PAGE}.{os.getpid()}")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def answer_scenes(
    model: Any, processor: Any, sam: Any, scenes: Sequence[tuple[str, Sample]]
) -> list[SceneAnswers]:
    """Caption every scene, then locate and segment what the caption names; only the IoU reads the truth."""
    from segment_anything import SamPredictor  # where there is a SAM, this is installed

    images = [sample.image for _, sample in scenes]
    captions = generate_answers(model, processor, images, [CAPTION_PROMPT] * len(images))
    asked = [(i, phrase) for i, caption in enumerate(captions) for phrase in _phrases(caption)]
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
        scene.objects.append(NamedObject(phrase, answer, box, mask, _iou(mask, phrase, scene.sample)))
    return results


def _phrases(caption: str) -> list[str]:
    """Colour and shape of every object that a caption names, each once, in order."""
    found = (" ".join(part for part in match.groups() if part) for match in MENTION.finditer(caption.lower()))
    return list(dict.fromkeys(found))


def _read_box(answer: str, image_size: int) -> tuple[float, float, float, float] | None:
    try:
        box = answer_to_box(answer, image_size)
    except ValueError:
        return None
    return box if box[0] < box[2] and box[1] < box[3] else None


def _iou(mask: np.ndarray | None, phrase: str, sample: Sample) -> float | None:
    """With the object of this shape, and this colour if there is one; of several the one that fits best."""
    *color, shape = phrase.split()
    alike = [o for o in sample.objects if o.shape == shape]
    if not alike:
        return None
    if mask is None:
        return 0.0
    same = [o.mask for o in alike if [o.color] == color] or [o.mask for o in alike]
    return max(float((mask & true).sum() / (mask | true).sum()) for true in same)


def _fill_page(scenes: Sequence[SceneAnswers], seconds: float) -> str:
    groups: dict[str, list[SceneAnswers]] = {}
    for scene in scenes:
        groups.setdefault(scene.distribution, []).append(scene)
    rows = [_fill_row(name, group) for name, group in (groups | {"all": list(scenes)}).items()]
    cards = [_fill_card(number, scene) for number, scene in enumerate(scenes, 1)]
    return _PAGE.substitute(
        count=len(scenes), seconds=f"{seconds:.1f}", rows="\n".join(rows), scenes="\n".join(cards)
    )


def _fill_row(name: str, scenes: list[SceneAnswers]) -> str:
    scores = caption_scores([s.caption for s in scenes], [s.sample for s in scenes])
    ious = [o.iou for s in scenes for o in s.objects if o.iou is not None]
    shares = [f"{scores[key]:.1%}" for key in ("f1", "chair_i", "chair_s", "color_accuracy")]
    values = [str(len(scenes)), *shares, f"{np.mean(ious):.2f}" if ious else "none"]
    return f"<tr><th>{name}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>"


def _fill_card(number: int, scene: SceneAnswers) -> str:
    said = {match[2] for match in MENTION.finditer(scene.caption.lower())}
    missed = dict.fromkeys(f"{o.color} {o.shape}" for o in scene.sample.objects if o.shape not in said)
    items = [_fill_item(thing, color) for thing, color in zip(scene.objects, cycle(PALETTE), strict=False)]
    image = enlarge(scene.sample.image, FACTOR)
    return _CARD.substitute(
        number=number,
        distribution=scene.distribution,
        caption=_mark_caption(scene.caption, scene.sample) or "<em>an empty caption</em>",
        image=_data_uri(image),
        overlay=_data_uri(_draw_overlay(scene)),
        side=image.width,
        objects="\n".join(items) or "<li>The caption names no object.</li>",
        missed=f"<b>{', '.join(missed)}</b>" if missed else "nothing",
    )


def _fill_item(thing: NamedObject, color: str) -> str:
    if thing.mask is None:
        place = f"no box: the answer was “{escape(thing.answer)}”"
    else:
        place = f"box {escape(thing.answer)}"
    score = "not in the image, invented" if thing.iou is None else f"IoU {thing.iou:.2f}"
    swatch = f'<span class="swatch" style="background:{color}"></span>'
    return f"<li>{swatch} {escape(thing.phrase)}: {place}; {score}</li>"


def _mark_caption(caption: str, sample: Sample) -> str:
    """The caption as HTML: mentions of absent shapes and wrong colours of present ones are marked."""
    parts, end = [], 0
    for match in MENTION.finditer(caption):
        color, shape = ((word or "").lower() for word in match.groups())
        colors = {o.color for o in sample.objects if o.shape == shape}
        kind, stop = "", match.end()
        if not colors:
            kind = "invented"
        elif color and color not in colors:
            kind, stop = "color", match.end(1)
        if kind:
            parts.append(escape(caption[end : match.start()]))
            parts.append(f'<mark class="{kind}">{escape(caption[match.start() : stop])}</mark>')
            end = stop
    return "".join(parts) + escape(caption[end:])


def _draw_overlay(scene: SceneAnswers) -> Image.Image:
    """Masks and boxes over the image in grey, so that every colour is one of the models'."""
    masks, boxes, colors, labels = [], [], [], []
    for number, (thing, color) in enumerate(zip(scene.objects, cycle(PALETTE), strict=False), 1):
        if thing.box is not None and thing.mask is not None:
            masks.append(thing.mask)
            boxes.append([FACTOR * side for side in thing.box])
            colors.append(color)
            labels.append(str(number))
    picture = enlarge(overlay_masks(scene.sample.image.convert("L"), masks, colors, 0.6), FACTOR)
    return draw_boxes(picture, boxes, colors, labels)


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>visionsel: what the embedded models see</title>
<style>
:root { color-scheme: light dark; --card: #f4f4f2; --line: #c8c8c4; }
@media (prefers-color-scheme: dark) { :root { --card: #242424; --line: #4a4a4a; } }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child { text-align: left; }
.scenes { display: grid; grid-template-columns: repeat(auto-fill, minmax(34rem, 1fr)); gap: 1rem; }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem; }
article h2 { font-size: 1rem; margin: 0 0 .6rem; }
article p, article ol { margin: .5rem 0 0; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; }
.pictures img { max-width: 100%; height: auto; }
.swatch { display: inline-block; width: .8em; height: .8em; border: 1px solid currentColor; }
mark { color: #000; padding: 0 .2em; border-radius: .2em; }
mark.invented { background: #d55e00; font-weight: bold; }
mark.color { background: #f0e442; }
@media (max-width: 36rem) { .scenes { grid-template-columns: 1fr; } }
</style>
</head>
<body>
<h1>What the embedded models see</h1>
<p>$count fresh scenes of the shapes world; no model was trained on any of them, and none was picked: they are
the first of a fixed seed. “balanced” draws its shapes independently; “anti” leaves out the companion that a
shape usually has in training, which tempts a model to invent it. The small vision-language model describes
each image and is asked <q>locate the …</q> for every object that it named; the box that it answers is the
prompt of the small SAM. Captions, boxes and masks are the output of these two models. The truth is used for
the marks, the objects missed and the scores only. All answers together took $seconds s.</p>
<table>
<tr><th>distribution</th><th>scenes</th><th>F1</th><th>CHAIR<sub>i</sub></th><th>CHAIR<sub>s</sub></th>
<th>right colours</th><th>mean IoU</th></tr>
$rows
</table>
<p>F1: of the shapes named. CHAIR<sub>i</sub>: share of the shapes named that are invented.
CHAIR<sub>s</sub>: share of the captions that invent one. IoU: of a mask with the object of that name, 0
without a box; of several alike the one that fits best. An object named twice is asked for once. So few scenes
show how the models see; the models' cards say how well, on many more.</p>
<p>Legend: <mark class="invented">red star</mark>, no such shape is in the image.
<mark class="color">red</mark> star, the shape is there in another colour. Colours and numbers of boxes and
masks are those of the list below them; the image under them is grey.</p>
<div class="scenes">
$scenes
</div>
</body>
</html>
""")

_CARD = Template("""<article>
<h2>$number, $distribution</h2>
<div class="pictures">
<img src="$image" width="$side" height="$side" alt="the scene">
<img src="$overlay" width="$side" height="$side" alt="boxes and masks over the scene in grey">
</div>
<p class="caption">$caption</p>
<ol>
$objects
</ol>
<p class="missed">Missed: $missed</p>
</article>""")


if __name__ == "__main__":
    sys.exit(main())
