"""Panoptic Narrative Grounding: captions whose noun phrases name segments (Gonzalez et al. 2021).

A folder holds `png_coco_<split>.json` and `panoptic_<split>.json`, or has them in `annotations/`, and beside
the latter the segments as PNGs, in `panoptic_<split>/` as COCO packs them or in
`panoptic_segmentation/<split>/` as the authors do; `<split>` is such as `val2017`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionsel.data.coco import read_json

__all__ = ["Narrative", "Phrase", "read_narratives"]


@dataclass(frozen=True)
class Phrase:
    """A noun phrase of a narrative.

    Attributes:
        text: its words.
        span: its first character in the caption, and one past its last.
        segments: ids of the segments it means.
        plural: whether it means several.
        thing: whether the first of them is a thing, not stuff.
    """

    text: str
    span: tuple[int, int]
    segments: tuple[int, ...]
    plural: bool
    thing: bool


@dataclass(frozen=True)
class Narrative:
    """A caption and what its phrases mean.

    Attributes:
        image: id of the image.
        file_name: of it.
        caption: the whole text; its parts in a row where they do not make up the text (some files differ).
        phrases: with segments, in order.
        png: file that has the segments.
    """

    image: int
    file_name: str
    caption: str
    phrases: tuple[Phrase, ...]
    png: Path

    def masks(self) -> list[np.ndarray]:
        """For each phrase bool `[H, W]`: its segments together.

        Raises:
            FileNotFoundError: without the PNG.
        """
        if not self.png.is_file():
            raise FileNotFoundError(f"there is no file {self.png}")
        pixels = np.asarray(Image.open(self.png).convert("RGB"), dtype=np.int64)
        ids = pixels @ np.array([1, 256, 65536])  # COCO's panoptic format
        return [np.isin(ids, phrase.segments) for phrase in self.phrases]


def read_narratives(folder: str | Path, split: str = "val2017") -> list[Narrative]:
    """The narratives of a split.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for a file of another form, or images and categories that the panoptic file does not list.
    """
    folder = Path(folder)
    rows = read_json(_find(folder, f"png_coco_{split}.json"))
    path = _find(folder, f"panoptic_{split}.json")
    panoptic = read_json(path)
    if not isinstance(rows, list) or not isinstance(panoptic, dict) or "annotations" not in panoptic:
        raise ValueError(
            f"{folder}: png_coco_{split}.json is a list, panoptic_{split}.json COCO's panoptic file"
        )
    names = {row["id"]: row["file_name"] for row in panoptic["images"]}
    things = {row["id"]: bool(row["isthing"]) for row in panoptic["categories"]}
    segments = {row["image_id"]: row for row in panoptic["annotations"]}
    narratives = []
    for row in rows:
        image = int(row["image_id"])
        if image not in names or image not in segments:
            raise ValueError(f"{path} does not list image {image}, which has a narrative")
        kinds = {info["id"]: things[info["category_id"]] for info in segments[image]["segments_info"]}
        caption = _caption(row)
        phrases = tuple(_phrases(row, caption, kinds))
        folders = (path.parent / f"panoptic_{split}", path.parent / "panoptic_segmentation" / split)
        pngs = next((one for one in folders if one.is_dir()), folders[0])
        png = pngs / segments[image]["file_name"]
        narratives.append(Narrative(image, names[image], caption, phrases, png))
    return narratives


def _caption(row: dict[str, Any]) -> str:
    """The text in which the parts are found one after the other."""
    parts = [part["utterance"].strip() for part in row["segments"]]
    end = 0
    for part in parts:
        start = row["caption"].find(part, end)
        if start < 0:
            return " ".join(parts)
        end = start + len(part)
    return row["caption"]


def _phrases(row: dict[str, Any], caption: str, kinds: dict[int, bool]) -> Iterator[Phrase]:
    """Parts without `segment_ids` mean nothing."""
    end = 0
    for part in row["segments"]:
        text = part["utterance"].strip()
        start = caption.find(text, end)
        end = start + len(text)
        ids = tuple(int(one) for one in part.get("segment_ids", ()))
        if not ids:
            continue
        if lost := [one for one in ids if one not in kinds]:
            raise ValueError(
                f"image {row['image_id']}: {text!r} means segment {lost[0]}, which is not listed"
            )
        yield Phrase(text, (start, end), ids, bool(part.get("plural")), kinds[ids[0]])


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / "annotations" / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"there is no file {name} in {folder} or its annotations folder")
