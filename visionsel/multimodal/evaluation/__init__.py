"""Whether a model invents objects: CHAIR, POPE, AMBER and MME, and tables that say what their scores cost.

from visionsel.multimodal.evaluation import amber, chair, generate_all, mme, pope, pope_task

chair.score(captions, objects)
pope.score(answers, labels)

task = pope_task("val2014", "coco_pope_adversarial.json")
rows = generate_all(model, processor, task.items, "answers.jsonl")
task.score([row["answer"] for row in rows])
"""

from visionsel.multimodal.evaluation import amber, chair, files, mme, pope
from visionsel.multimodal.evaluation.answers import Item, generate_all
from visionsel.multimodal.evaluation.report import Hallucination, amber_table, mme_table, table
from visionsel.multimodal.evaluation.synonyms import (
    Synonyms,
    coco_synonyms,
    read_synonyms,
    shapes_synonyms,
)
from visionsel.multimodal.evaluation.tasks import (
    Task,
    amber_task,
    chair_task,
    mme_task,
    pope_task,
    shapes_task,
)

__all__ = [
    "Hallucination",
    "Item",
    "Synonyms",
    "Task",
    "amber",
    "amber_table",
    "amber_task",
    "chair",
    "chair_task",
    "coco_synonyms",
    "files",
    "generate_all",
    "mme",
    "mme_table",
    "mme_task",
    "pope",
    "pope_task",
    "read_synonyms",
    "shapes_synonyms",
    "shapes_task",
    "table",
]
