"""Referring expressions in the files of RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO (Yu et al. 2016, Liu et al.
2023).

A folder holds `instances.json` and refs, `refs(unc).p`, `refs(google).p`, `refs(umd).p`, `grefs(unc).json` or
`refs.json` as `visionsel data shapes` writes them. Refs that are pickles are read by an unpickler that makes
nothing but lists, dicts, text and numbers.
"""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from visionsel.data.coco import Instances, read_instances, read_json

__all__ = ["Reference", "read_references", "read_refs"]


@dataclass(frozen=True)
class Reference:
    """One sentence about one image.

    Attributes:
        id: of the sentence.
        ref: of the object, whose sentences share it.
        image: id of the image.
        file_name: of it.
        text: the sentence.
        annotations: ids of what it means; more than one, or none, in gRefCOCO.
        instances: the file that has them.
    """

    id: int
    ref: int
    image: int
    file_name: str
    text: str
    annotations: tuple[int, ...]
    instances: Instances

    def mask(self) -> np.ndarray:
        """bool `[H, W]`: all that the sentence means."""
        image = self.instances.images[self.image]
        mask = np.zeros((image["height"], image["width"]), dtype=bool)
        for annotation in self.annotations:
            mask |= self.instances.mask(annotation)
        return mask

    def box(self) -> tuple[float, float, float, float] | None:
        """`(x0, y0, x1, y1)` of the annotation; None unless the sentence means exactly one."""
        if len(self.annotations) != 1:
            return None
        x, y, width, height = self.instances.annotations[self.annotations[0]]["bbox"]
        return x, y, x + width, y + height


def read_references(
    folder: str | Path, split: str, sentences: str = "all", refs: str | None = None
) -> list[Reference]:
    """The sentences of a split.

    Args:
        folder: with `instances.json` and one file of refs.
        split: such as `"val"`, `"testA"`, `"testB"`, `"test"`.
        sentences: `"all"`: each sentence is a sample (LISA, GLaMM); `"first"`: the first of each ref alone
            (F-LMM). Numbers of the two do not compare.
        refs: name of the file of refs, where the folder has several.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for an unknown split or protocol, several files of refs, or a file that is damaged.
    """
    if sentences not in ("all", "first"):
        raise ValueError(f'sentences must be "all" or "first", got {sentences!r}')
    folder = Path(folder)
    instances = read_instances(folder / "instances.json")
    rows = read_refs(folder / refs if refs else _only_refs(folder))
    splits = sorted({row["split"] for row in rows})
    if split not in splits:
        raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")
    return [
        reference
        for row in rows
        if row["split"] == split
        for reference in _sentences(row, instances, folder, sentences == "first")
    ]


def _sentences(row: dict[str, Any], instances: Instances, folder: Path, first: bool) -> Iterator[Reference]:
    given = row["ann_id"]
    annotations = [one for one in (given if isinstance(given, list) else [given]) if one != -1]
    if row["image_id"] not in instances.images:
        raise ValueError(f"{folder}: ref {row['ref_id']} is of image {row['image_id']}, which is not listed")
    if lost := [one for one in annotations if one not in instances.annotations]:
        raise ValueError(f"{folder}: ref {row['ref_id']} means annotation {lost[0]}, which is not listed")
    for sentence in row["sentences"][:1] if first else row["sentences"]:
        yield Reference(
            sentence["sent_id"],
            row["ref_id"],
            row["image_id"],
            instances.file_name(row["image_id"]),
            sentence["sent"],
            tuple(annotations),
            instances,
        )


def _only_refs(folder: Path) -> Path:
    found = sorted([*folder.glob("refs*.p"), *folder.glob("refs*.json"), *folder.glob("grefs*.json")])
    if not found:
        raise FileNotFoundError(f"{folder} has no file of refs, such as refs(unc).p or refs.json")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder} has several files of refs: {names}; name one with refs=")
    return found[0]


def read_refs(path: str | Path) -> list[dict[str, Any]]:
    """The refs of a file, JSON or pickle.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a pickle that holds more than plain data, a damaged file, or one that is no refs.
    """
    path = Path(path)
    if path.suffix == ".json":
        rows = read_json(path)
    else:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        with path.open("rb") as stream:
            try:
                rows = _PlainUnpickler(stream, encoding="utf-8").load()
            except (pickle.UnpicklingError, EOFError, UnicodeDecodeError, IndexError, KeyError) as error:
                raise ValueError(f"{path} is no pickle of plain data: {error}") from error
    keys = {"ref_id", "ann_id", "image_id", "split", "sentences"}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and keys <= set(row) for row in rows):
        raise ValueError(f"{path} is no file of refs: expected a list of {', '.join(sorted(keys))}")
    return rows


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, text and numbers; a pickle that names a class or function is refused."""

    def find_class(self, module_name: str, global_name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which could run code")
