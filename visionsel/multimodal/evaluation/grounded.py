"""What a grounder finds in annotated images, written to a file as it comes, and what it scores.

    task = refcoco_task("refcoco", "train2014", "val", sentences="all")
    rows = ground_all(grounder, task, "rows.jsonl")
    task.score(rows), task.protocol

A line has what its score needs: pixels of two masks (`Overlap`), a box, detections. Batches are fixed by the
task and each has random numbers of its own, so that a line does not depend on where a run was stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from visionsel.multimodal.evaluation.resume import finish_rows, own_luck
from visionsel.multimodal.evaluation.segmentation import Overlap, overlap
from visionsel.processes import ALONE, Processes

__all__ = ["Case", "GroundingTask", "ground_all", "open_as_stored", "overlaps_of", "pixels"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One line: an image and what is looked for.

    Attributes:
        fields: what the line says beside its result; values of JSON.
        image: the file.
        size: `(height, width)` that the annotations have; None: not known.
    """

    fields: Mapping[str, Any]
    image: Path
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class GroundingTask:
    """A benchmark.

    Attributes:
        cases: in the order of the file.
        measure: what a grounder finds in images, for the cases of these numbers; one result a case, with the
            keys of `keys` and values of JSON.
        keys: of a result.
        score: of all lines.
        protocol: in words, what the numbers are of; two that differ in it do not compare.
        batched: whether the grounder takes several cases at once.
        results: all lines as COCO results, of detection.
    """

    cases: Sequence[Case] = field(repr=False)
    measure: Callable[[Any, Sequence[Image.Image], Sequence[int]], list[Row]]
    keys: tuple[str, ...]
    score: Callable[[Sequence[Row]], dict[str, Any]]
    protocol: str
    batched: bool = False
    results: Callable[[Sequence[Row]], list[Row]] | None = None


def ground_all(
    grounder: Any,
    task: GroundingTask,
    path: str | Path,
    *,
    batch_size: int = 8,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    processes: Processes = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """What a grounder finds for all cases; those that the file has already are not looked at again.

    Args:
        grounder: a `Grounder`, or what has those of its methods that the task calls.
        task: the benchmark.
        path: of the file, JSON lines. A last line that is cut off is dropped.
        batch_size: cases at a time, where the task takes several.
        seed: of what is drawn, as by sampling and by baselines.
        settings: what the lines depend on beside the task, such as the names of the models; values of JSON.
        processes: that share the batches (`visionsel.processes.join_processes`); each gets all lines.
        progress: called with the number of lines in the file and of cases, first and after each line; of
            several processes, each counts the lines that are its own to make.

    Returns:
        the lines of the file: the fields of a case and its result.

    Raises:
        FileNotFoundError: for an image that does not exist.
        ValueError: for a number out of range, no cases, an image of another size than annotated, a file that
            was made with other settings, or one with other lines than this would write.
    """
    if batch_size < 1 or seed < 0:
        raise ValueError(f"batch_size must be at least 1 and seed at least 0, got {batch_size} and {seed}")
    if not task.cases:
        raise ValueError("there is nothing to look for: no cases")
    images = dict.fromkeys(case.image for case in task.cases)
    if missing := [image for image in images if not image.is_file()]:
        others = f" (nor {len(missing) - 1} others of {len(images)})" if len(missing) > 1 else ""
        raise FileNotFoundError(f"no image at {missing[0]}{others}")
    path = Path(path)
    step = batch_size if task.batched else 1
    fields = [case.fields for case in task.cases]
    named = [[case.fields, case.image.name] for case in task.cases]
    used = {
        **(settings or {}),
        "protocol": task.protocol,
        "batch_size": step,
        "seed": seed,
        "cases": len(task.cases),
        "asked": sha256(dumps(named, sort_keys=True).encode()).hexdigest()[:16],
    }
    device = getattr(getattr(grounder, "model", None), "device", torch.device("cpu"))

    def results(start: int, stop: int) -> list[Row]:
        pictures = [open_as_stored(case) for case in task.cases[start:stop]]
        with own_luck(device, seed, start):
            return task.measure(grounder, pictures, range(start, stop))

    starts = range(0, len(task.cases), step)
    return finish_rows(
        path,
        fields,
        used,
        lambda row: set(row) == set(task.keys),
        [(start, min(start + step, len(task.cases))) for start in starts],
        results,
        what="that of case",
        processes=processes,
        progress=progress,
    )


def open_as_stored(case: Case) -> Image.Image:
    """The image of a case in RGB, its pixels as they are stored: data sets annotate them so, whatever the
    EXIF data say.

    Raises:
        ValueError: for a file that is no image, or of another size than annotated.
    """
    try:
        with Image.open(case.image) as opened:
            picture = Image.fromarray(np.asarray(opened.convert("RGB")))  # without its EXIF data
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{case.image} is not an image, or is cut off") from error
    if case.size is not None and (picture.height, picture.width) != tuple(case.size):
        raise ValueError(
            f"{case.image} has {picture.height} x {picture.width} pixels, its annotations are for "
            f"{case.size[0]} x {case.size[1]}: give the images of the data set, not scaled or turned"
        )
    return picture


def pixels(mask: np.ndarray, truth: np.ndarray) -> list[int]:
    """An `Overlap` as a line has it."""
    return list(astuple(overlap(mask, truth)))


def overlaps_of(rows: Sequence[Row], key: str = "overlap") -> list[Overlap]:
    """The overlaps of lines."""
    return [Overlap(*row[key]) for row in rows]
