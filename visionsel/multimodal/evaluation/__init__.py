"""Whether a model invents objects: CHAIR on captions, POPE on answers, and a table of both.

from visionsel.multimodal.evaluation import chair, pope

chair.score(captions, objects)
pope.score(answers, labels)
"""

from visionsel.multimodal.evaluation import chair, files, pope
from visionsel.multimodal.evaluation.report import Hallucination, table
from visionsel.multimodal.evaluation.synonyms import (
    Synonyms,
    coco_synonyms,
    read_synonyms,
    shapes_synonyms,
)

__all__ = [
    "Hallucination",
    "Synonyms",
    "chair",
    "coco_synonyms",
    "files",
    "pope",
    "read_synonyms",
    "shapes_synonyms",
    "table",
]
