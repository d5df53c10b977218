"""Do methods against hallucination work on the shipped vision-language model, and what does it cost?

A row is a method: captions scored by CHAIR, answers to yes-or-no questions by POPE, both always beside what
such scores can be bought with: recall, words and mentions of the captions, the share of yes. The scenes are
those where the model invents, `"anti"`: the usual companion of a shape is absent. The questions are those of
the scenes, as many with yes as with no, the absent shapes random, popular or adversarial.

All methods choose the most probable token, so that a difference from `greedy` is theirs; the two-view
decoders were published with sampling, of which `sampling` is the plain form. Hyperparameters are the
published ones but where this model cannot take them, see `adapted`. The numbers compare methods on small
scenes; they do not predict those of large models.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visionsel.data.shapes import CAPTION_PROMPT, Sample, ShapesWorld
from visionsel.embedded import pruning_quality
from visionsel.embedded.lvlm_quality import generate_answers

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
            return repr(self.method)
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
) -> list[dict[str, Any]]:
    """Captions of fresh scenes and questions about them, with each method and without.

    Args:
        model, processor: of `load_lvlm`.
        methods: names as in `vhr:alpha=2`: modulators and two-view decoders; default all.
        size: scenes of each seed.
        seeds: of the scenes, each below 2**28 - 1: training has its own above.
        distribution: of the scenes, see `ShapesWorld`.
        settings: hyperparameters of methods, by name; they come before those of `adapted`. Those of
            `grounding_heads` are for its calibration, or its `heads`, which are taken as they are then. A
            method that needs some, as AGLA its view, is left out where it is not asked for by name.
        calibration: scenes on which the heads of `grounding_heads` are chosen, half of them for its report;
            they have the seed after the highest one of `seeds`, so that no scene is measured that was seen.
        temperature: of the row `sampling`.
        batch_size: captions at a time; twice as many questions.
        progress: told what is measured next.

    Returns:
        Rows of `COLUMNS`: `greedy` and `sampling` without any method first (kind `baseline`), then the
        methods (`modulation`, `decoding`); after `grounding_heads` its control, other heads at the same
        strength. Measures are means over the seeds; `_low` and `_high` are their range, None for one seed.
        `setting` tells hyperparameters.

    Raises:
        ValueError: for an unknown method or distribution, or a number out of range; or, with methods asked
            for by name, when one lacks what it needs or no heads are found to help.
    """
    kinds = _pick(methods)
    if size < 1 or calibration < 4 or batch_size < 1 or not temperature > 0:
        raise ValueError(
            "size and batch_size must be at least 1, calibration at least 4 and temperature above 0; got "
            f"{size}, {batch_size}, {calibration} and {temperature}"
        )
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**28 - 1 for seed in seeds):
        raise ValueError(
            f"seeds must be different numbers from 0 to 2**28 - 2, got {list(seeds)}; training has others"
        )
    say = progress or (lambda text: None)
    scenes = {seed: list(ShapesWorld(distribution, seed, size)) for seed in seeds}
    runs = [_Run(GREEDY, "baseline"), _Run(SAMPLING, "baseline", temperature=temperature)]
    for name, (kind, method) in kinds.items():
        given = {**adapted(name, model, processor), **(settings or {}).get(name, {})}
        try:
            if name == CALIBRATED and "heads" not in given:
                say(f"calibrating {name} on {calibration} other scenes")
                others = list(ShapesWorld(distribution, max(seeds) + 1, calibration))
                runs += _calibrated(model, processor, others, given)
            else:
                run = _Run(name, kind, method(**given))
                with run.method(model):  # one that does not fit is found before the others are measured
                    runs.append(run)
        except (ValueError, NotImplementedError) as error:
            if methods is not None:
                raise
            say(f"{name} is left out: {error}")
    rows = []
    for number, run in enumerate(runs):
        say(f"[{number + 1}/{len(runs)}] {run.name}")
        found = [_measure(model, processor, scenes[seed], run, seed, batch_size) for seed in seeds]
        row: dict[str, Any] = {
            "method": run.name,
            "kind": run.kind,
            "distribution": distribution,
            "size": size,
            "seeds": " ".join(map(str, seeds)),
            "setting": run.setting,
        }
        for measure in MEASURES:
            values = [one[measure] for one in found]
            several = len(values) > 1
            row[measure] = sum(values) / len(values)
            row[f"{measure}_low"] = min(values) if several else None
            row[f"{measure}_high"] = max(values) if several else None
        rows.append({column: row[column] for column in COLUMNS})
    return rows


def adapted(name: str, model: Any, processor: Any) -> dict[str, Any]:
    """The hyperparameters that a method has here because its defaults do not fit, by name.

    Published choices of layers are for 32: the same part of the depth is taken, rounded, at least one layer.
    In the decoder of four layers VHR acts on 1 to 3, VAR and ACT on 1 and 2, PAI on 1 to 3.

    VAR: no image token of this model has a dimension as huge as `tau` asks for, also in proportion to the
    width (20 at a width of 4096 are 3.5 at 128); the largest ones come to 3. With 2 some ten of the 64 tokens
    count as sinks, so that the rule is tried, but not the idea behind it.

    ICD and RITUAL get the tokenizer and the statistics of the processor. Most words of ICD's instruction are
    `<unk>` to this model.
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
    if name == "pai":
        return {"layers": tuple(range(skipped, depth))}
    if name in ("icd", "ritual"):
        from visionsel.multimodal.decoding import Disturbance, RandomTransform

        if name == "icd":
            return {"view": Disturbance.of(processor.tokenizer)}
        return {"view": RandomTransform.of(model, processor=processor)}
    return {}


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
    from visionsel.multimodal.evaluation import Hallucination, chair, pope, shapes_synonyms

    asked = [(one.image, question) for one in samples for question in one.questions]
    asked = [(image, question) for image, question in asked if question.kind == "exist"]
    with ExitStack() as stack:
        options: dict[str, Any] = {}
        if run.temperature is not None:
            devices = [model.device] if model.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices))
            torch.manual_seed(seed)
            options = {"do_sample": True, "temperature": run.temperature, "top_k": 0, "top_p": 1.0}
        if run.method is not None:
            stack.enter_context(run.method(model))
        images = [one.image for one in samples]
        captions = generate_answers(
            model, processor, images, [CAPTION_PROMPT] * len(images), batch_size, **options
        )
        answers = generate_answers(
            model,
            processor,
            [image for image, _ in asked],
            [question.text for _, question in asked],
            2 * batch_size,
            max_new_tokens=8,
            **options,
        )
    there = [{thing.shape for thing in one.objects} for one in samples]
    said = chair.score(captions, there, shapes_synonyms())
    scores = Hallucination.of(said, pope.score(answers, [question.answer for _, question in asked]))
    return {
        measure: said["mentions"] / said["captions"] if measure == "mentions" else getattr(scores, measure)
        for measure in MEASURES
    }


def write_rows(rows: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Write the rows as CSV, whole or not at all; what there is no value for stays empty."""
    return pruning_quality.write_rows(rows, path, COLUMNS)
