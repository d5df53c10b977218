"""Does attention find what is talked about? Heatmap methods with the shipped models on scenes with masks.

A row is a heatmap method; prompts, segmenter and answers are the same for all. Beside them stand three that
know nothing of the model: random points, the centre of the image, random boxes. Nothing is trained but
`mask_head`, which saw other scenes.

Referring expressions: mean IoU, cIoU, the share above an IoU of 0.5, and of the heatmap, without the
segmenter, whether its peak lies on the object (exact), there or two pixels from it (pointing; the original
game takes 15 on images of some 480), and how much of it lies on the object (energy). Open-ended detection: AP
and recall of the boxes of what the description names. The numbers compare methods on small scenes; they do
not predict those of large models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from visionsel.data.shapes import CAPTION_PROMPT, SHAPES, Sample, ShapesWorld
from visionsel.data.shapes.masks import encode_rle
from visionsel.embedded import pruning_quality
from visionsel.processes import ALONE, Processes

__all__ = ["COLUMNS", "MEASURES", "evaluate_grounding", "write_rows"]

MEASURES = {
    "g_iou": "mIoU",
    "c_iou": "cIoU",
    "precision_50": "P@50",
    "exact": "exact",
    "pointing": "pointing",
    "energy": "energy",
    "ap_50": "AP50",
    "ar": "AR",
}
"""What each row has, in the order of the table."""

COLUMNS = [
    *("method", "kind", "distribution", "size", "seeds", "expressions", *MEASURES),
    *(f"{measure}_{end}" for measure in MEASURES for end in ("low", "high")),
    "setting",
]
LEARNED = "mask_head"
TOLERANCE = 2  # pixels of 64
LAST = 2**28 - 4  # the seeds after it: calibration, validation, and the presets of heads; then training


@dataclass(frozen=True)
class _Run:
    """One row to measure."""

    name: str
    kind: str
    heatmap: Any
    prompts: str = "points"

    @property
    def setting(self) -> str:
        from visionsel.multimodal.grounding.heatmaps import HEATMAPS
        from visionsel.multimodal.intervention import parse

        named = isinstance(self.heatmap, str) and self.kind == "attention"
        method = repr(parse(self.heatmap, HEATMAPS) if named else self.heatmap)
        return method if self.prompts == "points" else f"{method}, {self.prompts}"


def evaluate_grounding(
    model: Any,
    processor: Any,
    methods: Sequence[str] | None = None,
    size: int = 60,
    seeds: Sequence[int] = (0,),
    distribution: str = "balanced",
    *,
    segmenter: Any = None,
    ensembles: bool = False,
    batch_size: int = 32,
    progress: Callable[[str], None] | None = None,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Expressions and descriptions of fresh scenes, by each heatmap method and by chance.

    Args:
        model, processor: of `load_lvlm`.
        methods: names with settings, as in `mean:layers=(2,)`; default all, and `mask_head`.
        size: scenes of each seed.
        seeds: of the scenes, each below 2**28 - 3: what is chosen and trained has its own above.
        distribution: of the scenes, see `ShapesWorld`.
        segmenter: of `build_segmenter`; None: the shipped one, where the model is.
        ensembles: detect with all questions of `Grounder.detect` and the quarters of the images; otherwise
            with the description alone.
        batch_size: expressions at a time.
        progress: told what is measured next.
        processes: that share the rows (`visionsel.processes.join_processes`); all of them return all rows.

    Returns:
        Rows of `COLUMNS`: the baselines first (kind `baseline`), then the methods (`attention`, `learned`).
        Measures are means over the seeds; `_low` and `_high` are their range, None for one seed. `setting`
        tells hyperparameters, and `expressions` how many there were.

    Raises:
        ImportError: without the extra "train", which has COCO's evaluator.
        ValueError: for an unknown method or distribution, or a number out of range; or, with methods asked
            for by name, when one lacks what it needs.
    """
    from visionsel.multimodal.grounding.grounder import Grounder
    from visionsel.multimodal.grounding.segmenters import build_segmenter

    if min(size, batch_size) < 1:
        raise ValueError(f"size and batch_size must be at least 1, got {size} and {batch_size}")
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed <= LAST for seed in seeds):
        raise ValueError(
            f"seeds must be different numbers from 0 to 2**28 - 4, got {list(seeds)}; training has others"
        )
    say = progress or (lambda text: None)
    segmenter = segmenter or build_segmenter("embedded", model.device)
    grounders: list[tuple[_Run, Any]] = []
    for run in _runs(methods):
        try:
            made = Grounder(
                model,
                processor,
                segmenter,
                run.heatmap,
                prompts=run.prompts,
                names=list(SHAPES),
                batch_size=batch_size,
            )
            made.refer(
                ShapesWorld(distribution, LAST + 1, 1)[0].image, "the ring"
            )  # before others are measured
        except (ValueError, NotImplementedError, FileNotFoundError) as error:
            if methods is not None:
                raise
            say(f"{run.name} is left out: {error}")
            continue
        grounders.append((run, made))
    scenes = {seed: list(ShapesWorld(distribution, seed, size)) for seed in seeds}

    def row_of(number: int) -> dict[str, Any]:
        run, grounder = grounders[number]
        say(f"[{number + 1}/{len(grounders)}] {run.name}")
        measured = [_measure(grounder, scenes[seed], seed, batch_size, ensembles) for seed in seeds]
        several = len(measured) > 1
        row: dict[str, Any] = {
            "method": run.name,
            "kind": run.kind,
            "distribution": distribution,
            "size": size,
            "seeds": " ".join(map(str, seeds)),
            "expressions": sum(one["expressions"] for one in measured),
            "setting": run.setting,
        }
        for measure in MEASURES:
            values = [one[measure] for one in measured]
            row[measure] = sum(values) / len(values)
            row[f"{measure}_low"] = min(values) if several else None
            row[f"{measure}_high"] = max(values) if several else None
        return {column: row[column] for column in COLUMNS}

    return processes.share(range(len(grounders)), row_of)


def _runs(methods: Sequence[str] | None) -> list[_Run]:
    """Chance first, then the methods."""
    from visionsel.multimodal.grounding.heatmaps import HEATMAPS
    from visionsel.multimodal.grounding.heatmaps.chance import CentrePoint, RandomBox, RandomPoint
    from visionsel.multimodal.intervention import method_name

    chance = [
        _Run("random points", "baseline", RandomPoint()),
        _Run("centre point", "baseline", CentrePoint()),
        _Run("random box", "baseline", RandomBox(), "box"),
    ]
    known = [*map(method_name, HEATMAPS), LEARNED]
    chosen = known if methods is None else list(methods)
    if unknown := [name for name in chosen if name.partition(":")[0] not in known]:
        raise ValueError(f"no method is called {', '.join(unknown)}; there are {', '.join(known)}")
    kinds = ["learned" if name.partition(":")[0] == LEARNED else "attention" for name in chosen]
    return [*chance, *(_Run(name, kind, name) for name, kind in zip(chosen, kinds, strict=True))]


def _measure(
    grounder: Any, scenes: Sequence[Sample], seed: int, batch_size: int, ensembles: bool
) -> dict[str, Any]:
    """The measures of one row on the scenes of one seed."""
    from visionsel.multimodal.evaluation import detection, segmentation
    from visionsel.multimodal.evaluation.resume import own_luck

    asked = [(scene, one) for scene in scenes for one in scene.expressions]
    overlaps, exact, peaks, shares = [], [], [], []
    found: list[dict[str, Any]] = []
    with own_luck(grounder.model.device, seed):
        pairs = iter(asked)
        while part := list(islice(pairs, batch_size)):
            words = grounder.refer_many([scene.image for scene, _ in part], [one.text for _, one in part])
            for word, (scene, one) in zip(words, part, strict=True):
                truth, heatmap = scene.objects[one.object].mask, word.heatmap
                overlaps.append(segmentation.overlap(word.mask, truth))
                exact.append(segmentation.peak_inside(heatmap, truth))
                peaks.append(segmentation.peak_inside(heatmap, truth, TOLERANCE))
                shares.append(segmentation.energy_inside(heatmap, truth))
        options: dict[str, Any] = {} if ensembles else {"questions": CAPTION_PROMPT, "crops": False}
        ids = {shape: number for number, shape in enumerate(SHAPES, 1)}
        for number, scene in enumerate(scenes, 1):
            result = grounder.detect(scene.image, **options)
            found += result.to_coco(number, ids)
    if not asked:
        raise ValueError(f"these {len(scenes)} scenes have no expressions; take more")
    scores = segmentation.score(overlaps)
    boxes = detection.average_precision(_instances(scenes), found)
    return {
        **{name: scores[name] for name in ("g_iou", "c_iou", "precision_50")},
        "expressions": len(asked),
        "exact": sum(exact) / len(exact),
        "pointing": sum(peaks) / len(peaks),
        "energy": sum(shares) / len(shares),
        "ap_50": boxes["ap_50"],
        "ar": boxes["ar_100"],
    }


def _instances(scenes: Sequence[Sample]) -> dict[str, Any]:
    """The objects of scenes as COCO's instance files have them."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, 1):
        height, width = scene.labels.shape
        images.append({"id": number, "height": height, "width": width})
        for thing in scene.objects:
            x0, y0, x1, y1 = (float(side) for side in thing.box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1 + SHAPES.index(thing.shape),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": float(thing.mask.sum()),
                    "segmentation": encode_rle(thing.mask),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": shape} for number, shape in enumerate(SHAPES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_rows(rows: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Write the rows as CSV, whole or not at all; what there is no value for stays empty."""
    return pruning_quality.write_rows(rows, path, COLUMNS)
