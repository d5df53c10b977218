"""Grounding: what the model looked at while it wrote a word, as a heatmap, and as a mask of the SAM."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from string import Template
from typing import Any

import numpy as np

from train.report_marks import FACTOR, INVENTED, MENTION, PALETTE, Drawn, best_iou, chip, draw_over_grey
from train.report_page import Section, picture, table
from visionsel.data.shapes import CAPTION_PROMPT, SHAPES, Sample
from visionsel.multimodal import Grounder, build_segmenter
from visionsel.multimodal.evaluation.resume import own_luck
from visionsel.multimodal.evaluation.segmentation import peak_inside
from visionsel.multimodal.grounding.heatmaps.chance import CentrePoint, RandomPoint
from visionsel.multimodal.grounding.results import Grounding, Word
from visionsel.viz import enlarge, overlay_heatmap

__all__ = ["GroundedWord", "ground_scene", "grounding_section"]

METHOD = "mean"
SHOWN = 4  # scenes with pictures


@dataclass(frozen=True, eq=False)
class GroundedWord:
    """A word of an answer that names a shape.

    Attributes:
        word: of the grounder.
        phrase: its colour and shape as the answer has them.
        iou: of its mask with the truth; None when no such shape is in the image.
        hit: whether the peak of its heatmap lies on an object of that shape.
    """

    word: Word
    phrase: str
    iou: float | None
    hit: bool


def grounding_section(model: Any, processor: Any, sam: Any, samples: Sequence[Sample], seed: int) -> Section:
    """Ask about scenes and ground the words of the answers; the first few are drawn.

    Args:
        model, processor, sam: that answer and segment.
        samples: the scenes.
        seed: of the random points that stand beside attention.
    """
    segmenter = build_segmenter(sam)
    methods: dict[str, Any] = {
        f"attention (<code>{METHOD}</code>)": METHOD,
        "centre of the image": CentrePoint(),
        "random points": RandomPoint(),
    }
    found: dict[str, list[list[GroundedWord]]] = {}
    answers: list[Grounding] = []
    for name, heatmap in methods.items():
        grounder = Grounder(model, processor, segmenter, heatmap, names=list(SHAPES))
        with own_luck(model.device, seed):
            results = [grounder.ask(sample.image, CAPTION_PROMPT, max_new_tokens=64) for sample in samples]
            found[name] = [
                ground_scene(result, sample) for result, sample in zip(results, samples, strict=True)
            ]
        answers = answers or results
    first = next(iter(found.values()))
    heads = ["heatmap", "words", "mean IoU", "IoU above 0.5", "peak on the object", "mean score"]
    body = _BODY.substitute(
        count=len(samples),
        shown=min(SHOWN, len(samples)),
        table=table(
            "Masks of words against the truth",
            heads,
            [_row(name, words) for name, words in found.items()],
            _NOTE,
        ),
        scenes="\n".join(
            _card(number, sample, answer, words)
            for number, (sample, answer, words) in enumerate(
                zip(samples[:SHOWN], answers, first, strict=False), 1
            )
        ),
    )
    ious = _ious(first)
    figure = f"{np.mean(ious):.2f}" if ious else "none"
    return Section("grounding", "Grounding", figure, "mean IoU of masks made of attention", body)


def ground_scene(answer: Grounding, sample: Sample) -> list[GroundedWord]:
    """The words of an answer that name shapes, and how well they are placed."""
    named = {match.span(2): match[0].lower() for match in MENTION.finditer(answer.answer)}
    words = []
    for word in answer.objects:
        phrase = " ".join(named.get(word.span, str(word.name)).split())
        alike = [o.mask for o in sample.objects if o.shape == word.name]
        hit = bool(alike) and peak_inside(word.heatmap, np.any(alike, axis=0))
        words.append(GroundedWord(word, phrase, best_iou(word.mask, phrase, sample), hit))
    return words


def _ious(scenes: Sequence[Sequence[GroundedWord]]) -> list[float]:
    return [one.iou for words in scenes for one in words if one.iou is not None]


def _row(name: str, scenes: Sequence[Sequence[GroundedWord]]) -> list[str]:
    there = [one for words in scenes for one in words if one.iou is not None]
    if not there:
        return [name, "0", *["none"] * 4]
    ious = np.array(_ious(scenes))
    hits, scores = np.mean([one.hit for one in there]), np.mean([one.word.score for one in there])
    return [
        name,
        str(len(there)),
        f"{ious.mean():.2f}",
        f"{(ious > 0.5).mean():.0%}",
        f"{hits:.0%}",
        f"{scores:.2f}",
    ]


def _card(number: int, sample: Sample, answer: Grounding, words: Sequence[GroundedWord]) -> str:
    palette = cycle(PALETTE)
    colors = [INVENTED if one.iou is None else next(palette) for one in words]
    drawn = [
        Drawn(one.word.mask, one.word.box, color, one.word.text)
        for one, color in zip(words, colors, strict=True)
        if one.word.box is not None
    ]
    maps = [_heatmap(sample, one, color) for one, color in zip(words, colors, strict=True)]
    return _CARD.substitute(
        number=number,
        image=picture(enlarge(sample.image, FACTOR), f"scene {number}"),
        overlay=picture(
            draw_over_grey(sample.image, drawn), f"scene {number} in grey under the masks and boxes of words"
        ),
        answer=_color_words(answer.answer, words, colors) or "<em>an empty answer</em>",
        maps="\n".join(maps) or "<p>The answer names no shape.</p>",
    )


def _color_words(answer: str, words: Sequence[GroundedWord], colors: Sequence[str]) -> str:
    parts, end = [], 0
    for one, color in zip(words, colors, strict=True):
        start, stop = one.word.span
        parts += [escape(answer[end:start]), chip(answer[start:stop], color)]
        end = stop
    return "".join(parts) + escape(answer[end:])


def _heatmap(sample: Sample, one: GroundedWord, color: str) -> str:
    heat = one.word.heatmap.repeat(FACTOR, 0).repeat(FACTOR, 1)
    drawn = overlay_heatmap(enlarge(sample.image, FACTOR), heat, legend=False)
    truth = "not in the image, invented" if one.iou is None else f"IoU {one.iou:.2f}"
    alt = f"what was looked at for “{one.phrase}”"
    return (
        f'<figure class="framed" style="--frame:{color}">{picture(drawn, alt)}<figcaption>'
        f"<b>{escape(one.phrase)}</b> <span>score {one.word.score:.2f}</span> <span>{truth}</span>"
        "</figcaption></figure>"
    )


_BODY = Template("""<p>The same model is asked to describe other scenes. Nothing is asked about places:
while it writes a word, its attention to the image, a mean over heads and the middle layers, is read as a
heatmap; the peaks of that are points for the small SAM. Nothing is trained for it (<code>Grounder(model,
processor, segmenter, heatmap="mean").ask(image, question)</code>).</p>
$table
<p class="legend">Below are the first $shown of $count scenes. A word has one colour in the answer, in its
mask and box, and around its heatmap, which goes from dark blue (least) to yellow (most). <mark
class="invented">star</mark> marks a word for a shape that is not in the image: attention then points at
something else.</p>
<div class="cards grounded">
$scenes
</div>""")

_NOTE = (
    "Over all words that name a shape of the image. The last two rows put chance in the place of "
    "attention; the answers, the points made of a heatmap and the SAM are the same. IoU: with the object "
    "of that name, of several alike the one that fits best. The peak must lie on it exactly, on a grid of"
    " 8 x 8 cells. Score: the IoU that the SAM predicts times the probability of the word; it knows no "
    "truth and is not calibrated."
)

_CARD = Template("""<article>
<h3>Scene $number</h3>
<p class="said answer">$answer</p>
<div class="pictures">
$image
$overlay
</div>
<div class="maps">
$maps
</div>
</article>""")
