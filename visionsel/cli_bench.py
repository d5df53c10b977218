"""`visionsel bench`: the paired measurements of the package `benchmarks`, and why a backend is chosen."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from visionsel.cli_text import (
    Progress,
    add_markdown,
    add_verb,
    check_form,
    count,
    lines,
    output_file,
    table,
    writing,
)
from visionsel.ops.choice import ORDER

__all__ = ["add_bench"]

OPERATORS = tuple(ORDER)
EXAMPLES = (
    "visionsel bench --explain",
    "visionsel bench ops --rounds 5 --threads 2",
    "visionsel bench pruning --methods fastv divprune --visual-tokens 576 --json",
    "visionsel bench growth --threads 1 -o growth.md",
    "visionsel bench -o bench.json",
)
Add = Callable[..., argparse.ArgumentParser]
Tables = list[tuple[str, list[str], list[list[str]]]]


def add_bench(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb `bench` to the command; `common` has the options of every verb."""
    shared = argparse.ArgumentParser(add_help=False, parents=[common])
    add_markdown(shared)
    # without defaults, like the options of every verb: they may stand before NAME and after it
    shared.add_argument(
        "-o",
        "--out",
        type=output_file(".json", ".md"),
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="write all that was found (.json), or pages with tables (.md)",
    )
    shared.add_argument("--device", default=argparse.SUPPRESS, help="default: cuda if there is one, else cpu")
    shared.add_argument(
        "--threads", type=count, default=argparse.SUPPRESS, metavar="N", help="default: torch's own choice"
    )
    bench = verbs.add_parser(
        "bench",
        parents=[shared],
        help="speed and memory of operators and models, what pruning saves, what recording attention costs",
        description="Time things in turn with what they replace, and give ratios, round by round.\n"
        "Without NAME all of them, with their defaults (some twenty minutes on two cores).",
        epilog=lines(EXAMPLES),
    )
    bench.add_argument(
        "--explain",
        action="store_true",
        help="measure nothing: say which backend each operator takes on this machine, and why no other",
    )
    programs = bench.add_subparsers(dest="benchmark", metavar="NAME")

    def add(name: str, help: str, *examples: str) -> argparse.ArgumentParser:
        return add_verb(programs, name, shared, help, *examples)

    _add_ops(add)
    _add_attention(add)
    _add_models(add)
    _add_growth(add)
    _add_memory(add)
    _add_pruning(add)
    _add_grounding(add)
    bench.set_defaults(run=partial(_bench, programs.choices))


def _add_ops(add: Add) -> None:
    text = "the operators against the authors' formulations, timm and more, at the map sizes of a 224 image"
    ops = add("ops", text, "visionsel bench ops --operators halo --backends auto compiled --threads 1")
    _add_rounds(ops, 7)
    _add_batch(ops)
    _add_operators(ops)
    _add_dtype(ops)


def _add_attention(add: Add) -> None:
    text = "the operators without projections against attention to all tokens, at the same map sizes"
    attention = add("attention", text, "visionsel bench attention --device cuda --dtype bfloat16 --batch 128")
    _add_rounds(attention, 7)
    _add_batch(attention)
    _add_operators(attention)
    _add_dtype(attention)


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of inputs and weights: float32, bfloat16 or float16 (default: float32)",
    )


def _add_models(add: Add) -> None:
    text = "whole models with the authors' formulations and with ours, and timm's own, accelerated"
    models = add("models", text, "visionsel bench models --models nat_tiny --rounds 5 -o models.json")
    _add_rounds(models, 5)
    _add_batch(models)
    models.add_argument("--models", nargs="+", metavar="MODEL", help="those that are measured (default: all)")
    models.add_argument(
        "--compile",
        action="store_true",
        help="also the accelerated models through torch.compile, forward (a minute or two for each)",
    )
    _add_backends(models)


def _add_growth(add: Add) -> None:
    text = "how the time of each operator grows with the image"
    growth = add("growth", text, "visionsel bench growth --operators neighborhood --threads 1")
    _add_rounds(growth, 5)
    growth.add_argument(
        "--sides",
        type=count,
        nargs="+",
        default=[56, 112, 224],
        metavar="N",
        help="of the first stage's map, a quarter of the image's (default: 56 112 224)",
    )
    _add_operators(growth)


def _add_memory(add: Add) -> None:
    text = "the peak memory of each operator and of what it replaces"
    memory = add("memory", text, "visionsel bench memory --operators halo -o memory.json")
    _add_batch(memory)
    _add_operators(memory)


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=count, default=1, metavar="N", help="images at a time (default: 1)")


def _add_operators(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--operators",
        nargs="+",
        choices=OPERATORS,
        default=list(OPERATORS),
        metavar="OPERATOR",
        help=f"those that are measured (default: {' '.join(OPERATORS)})",
    )
    _add_backends(parser)


def _add_backends(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["auto"],
        metavar="BACKEND",
        help="ours, each in turn; one that cannot serve a call is left out with the reason (default: auto)",
    )


def _add_pruning(add: Add) -> None:
    text = "what pruning saves: time, FLOPs and cache of a LLaVA with random weights, or of any model"
    pruning = add(
        "pruning",
        text,
        "visionsel bench pruning --methods fastv dart --keep 0.5 0.25",
        "visionsel bench pruning --model llava-1.5-7b-hf --dtype bfloat16 --device cuda",
    )
    pruning.add_argument(
        "--model", metavar="FOLDER", help="of transformers (default: random weights of this size)"
    )
    _add_size(pruning)
    pruning.add_argument(
        "--tower-layers", type=count, default=2, metavar="N", help="of the vision tower (default: 2)"
    )
    pruning.add_argument(
        "--visual-tokens",
        type=count,
        nargs="+",
        default=[576, 2880],
        metavar="N",
        help="of each prompt; an image has 576 (default: 576 2880)",
    )
    pruning.add_argument(
        "--text-tokens", type=count, default=75, metavar="N", help="beside them (default: 75)"
    )
    pruning.add_argument("--batch", type=count, default=1, metavar="N", help="prompts at a time (default: 1)")
    methods = ("random", "fastv", "pyramiddrop", "visionzip")  # one of each place and signal
    pruning.add_argument(
        "--methods",
        nargs="+",
        default=list(methods),
        metavar="METHOD",
        help=f"or all (default: {' '.join(methods)})",
    )
    pruning.add_argument(
        "--keep",
        type=float,
        nargs="+",
        default=[0.5, 0.25, 0.11],
        metavar="SHARE",
        help="shares of the image tokens that a decoder layer has on average (default: 0.5 0.25 0.11)",
    )
    pruning.add_argument(
        "--new-tokens",
        type=int,
        default=8,
        metavar="N",
        help="generated after the first; 0 for none (default: 8)",
    )
    _add_rounds(pruning, 3)
    pruning.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights: float32, bfloat16 or float16 (default: float32)",
    )


def _add_grounding(add: Add) -> None:
    text = "what it costs to record attention while a LLaVA with random weights answers"
    grounding = add("grounding", text, "visionsel bench grounding --images 1 --rounds 5")
    _add_size(grounding)
    grounding.add_argument(
        "--images", type=count, default=5, metavar="N", help="of 576 tokens each (default: 5)"
    )
    grounding.add_argument(
        "--text-tokens", type=count, default=70, metavar="N", help="beside them (default: 70)"
    )
    grounding.add_argument(
        "--new-tokens", type=count, default=4, metavar="N", help="of the answer (default: 4)"
    )
    _add_rounds(grounding, 5)


def _add_rounds(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument(
        "--rounds",
        type=count,
        default=rounds,
        metavar="N",
        help=f"that count, after warm-up (default: {rounds})",
    )


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hidden", type=count, default=768, metavar="N", help="width of the decoder (default: 768)"
    )
    parser.add_argument("--layers", type=count, default=12, metavar="N", help="of the decoder (default: 12)")


def _bench(parsers: Mapping[str, argparse.ArgumentParser], options: argparse.Namespace) -> None:
    import torch

    from visionsel.devices import choose_device

    check_form(options)
    if options.explain and options.benchmark is not None:
        raise ValueError(f"--explain measures nothing: leave out {options.benchmark}, or --explain")
    if "threads" in options:
        torch.set_num_threads(options.threads)
    device = choose_device(getattr(options, "device", None))
    names = list(parsers) if options.benchmark is None else [options.benchmark]
    results: dict[str, Any] = {}
    shown: dict[str, Tables] = {}
    if options.explain:
        from visionsel.cli_explain import explain, explain_tables

        results = {"explain": explain(device)}
        shown = {"explain": explain_tables(results["explain"])}
        _print(options, shown["explain"])
        names = []
    for name in names:
        program = _program(name)
        defaults = vars(parsers[name].parse_args([]))
        given = {key: getattr(options, key, value) for key, value in defaults.items()}
        with Progress() as progress:
            results[name] = program.measure(**given, device=device, say=progress.say)
        if shown and not options.json:
            print()
        shown[name] = program.tables(results[name])
        _print(options, shown[name])
    content = results if len(results) > 1 else next(iter(results.values()))
    if options.json:
        print(json.dumps(content, indent=2))
    if "out" in options:
        if options.out.suffix.lower() == ".md":
            text = "\n\n".join(_page(name, found, shown[name]) for name, found in results.items())
        else:
            text = json.dumps(content, indent=2)
        _write(options.out, text)


def _print(options: argparse.Namespace, tables: Tables) -> None:
    if not options.json:
        print(_text(tables, options.markdown), flush=True)


def _text(tables: Tables, markdown: bool) -> str:
    parts = []
    for title, header, rows in tables:
        parts += [title] if title else []
        parts.append(table(header, rows, markdown))
    return "\n\n".join(parts)


def _page(name: str, found: Any, tables: Tables) -> str:
    """What was found as Markdown: a page with the machine and the date, or only a table."""
    if name == "explain":
        return _text(tables, markdown=True)
    page: str = import_module("benchmarks.tables").page(found)
    return page.rstrip()


def _write(path: Path, text: str) -> None:
    from visionsel.files import whole_file

    with writing(path), whole_file(path) as partial:
        partial.write_text(text + "\n")
    print(f"written to {path}", file=sys.stderr)


def _program(name: str) -> Any:
    """A module of the package `benchmarks`, which stands beside this one."""
    if name in ("pruning", "grounding"):
        import_module("visionsel.multimodal")  # names the extra where it is missing
    try:
        program = import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("benchmarks"):
            raise
        program = None
    if not hasattr(program, "measure"):
        raise ImportError(
            "the package benchmarks of visionsel was not found, or another one of this name comes first; "
            "run the command in another folder, or install visionsel anew"
        )
    return program
