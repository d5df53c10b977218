"""Is what a written shapes world says true?

Reads the annotation files of `write_shapes` and nothing else, and shares with the code that makes the texts
only the
words: it takes sentences apart where that puts them together.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visionsel.data.shapes.drawing import BACKGROUNDS, COLORS, SHAPES
from visionsel.data.shapes.files import CARD, POPE_KINDS
from visionsel.data.shapes.language import BINS, COLUMNS, NUMBERS, ROWS
from visionsel.data.shapes.masks import decode_rle
from visionsel.data.shapes.scene import PARTNERS, SIZES

__all__ = ["check_shapes"]

_SIZE, _COLOR, _SHAPE = "|".join(SIZES), "|".join(COLORS), "|".join(SHAPES)
_CELL = f"(?:{'|'.join(ROWS)}) (?:{'|'.join(COLUMNS)})"
_RELATION = "left of|right of|above|below"
_THING = rf"(?:({_SIZE}) )?(?:({_COLOR}) )?({_SHAPE})"
_EXPRESSION = re.compile(rf"the {_THING}(?: ({_RELATION}) (the .+)| in the ({_CELL}))?")
_RELATIVE = re.compile(rf"is (the (?:(?!{_RELATION}).)+) ({_RELATION}) (the .+)\?")


@dataclass(frozen=True)
class _Thing:
    annotation: int
    shape: str
    color: str
    size: str
    box: tuple[float, float, float, float]

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class _Image:
    name: str
    side: int
    background: str
    things: list[_Thing]

    def cell(self, thing: _Thing) -> str:
        column, row = (int(3 * position / self.side) for position in thing.center)
        return f"{ROWS[row]} {COLUMNS[column]}"

    def resolve(self, expression: str) -> list[_Thing]:
        """Everything that an expression fits; nothing if it is none."""
        match = _EXPRESSION.fullmatch(expression)
        if not match:
            return []
        size, color, shape, relation, anchor, place = match.groups()
        found = [
            t for t in self.things if t.shape == shape and color in (None, t.color) and size in (None, t.size)
        ]
        if place:
            found = [t for t in found if self.cell(t) == place]
        if relation:
            anchors = self.resolve(anchor)
            if len(anchors) != 1:
                return []
            found = [t for t in found if t is not anchors[0] and _stands(t, relation, anchors[0])]
        return found


def _stands(thing: _Thing, relation: str, other: _Thing) -> bool:
    (x, y), (u, v) = thing.center, other.center
    return {"left of": x < u, "right of": x > u, "above": y < v, "below": y > v}[relation]


def check_shapes(root: str | Path) -> list[str]:
    """What is not true in a folder written by `write_shapes`: one line each, none for a good folder.

    A caption of noisy training data may mention an absent partner of a present shape, where the card says
    that there is noise.

    Raises:
        FileNotFoundError: when `root` is no such folder.
    """
    root = Path(root)
    if not (root / CARD).is_file():
        raise FileNotFoundError(
            f"{root} has no {CARD}; it was not written by write_shapes, or not to the end"
        )
    card = json.loads((root / CARD).read_text())
    problems: list[str] = []
    everything: dict[str, _Image] = {}
    for split in card["splits"]:
        images = _read_instances(root / "annotations" / f"instances_{split}.json")
        everything |= images
        problems += [f"{name} is missing" for name in images if not (root / "images" / name).is_file()]
        problems += _check_masks(root, split)
        noisy = split == "train" and card["caption_noise"] > 0
        problems += _check_captions(root / "annotations" / f"captions_{split}.json", images, noisy)
        problems += _check_questions(root / "questions" / f"{split}.jsonl", images)
        for kind in POPE_KINDS:
            problems += _check_pope(root / "pope" / f"{split}_{kind}.json", images)
        problems += _check_amber(root / "amber" / split, images)
        problems += _check_mme(root / "mme" / split, images)
    return [*problems, *_check_refs(root / "refcoco", everything)]


def _read_instances(path: Path) -> dict[str, _Image]:
    content = json.loads(path.read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    images = {
        row["id"]: _Image(row["file_name"], row["width"], row["background"], []) for row in content["images"]
    }
    for row in content["annotations"]:
        x, y, width, height = row["bbox"]
        words = row["attributes"]
        images[row["image_id"]].things.append(
            _Thing(
                row["id"],
                names[row["category_id"]],
                words["color"],
                words["size"],
                (x, y, x + width, y + height),
            )
        )
    return {image.name: image for image in images.values()}


def _check_masks(root: Path, split: str) -> Iterator[str]:
    """Boxes, areas, polygons and run lengths of an object agree."""
    polygons = json.loads((root / "annotations" / f"instances_{split}.json").read_text())["annotations"]
    runs = json.loads((root / "annotations" / f"instances_rle_{split}.json").read_text())["annotations"]
    if [row["id"] for row in polygons] != [row["id"] for row in runs]:
        yield f"{split}: the two files of instances do not hold the same annotations"
        return
    for outline, run in zip(polygons, runs, strict=True):
        mask = decode_rle(run["segmentation"])
        columns, rows = np.flatnonzero(mask.any(0)).tolist(), np.flatnonzero(mask.any(1)).tolist()
        box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
        if not box == outline["bbox"] == run["bbox"]:
            yield f"{split}: box {outline['bbox']} of annotation {run['id']} is not that of its mask, {box}"
        enclosed = sum(_enclosed(polygon) for polygon in outline["segmentation"])
        if not mask.sum() == outline["area"] == run["area"] == enclosed:
            yield f"{split}: areas of annotation {run['id']} differ: mask {mask.sum()}, polygons {enclosed}"


def _enclosed(polygon: list[int]) -> float:
    x, y = polygon[::2], polygon[1::2]
    return abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))) / 2


def _check_captions(path: Path, images: dict[str, _Image], noisy: bool) -> Iterator[str]:
    content = json.loads(path.read_text())
    names = {row["id"]: row["file_name"] for row in content["images"]}
    pattern = re.compile(rf"(.+) on a ({'|'.join(BACKGROUNDS)}) background")
    for row in content["annotations"]:
        image, text = images[names[row["image_id"]]], row["caption"]
        match = pattern.fullmatch(text)
        mentions = [re.fullmatch(f"a {_THING}", part) for part in match[1].split(" and ")] if match else []
        if not match or match[2] != image.background or not all(mentions):
            yield f"{image.name}: {text!r} is not a caption of it"
            continue
        said = Counter(mention.group(1, 2, 3) for mention in mentions if mention)
        there: Counter[tuple[str | Any, ...]] = Counter((t.size, t.color, t.shape) for t in image.things)
        shapes = {t.shape for t in image.things}
        brought = {partner for shape, partner in PARTNERS.items() if shape in shapes} - shapes
        phantoms = [words[2] for words in said - there]
        if there - said or not (set(phantoms) <= brought if noisy else not phantoms):
            yield f"{image.name}: {text!r} is not true"


def _check_questions(path: Path, images: dict[str, _Image]) -> Iterator[str]:
    for line in path.read_text().splitlines():
        row = json.loads(line)
        image = images[row["image"]]
        answer = _ANSWERS[row["kind"]](image, row["text"], row["answer"])
        if not answer:
            yield f"{image.name}: {row['kind']} {row['text']!r} {row['answer']!r} is not true"


def _exist(image: _Image, text: str, answer: str) -> bool:
    match = re.fullmatch(rf"is there an? ({_SHAPE}) in the image\?", text.lower())
    return match is not None and answer == ("yes" if any(t.shape == match[1] for t in image.things) else "no")


def _color(image: _Image, text: str, answer: str) -> bool:
    match = re.fullmatch(rf"what color is the ({_SHAPE})\?", text)
    return match is not None and [answer] == [t.color for t in image.things if t.shape == match[1]]


def _absent(image: _Image, text: str, answer: str) -> bool:
    match = re.fullmatch(rf"what color is the ({_SHAPE})\?", text)
    return match is not None and answer == "no" and all(t.shape != match[1] for t in image.things)


def _count(image: _Image, text: str, answer: str) -> bool:
    match = re.fullmatch(rf"how many (?:({_SHAPE}) shapes|({_COLOR}) objects|objects) are there\?", text)
    if not match:
        return False
    shape, color = match.groups()
    number = sum(shape in (None, t.shape) and color in (None, t.color) for t in image.things)
    return answer == NUMBERS[number]


def _where(image: _Image, text: str, answer: str) -> bool:
    match = re.fullmatch(r"where is (.+)\?", text)
    return match is not None and [answer] == [image.cell(t) for t in image.resolve(match[1])]


def _what(image: _Image, text: str, answer: str) -> bool:
    match = re.fullmatch(rf"what is in the ({_CELL})\?", text)
    found = [t for t in image.things if match and image.cell(t) == match[1]]
    return [answer.split()[1:]] == [[t.color, t.shape] for t in found]


def _relation(image: _Image, text: str, answer: str) -> bool:
    match = _RELATIVE.fullmatch(text)
    if not match:
        return False
    first, second = image.resolve(match[1]), image.resolve(match[3])
    if len(first) != 1 or len(second) != 1 or first == second:
        return False
    return answer == ("yes" if _stands(first[0], match[2], second[0]) else "no")


def _refer(image: _Image, text: str, answer: str) -> bool:
    match = re.fullmatch(r"locate (.+)\.", text)
    found = image.resolve(match[1]) if match else []
    if len(found) != 1 or not re.fullmatch(r"\d+( \d+){3}", answer):
        return False
    bins = [int(word) for word in answer.split()]
    step, box = image.side / BINS, found[0].box
    if image.side == 64:  # the raster on which texts are made
        return bins == [
            *(int(side // step) for side in box[:2]),
            *(-int(-side // step) - 1 for side in box[2:]),
        ]
    said = [bins[0] * step, bins[1] * step, (bins[2] + 1) * step, (bins[3] + 1) * step]
    shared = _area([*map(max, said[:2], box[:2]), *map(min, said[2:], box[2:])])
    return shared >= 0.5 * (_area(said) + _area(box) - shared)


def _area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


_ANSWERS: dict[str, Callable[[_Image, str, str], bool]] = {
    "exist": _exist,
    "color": _color,
    "absent": _absent,
    "count": _count,
    "where": _where,
    "what": _what,
    "relation": _relation,
    "refer": _refer,
}


def _check_pope(path: Path, images: dict[str, _Image]) -> Iterator[str]:
    for line in path.read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        if not _exist(images[row["image"]], row["text"], row["label"]):
            yield f"{row['image']}: {path.name} {row['text']!r} {row['label']!r} is not true"


def _check_amber(folder: Path, images: dict[str, _Image]) -> Iterator[str]:
    """Objects and expected ones of the captions, and answers to the questions."""
    annotations = json.loads((folder / "annotations.json").read_text())
    queries = json.loads((folder / "query" / "query_all.json").read_text())
    if [row["id"] for row in annotations] != [row["id"] for row in queries]:
        yield f"{folder}: annotations and queries do not have the same ids"
        return
    for row, query in zip(annotations, queries, strict=True):
        image, truth = images[query["image"]], row["truth"]
        shapes = {t.shape for t in image.things}
        if row["type"] == "generative":
            brought = {partner for shape, partner in PARTNERS.items() if shape in shapes} - shapes
            true = sorted(truth) == sorted(shapes) and sorted(row["hallu"]) == sorted(brought)
        else:
            judge = _exist if row["type"] == "discriminative-hallucination" else _relation
            true = judge(image, query["query"], truth)
        if not true:
            yield f"{image.name}: amber {query['query']!r} {truth!r} is not true"


def _check_mme(folder: Path, images: dict[str, _Image]) -> Iterator[str]:
    """Pairs of questions to an image, one with each answer."""
    for subset, judge in (("existence", _exist), ("position", _relation)):
        rows = [line.split("\t") for line in (folder / f"{subset}.txt").read_text().splitlines()]
        for (image, text, answer), (other, _, opposite) in zip(rows, rows[1:] + rows[:1], strict=True):
            if not judge(images[image], text, answer.lower()):
                yield f"{image}: mme {text!r} {answer!r} is not true"
            if answer == "Yes" and (image, "No") != (other, opposite):
                yield f"{image}: mme {text!r} has no other question beside it"


def _check_refs(folder: Path, images: dict[str, _Image]) -> Iterator[str]:
    """Every sentence fits its annotation and no other; the instances are those of all splits."""
    things = {
        t.annotation for image in _read_instances(folder / "instances.json").values() for t in image.things
    }
    if things != {t.annotation for image in images.values() for t in image.things}:
        yield f"{folder.name}: instances.json does not hold the annotations of all splits"
    for ref in json.loads((folder / "refs.json").read_text()):
        for sentence in ref["sentences"]:
            found = [t.annotation for t in images[ref["file_name"]].resolve(sentence["sent"])]
            if found != [ref["ann_id"]]:
                yield f"{ref['file_name']}: {sentence['sent']!r} is not annotation {ref['ann_id']} only"
