"""Boxes and masks with scores against instance files: COCO's AP, LVIS's fixed AP, class-agnostic recall.

Matching is faster-coco-eval's. Detections are COCO results, dicts with `image_id`, `category_id`, `score` and
`bbox` (x, y, width, height) or `segmentation` (compressed run lengths).
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["average_precision", "class_agnostic_recall", "fixed_average_precision"]

FREQUENCIES = {"rare": "r", "common": "c", "frequent": "f"}
Detections = Sequence[dict[str, Any]]


def average_precision(truth: dict[str, Any], detections: Detections, kind: str = "bbox") -> dict[str, float]:
    """COCO's averages over IoU 0.5 to 0.95, at most 100 detections an image.

    Args:
        truth: content of an instance file.
        detections: as COCO results.
        kind: `"bbox"` or `"segm"`.

    Returns:
        `ap`, `ap_50`, `ap_75`, `ap_small`, `ap_medium`, `ap_large`, `ar_100`; NaN where there is none.

    Raises:
        ImportError: without the extra "train".
        ValueError: for another kind, or detections of images or categories that the file does not list.
    """
    evaluated = _evaluate(truth, detections, kind, {})
    area = evaluated.params.areaRngLbl.index
    return {
        "ap": _precision(evaluated),
        "ap_50": _precision(evaluated, iou=0.5),
        "ap_75": _precision(evaluated, iou=0.75),
        **{f"ap_{size}": _precision(evaluated, area=area(size)) for size in ("small", "medium", "large")},
        "ar_100": _recall(evaluated),
    }


def fixed_average_precision(
    truth: dict[str, Any], detections: Detections, kind: str = "bbox", per_class: int = 10_000
) -> dict[str, float]:
    """LVIS's AP without a limit of detections an image (Dave et al. 2021): the best `per_class` of each class
    over the whole set.

    As LVIS does, detections of classes that were not looked for in an image are left out, and those of
    classes that were not annotated exhaustively are not held against it.

    Args:
        truth: content of an LVIS file: images with `neg_category_ids` and `not_exhaustive_category_ids`,
            categories with `frequency`.
        detections: as COCO results.
        kind: `"bbox"` or `"segm"`.
        per_class: how many detections of a class count, by score; of equal ones the first.

    Returns:
        `ap`, `ap_50`, `ap_75`, `ap_rare`, `ap_common`, `ap_frequent`; NaN where there is none.

    Raises:
        ImportError: without the extra "train".
        ValueError: as `average_precision`, or for a file without frequencies.
    """
    if not all(row.get("frequency") in FREQUENCIES.values() for row in truth["categories"]):
        raise ValueError("categories have no frequency r, c or f: not a file of LVIS")
    classes: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for one in detections:
        classes[one["category_id"]].append(one)
    chosen = [
        one
        for rows in classes.values()
        for one in sorted(rows, key=lambda row: row["score"], reverse=True)[:per_class]
    ]
    images: dict[int, int] = defaultdict(int)
    for one in chosen:
        images[one["image_id"]] += 1
    limit = max([1, *images.values()])
    evaluated = _evaluate(truth, chosen, kind, {"lvis_style": True}, limit)
    order = {category: place for place, category in enumerate(evaluated.params.catIds)}
    scores = {
        "ap": _precision(evaluated),
        "ap_50": _precision(evaluated, iou=0.5),
        "ap_75": _precision(evaluated, iou=0.75),
    }
    for name, letter in FREQUENCIES.items():
        group = [order[row["id"]] for row in truth["categories"] if row["frequency"] == letter]
        scores[f"ap_{name}"] = _precision(evaluated, classes=group)
    return scores


def class_agnostic_recall(
    truth: dict[str, Any], detections: Detections, kind: str = "bbox", limit: int = 100
) -> dict[str, float]:
    """How much is found at all, whatever it is called (CODA's measure): `ar`, `ar_50`, `ar_75`.

    Args:
        truth: content of an instance file.
        detections: as COCO results; their categories do not matter.
        kind: `"bbox"` or `"segm"`.
        limit: detections an image, by score.

    Raises:
        ImportError: without the extra "train".
        ValueError: as `average_precision`.
    """
    things = [{**row, "category_id": 1} for row in truth["annotations"]]
    nameless = {**truth, "annotations": things, "categories": [{"id": 1, "name": "object"}]}
    evaluated = _evaluate(nameless, [{**one, "category_id": 1} for one in detections], kind, {}, limit)
    return {
        "ar": _recall(evaluated),
        "ar_50": _recall(evaluated, iou=0.5),
        "ar_75": _recall(evaluated, iou=0.75),
    }


def _evaluate(
    truth: dict[str, Any], detections: Detections, kind: str, options: dict[str, Any], limit: int = 100
) -> Any:
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise ImportError(
            'detections are matched by faster-coco-eval: pip install "visionsel[train]"'
        ) from error
    if kind not in ("bbox", "segm"):
        raise ValueError(f'kind must be "bbox" or "segm", got {kind!r}')
    images, categories = ({row["id"] for row in truth[key]} for key in ("images", "categories"))
    form = "bbox" if kind == "bbox" else "segmentation"
    for one in detections:
        if one["image_id"] not in images or one["category_id"] not in categories or form not in one:
            raise ValueError(
                f"a detection needs {form} and an image and a category of the instance file, got {one}"
            )
        if not np.isfinite(one["score"]):
            raise ValueError(f"the score of a detection is {one['score']}: {one}")
    gold = {"info": {}, "licenses": [], **truth}
    gold["annotations"] = [{"iscrowd": 0, **row} for row in truth["annotations"]]
    coco = COCO(gold, use_deepcopy=True)
    found = coco.loadRes([{**one} for one in detections])
    evaluated = COCOeval_faster(coco, found, kind, print_function=lambda text: None, **options)
    evaluated.params.maxDets = [limit]
    evaluated.evaluate()
    evaluated.accumulate()
    return evaluated


def _precision(
    evaluated: Any, iou: float | None = None, area: int = 0, classes: list[int] | None = None
) -> float:
    """Mean of `[IoUs, recalls, classes, areas, limits]` where there is any truth."""
    values = evaluated.eval["precision"][..., area, -1]
    if iou is not None:
        values = values[np.isclose(evaluated.params.iouThrs, iou)]
    return _mean(values if classes is None else values[:, :, classes])


def _recall(evaluated: Any, iou: float | None = None) -> float:
    """Mean of `[IoUs, classes, areas, limits]` where there is any truth."""
    values = evaluated.eval["recall"][..., 0, -1]
    return _mean(values if iou is None else values[np.isclose(evaluated.params.iouThrs, iou)])


def _mean(values: np.ndarray) -> float:
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")
