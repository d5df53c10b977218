"""Open-ended detection on COCO, LVIS and CODA.

The lines of a run have the names that the model gave; they get categories when they are scored, so that
another matching needs no other run.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from visionsel.data.coco import Instances, read_instances
from visionsel.data.shapes.masks import encode_rle
from visionsel.multimodal.evaluation import detection
from visionsel.multimodal.evaluation.grounded import Case, GroundingTask
from visionsel.multimodal.evaluation.grounding_tasks import check_limit
from visionsel.multimodal.evaluation.labels import Match

__all__ = ["BENCHMARKS", "coco_results", "detection_task", "read_categories"]

BENCHMARKS = ("coco", "lvis", "coda")
Row = dict[str, Any]
Matcher = Callable[[Sequence[str]], list[list[Match]]]


def detection_task(
    benchmark: str,
    path: str | Path,
    images: str | Path,
    match: Matcher | None = None,
    limit: int | None = None,
    *,
    matching: str = "",
    corner_cases: bool = False,
    detect: dict[str, Any] | None = None,
) -> GroundingTask:
    """What `Grounder.detect` finds in annotated images.

    Args:
        benchmark: `"coco"`: AP; `"lvis"`: fixed AP; `"coda"`: class-agnostic recall, for which names do not
            matter.
        path: the instance file.
        images: the folder of the images; files named as from it, or by the last part of their names.
        match: categories of names, such as a `LabelMatcher`; not for CODA.
        limit: the first so many images.
        matching: `match` in words, for the scores; lines do not depend on it.
        corner_cases: of CODA, only objects that are marked as such.
        detect: arguments of `Grounder.detect`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for another benchmark, a match that is missing or not wanted, or what is no instance file.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {benchmark!r}; choose of {', '.join(BENCHMARKS)}")
    agnostic = benchmark == "coda"
    if (match is None) != agnostic:
        raise ValueError("names are matched with categories for coco and lvis, and not for coda")
    if corner_cases and not agnostic:
        raise ValueError("corner cases are marked in CODA only")
    truth = _chosen(read_instances(path), check_limit(limit), corner_cases)
    first = next(iter(truth.categories), None)
    if first is None:
        raise ValueError(f"{path} has no categories")
    ids = list(truth.images)

    def measure(grounder: Any, pictures: Sequence[Image.Image], numbers: Sequence[int]) -> list[Row]:
        return [{"found": _found(grounder.detect(picture, **(detect or {})))} for picture in pictures]

    def results(rows: Sequence[Row]) -> list[Row]:
        return coco_results(rows, match or (lambda names: [[(first, 1.0)]] * len(names)))

    def measured(rows: Sequence[Row]) -> dict[str, Any]:
        made = results(rows)
        names = [one["name"] for row in rows for one in row["found"]]
        scores: dict[str, Any] = {"images": len(rows), "detections": len(names)}
        if match is not None:
            scores["without_category"] = sum(not found for found in match(names))
            scores["matching"] = matching
        rate: Any = {
            "coco": detection.average_precision,
            "lvis": detection.fixed_average_precision,
            "coda": detection.class_agnostic_recall,
        }[benchmark]
        masks = all("segmentation" in row for row in truth.content["annotations"])
        for kind in ("bbox", "segm") if masks else ("bbox",):
            scores[kind] = rate(truth.content, made, kind)
        return scores

    what = {"coco": "AP, at most 100 an image", "lvis": "fixed AP, at most 10,000 a class"}
    said = what.get(benchmark, "class-agnostic recall, at most 100 an image")
    if corner_cases:
        said += ", of corner cases"
    return GroundingTask(
        [
            Case(
                {"image": image},
                _file(Path(images), truth, image),
                (truth.images[image]["height"], truth.images[image]["width"]),
            )
            for image in ids
        ],
        measure,
        ("found",),
        measured,
        f"{said}; {len(ids)} images of {Path(path).name}",
        results=results,
    )


def coco_results(rows: Sequence[Row], match: Matcher) -> list[Row]:
    """Detections with categories, as COCO's evaluators read them.

    Args:
        rows: with `image` and `found`: `name`, `score`, `bbox`, `segmentation`.
        match: gives each name its categories and weights; a detection becomes one result for each, its score
            times the weight, and none without a category.
    """
    flat = [(row["image"], one) for row in rows for one in row["found"]]
    labels = match([one["name"] for _, one in flat])
    return [
        {
            "image_id": image,
            "category_id": category,
            "score": one["score"] * weight,
            "bbox": one["bbox"],
            "segmentation": one["segmentation"],
        }
        for (image, one), found in zip(flat, labels, strict=True)
        for category, weight in found
    ]


def read_categories(path: str | Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    """The categories of an instance file by id, and the synonyms that LVIS lists.

    Raises:
        FileNotFoundError, ValueError: see `read_instances`.
    """
    instances = read_instances(path)
    synonyms = {
        row["id"]: [str(one) for one in row.get("synonyms", ())] for row in instances.content["categories"]
    }
    return instances.categories, synonyms


def _chosen(instances: Instances, limit: int | None, corner_cases: bool) -> Instances:
    """The first images and what is annotated in them."""
    content = instances.content
    images = content["images"][:limit]
    if not images:
        raise ValueError("the instance file lists no images")
    ids = {row["id"] for row in images}
    annotations = [row for row in content["annotations"] if row["image_id"] in ids]
    if corner_cases:
        if not all("corner_case" in row for row in annotations):
            raise ValueError("annotations do not say whether they are corner cases: not a file of CODA")
        annotations = [row for row in annotations if row["corner_case"]]
    return Instances(
        {row["id"]: row for row in images},
        {row["id"]: row for row in annotations},
        instances.categories,
        {**content, "images": images, "annotations": annotations},
    )


def _file(folder: Path, instances: Instances, image: int) -> Path:
    name = instances.file_name(image)
    whole = folder / name
    return whole if whole.is_file() else folder / Path(name).name


def _found(result: Any) -> list[Row]:
    """What a detection keeps of each object."""
    found = []
    for word in result.words:
        if word.box is None:
            continue
        x0, y0, x1, y1 = (float(side) for side in word.box)
        found.append(
            {
                "name": word.name,
                "score": float(word.score),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "segmentation": encode_rle(word.mask),
            }
        )
    return found
