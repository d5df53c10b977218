"""The shapes world as files, in the formats of the data sets that people use.

```
root/
  shapes.json                                  what was written, with which settings
  images/shapes_<split>_<index>.png
  annotations/instances_<split>.json           COCO instances: boxes and polygons
  annotations/instances_rle_<split>.json       the same with compressed run lengths
  annotations/captions_<split>.json            COCO captions, two an image
  refcoco/instances.json, refcoco/refs.json    RefCOCO's layout over all splits; refs as JSON, no pickle
  pope/<split>_{random,popular,adversarial}.json   POPE's question files, JSON lines
  amber/<split>/{annotations,relation}.json, safe_words.txt, query/query_all.json   AMBER's, see `benchmarks`
  mme/<split>/{existence,position}.txt         MME's: image, question and answer, parted by tabs; pairs
  questions/<split>.jsonl                      all questions: question_id, image, text, answer, kind
  classification/{train,val,test}/<shape>/*.png    an image folder: one object an image, shapes equally often
```

Splits: `train`; `val`, fresh data of the same distribution; `balanced` and `anti`, fresh data of these. Only
captions of `train` can be noisy. COCO's annotations carry `attributes` (colour, size, faint) and images their
`background`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from visionsel.data.folders import write_once
from visionsel.data.shapes.benchmarks import Scene, amber_files, mme_rows
from visionsel.data.shapes.dice import Dice
from visionsel.data.shapes.drawing import SHAPES
from visionsel.data.shapes.language import split_words, with_article
from visionsel.data.shapes.masks import encode_rle, trace_polygons
from visionsel.data.shapes.world import WORLD_VERSION, Sample, ShapesWorld

__all__ = ["CARD", "POPE_KINDS", "SPLITS", "write_shapes"]

CARD = "shapes.json"
SPLITS = ("train", "val", "balanced", "anti")
POPE_KINDS = ("random", "popular", "adversarial")
_TEST_SEEDS = 1 << 30  # seeds of splits: the seed itself, and this much more for each split after the first
_COMPRESSION = 1  # noise does not compress: more takes ten times as long and saves little
_POPE_KEY = 1 << 16  # far from the numbers of distributions, with which the keys of samples begin


def write_shapes(
    root: str | Path,
    size: int = 2000,
    test_size: int | None = None,
    seed: int = 0,
    distribution: str = "train",
    image_size: int = 64,
    *,
    co_occurrence: float = 0.8,
    caption_noise: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the shapes world to `root`, or reuse a folder that was written with the same settings.

    The folder appears under its name only when it is complete: it is written beside it and renamed.

    Args:
        root: the folder to make.
        size: images of `train`, and about as many for classification (the same number of each shape).
        test_size: images of each other split; default a tenth of `size`.
        seed: of `train`, below 2**30; the other splits get seeds that no `train` has.
        distribution: of `train` and `val`, one of `visionsel.data.shapes.DISTRIBUTIONS`.
        image_size: pixels a side, 32 to 1024.
        co_occurrence: see `ShapesWorld`; for `train` and `val`.
        caption_noise: see `ShapesWorld`; for `train` only.
        progress: called with the number of images written and of all, after each.

    Returns:
        `root` as a `Path`.

    Raises:
        ValueError: for settings out of range, or when `root` holds a world written with others.
        FileExistsError: when `root` holds something else.
    """
    root = Path(root)
    test_size = max(1, size // 10) if test_size is None else test_size
    if size < 1 or test_size < 1:
        raise ValueError(f"size and test_size must be at least 1, got {size} and {test_size}")
    if not 0 <= seed < _TEST_SEEDS:
        raise ValueError(
            f"seed must be from 0 to 2**30 - 1, so that the other splits have their own; got {seed}"
        )
    seeds = {split: seed + _TEST_SEEDS * i for i, split in enumerate(SPLITS)}
    worlds = {
        "train": ShapesWorld(
            distribution,
            seeds["train"],
            size,
            image_size,
            co_occurrence=co_occurrence,
            caption_noise=caption_noise,
        ),
        "val": ShapesWorld(distribution, seeds["val"], test_size, image_size, co_occurrence=co_occurrence),
        "balanced": ShapesWorld("balanced", seeds["balanced"], test_size, image_size),
        "anti": ShapesWorld("anti", seeds["anti"], test_size, image_size),
    }
    card = {
        "world_version": WORLD_VERSION,
        "image_size": image_size,
        "co_occurrence": co_occurrence,
        "caption_noise": caption_noise,
        "benchmarks": ["pope", "amber", "mme"],
        "splits": {
            split: {"distribution": world.distribution, "seed": world.seed, "size": world.size}
            for split, world in worlds.items()
        },
    }

    def write(folder: Path) -> None:
        _write_splits(folder, worlds, progress)
        _write_classification(folder / "classification", seeds, size, test_size, image_size)

    return write_once(root, CARD, card, write)


def _dump(content: Any, path: Path, indent: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=indent) + "\n")


def _dump_lines(rows: Sequence[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_splits(
    root: Path, worlds: dict[str, ShapesWorld], progress: Callable[[int, int], None] | None
) -> None:
    (root / "images").mkdir()
    everything, refs = _Instances(), _Refs()
    presence: dict[str, dict[str, list[str]]] = {}
    image_id, total = 0, sum(len(world) for world in worlds.values())
    for split, world in worlds.items():
        polygons, runs = _Instances(), _Instances()
        captions: list[dict[str, Any]] = []
        questions: list[dict[str, Any]] = []
        scenes: list[Scene] = []
        presence[split] = {}
        for index, sample in enumerate(world):
            image_id += 1
            name = f"shapes_{split}_{index:06d}.png"
            sample.image.save(root / "images" / name, compress_level=_COMPRESSION)
            masks = [o.mask for o in sample.objects]
            outlines = [trace_polygons(mask) for mask in masks]
            ids = everything.add(image_id, name, sample, outlines)
            polygons.add(image_id, name, sample, outlines)
            runs.add(image_id, name, sample, [encode_rle(mask) for mask in masks])
            refs.add(image_id, name, split, sample, ids)
            presence[split][name] = list(dict.fromkeys(o.shape for o in sample.objects))
            scenes.append((name, presence[split][name], sample.questions))
            captions += [{"image_id": image_id, "caption": text} for text in sample.captions]
            questions += [
                {"image": name, "text": q.text, "answer": q.answer, "kind": q.kind} for q in sample.questions
            ]
            if progress is not None:
                progress(image_id, total)
        _dump(polygons.content(), root / "annotations" / f"instances_{split}.json")
        _dump(runs.content(), root / "annotations" / f"instances_rle_{split}.json")
        numbered = [{"id": i, **caption} for i, caption in enumerate(captions, 1)]
        _dump(
            {"info": _INFO, "licenses": [], "images": polygons.images, "annotations": numbered},
            root / "annotations" / f"captions_{split}.json",
        )
        _dump_lines(
            [{"question_id": i, **row} for i, row in enumerate(questions, 1)],
            root / "questions" / f"{split}.jsonl",
        )
        _write_benchmarks(root, split, scenes)
    _dump(everything.content(), root / "refcoco" / "instances.json")
    _dump(refs.rows, root / "refcoco" / "refs.json")
    for number, split in enumerate(SPLITS):
        for kind in POPE_KINDS:
            dice = Dice(_POPE_KEY, worlds[split].seed, number)
            rows = list(_pope(presence[split], presence["train"], kind, dice))
            _dump_lines(
                [{"question_id": i, **row} for i, row in enumerate(rows, 1)],
                root / "pope" / f"{split}_{kind}.json",
            )


def _write_benchmarks(root: Path, split: str, scenes: Sequence[Scene]) -> None:
    """AMBER's and MME's files of a split."""
    for name, content in amber_files(scenes).items():
        path = root / "amber" / split / name
        if isinstance(content, str):
            path.write_text(content)
        else:
            _dump(content, path)
    folder = root / "mme" / split
    folder.mkdir(parents=True)
    lines: dict[str, list[str]] = {"existence": [], "position": []}
    for row in mme_rows(scenes):
        lines[row["subset"]].append(f"{row['image']}\t{row['text']}\t{row['label'].capitalize()}\n")
    for subset, content in lines.items():
        (folder / f"{subset}.txt").write_text("".join(content))


_INFO = {"description": "visionsel shapes world", "version": str(WORLD_VERSION)}


class _Instances:
    """COCO's instances; annotation ids are the image's id times ten plus the object's position."""

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, image_id: int, name: str, sample: Sample, segmentations: Sequence[Any]) -> list[int]:
        height, width = sample.labels.shape
        self.images.append(
            {
                "id": image_id,
                "file_name": name,
                "width": width,
                "height": height,
                "background": sample.background,
            }
        )
        ids = []
        for o, segmentation in zip(sample.objects, segmentations, strict=True):
            x0, y0, x1, y1 = o.box
            ids.append(10 * image_id + o.index)
            self.annotations.append(
                {
                    "id": ids[-1],
                    "image_id": image_id,
                    "category_id": SHAPES.index(o.shape) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": o.area,
                    "iscrowd": 0,
                    "segmentation": segmentation,
                    "attributes": {"color": o.color, "size": o.size, "faint": o.faint},
                }
            )
        return ids

    def content(self) -> dict[str, Any]:
        categories = [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(SHAPES, 1)]
        return {
            "info": _INFO,
            "licenses": [],
            "images": self.images,
            "annotations": self.annotations,
            "categories": categories,
        }


class _Refs:
    """RefCOCO's refs: one an object that has expressions, with all of them as its sentences."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.sentences = 0

    def add(self, image_id: int, name: str, split: str, sample: Sample, ids: list[int]) -> None:
        for o in sample.objects:
            texts = [e.text for e in sample.expressions if e.object == o.index]
            if not texts:
                continue
            sentences = []
            for text in texts:
                sentences.append(
                    {"tokens": split_words(text), "raw": text, "sent_id": self.sentences, "sent": text}
                )
                self.sentences += 1
            self.rows.append(
                {
                    "ref_id": len(self.rows),
                    "ann_id": ids[o.index],
                    "image_id": image_id,
                    "category_id": SHAPES.index(o.shape) + 1,
                    "file_name": name,
                    "split": split,
                    "sentences": sentences,
                    "sent_ids": [sentence["sent_id"] for sentence in sentences],
                }
            )


def _pope(
    images: dict[str, list[str]], known: dict[str, list[str]], kind: str, dice: Dice
) -> Iterator[dict[str, str]]:
    """POPE's questions (Li et al. 2023, section 5.1): the first three shapes of an image, each with an absent
    one.

    Images with fewer than three shapes are left out. An absent shape is drawn at random, or is the most
    frequent, or the one that comes most often with the present shape; frequencies are those of `known`, the
    training data, since that is where a model has its habits from. Ties go to the first of `SHAPES`.
    """
    often = Counter(shape for shapes in known.values() for shape in shapes)
    together = Counter((a, b) for shapes in known.values() for a in shapes for b in shapes if a != b)
    for image, present in images.items():
        if len(present) < 3:
            continue
        absent = [shape for shape in SHAPES if shape not in present]
        for positive in present[:3]:
            if kind == "random":
                negative = dice.choose(absent)
            elif kind == "popular":
                negative = max(absent, key=lambda shape: often[shape])
            else:
                negative = max(absent, key=lambda shape: together[positive, shape])
            absent.remove(negative)
            for shape, label in ((positive, "yes"), (negative, "no")):
                yield {
                    "image": image,
                    "text": f"Is there {with_article(shape)} in the image?",
                    "label": label,
                }


def _write_classification(
    root: Path, seeds: dict[str, int], size: int, test_size: int, image_size: int
) -> None:
    for part, seed, count in (
        ("train", seeds["train"], size),
        ("val", seeds["val"], test_size),
        ("test", seeds["balanced"], test_size),
    ):
        share = -(-count // len(SHAPES))
        written = dict.fromkeys(SHAPES, 0)
        for shape in SHAPES:
            (root / part / shape).mkdir(parents=True)
        world = ShapesWorld("balanced", seed, 2**32 - 1, image_size, max_objects=1)
        for index, sample in enumerate(world):
            (o,) = sample.objects
            if written[o.shape] < share:
                sample.image.save(root / part / o.shape / f"{index:06d}.png", compress_level=_COMPRESSION)
                written[o.shape] += 1
            if min(written.values()) == share:
                break
