"""Does pruning keep the answers right? Every pruner at several budgets on the shipped vision-language model.

A row is a method at a budget: the share of image tokens that a decoder layer gets in the mean, see
`visionsel.multimodal.pruning.budget` for what that is for each method and where it cannot be met. Random and
uniform choices are methods like the others. The numbers compare methods on small scenes; they do not predict
those of large models.
"""

import csv
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from visionsel.data.shapes import CAPTION_PROMPT, Sample, ShapesWorld
from visionsel.embedded.files import WEIGHTS
from visionsel.embedded.lvlm_quality import caption_scores, encode_prompts, generate_answers, question_scores
from visionsel.files import whole_file
from visionsel.processes import ALONE, Processes

__all__ = ["COLUMNS", "MEASURES", "evaluate_pruning", "plot_rows", "write_rows"]

MEASURES = {
    "caption_f1": "caption F1",
    "exist_accuracy": "yes/no accuracy",
    "refer_accuracy": "referring accuracy",
}
"""What is compared, in the order of the plot; a box is right when its IoU with the true one is above 0.5."""

COLUMNS = (
    "method keep first_layer equivalent_tokens full_tokens flops_ratio cache_ratio "
    "caption_f1 exist_accuracy refer_accuracy refer_iou cpu_seconds pruner"
).split()
UNPRUNED = "none"
PREDICTOR = WEIGHTS / "explainprune"
BASELINES = ("random", "uniform", "pool")
Asked = tuple[Any, str, Any]  # image, prompt, and the question it is, or None for a caption
QUESTIONS = {"exist": 6, "refer": 3}  # of each scene at most


def evaluate_pruning(
    model: Any,
    processor: Any,
    methods: Sequence[str] | None = None,
    keep: Sequence[float] = (1.0, 0.5, 0.25, 0.1),
    size: int = 200,
    seed: int = 0,
    batch_size: int = 50,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    trials: int = 60,
    progress: Callable[[str], None] | None = None,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Captions, yes/no and referring questions about fresh balanced scenes, with each pruner and without.

    Args:
        model, processor: of `load_lvlm`.
        methods: names as in `fastv:keep=0.25`; default all. Those without a budget give one row.
        keep: budgets in (0, 1].
        size: scenes.
        seed: of the scenes; below 2**28, where no training has its own.
        batch_size: prompts that are answered at once.
        settings: further hyperparameters of methods, by name. A method that needs some, such as a net that
            was trained for the model, is left out where it is not asked for by name.
        trials: schedules that the search of VFlowOpt tries on 16 other scenes, for the rows `vflowopt+`; its
            published schedules were searched on another model. 0 leaves them out.
        progress: told what is measured next.
        processes: that share the rows (`visionsel.processes.join_processes`); all of them return all rows.

    Returns:
        Rows of `COLUMNS`, the model without pruning first (method `none`); `keep` is None where a method
        decides itself, `first_layer` the decoder layer that is the first to get fewer tokens.
        `equivalent_tokens` and the ratios are means over all prompts.

    Raises:
        ValueError: for an unknown method, a budget out of range, or a size or seed out of range.
    """
    from visionsel.multimodal.pruning.budget import has_budget, with_budget
    from visionsel.multimodal.pruning.checks import check_keep

    kinds = _pick(methods)
    for share in keep:
        check_keep(float(share), "budget")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if not 0 <= seed < 2**28:
        raise ValueError(f"seed must be from 0 to 2**28 - 1, got {seed}; training has seeds above")
    say = progress or (lambda text: None)
    layers = model.config.get_text_config().num_hidden_layers
    trained = {"explainprune": {"predictor": PREDICTOR}} if PREDICTOR.is_dir() else {}
    runs: list[tuple[str, float | None, Any]] = [(UNPRUNED, 1.0, None)]
    for name, kind in kinds.items():
        more: dict[str, Any] = {**trained.get(name, {}), **(settings or {}).get(name, {})}
        budgets = sorted(keep, reverse=True) if has_budget(kind) else [None]
        try:
            runs += [(name, share, with_budget(kind, share or 1.0, layers, **more)) for share in budgets]
        except ValueError as error:
            if methods is not None:
                raise
            say(f"{name} is left out: {error}")
        if name == "prumerge":
            runs.append(("prumerge+", None, kind(plus=True)))
        elif name == "vflowopt" and trials:
            for share in (share for share in budgets if share is not None and share < 1):
                say(f"searching a schedule of vflowopt for {share:g}")
                try:
                    runs.append(("vflowopt+", share, _search(model, processor, share, trials, seed + 1)))
                except ImportError as error:
                    say(f"vflowopt+ is left out: {error}")
    samples = list(ShapesWorld("balanced", seed, size))

    def measured(number: int) -> dict[str, Any]:
        name, budget, pruner = runs[number]
        say(f"[{number + 1}/{len(runs)}] {name}" + ("" if budget is None else f" {budget:g}"))
        start = time.process_time()
        row = _measure(model, processor, samples, pruner, batch_size)
        row |= {
            "method": name,
            "keep": budget,
            "cpu_seconds": time.process_time() - start,
            "pruner": repr(pruner),
        }
        return {column: row[column] for column in COLUMNS}

    return processes.share(range(len(runs)), measured)


def _search(model: Any, processor: Any, budget: float, trials: int, seed: int) -> Any:
    """VFlowOpt with a schedule that was searched on this model: captions, and two questions a scene."""
    from visionsel.multimodal.pruning.vflowopt_search import Ranges, calibrate

    scenes = list(ShapesWorld("balanced", seed, 16))
    asked = [[CAPTION_PROMPT] * len(scenes)]
    for shift in (0, 5):
        pairs = enumerate(scenes)
        asked.append([scene.questions[(i + shift) % len(scene.questions)].text for i, scene in pairs])
    images = [scene.image for scene in scenes]
    samples = [encode_prompts(processor, images, prompts).to(model.device) for prompts in asked]
    ranges = Ranges(threshold=(0.0, 5.0), block=(2.0, 8.0))  # of 8 x 8 tokens
    return calibrate(model, samples, budget, trials=trials, startup=max(2, trials // 3), ranges=ranges)[0]


def _pick(methods: Sequence[str] | None) -> dict[str, Any]:
    """The classes of the methods by name."""
    from visionsel.multimodal.intervention import method_name
    from visionsel.multimodal.pruning import PRUNERS

    known = {method_name(kind): kind for kind in PRUNERS}
    if unknown := [name for name in methods or () if name not in known]:
        raise ValueError(f"no method is called {', '.join(unknown)}; there are {', '.join(known)}")
    return {name: known[name] for name in methods or known}


def _measure(
    model: Any, processor: Any, samples: Sequence[Sample], pruner: Any, batch_size: int
) -> dict[str, Any]:
    """Answers, and what they cost, with one pruner (None: without any)."""
    from visionsel.multimodal.pruning.random import RandomPrune

    asked: list[Asked] = [(sample.image, CAPTION_PROMPT, None) for sample in samples]
    for kind, most in QUESTIONS.items():
        for sample in samples:
            chosen = [question for question in sample.questions if question.kind == kind][:most]
            asked += [(sample.image, question.text, question) for question in chosen]
    answers: list[str] = []
    reports = []
    for part in _batches(asked, batch_size):
        images, prompts, _ = zip(*part, strict=True)
        longest = 64 if part[0][2] is None else 8
        with nullcontext() if pruner is None else pruner(model) as pruned:
            answers += generate_answers(model, processor, images, prompts, len(part), longest)
        if pruned is not None:
            reports.append((len(part), pruned.report()))
    if pruner is None:  # what one prompt costs, of which nothing is dropped
        with RandomPrune(keep=1.0)(model) as pruned:
            generate_answers(model, processor, [samples[0].image], [CAPTION_PROMPT], 1, 1)
        reports.append((1, pruned.report()))
    captions = caption_scores(answers[: len(samples)], samples)
    questions = question_scores(answers[len(samples) :], [question for *_, question in asked[len(samples) :]])
    return _costs(reports) | {
        "caption_f1": captions["f1"],
        "exist_accuracy": questions.get("exist"),
        "refer_accuracy": questions.get("refer_at_half"),
        "refer_iou": questions.get("refer"),
    }


def _costs(reports: Sequence[tuple[int, Any]]) -> dict[str, Any]:
    """Means over the prompts, of the sizes and reports of their batches."""
    every, total = [report for _, report in reports], sum(number for number, _ in reports)
    dropped = [tokens < every[0].full_tokens for tokens in every[0].visual_tokens]
    return {
        "first_layer": dropped.index(True) if any(dropped) else None,
        "equivalent_tokens": sum(number * report.equivalent_tokens for number, report in reports) / total,
        "full_tokens": sum(number * report.full_tokens for number, report in reports) / total,
        "flops_ratio": sum(r.flops for r in every) / sum(r.full_flops for r in every),
        "cache_ratio": sum(r.cache_bytes for r in every) / sum(r.full_cache_bytes for r in every),
    }


def _batches(asked: Sequence[Asked], size: int) -> Iterable[list[Asked]]:
    """Prompts of one kind, so that those with short answers do not wait for captions."""
    part: list[Asked] = []
    for entry in asked:
        if part and (len(part) == size or (entry[2] is None) != (part[0][2] is None)):
            yield part
            part = []
        part.append(entry)
    if part:
        yield part


def write_rows(rows: Sequence[dict[str, Any]], path: str | Path, columns: Sequence[str] = COLUMNS) -> Path:
    """Write the rows as CSV, whole or not at all; what there is no value for stays empty."""
    with whole_file(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return Path(path)


def plot_rows(rows: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Draw each measure over the image tokens that the methods used in the mean, one panel a measure.

    Methods that drop at the input have full lines, those inside the decoder dashed ones; random and uniform
    choices and averages, which the others must beat, are grey; the model without pruning is the dotted line.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import ScalarFormatter
    except ImportError as error:
        raise ImportError('the plot needs matplotlib: pip install "visionsel[train]"') from error

    names = list(dict.fromkeys(row["method"] for row in rows if row["method"] != UNPRUNED))
    styles = _styles(names, rows)
    figure = Figure(figsize=(4.4 * len(MEASURES) + 2, 5), layout="constrained")
    axes = figure.subplots(1, len(MEASURES), sharex=True)
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        there = [row for row in rows if row[measure] is not None]
        for name in names:
            points = sorted(
                (row["equivalent_tokens"], row[measure]) for row in there if row["method"] == name
            )
            axis.plot([x for x, _ in points], [y for _, y in points], label=name, **styles[name])
        for row in there:
            if row["method"] == UNPRUNED:
                axis.axhline(row[measure], color="black", linestyle=":", linewidth=1.2, zorder=1)
        axis.set_title(title, loc="left", fontsize=12)
        axis.set_xlabel("image tokens, mean over the layers")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.grid(color="0.93")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=10, handlelength=3)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150)
    return Path(path)


# no grey: that is for the baselines
_COLORS = (
    "#1f77b4 #ff7f0e #2ca02c #d62728 #9467bd #8c564b #e377c2 #bcbd22 #17becf "
    "#0b3d91 #7a5c00 #005f3c #7b0030 #4b2a7b"
).split()


def _styles(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Lines told apart by colour and marker, dashed inside the decoder, grey for the baselines."""
    inside = {row["method"] for row in rows if row["first_layer"]}
    styles, number = {}, 0
    for name in names:
        baseline = name in BASELINES
        color = str(0.25 + 0.2 * BASELINES.index(name)) if baseline else _COLORS[number % len(_COLORS)]
        styles[name] = {
            "color": color,
            "marker": "x+1"[BASELINES.index(name)] if baseline else "osDv^P*X<>"[number * 7 // 5 % 10],
            "linestyle": "--" if name in inside else "-",
            "linewidth": 2.4 if baseline else 1.5,
            "markersize": 8 if baseline else 6,
            "markeredgewidth": 2 if baseline else 0,
            "alpha": 0.9,
            "zorder": 2 if baseline else 3,
        }
        number += not baseline
    return styles
