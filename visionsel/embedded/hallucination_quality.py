"""Do methods against hallucination work on the shipped vision-language model, and what does it cost?

A row is a method: captions scored by CHAIR, answers to yes-or-no questions by POPE, both always beside what
such scores can be bought with: recall, words and mentions of the captions, the share of yes. The scenes are
those where the model invents, `"anti"`: the usual companion of a shape is absent. The questions are those of
the scenes, as many with yes as with no, the absent shapes random, popular or adversarial.

All methods choose the most probable token, so that a difference from `greedy` is theirs; the two-view
decoders were published with sampling, of which `sampling` is the plain form. Two equal views that agree
sharpen to a temperature below 1: sampling at it is what `ritual` and `agla` must beat. Hyperparameters are
the published ones but where this model cannot take them, see `adapted`; with `tune` also those that do best
on scenes of their own, see `hallucination_tuning`. The numbers compare methods on small scenes; they do not
predict those of large models.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from visionsel.data.shapes import Sample, ShapesWorld
from visionsel.embedded import pruning_quality
from visionsel.embedded.hallucination_tuning import grid_of
from visionsel.processes import ALONE, Processes

__all__ = ["COLUMNS", "MEASURES", "adapted", "evaluate_hallucination", "write_rows"]

MEASURES = {
    "chair_i": "CHAIR_I",
    "chair_s": "CHAIR_S",
    "object_recall": "recall",
    "length": "words",
    "mentions": "mentions",
    "accuracy": "accuracy",
    "f1": "F1",
    "yes_ratio": "yes",
}
"""What each row has, in the order of the table; words and mentions are those of a caption in the mean."""

COLUMNS = [
    *("method", "kind", "distribution", "size", "seeds", *MEASURES),
    *(f"{measure}_{end}" for measure in MEASURES for end in ("low", "high")),
    "setting",
]
GREEDY, SAMPLING = "greedy", "sampling"
CALIBRATED, CONTROL = "grounding_heads", "grounding_heads control"
AGREEING = ("ritual", "agla")  # of equal views they make a temperature of 1 / (1 + alpha)
LAST = 2**28 - 4  # the seeds after it: calibration, validation, and the preset of heads; then training


@dataclass(frozen=True)
class _Run:
    """One row to measure: a method, or the model by itself at a temperature (None: greedily)."""

    name: str
    kind: str
    method: Any = None
    temperature: float | None = None

    @property
    def setting(self) -> str:
        if self.method is not None:
            values = {
                one.name: repr(getattr(self.method, one.name)) for one in fields(self.method) if one.repr
            }
            for name, text in values.items():  # models are no setting, but may be in a view
                if "\n" in text:
                    values[name] = type(getattr(self.method, name)).__name__
            told = ", ".join(f"{name}={text}" for name, text in values.items())
            return f"{type(self.method).__name__}({told})"
        return "" if self.temperature is None else f"temperature={self.temperature:g}"


def evaluate_hallucination(
    model: Any,
    processor: Any,
    methods: Sequence[str] | None = None,
    size: int = 200,
    seeds: Sequence[int] = (0,),
    distribution: str = "anti",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    calibration: int = 100,
    temperature: float = 1.0,
    batch_size: int = 50,
    progress: Callable[[str], None] | None = None,
    tune: bool = False,
    validation: int = 60,
    tables: Callable[[str, Any], None] | None = None,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Captions of fresh scenes and questions about them, with each method and without.

    Args:
        model, processor: of `load_lvlm`.
        methods: names as in `vhr:alpha=2`: modulators and two-view decoders; default all.
        size: scenes of each seed.
        seeds: of the scenes, each below 2**28 - 3: what is chosen and trained has its own above.
        distribution: of the scenes, see `ShapesWorld`.
        settings: hyperparameters of methods, by name; they come before those of `adapted`. Those of
            `grounding_heads` are for its calibration, or its `heads`, which are taken as they are then. A
            method that needs some, as AGLA its view, is left out where it is not asked for by name.
        calibration: scenes on which the heads of `grounding_heads` are chosen, half of them for its report;
            they have the seed after the highest one of `seeds`, so that no scene is measured that was seen.
        temperature: of the row `sampling`.
        batch_size: captions at a time; twice as many questions.
        progress: told what is measured next.
        tune: whether each method is measured at its best setting too, the one with the lowest CHAIR_I of a
            grid that keeps recall, length and answers, see `visionsel.multimodal.evaluation.tuning`. What
            `settings` has stays as it is. The scenes of `seeds` are seen after all that is chosen.
        validation: scenes on which it is chosen; they have the seed after that of calibration.
        tables: told the name of each method that is tuned and what was tried, a `Tuning`.
        processes: that share the rows (`visionsel.processes.join_processes`); each calibrates and tunes, and
            all of them return all rows.

    Returns:
        Rows of `COLUMNS`: `greedy` and `sampling` without any method first (kind `baseline`), with sampling
        at the temperatures that `ritual` and `agla` amount to, where they are measured; then the methods
        (`modulation`, `decoding`), each followed by its tuned form, `vhr tuned`, if a setting keeps the
        limits; after `grounding_heads` its control, other heads at the same strength. Measures are means over
        the seeds; `_low` and `_high` are their range, None for one seed. `setting` tells hyperparameters.

    Raises:
        ValueError: for an unknown method or distribution, or a number out of range; or, with methods asked
            for by name, when one lacks what it needs or no heads are found to help.
    """
    from visionsel.multimodal.evaluation import shapes_synonyms
    from visionsel.multimodal.evaluation.asking import describe

    kinds = _pick(methods)
    if min(size, batch_size, validation) < 1 or calibration < 4 or not temperature > 0:
        raise ValueError(
            "size and batch_size must be at least 1, validation too, calibration at least 4 and temperature "
            f"above 0; got {size}, {batch_size}, {validation}, {calibration} and {temperature}"
        )
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed <= LAST for seed in seeds):
        raise ValueError(
            f"seeds must be different numbers from 0 to 2**28 - 4, got {list(seeds)}; training has others"
        )
    say = progress or (lambda text: None)
    scenes = {seed: list(ShapesWorld(distribution, seed, size)) for seed in seeds}
    tuner = None
    if tune:
        others = list(ShapesWorld(distribution, max(seeds) + 2, validation))
        tuner = _Tuner(model, processor, others, batch_size, say, tables or (lambda name, tuning: None))
    other = list(ShapesWorld(distribution, max(seeds) + 1, 1))
    runs: list[_Run] = []
    for name, (kind, method) in kinds.items():
        chosen = dict((settings or {}).get(name, {}))
        given = {**adapted(name, model, processor), **chosen}
        try:
            if name == CALIBRATED and "heads" not in given:
                say(f"calibrating {name} on {calibration} other scenes")
                others = list(ShapesWorld(distribution, max(seeds) + 1, calibration))
                found = _calibrated(model, processor, others, given)
                given = {"heads": found[0].method.heads, "strength": found[0].method.strength}
            else:
                found = [_Run(name, kind, method(**given))]
                with found[0].method(model):  # one that does not fit is found before others are measured
                    describe(model, processor, other, shapes_synonyms(), max_new_tokens=2)
            if tuner is not None and (best := tuner(name, method, given, chosen)) is not None:
                found += _tuned(found, best)
            runs += found
        except (ValueError, NotImplementedError) as error:
            if methods is not None:
                raise
            say(f"{name} is left out: {error}")
    runs = [*_baselines(runs, temperature), *runs]

    def row_of(number: int) -> dict[str, Any]:
        run = runs[number]
        say(f"[{number + 1}/{len(runs)}] {run.name}")
        measured = [_measure(model, processor, scenes[seed], run, seed, batch_size) for seed in seeds]
        row: dict[str, Any] = {
            "method": run.name,
            "kind": run.kind,
            "distribution": distribution,
            "size": size,
            "seeds": " ".join(map(str, seeds)),
            "setting": run.setting,
        }
        for measure in MEASURES:
            values = [one[measure] for one in measured]
            several = len(values) > 1
            row[measure] = sum(values) / len(values)
            row[f"{measure}_low"] = min(values) if several else None
            row[f"{measure}_high"] = max(values) if several else None
        return {column: row[column] for column in COLUMNS}

    return processes.share(range(len(runs)), row_of)


def adapted(name: str, model: Any, processor: Any) -> dict[str, Any]:
    """The hyperparameters that a method has here because its defaults do not fit, by name.

    Published choices of layers are for 32: the same part of the depth is taken, rounded, at least one layer.
    In the decoder of four layers VHR acts on 1 to 3, VAR and ACT on 1 and 2, PAI and Paint on 1 to 3. So is
    the part of the image tokens that GLC has as candidates, 128 of 576.

    VAR: no image token of this model has a dimension as huge as `tau` asks for, also in proportion to the
    width (20 at a width of 4096 are 3.5 at 128); the largest ones come to 3. With 2 some ten of the 64 tokens
    count as sinks, so that the rule is tried, but not the idea behind it.

    ICD and RITUAL get the tokenizer and the statistics of the processor. Most words of ICD's instruction are
    `<unk>` to this model. What matters to AGLA says the CLIP of the package, not BLIP.
    """
    depth = model.config.get_text_config().num_hidden_layers
    skipped = max(1, round(2 * depth / 32))
    end = depth - max(1, round(depth / 32))
    if name == "vhr":
        return {"layers": tuple(sorted({1, *range(depth - max(1, round(14 * depth / 32)), depth)}))}
    if name == "var":
        return {"layers": tuple(range(skipped, end)), "tau": 2.0}
    if name == "act":
        return {"layers": tuple(range(skipped, end))}
    if name in ("pai", "paint"):
        return {"layers": tuple(range(skipped, depth))}
    if name in ("icd", "ritual"):
        from visionsel.multimodal.decoding import Disturbance, RandomTransform

        if name == "icd":
            return {"view": Disturbance.of(processor.tokenizer)}
        return {"view": RandomTransform.of(model, processor=processor)}
    if name == "agla":
        from visionsel.embedded.clip import load_clip
        from visionsel.multimodal.decoding.matching import ClipMatcher, matching_view

        clip, _, tokenizer = load_clip()
        return {"view": matching_view(model, processor, ClipMatcher(clip.to(model.device), tokenizer))}
    if name == "glc":
        side = processor.image_processor.crop_size["height"] // processor.patch_size
        return {"keep": max(1, round(128 * side**2 / 576))}
    return {}


def _baselines(runs: Sequence[_Run], temperature: float) -> list[_Run]:
    """The model by itself: greedily, sampling, and sampling at what agreeing decoders amount to."""
    matched = {
        1 / (1 + run.method.alpha)
        for run in runs
        if run.name.partition(" ")[0] in AGREEING and run.method.alpha > 0
    }
    return [
        _Run(GREEDY, "baseline"),
        _Run(SAMPLING, "baseline", temperature=temperature),
        *(
            _Run(f"{SAMPLING} T={one:.2g}", "baseline", temperature=one)
            for one in sorted(matched - {temperature}, reverse=True)
        ),
    ]


@dataclass
class _Tuner:
    """Chooses the settings of methods on scenes of their own."""

    model: Any
    processor: Any
    scenes: Sequence[Sample]
    batch_size: int
    say: Callable[[str], None]
    tables: Callable[[str, Any], None]
    baseline: Any = None  # of the model by itself, measured once

    def __call__(self, name: str, method: Any, given: Mapping[str, Any], kept: Mapping[str, Any]) -> Any:
        """The method at its best; None where nothing is to be chosen, or nothing keeps the limits."""
        from visionsel.multimodal.evaluation import shapes_synonyms
        from visionsel.multimodal.evaluation.tuning import settings_of, tune

        grid = grid_of(name, self.model, self.processor, given)
        grid = {key: values for key, values in grid.items() if key not in kept}
        if not grid:
            return None
        self.say(f"tuning {name}: {len(settings_of(grid))} settings on {len(self.scenes)} other scenes")
        tuning = tune(
            self.model,
            self.processor,
            method,
            grid,
            self.scenes,
            fixed=given,
            baseline=self.baseline,
            synonyms=shapes_synonyms(),
            batch_size=self.batch_size,
        )
        self.baseline = tuning.baseline
        self.tables(name, tuning)
        if tuning.chosen is None:
            self.say(f"{name} has no tuned form: no setting keeps recall, length and answers")
            return None
        self.say(f"{name} does best with {tuning.chosen.name}")
        return tuning.best()


def _tuned(found: Sequence[_Run], best: Any) -> list[_Run]:
    """The tuned form of a method, and of its control if the strength is another one."""
    first, *controls = found
    runs = [_Run(f"{first.name} tuned", first.kind, best)]
    for control in controls:
        if best.strength != first.method.strength:
            runs.append(
                _Run(f"{control.name} tuned", control.kind, replace(control.method, strength=best.strength))
            )
    return runs


def _pick(methods: Sequence[str] | None) -> dict[str, tuple[str, Any]]:
    """Kinds and classes of the methods by name."""
    from visionsel.multimodal.decoding import DECODERS
    from visionsel.multimodal.intervention import method_name
    from visionsel.multimodal.modulation import MODULATORS

    known = {method_name(method): ("modulation", method) for method in MODULATORS}
    known |= {method_name(method): ("decoding", method) for method in DECODERS}
    if unknown := [name for name in methods or () if name not in known]:
        raise ValueError(f"no method is called {', '.join(unknown)}; there are {', '.join(known)}")
    return {name: known[name] for name in (known if methods is None else methods)}


def _calibrated(
    model: Any, processor: Any, samples: Sequence[Sample], given: Mapping[str, Any]
) -> list[_Run]:
    """The heads that help, and others."""
    from visionsel.multimodal.modulation import GroundingHeads

    heads = GroundingHeads.calibrate(model, processor, samples, **given)
    assert heads.report is not None
    runs = [_Run(CALIBRATED, "modulation", heads)]
    control = {int(layer): chosen for layer, chosen in heads.report["control_heads"].items()}
    if control:
        runs.append(_Run(CONTROL, "modulation", GroundingHeads(control, heads.strength)))
    return runs


def _measure(
    model: Any, processor: Any, samples: Sequence[Sample], run: _Run, seed: int, batch_size: int
) -> dict[str, float]:
    """The measures of one row on the scenes of one seed."""
    from visionsel.multimodal.evaluation import Hallucination, shapes_synonyms
    from visionsel.multimodal.evaluation.asking import ask, describe

    with ExitStack() as stack:
        options: dict[str, Any] = {}
        if run.temperature is not None:
            devices = [model.device] if model.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices))
            torch.manual_seed(seed)
            options = {"do_sample": True, "temperature": run.temperature, "top_k": 0, "top_p": 1.0}
        if run.method is not None:
            stack.enter_context(run.method(model))
        said = describe(model, processor, samples, shapes_synonyms(), batch_size=batch_size, **options)
        answered = ask(model, processor, samples, 2 * batch_size, **options)
    scores = Hallucination.of(said, answered)
    return {
        measure: said["mentions"] / said["captions"] if measure == "mentions" else getattr(scores, measure)
        for measure in MEASURES
    }


def write_rows(rows: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Write the rows as CSV, whole or not at all; what there is no value for stays empty."""
    return pruning_quality.write_rows(rows, path, COLUMNS)
