"""Objects of an instance file that a detector can learn from or be measured on; the others are named."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionsel.data.coco import Instances, annotation_mask, read_instances

__all__ = ["Objects", "read_objects"]


@dataclass(frozen=True)
class Objects:
    """Usable annotations of an instance file.

    Attributes:
        instances: the file.
        rows: usable annotations by image id; every image has a list, which can be empty.
        left_out: why each of the other annotations is not usable, with its id and its image's file.
    """

    instances: Instances
    rows: dict[int, list[dict[str, Any]]]
    left_out: list[str]

    @property
    def categories(self) -> dict[int, str]:
        """Names by category id, in the order of the ids; the first is class 1 of a detector."""
        return dict(sorted(self.instances.categories.items()))


def read_objects(path: str | Path, masks: bool = False) -> Objects:
    """An instance file, checked.

    Left out are annotations whose box is not four numbers, has no area or lies outside of its image, and with
    `masks` those whose segmentation is missing, empty or malformed. A box that reaches over the border of its
    image is usable.

    Args:
        path: of a file in the format of COCO.
        masks: segmentations are wanted, too.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for what is no instance file, an id that two rows share, a row that lacks a key, or an
            annotation of an image or category that is not listed.
    """
    try:
        instances = read_instances(path)
    except KeyError as error:
        raise ValueError(f"{path}: a row lacks {error}") from error
    for part in ("images", "annotations", "categories"):
        _check_ids(path, part, instances.content[part])
    for number, image in instances.images.items():
        if not all(isinstance(image.get(side), int) and image[side] > 0 for side in ("height", "width")):
            raise ValueError(f"{path}: image {number} has no height and width in pixels")
        if not image.get("file_name") and not image.get("coco_url"):
            raise ValueError(f"{path}: image {number} has no file_name")
    rows: dict[int, list[dict[str, Any]]] = {number: [] for number in instances.images}
    left_out = []
    for number, row in instances.annotations.items():
        image, name = instances.images[row["image_id"]], instances.file_name(row["image_id"])
        if row.get("category_id") not in instances.categories:
            raise ValueError(
                f"{path}: annotation {number} of {name} has category_id {row.get('category_id')!r}, "
                "which is not listed under categories"
            )
        problem = _box_problem(row.get("bbox"), image["height"], image["width"])
        if problem is None and masks:
            problem = _mask_problem(row.get("segmentation"), image["height"], image["width"])
        if problem is None:
            rows[row["image_id"]].append(row)
        else:
            left_out.append(f"annotation {number} of {name}: {problem}")
    return Objects(instances, rows, left_out)


def _check_ids(path: str | Path, part: str, rows: list[dict[str, Any]]) -> None:
    seen = set()
    for row in rows:
        if row["id"] in seen:
            raise ValueError(f"{path}: two rows of {part} have the id {row['id']}")
        seen.add(row["id"])


def _box_problem(box: Any, height: int, width: int) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not _finite(box):
        return f"its bbox is {box}, not four numbers"
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return f"its bbox {box} has no area"
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return f"its bbox {box} is outside of the image of {height} x {width} pixels"
    return None


def _mask_problem(segmentation: Any, height: int, width: int) -> str | None:
    if not segmentation:
        return "it has no segmentation"
    if isinstance(segmentation, list):
        if all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and _finite(p) for p in segmentation):
            return None
        return "its segmentation has a polygon that is not three corners or more"
    try:
        mask = annotation_mask(segmentation, height, width)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return f"its segmentation cannot be read: {error}"
    return None if mask.any() else "its segmentation has no pixels"


def _finite(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)
