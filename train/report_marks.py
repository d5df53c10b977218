"""What is said of a scene against what is there: marks in captions, boxes and masks in pictures.

Vermilion marks what is invented, and nothing else.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from visionsel.data.shapes import COLORS, SHAPES, Sample
from visionsel.multimodal.evaluation.segmentation import overlap
from visionsel.viz import OKABE_ITO, draw_boxes, enlarge, overlay_masks

__all__ = [
    "FACTOR",
    "INVENTED",
    "MENTION",
    "PALETTE",
    "Drawn",
    "best_iou",
    "chip",
    "draw_over_grey",
    "mark_caption",
    "missed",
    "phrases",
]

FACTOR = 4  # of pictures, whose scenes have 64 pixels a side
MENTION = re.compile(rf"\b(?:({'|'.join(COLORS)})\s+)?({'|'.join(SHAPES)})\b", re.IGNORECASE)
INVENTED = OKABE_ITO["vermilion"]
# orange comes last, for it is the nearest to vermilion
PALETTE = [OKABE_ITO[name] for name in ("sky blue", "green", "yellow", "purple", "blue", "orange")]


@dataclass(frozen=True)
class Drawn:
    """A mask, bool `[H, W]`, and a box (x0, y0, x1, y1) in pixels of the scene, their colour and label."""

    mask: np.ndarray
    box: Sequence[float]
    color: str
    label: str


def phrases(caption: str) -> list[str]:
    """Colour and shape of every object that a caption names, each once, in order."""
    found = (" ".join(part for part in match.groups() if part) for match in MENTION.finditer(caption.lower()))
    return list(dict.fromkeys(found))


def best_iou(mask: np.ndarray | None, phrase: str, sample: Sample) -> float | None:
    """IoU of a mask with the object of this shape, and this colour if there is one.

    Of several the one that fits best; 0 without a mask; None when no such shape is in the image.
    """
    *color, shape = phrase.split()
    alike = [o for o in sample.objects if o.shape == shape]
    if not alike:
        return None
    if mask is None or not mask.any():
        return 0.0
    same = [o.mask for o in alike if [o.color] == color] or [o.mask for o in alike]
    return max(overlap(mask, truth).iou for truth in same)


def mark_caption(caption: str, sample: Sample) -> str:
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


def missed(caption: str, sample: Sample) -> list[str]:
    """Colour and shape of what is there and whose shape the caption does not name."""
    said = {match[2] for match in MENTION.finditer(caption.lower())}
    return list(dict.fromkeys(f"{o.color} {o.shape}" for o in sample.objects if o.shape not in said))


def chip(text: str, color: str) -> str:
    """Text on a colour, as HTML; vermilion stands for what is invented."""
    if color == INVENTED:
        return f'<mark class="invented">{escape(text)}</mark>'
    ink = "#fff" if color == OKABE_ITO["blue"] else "#000"
    return f'<mark class="chip" style="background:{color};color:{ink}">{escape(text)}</mark>'


def draw_over_grey(image: Image.Image, things: Sequence[Drawn]) -> Image.Image:
    """Masks and boxes over the enlarged image in grey, so that every colour is one of theirs."""
    colors = [thing.color for thing in things]
    painted = overlay_masks(image.convert("L"), [thing.mask for thing in things], colors, 0.6)
    boxes = [[FACTOR * side for side in thing.box] for thing in things]
    return draw_boxes(enlarge(painted, FACTOR), boxes, colors, [thing.label for thing in things])
