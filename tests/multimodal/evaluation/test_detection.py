import contextlib
import io
from typing import Any

import numpy as np
import pytest

from visionsel.data.shapes.masks import encode_rle
from visionsel.multimodal.evaluation import detection


def _world(seed: int, images: int = 12, classes: int = 3) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Boxes as rectangles, detections that are some of them shifted, and some that are nothing."""
    dice = np.random.default_rng(seed)
    truth: dict[str, Any] = {
        "images": [{"id": i, "height": 200, "width": 200} for i in range(1, images + 1)],
        "categories": [{"id": c, "name": str(c), "frequency": "rcf"[c % 3]} for c in range(1, classes + 1)],
        "annotations": [],
    }
    detections = []

    def add(image: int, category: int, box: np.ndarray, score: float | None) -> None:
        x, y, width, height = (int(side) for side in box)
        mask = np.zeros((200, 200), dtype=bool)
        mask[y : y + height, x : x + width] = True
        row = {"image_id": image, "category_id": category, "segmentation": encode_rle(mask)}
        row["bbox"] = [float(side) for side in (x, y, width, height)]
        if score is None:
            number = len(truth["annotations"]) + 1
            truth["annotations"].append({**row, "id": number, "area": float(mask.sum()), "iscrowd": 0})
        else:
            detections.append({**row, "score": score})

    for image in range(1, images + 1):
        for _ in range(dice.integers(1, 5)):
            category = int(dice.integers(1, classes + 1))
            box = np.r_[dice.integers(0, 80, 2), dice.integers(10, 100, 2)]
            add(image, category, box, None)
            for _ in range(dice.integers(0, 3)):
                near = box + np.r_[dice.integers(0, 8, 2), dice.integers(-6, 12, 2)]
                add(image, category, np.r_[near[:2], near[2:].clip(2)], float(dice.random()))
        add(image, int(dice.integers(1, classes + 1)), np.array([150, 150, 30, 20]), float(dice.random()))
    return truth, detections


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_equals_pycocotools(kind: str) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, detections = _world(0)
    if kind == "segm":
        detections = [{key: value for key, value in row.items() if key != "bbox"} for row in detections]
    scores = detection.average_precision(truth, detections, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"info": {}, **truth}
        coco.createIndex()
        known = COCOeval(coco, coco.loadRes([{**row} for row in detections]), kind)
        known.evaluate()
        known.accumulate()
        known.summarize()
    expected = [value if value > -1 else np.nan for value in known.stats[[0, 1, 2, 3, 4, 5, 8]]]
    np.testing.assert_allclose(list(scores.values()), expected, atol=1e-12)
    assert 0.02 < scores["ap"] < 0.9


def test_fixed_average_precision_keeps_the_best_of_each_class_over_the_whole_set() -> None:
    square = {"bbox": [0.0, 0.0, 10.0, 10.0], "category_id": 1}
    truth = {
        "images": [
            {"id": i, "height": 50, "width": 50, "neg_category_ids": [], "not_exhaustive_category_ids": []}
            for i in (1, 2)
        ],
        "categories": [{"id": 1, "name": "a", "frequency": "r"}, {"id": 2, "name": "b", "frequency": "f"}],
        "annotations": [{**square, "id": i, "image_id": i, "area": 100.0} for i in (1, 2)],
    }
    away = {**square, "bbox": [30.0, 30.0, 10.0, 10.0]}
    right = [{**square, "image_id": i, "score": 0.9 - i / 10} for i in (1, 2)]  # 0.8, 0.7
    wrong = [{**away, "image_id": 1, "score": 0.75}]
    # ranks: right, wrong, right: precision 1 up to recall 1/2, then 2/3
    expected = (51 * 1 + 50 * 2 / 3) / 101
    scores = detection.fixed_average_precision(truth, [*right, *wrong])
    assert scores["ap"] == scores["ap_rare"] == pytest.approx(expected)
    assert np.isnan(scores["ap_frequent"])
    # 350 detections in one image: none is cut off by a limit an image
    crowd = [{**away, "image_id": 2, "score": 0.95}] * 350
    late = detection.fixed_average_precision(truth, [*crowd, *right])
    assert late["ap"] == pytest.approx((51 * 2 / 352 + 50 * 2 / 352) / 101)
    assert detection.fixed_average_precision(truth, [*right, *wrong], per_class=1)["ap"] == pytest.approx(
        51 / 101
    )
    # a class that was not looked for in an image is not wrong there; one that was is
    elsewhere = {**away, "category_id": 2, "image_id": 1, "score": 0.99}
    truth["annotations"].append({**square, "category_id": 2, "id": 3, "image_id": 2, "area": 100.0})
    there = {**square, "category_id": 2, "image_id": 2, "score": 0.5}
    assert detection.fixed_average_precision(truth, [elsewhere, there])["ap_frequent"] == 1
    truth["images"][0]["neg_category_ids"] = [2]
    assert detection.fixed_average_precision(truth, [elsewhere, there])["ap_frequent"] == pytest.approx(0.5)
    # and where a class was not annotated to the end, what is unmatched is no error
    truth["images"][0] |= {"neg_category_ids": [], "not_exhaustive_category_ids": [1]}
    assert detection.fixed_average_precision(truth, [*right, *wrong])["ap_rare"] == 1


def test_class_agnostic_recall_does_not_read_names() -> None:
    truth, detections = _world(1)
    renamed = [{**row, "category_id": 1 + row["category_id"] % 3} for row in detections]
    scores = detection.class_agnostic_recall(truth, detections)
    assert scores == detection.class_agnostic_recall(truth, renamed)
    found = 0
    for thing in truth["annotations"]:  # no two things of these share a detection at this IoU
        boxes = [row["bbox"] for row in detections if row["image_id"] == thing["image_id"]]
        found += any(_iou(box, thing["bbox"]) >= 0.75 for box in boxes)
    assert scores["ar_75"] == pytest.approx(found / len(truth["annotations"]))


def _iou(first: list[float], second: list[float]) -> float:
    cells = [
        {(x, y) for x in range(int(b[0]), int(b[0] + b[2])) for y in range(int(b[1]), int(b[1] + b[3]))}
        for b in (first, second)
    ]
    return len(cells[0] & cells[1]) / len(cells[0] | cells[1])


def test_nothing_found_scores_zero_and_wrong_input_is_refused() -> None:
    truth, detections = _world(2)
    assert detection.average_precision(truth, [])["ap"] == 0
    with pytest.raises(ValueError, match="kind must be"):
        detection.average_precision(truth, detections, "keypoints")
    with pytest.raises(ValueError, match="an image and a category of the instance file"):
        detection.average_precision(truth, [{**detections[0], "image_id": 99}])
    with pytest.raises(ValueError, match="score of a detection is nan"):
        detection.average_precision(truth, [{**detections[0], "score": float("nan")}])
    for row in truth["categories"]:
        del row["frequency"]
    with pytest.raises(ValueError, match="not a file of LVIS"):
        detection.fixed_average_precision(truth, detections)
