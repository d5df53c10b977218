"""`visionsel evaluate`: what measures the models that ship with the package.

The benchmarks of other data and models are in `cli_benchmarks` (`chair`, `pope`, `amber`, `mme`) and in
`cli_grounding` (`refcoco`, `png`, `coco`, `lvis`, `coda`, `vizwiz-grounding`).
"""

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from visionsel.cli_benchmarks import add_benchmarks
from visionsel.cli_grounding import add_grounding
from visionsel.cli_text import Progress, add_verb, add_verbs, output_file, print_table, writing

__all__ = ["add_evaluate"]

EPILOG = """\
examples:
  visionsel evaluate embedded
  visionsel evaluate pope --data shapes --decode vcd
  visionsel evaluate refcoco --data refcoco --images train2014 --split testA --model llava --out rows.jsonl

'visionsel evaluate NAME --help' has the options of each."""


def add_evaluate(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb `evaluate` to the command; `common` has the options of every verb."""
    parser = verbs.add_parser("evaluate", help="measure models", description="Measure models.", epilog=EPILOG)
    evaluate = add_verbs(parser, "evaluation", metavar="NAME")
    embedded = add_verb(
        evaluate,
        "embedded",
        common,
        "the models that ship with visionsel, on fresh scenes of the shapes world",
        "visionsel evaluate embedded",
        "visionsel evaluate embedded --models lvlm segmenter --size 200 --json",
    )
    embedded.add_argument(
        "--folder", type=Path, metavar="DIR", help="weights to measure (default: those of the package)"
    )
    embedded.add_argument("--models", nargs="+", metavar="MODEL", help="which (default: all)")
    embedded.add_argument(
        "--size",
        type=int,
        default=400,
        metavar="N",
        help="scenes of each distribution (default: 400, some minutes)",
    )
    embedded.add_argument("--seed", type=int, default=0, metavar="SEED", help="of the scenes (default: 0)")
    embedded.set_defaults(run=_evaluate_embedded)

    pruning = add_verb(
        evaluate,
        "pruning",
        common,
        "whether pruners keep the answers right, on the vision-language model of the package",
        "visionsel evaluate pruning --methods random fastv --keep 0.5 0.25 --csv table.csv --plot table.png",
    )
    pruning.add_argument("--methods", nargs="+", metavar="METHOD", help="which (default: all)")
    pruning.add_argument(
        "--keep",
        nargs="+",
        type=float,
        default=[1.0, 0.5, 0.25, 0.1],
        metavar="SHARE",
        help="shares of the image tokens that a decoder layer has on average (default: 1 0.5 0.25 0.1)",
    )
    pruning.add_argument(
        "--size",
        type=int,
        default=200,
        metavar="N",
        help="scenes (default: 200, some ten minutes for all methods)",
    )
    pruning.add_argument("--seed", type=int, default=0, metavar="SEED", help="of the scenes (default: 0)")
    pruning.add_argument("--device", help="default: cuda if there is one, else cpu")
    pruning.add_argument("--csv", type=Path, metavar="FILE", help="write the table")
    pruning.add_argument(
        "--plot",
        type=output_file(".png", ".pdf", ".svg"),
        metavar="FILE",
        help="draw it (.png, .pdf, .svg)",
    )
    pruning.set_defaults(run=_evaluate_pruning)

    hallucination = add_verb(
        evaluate,
        "hallucination",
        common,
        "what methods against invention give, and cost, on the vision-language model of the package",
        "visionsel evaluate hallucination --methods vhr vcd --seeds 0 1 2 --tune",
    )
    hallucination.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="modulators and two-view decoders (default: all)"
    )
    hallucination.add_argument(
        "--tune",
        action="store_true",
        help="measure each method at its best setting too, chosen on other scenes (takes much longer)",
    )
    _add_scenes(hallucination, 200)
    hallucination.set_defaults(run=_evaluate_hallucination)

    grounding = add_verb(
        evaluate,
        "grounding",
        common,
        "whether attention finds what expressions mean, with the models of the package",
        "visionsel evaluate grounding --methods vl_sam mean --seeds 0 1 --csv table.csv",
    )
    grounding.add_argument("--methods", nargs="+", metavar="METHOD", help="heatmaps (default: all)")
    grounding.add_argument(
        "--ensembles",
        action="store_true",
        help="detect with ten questions and the quarters of each image (takes ten times as long)",
    )
    _add_scenes(grounding, 60)
    grounding.set_defaults(run=_evaluate_grounding)
    add_grounding(evaluate, common)
    add_benchmarks(evaluate, common)


def _add_scenes(parser: argparse.ArgumentParser, size: int) -> None:
    """On which scenes a table is made, and where it goes."""
    parser.add_argument(
        "--size",
        type=int,
        default=size,
        metavar="N",
        help=f"scenes of each seed (default: {size}, some minutes)",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0],
        metavar="SEED",
        help="of the scenes; several give mean and range (default: 0)",
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table")


def _evaluate_embedded(options: argparse.Namespace) -> None:
    from visionsel.embedded.evaluation import MODELS, check_goals, evaluate_embedded
    from visionsel.embedded.files import WEIGHTS

    models = options.models or MODELS
    names = [*models, *(["loading"] if set(models) == set(MODELS) else [])]
    with Progress(shown=options.processes.first) as progress:
        results = evaluate_embedded(
            options.folder or WEIGHTS,
            models,
            options.size,
            options.seed,
            progress=lambda name: progress.say(f"[{names.index(name) + 1}/{len(names)}] measuring {name}"),
            processes=options.processes,
        )
    if not options.processes.first:
        return
    checks = check_goals(results)
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        rows = [
            [goal.measure, str(goal), f"{value:.3f}", "yes" if reached else "no"]
            for goal, value, reached in checks
        ]
        print_table(["measure", "goal", "measured", "reached"], rows)
        print("\nall measures: --json")
    if missed := [goal.measure for goal, _, reached in checks if not reached]:
        raise ValueError(f"goals missed: {', '.join(missed)}")


def _evaluate_pruning(options: argparse.Namespace) -> None:
    from visionsel.embedded.pruning_quality import MEASURES, evaluate_pruning, plot_rows, write_rows
    from visionsel.generation import load_lvlm

    if options.plot is not None and find_spec("matplotlib") is None:
        raise ImportError('--plot needs matplotlib: pip install "visionsel[train]"')
    with Progress(shown=options.processes.first) as progress:
        rows = evaluate_pruning(
            *load_lvlm("embedded", options.device),
            options.methods,
            options.keep,
            options.size,
            options.seed,
            progress=progress.say,
            processes=options.processes,
        )
    numbers = ["equivalent_tokens", "flops_ratio", "cache_ratio", *MEASURES]
    header = ["method", "keep", "tokens", "FLOPs", "cache", *MEASURES.values()]

    def cells(row: dict[str, Any]) -> list[str]:
        keep = "-" if row["keep"] is None else f"{row['keep']:g}"
        digits = {name: 1 if "tokens" in name else 3 for name in numbers}
        found = ["-" if row[name] is None else f"{row[name]:.{digits[name]}f}" for name in numbers]
        return [row["method"], keep, *found]

    _show(options, rows, header, cells, write_rows)
    if options.plot is not None and options.processes.first:
        with writing(options.plot):
            plot_rows(rows, options.plot)


def _evaluate_hallucination(options: argparse.Namespace) -> None:
    from visionsel.embedded.hallucination_quality import MEASURES, evaluate_hallucination, write_rows
    from visionsel.generation import load_lvlm

    with Progress(shown=options.processes.first) as progress:
        rows = evaluate_hallucination(
            *load_lvlm("embedded", options.device),
            options.methods,
            options.size,
            options.seeds,
            progress=progress.say,
            processes=options.processes,
            tune=options.tune,
            tables=lambda name, tuning: progress.say(f"{name}\n{tuning.table()}"),
        )
    header = ["method", *MEASURES.values()]
    _show(options, rows, header, lambda row: _with_ranges(row, list(MEASURES)), write_rows)


def _evaluate_grounding(options: argparse.Namespace) -> None:
    from visionsel.embedded.grounding_quality import MEASURES, evaluate_grounding, write_rows
    from visionsel.generation import load_lvlm

    with Progress(shown=options.processes.first) as progress:
        rows = evaluate_grounding(
            *load_lvlm("embedded", options.device),
            options.methods,
            options.size,
            options.seeds,
            ensembles=options.ensembles,
            progress=progress.say,
            processes=options.processes,
        )
    header = ["method", *MEASURES.values()]
    _show(options, rows, header, lambda row: _with_ranges(row, list(MEASURES)), write_rows)


def _show(
    options: argparse.Namespace,
    rows: list[dict[str, Any]],
    header: list[str],
    cells: Callable[[dict[str, Any]], list[str]],
    write: Callable[[list[dict[str, Any]], Path], Any],
) -> None:
    """Print what was measured, then write it: a full disk takes nothing away."""
    if not options.processes.first:
        return
    if options.json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(header, [cells(row) for row in rows])
    if options.csv is not None:
        with writing(options.csv):
            write(rows, options.csv)


def _with_ranges(row: dict[str, Any], measures: list[str]) -> list[str]:
    return [row["method"], *(_with_range(row, measure) for measure in measures)]


def _with_range(row: dict[str, Any], measure: str) -> str:
    """A mean, and its range over several seeds."""
    digits = {"length": 1, "mentions": 2}.get(measure, 3)
    values = [row[measure + end] for end in ("", "_low", "_high")]
    numbers = [f"{value:.{digits}f}" for value in values if value is not None]
    if not numbers:
        return "-"
    mean, *ends = numbers
    return f"{mean} ({'-'.join(ends)})" if ends else mean
