"""How the benchmarks of `visionsel evaluate` let a model answer, with interventions and beside baselines."""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionsel import __version__
from visionsel.cli_text import Progress, writing

__all__ = ["add_answering", "answer_task", "shapes_distribution"]


def add_answering(parser: Any, data: str) -> None:
    """Add the options to a benchmark; `data` says what its --data is."""
    group = parser.add_argument_group("asking a model, where no FILE is given")
    group.add_argument("--images", type=Path, metavar="DIR", help="the folder of the images")
    group.add_argument("--data", metavar="DATA", help=data)
    group.add_argument(
        "--model",
        default="embedded",
        metavar="FOLDER",
        help="a folder (or cached name) of a vision-language model of transformers (default: the small one "
        "of the package, which knows coloured shapes)",
    )
    for name, text in (
        ("--prune", "methods that drop image tokens, such as fastv:keep=0.25,layer=2"),
        ("--modulate", "methods that change attention or heads, such as vhr:alpha=2"),
    ):
        group.add_argument(name, nargs="+", action="extend", default=[], metavar="SPEC", help=text)
    group.add_argument(
        "--decode", metavar="SPEC", help="a method of decoding: with two views, such as vcd, or glc"
    )
    group.add_argument(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        help="also the model by itself: greedy, and sampling at the temperature that the method amounts to "
        "(default: beside every method)",
    )
    group.add_argument(
        "--temperature", type=float, metavar="T", help="sample at it (default: the most probable token)"
    )
    group.add_argument("--seed", type=int, default=0, help="of sampling, and of scenes (default: 0)")
    group.add_argument("--limit", type=int, metavar="N", help="the first N images (shapes: default 200)")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="at a time (default: 8)")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="of an answer (default: captions 512, answers to yes-or-no questions 16)",
    )
    group.add_argument(
        "--prompt", metavar="TEXT", help="how to ask for a caption; for questions {} is where they stand"
    )
    group.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="keep the answers (JSON lines); a run that was stopped goes on from there",
    )
    group.add_argument("--device", help="default: cuda if there is one, else cpu")
    group.add_argument("--dtype", help="of the weights, such as bfloat16 (default: as they are stored)")


def shapes_distribution(options: argparse.Namespace) -> str | None:
    """The distribution that `--data shapes[:DISTRIBUTION]` names; None for data in files.

    Raises:
        ValueError: where files, folders or prompts are given besides, or a benchmark has no other --data; or
            for options of asking where files are scored.
    """
    asking = ("images", "prune", "modulate", "decode", "baselines", "temperature", "limit", "prompt", "out")
    if options.files and (given := [one for one in asking if getattr(options, one) not in (None, [], False)]):
        raise ValueError(
            f"--{given[0]} is for asking a model: leave it out to score files, or leave out FILE"
        )
    name, _, distribution = (options.data or "").partition(":")
    if name != "shapes":
        if options.data is not None and options.evaluation in ("chair", "pope"):
            raise ValueError(
                f"--data of {options.evaluation} is shapes or shapes:DISTRIBUTION, got {options.data!r}; "
                "data in files has options of its own, see --help"
            )
        return None
    for given, text in ((options.files, "FILE"), (options.images, "--images"), (options.prompt, "--prompt")):
        if given:
            raise ValueError(f"the shapes world has its own images and prompts; leave out {text}")
    return distribution or "anti"


@dataclass(frozen=True)
class _Run:
    """One line of the table: methods, and how tokens are chosen."""

    name: str
    methods: Sequence[Any]
    temperature: float | None
    path: Path


def answer_task(options: argparse.Namespace, task: Any) -> dict[str, dict[str, Any]]:
    """What each line of the table scored; baselines first.

    They are asked last: what does not fit the model, or the file, is found before hours of them.
    """
    if options.out is not None:
        return _answer(options, task, options.out)
    with tempfile.TemporaryDirectory() as folder:
        return _answer(options, task, Path(folder) / "answers.jsonl")


def _answer(options: argparse.Namespace, task: Any, out: Path) -> dict[str, dict[str, Any]]:
    import transformers

    from visionsel.generation import load_lvlm, parse_methods, read_methods
    from visionsel.multimodal.evaluation import generate_all

    if options.max_new_tokens is not None:
        task = task.cut(options.max_new_tokens)
    read_methods(options.prune, options.modulate, options.decode)  # found before a large model is loaded
    model, processor = load_lvlm(options.model, options.device, options.dtype)
    methods = parse_methods(model, processor, options.prune, options.modulate, options.decode)
    settings = {
        "benchmark": options.evaluation,
        "model": options.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "visionsel": __version__,
        "transformers": transformers.__version__,
    }
    results = {}
    runs = _runs(options, methods, out)
    for number, run in enumerate(runs):
        name = f"[{number + 1}/{len(runs)}] {run.name}"
        with (
            Progress(name, step=True, shown=options.processes.first) as progress,
            writing(run.path, alone=False),
        ):
            rows = generate_all(
                model,
                processor,
                task.items,
                run.path,
                interventions=run.methods,
                batch_size=options.batch_size,
                max_new_tokens=task.max_new_tokens,
                temperature=run.temperature,
                seed=options.seed,
                said=task.said,
                settings=settings,
                processes=options.processes,
                progress=progress.go_on,
            )
        results[run.name] = task.score([row[task.said] for row in rows])
    return {run.name: results[run.name] for run in [*runs[1:], runs[0]]}


def _runs(options: argparse.Namespace, methods: Sequence[Any], out: Path) -> list[_Run]:
    """The run that is asked for, and the baselines, with files beside its own."""
    specs = [*options.prune, *options.modulate, *filter(None, [options.decode])]
    plain = "greedy" if options.temperature is None else f"sampling T={options.temperature:.3g}"
    name = " + ".join(specs) or plain
    if specs and options.temperature is not None:
        name += f" T={options.temperature:.3g}"
    runs = [_Run(name, methods, options.temperature, out)]
    if options.baselines or (options.baselines is None and specs):
        matched = (options.temperature or 1.0) / (1 + _agreement(methods))
        for baseline, temperature in (("greedy", None), (f"sampling T={matched:.3g}", matched)):
            if specs or temperature != options.temperature:
                beside = baseline.replace(" T=", "-")
                path = out.with_name(f"{out.stem}.{beside}{out.suffix}")
                runs.append(_Run(baseline, [], temperature, path))
    return runs


def _agreement(methods: Sequence[Any]) -> float:
    """The strength of a second view that is added: equal views sharpen to temperature 1 / (1 + it)."""
    from visionsel.multimodal.decoding import AGLA, Ritual

    return sum(method.alpha for method in methods if isinstance(method, AGLA | Ritual))
