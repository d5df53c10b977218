"""Model cards of the embedded models: what they are, how they were trained, and what was measured.

The texts are in `train/cards`; here they get their numbers.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visionsel.embedded.evaluation import GOALS, MODELS, lookup, scenes_of

__all__ = ["write_cards"]

TEXTS = Path(__file__).parent / "cards"
SPLITS = {
    "train": "as in training",
    "balanced": "all shapes alike",
    "anti": "the usual companion is absent",
    "single": "one object an image",
}
TITLES = {"biformer": "BiFormer", "nat": "NAT", "selectformer": "SelectFormer"}
TRAINING = """\
## Training

From random weights on the shapes world (`visionsel.data.shapes`): 64-pixel scenes made from a seed, each seen
once. `configs/shapes/{config}.yaml` is the recipe; `make embedded` repeats it. This model has seed {seed}; it
took {cpu:.0f} minutes of CPU time on one thread. The scenes of training have seeds from 2^30 - 2^20 on; those
measured below have seed 0.
"""
QUALITY = """\
## Quality

On {count} scenes of each kind{spread}. These numbers validate methods and code; they do not predict what a
method gives on a model of seven billion parameters and photographs.

{table}

{cost}
"""
COST = """\
Loading all models of the package takes {seconds:.1f} s and {megabytes:.0f} MB in a process that has imported
the libraries, which takes {import_seconds:.0f} s{caption}."""


def write_cards(folder: Path, results: dict[int, dict[str, Any]], size: int) -> None:
    """Write `README.md` into the folder of each model.

    Args:
        folder: with one folder a model.
        results: of `evaluate_embedded` with `times`, by seed; the models in the folder are the first seed's,
            further seeds may lack some of them.
        size: number of scenes of each distribution that were measured on.
    """
    shipped = next(iter(results))
    for model in MODELS:
        name = model.removeprefix("classifier_")
        kind, name = (model, "") if name == model else ("classifier", name)
        time = results[shipped]["times"][model]
        training = TRAINING.format(
            config=name or kind,
            seed=shipped,
            cpu=time["cpu_seconds"] / 60,
        )
        seeds = [str(seed) for seed, result in results.items() if model in result]
        spread = f": the model shipped, then mean and range over the seeds {', '.join(seeds)}"
        quality = QUALITY.format(
            count=scenes_of(model, size),
            spread=spread if len(seeds) > 1 else ", one seed",
            table=_table(model, results),
            cost=COST.format(caption=_caption(model, results[shipped]), **results[shipped]["loading"]),
        )
        text = (TEXTS / f"{kind}.md").read_text()
        text = text.format(
            training=training.strip(), quality=quality.strip(), name=name, title=TITLES.get(name)
        )
        path = folder / model / "README.md"
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(text)
        partial.rename(path)


def _caption(model: str, result: dict[str, Any]) -> str:
    """How long a caption takes, for the model that makes them."""
    return f"; a caption takes {result[model]['caption_seconds']:.2f} s" if model == "lvlm" else ""


def _table(model: str, results: dict[int, dict[str, Any]]) -> str:
    """A row for each number: shipped, the goal if it has one, and with several seeds mean and range."""
    goals = {goal.measure: goal for goal in GOALS}
    found = [result for result in results.values() if model in result]
    head = ["scenes", "measure", "shipped", "goal", *(["mean", "range"] if len(found) > 1 else [])]
    rows = [head, ["---"] * len(head)]
    for split in SPLITS:
        for name in _numbers(found[0][model].get(split, {})):
            key = f"{model}.{split}.{name}"
            values = [value for result in found if (value := lookup(result, key)) is not None]
            row = [f"{split}: {SPLITS[split]}", name, f"{values[0]:.3f}", str(goals.get(key, ""))]
            if len(found) > 1:
                row += [f"{sum(values) / len(values):.3f}", f"{min(values):.3f} - {max(values):.3f}"]
            rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _numbers(measures: dict[str, Any], prefix: str = "") -> Sequence[str]:
    """Dotted names of the numbers in nested results; counts and lists are left out."""
    names: list[str] = []
    for name, value in measures.items():
        if isinstance(value, dict):
            names += _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            names.append(prefix + name)
    return names
