"""COCO's annotation files: images, instances, masks; LVIS and RefCOCO share the format."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visionsel.data.shapes.masks import decode_rle

__all__ = ["Instances", "annotation_mask", "read_instances", "read_json"]


@dataclass(frozen=True)
class Instances:
    """An instance file.

    Attributes:
        images: by id, with `file_name`, `height` and `width`.
        annotations: by id, with `image_id`, `category_id`, `bbox` (x, y, w, h) and `segmentation`.
        categories: names by id.
        content: the file as it is, for evaluators that take it whole.
    """

    images: dict[int, dict[str, Any]]
    annotations: dict[int, dict[str, Any]]
    categories: dict[int, str]
    content: dict[str, Any]

    def mask(self, annotation: int) -> np.ndarray:
        """bool `[H, W]`: the pixels of an annotation."""
        row = self.annotations[annotation]
        image = self.images[row["image_id"]]
        return annotation_mask(row["segmentation"], image["height"], image["width"])

    def file_name(self, image: int) -> str:
        """Name of an image's file; LVIS has it at the end of `coco_url` only."""
        row = self.images[image]
        return row.get("file_name") or str(row["coco_url"]).rsplit("/", 1)[-1]


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file that is no JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_instances(path: str | Path) -> Instances:
    """An instance file of COCO or LVIS.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file without images, annotations or categories, or annotations of unknown images.
    """
    content = read_json(path)
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in keys):
        raise ValueError(f"{path} is no instance file: expected lists under {', '.join(keys)}")
    images = {row["id"]: row for row in content["images"]}
    annotations = {row["id"]: row for row in content["annotations"]}
    if lost := [row["id"] for row in content["annotations"] if row["image_id"] not in images]:
        raise ValueError(f"{path}: {len(lost)} annotations of images that are not listed, such as {lost[0]}")
    categories = {row["id"]: row["name"] for row in content["categories"]}
    return Instances(images, annotations, categories, content)


def annotation_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The pixels of a segmentation in any of COCO's forms.

    Args:
        segmentation: polygons `[[x0, y0, x1, y1, ...], ...]`, or run lengths, compressed or as a list.
        height, width: of the image.

    Returns:
        bool `[height, width]`.

    Raises:
        ImportError: for polygons without the extra "train".
        ValueError: for a form that is not known, or run lengths of another size.
    """
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"run lengths are of {segmentation['size']} pixels, the image {[height, width]}")
        if isinstance(counts, list):
            if sum(counts) != height * width:
                raise ValueError(f"run lengths do not fill {height} x {width} pixels")
            return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
        text = counts.decode() if isinstance(counts, bytes) else counts
        return decode_rle({"size": [height, width], "counts": text})
    if not isinstance(segmentation, list) or not all(
        isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation
    ):
        raise ValueError("a segmentation is run lengths or polygons of three corners or more")
    if not segmentation:
        return np.zeros((height, width), dtype=bool)
    try:
        from faster_coco_eval.core import mask as coco_mask
    except ImportError as error:
        raise ImportError(
            'polygons are filled by faster-coco-eval: pip install "visionsel[train]"'
        ) from error
    runs = coco_mask.frPyObjects(
        [[float(side) for side in polygon] for polygon in segmentation], height, width
    )
    return coco_mask.decode(coco_mask.merge(runs)).astype(bool)
