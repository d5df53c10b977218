"""The shapes world: images of coloured shapes with masks, captions, questions and referring expressions.

A procedural data set on which a vision-language model, a segmenter and classifiers learn to see in minutes on
a laptop. `ShapesWorld` makes samples in memory, `write_shapes` writes them in the formats of COCO, RefCOCO,
POPE and ImageFolder, `check_shapes` reads such a folder and says what is not true in it.
"""

from visionsel.data.shapes.checker import check_shapes
from visionsel.data.shapes.drawing import BACKGROUNDS, COLORS, RGB, SHAPES
from visionsel.data.shapes.files import write_shapes
from visionsel.data.shapes.language import (
    BINS,
    CAPTION_PROMPT,
    Expression,
    Question,
    answer_to_box,
    box_to_answer,
    split_words,
    vocabulary,
)
from visionsel.data.shapes.scene import DISTRIBUTIONS, PARTNERS, SIZES, ShapeObject
from visionsel.data.shapes.world import Sample, ShapesWorld

__all__ = [
    "BACKGROUNDS",
    "BINS",
    "CAPTION_PROMPT",
    "COLORS",
    "DISTRIBUTIONS",
    "PARTNERS",
    "RGB",
    "SHAPES",
    "SIZES",
    "Expression",
    "Question",
    "Sample",
    "ShapeObject",
    "ShapesWorld",
    "answer_to_box",
    "box_to_answer",
    "check_shapes",
    "split_words",
    "vocabulary",
    "write_shapes",
]
