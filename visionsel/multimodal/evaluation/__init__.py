"""Whether a model invents objects, and whether it finds what it talks about.

CHAIR, POPE, AMBER and MME, with tables that say what their scores cost:

from visionsel.multimodal.evaluation import amber, chair, generate_all, mme, pope, pope_task

chair.score(captions, objects)
pope.score(answers, labels)

task = pope_task("val2014", "coco_pope_adversarial.json")
rows = generate_all(model, processor, task.items, "answers.jsonl")
task.score([row["answer"] for row in rows])

RefCOCO, panoptic narratives, VizWiz, COCO, LVIS and CODA, for a `Grounder`:

task = refcoco_task("refcoco", "train2014", "testA", sentences="all")
rows = ground_all(grounder, task, "rows.jsonl")
task.score(rows), task.protocol
"""

from visionsel.multimodal.evaluation import amber, chair, detection, files, mme, pope, segmentation
from visionsel.multimodal.evaluation.answers import Item, generate_all
from visionsel.multimodal.evaluation.detection_tasks import detection_task
from visionsel.multimodal.evaluation.grounded import GroundingTask, ground_all
from visionsel.multimodal.evaluation.grounding_tasks import narratives_task, refcoco_task, vizwiz_task
from visionsel.multimodal.evaluation.labels import LabelMatcher
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
    "GroundingTask",
    "Hallucination",
    "Item",
    "LabelMatcher",
    "Synonyms",
    "Task",
    "amber",
    "amber_table",
    "amber_task",
    "chair",
    "chair_task",
    "coco_synonyms",
    "detection",
    "detection_task",
    "files",
    "generate_all",
    "ground_all",
    "mme",
    "mme_table",
    "mme_task",
    "narratives_task",
    "pope",
    "pope_task",
    "read_synonyms",
    "refcoco_task",
    "segmentation",
    "shapes_synonyms",
    "shapes_task",
    "table",
    "vizwiz_task",
]
