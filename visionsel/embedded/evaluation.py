"""What the cards of the embedded models state, measured on fresh scenes, and what it must reach."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionsel.data.shapes import CAPTION_PROMPT, Sample, ShapesWorld
from visionsel.embedded.classifier import load_classifier, measure_classifier
from visionsel.embedded.clip import load_clip
from visionsel.embedded.clip_quality import measure_clip
from visionsel.embedded.explainprune import load_predictor, measure_predictor
from visionsel.embedded.files import WEIGHTS
from visionsel.embedded.lvlm import load_lvlm
from visionsel.embedded.lvlm_quality import generate_answers, measure_lvlm
from visionsel.embedded.mask_head import load_mask_head, measure_mask_head
from visionsel.embedded.segmentation_quality import measure_segmenter
from visionsel.embedded.segmenter import load_segmenter
from visionsel.processes import ALONE, Processes

__all__ = ["CLASSIFIERS", "GOALS", "MODELS", "Goal", "check_goals", "evaluate_embedded", "lookup"]

CLASSIFIERS = ("biformer", "nat", "selectformer")
MODELS = (
    "lvlm",
    "segmenter",
    *(f"classifier_{name}" for name in CLASSIFIERS),
    "clip",
    "explainprune",
    "mask_head",
)


@dataclass(frozen=True)
class Goal:
    """A measure, such as `lvlm.balanced.captions.f1`, and the range that it must be in."""

    measure: str
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None:
            return f"<= {self.high}"
        return f">= {self.low}" if self.high is None else f"{self.low} - {self.high}"

    def holds(self, value: float) -> bool:
        """Is the value in the range, its ends included?"""
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


GOALS = (
    Goal("lvlm.train.captions.f1", 0.95),
    Goal("lvlm.balanced.captions.f1", 0.93),
    Goal("lvlm.balanced.captions.color_accuracy", 0.95),
    Goal("lvlm.balanced.questions.exist_random", 0.95),
    Goal("lvlm.balanced.questions.exist_adversarial", 0.9),
    Goal("lvlm.balanced.questions.where", 0.8),
    Goal("lvlm.balanced.questions.relation", 0.8),
    Goal("lvlm.train.captions.chair_i", None, 0.07),
    Goal("lvlm.anti.captions.chair_i", 0.1, 0.25),
    Goal("lvlm.balanced.pointing.best", 0.85),
    Goal("segmenter.balanced.point_iou", 0.82),
    Goal("segmenter.balanced.box_iou", 0.86),
    *(Goal(f"classifier_{name}.single.top1", 0.95) for name in CLASSIFIERS),
    Goal("mask_head.balanced.refer_iou", 0.75),
    Goal("loading.seconds", None, 3.0),
    Goal("loading.megabytes", None, 500.0),
    Goal("lvlm.caption_seconds", None, 1.0),
)
"""What the shipped models must reach."""


def lookup(results: dict[str, Any], measure: str) -> float | None:
    """The value of a dotted name in nested results, or None where it was not measured."""
    value: Any = results
    for part in measure.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def check_goals(results: dict[str, Any]) -> list[tuple[Goal, float, bool]]:
    """Each goal whose measure is there, with the value and whether it is reached."""
    found = ((goal, lookup(results, goal.measure)) for goal in GOALS)
    return [(goal, value, goal.holds(value)) for goal, value in found if value is not None]


def scenes_of(model: str, size: int) -> int:
    """How many scenes of each kind a model is measured on."""
    if model.startswith("classifier_"):
        return 5 * size
    return max(1, size // 4) if model in ("mask_head", "explainprune") else size


def evaluate_embedded(
    folder: str | Path = WEIGHTS,
    models: Sequence[str] = MODELS,
    size: int = 400,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Measure the models of a folder on fresh scenes.

    Args:
        folder: with one folder a model.
        models: which, of `MODELS`.
        size: scenes of each distribution; classifiers see five times as many, of one object each, mask head
            and predictor a quarter.
        seed: of the scenes; below 2**28, where no training has its own.
        progress: told what is measured next.
        processes: that share the models (`visionsel.processes.join_processes`); each returns all.

    Returns:
        `{model: {distribution: measures}}`, with `lvlm.caption_seconds` and, where all models are asked for,
        `loading`, see `measure_loading`.

    Raises:
        ValueError: for an unknown model, or a size or seed out of range.
        FileNotFoundError: when the folder lacks a model.
    """
    if unknown := set(models) - set(MODELS):
        raise ValueError(f"unknown models {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if not 0 <= seed < 2**28:
        raise ValueError(f"seed must be from 0 to 2**28 - 1, got {seed}; training has seeds above")
    folder = Path(folder)
    say = progress or (lambda text: None)
    scenes = {name: list(ShapesWorld(name, seed, size)) for name in ("train", "balanced", "anti")}
    quarter = {name: some[: scenes_of("mask_head", size)] for name, some in scenes.items()}

    def measured(name: str) -> dict[str, Any]:
        say(name)
        if name == "lvlm":
            return _measure_lvlm(folder / name, scenes)
        if name == "segmenter":
            sam = load_segmenter(folder / name)
            return {part: measure_segmenter(sam, some, seed) for part, some in scenes.items()}
        if name == "clip":
            clip = load_clip(folder / name)
            return {part: measure_clip(*clip, some, seed) for part, some in scenes.items()}
        if name == "explainprune":
            predictor, lvlm = load_predictor(folder / name), load_lvlm(folder / "lvlm")
            return {part: measure_predictor(predictor, *lvlm, some) for part, some in quarter.items()}
        if name == "mask_head":
            head, lvlm = load_mask_head(folder / name, folder / "segmenter"), load_lvlm(folder / "lvlm")
            return {part: measure_mask_head(head, *lvlm, some) for part, some in quarter.items()}
        classifier = load_classifier(name.removeprefix("classifier_"), folder / name)
        singles = ShapesWorld("balanced", seed, scenes_of(name, size), max_objects=1)
        return {"single": measure_classifier(classifier, singles)}

    results = dict(zip(models, processes.share(models, measured), strict=True))
    if set(models) == set(MODELS):
        say("loading")
        results["loading"] = measure_loading(folder)
    return results


def _measure_lvlm(folder: Path, scenes: dict[str, list[Sample]]) -> dict[str, Any]:
    model, processor = load_lvlm(folder)
    measured: dict[str, Any] = {
        name: measure_lvlm(model, processor, samples) for name, samples in scenes.items()
    }
    times = []
    for sample in scenes["balanced"][:10]:
        start = time.perf_counter()
        generate_answers(model, processor, [sample.image], [CAPTION_PROMPT])
        times.append(time.perf_counter() - start)
    measured["caption_seconds"] = sorted(times)[len(times) // 2]
    return measured


_LOADING = """
import json, sys, time
start = time.perf_counter()
from pathlib import Path
import open_clip, psutil, segment_anything, torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from visionsel.embedded import load_classifier, load_clip, load_lvlm, load_mask_head, load_predictor
from visionsel.embedded import load_segmenter
imported, before = time.perf_counter(), psutil.Process().memory_info().rss
folder = Path(sys.argv[1])
models = [load_lvlm(folder / "lvlm"), load_segmenter(folder / "segmenter"), load_clip(folder / "clip")]
models += [load_mask_head(folder / "mask_head", folder / "segmenter")]
models += [load_predictor(folder / "explainprune")]
models += [load_classifier(name, folder / f"classifier_{name}") for name in sys.argv[2:]]
seconds, after = time.perf_counter() - imported, psutil.Process().memory_info().rss
megabytes = (after - before) / 2**20
print(json.dumps({"seconds": seconds, "megabytes": megabytes, "import_seconds": imported - start}))
"""


def measure_loading(folder: str | Path = WEIGHTS) -> dict[str, float]:
    """Seconds and megabytes that loading all models adds to a fresh process with the libraries imported.

    Returns:
        `seconds`, `megabytes`, and `import_seconds`, what the imports took before.
    """
    done = subprocess.run(
        [sys.executable, "-c", _LOADING, str(folder), *CLASSIFIERS], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"loading the models of {folder} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
