"""The `visionsel` command.

`visionsel models` lists the backbones, `visionsel predict` classifies images, `visionsel generate` answers
about an image, `visionsel data` writes data sets, `visionsel evaluate` measures models. Results go to stdout
as text or, with `--json`, as JSON; messages go to stderr. Exit status: 0 done, 1 the input was not usable or
a goal was missed, 2 wrong arguments.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visionsel import __version__

EPILOG = {
    "models": "example: visionsel models 'dinat_*'",
    "shapes": "example: visionsel data shapes --out shapes --size 2000 --image-size 64",
    "embedded": "example: visionsel evaluate embedded --models lvlm segmenter --size 200",
    "generate": "example: visionsel generate scene.png 'describe the image.' --prune fastv:keep=0.25,layer=1",
    "pruning": "example: visionsel evaluate pruning --methods random fastv --keep 0.5 0.25 --plot table.png",
    "hallucination": "example: visionsel evaluate hallucination --methods vhr vcd --seeds 0 1 2",
    "chair": "example: visionsel evaluate chair llava.jsonl --instances instances_val2014.json "
    "--references captions_val2014.json",
    "pope": "example: visionsel evaluate pope answers.jsonl --questions coco_pope_adversarial.json",
    "predict": "example: visionsel predict cat.jpg --model nat_tiny --checkpoint nat_tiny.pth --topk 3",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # every failure becomes one line; --debug shows where it came from
        if options.debug:
            traceback.print_exc()
        else:
            print(f"visionsel {options.verb}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visionsel", description="Vision models that select what they look at."
    )
    parser.add_argument("--version", action="version", version=f"visionsel {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    models = verbs.add_parser(
        "models", parents=[common], help="list the backbones and their releases", epilog=EPILOG["models"]
    )
    models.add_argument(
        "pattern", nargs="?", default="*", help="names to list, with wildcards (default: all)"
    )
    models.set_defaults(run=_models)

    predict = verbs.add_parser("predict", parents=[common], help="classify images", epilog=EPILOG["predict"])
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    predict.add_argument("--model", help="a timm model name, with its tag if it has several releases")
    predict.add_argument(
        "--checkpoint",
        type=Path,
        help="weights: a released file, or a checkpoint of train.classification, which also names the "
        "model; without it the model's released weights are downloaded",
    )
    predict.add_argument("--topk", type=int, default=5, help="classes to print for each image (default: 5)")
    predict.add_argument("--device", help="default: cuda if there is one, else cpu")
    predict.set_defaults(run=_predict)

    generate = verbs.add_parser(
        "generate",
        parents=[common],
        help="answer about an image; if wished with fewer image tokens, or with methods against invention",
        epilog=EPILOG["generate"],
    )
    generate.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
    generate.add_argument("prompt", help="a question or an instruction")
    generate.add_argument(
        "--model",
        default="embedded",
        help="a folder (or cached name) of a vision-language model of transformers (default: the small one "
        "of the package, which knows coloured shapes)",
    )
    generate.add_argument(
        "--prune",
        nargs="+",
        action="extend",
        default=[],
        metavar="SPEC",
        help="methods with their settings, such as fastv:keep=0.25,layer=2; several work together",
    )
    generate.add_argument(
        "--modulate",
        nargs="+",
        action="extend",
        default=[],
        metavar="SPEC",
        help="methods that change attention or heads, such as vhr:alpha=2 or pai; several work together",
    )
    generate.add_argument(
        "--decode", metavar="SPEC", help="a method that decodes with two views, such as vcd:alpha=1 or m3id"
    )
    generate.add_argument("--max-new-tokens", type=int, default=64, help="of the answer (default: 64)")
    generate.add_argument("--out", type=Path, metavar="PICTURE", help="draw which patches were kept")
    generate.add_argument("--device", help="default: cuda if there is one, else cpu")
    generate.set_defaults(run=_generate)

    data = verbs.add_parser("data", help="write a data set").add_subparsers(
        dest="data_set", required=True, metavar="NAME"
    )
    shapes = data.add_parser(
        "shapes",
        parents=[common],
        help="coloured shapes with masks, captions, questions and expressions, in common formats",
        epilog=EPILOG["shapes"],
    )
    shapes.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    shapes.add_argument("--size", type=int, default=2000, help="training images (default: 2000)")
    shapes.add_argument(
        "--test-size", type=int, help="images of each other split (default: a tenth of --size)"
    )
    shapes.add_argument("--seed", type=int, default=0, help="another seed is other data (default: 0)")
    shapes.add_argument(
        "--distribution",
        default="train",
        help="of the training data and its validation split: train, balanced or anti (default: train)",
    )
    shapes.add_argument("--image-size", type=int, default=64, help="pixels a side, 32 to 1024 (default: 64)")
    shapes.add_argument(
        "--caption-noise",
        type=float,
        default=0.0,
        metavar="P",
        help="with this probability training captions mention a usual companion that is absent (default: 0)",
    )
    shapes.set_defaults(run=_data_shapes)

    evaluate = verbs.add_parser("evaluate", help="measure models").add_subparsers(
        dest="evaluation", required=True, metavar="NAME"
    )
    embedded = evaluate.add_parser(
        "embedded",
        parents=[common],
        help="the models that ship with visionsel, on fresh scenes of the shapes world",
        epilog=EPILOG["embedded"],
    )
    embedded.add_argument("--folder", type=Path, help="weights to measure (default: those of the package)")
    embedded.add_argument("--models", nargs="+", metavar="MODEL", help="which (default: all)")
    embedded.add_argument(
        "--size", type=int, default=400, help="scenes of each distribution (default: 400, some minutes)"
    )
    embedded.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    embedded.set_defaults(run=_evaluate_embedded)

    pruning = evaluate.add_parser(
        "pruning",
        parents=[common],
        help="whether pruners keep the answers right, on the vision-language model of the package",
        epilog=EPILOG["pruning"],
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
        "--size", type=int, default=200, help="scenes (default: 200, some ten minutes for all methods)"
    )
    pruning.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    pruning.add_argument("--csv", type=Path, metavar="FILE", help="write the table")
    pruning.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png, .pdf, .svg)")
    pruning.set_defaults(run=_evaluate_pruning)

    hallucination = evaluate.add_parser(
        "hallucination",
        parents=[common],
        help="what methods against invention give, and cost, on the vision-language model of the package",
        epilog=EPILOG["hallucination"],
    )
    hallucination.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="modulators and two-view decoders (default: all)"
    )
    hallucination.add_argument(
        "--size", type=int, default=200, help="scenes of each seed (default: 200, some minutes)"
    )
    hallucination.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0],
        metavar="SEED",
        help="of the scenes; several give mean and range (default: 0)",
    )
    hallucination.add_argument("--csv", type=Path, metavar="FILE", help="write the table")
    hallucination.set_defaults(run=_evaluate_hallucination)

    chair = evaluate.add_parser(
        "chair",
        parents=[common],
        help="which objects captions invent (CHAIR), beside their recall and length",
        epilog=EPILOG["chair"],
    )
    chair.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="captions: JSON lines of image_id and caption"
    )
    chair.add_argument(
        "--instances", nargs="+", type=Path, default=[], metavar="FILE", help="COCO's annotated objects"
    )
    chair.add_argument(
        "--references",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="COCO's captions by people; CHAIR counts the objects of both",
    )
    chair.add_argument(
        "--synonyms",
        metavar="FILE",
        help='a table of your own, or "shapes" for the shapes world (default: the 80 COCO classes)',
    )
    chair.add_argument(
        "--parser",
        default="nouns",
        help="nouns, or one of published numbers: pattern (2018), wordnet (its ports) (default: nouns)",
    )
    chair.set_defaults(run=_evaluate_chair)

    pope = evaluate.add_parser(
        "pope",
        parents=[common],
        help="whether a model says yes to objects that are not there (POPE), beside its share of yes",
        epilog=EPILOG["pope"],
    )
    pope.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="answers: JSON lines of answer, in the order of the questions or with their question_id",
    )
    pope.add_argument("--questions", type=Path, required=True, metavar="FILE", help="as POPE releases them")
    pope.set_defaults(run=_evaluate_pope)
    return parser


def _models(options: argparse.Namespace) -> None:
    rows = list_releases(options.pattern)
    if not rows:
        raise ValueError(f"no visionsel model matches {options.pattern!r}; 'visionsel models' lists all")
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    _print_table(
        ["model", "parameters", "input", "classes", "weights"],
        [
            [
                row["model"],
                f"{row['parameters'] / 1e6:.1f} M",
                "x".join(map(str, row["input_size"])),
                str(row["num_classes"]),
                row["weights"] or "-",
            ]
            for row in rows
        ],
    )


def list_releases(pattern: str = "*") -> list[dict[str, Any]]:
    """One dict for each model and release that match a pattern: name, size, input, licence, weights."""
    import timm

    from visionsel.models import registered_names

    rows = []
    for name in registered_names(pattern):
        for tagged in timm.list_models(f"{name}.*", include_tags=True) or [name]:
            cfg = timm.get_pretrained_cfg(tagged)
            assert cfg is not None  # every model of ours has one
            model = timm.create_model(tagged, device="meta")  # a tag may change the architecture
            parameters = sum(p.numel() for p in model.parameters())
            rows.append(
                {
                    "model": tagged,
                    "parameters": parameters,
                    "input_size": list(cfg.input_size),
                    "num_classes": cfg.num_classes,
                    "license": cfg.license,
                    "weights": cfg.url or cfg.hf_hub_id or "",
                }
            )
    return rows


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _predict(options: argparse.Namespace) -> None:
    from visionsel.prediction import load_classifier, predict_images

    classifier = load_classifier(options.model, options.checkpoint, options.device)
    results = predict_images(classifier, options.images, options.topk)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        print(result["image"])
        for entry in result["classes"]:
            print(f"  {entry['probability']:7.2%}  {entry['label']}")


def _generate(options: argparse.Namespace) -> None:
    from visionsel.files import whole_file
    from visionsel.generation import generate_answer, load_lvlm

    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    model, processor = load_lvlm(options.model, options.device)
    result = generate_answer(
        model,
        processor,
        options.image,
        options.prompt,
        options.prune,
        options.max_new_tokens,
        options.modulate,
        options.decode,
    )
    if options.json:
        print(json.dumps({"answer": result.answer, "report": result.report.to_dict()}, indent=2))
    else:
        print(f"{result.answer}\n\n{result.report}")
    if options.out is not None:
        with whole_file(options.out) as partial:
            result.picture().save(partial)


def _data_shapes(options: argparse.Namespace) -> None:
    from visionsel.data.shapes import write_shapes

    root = write_shapes(
        options.out,
        options.size,
        options.test_size,
        options.seed,
        options.distribution,
        options.image_size,
        caption_noise=options.caption_noise,
        progress=_show_progress if sys.stderr.isatty() else None,
    )
    card = json.loads((root / "shapes.json").read_text())
    if options.json:
        print(json.dumps({"out": str(root), **card}, indent=2))
        return
    _print_table(
        ["split", "distribution", "seed", "images"],
        [
            [name, split["distribution"], str(split["seed"]), str(split["size"])]
            for name, split in card["splits"].items()
        ],
    )


def _evaluate_embedded(options: argparse.Namespace) -> None:
    from visionsel.embedded.evaluation import MODELS, check_goals, evaluate_embedded
    from visionsel.embedded.files import WEIGHTS

    results = evaluate_embedded(
        options.folder or WEIGHTS,
        options.models or MODELS,
        options.size,
        options.seed,
        progress=lambda name: print(f"measuring {name}", file=sys.stderr, flush=True),
    )
    checks = check_goals(results)
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        rows = [
            [goal.measure, str(goal), f"{value:.3f}", "yes" if reached else "no"]
            for goal, value, reached in checks
        ]
        _print_table(["measure", "goal", "measured", "reached"], rows)
        print("\nall measures: --json")
    if missed := [goal.measure for goal, _, reached in checks if not reached]:
        raise ValueError(f"goals missed: {', '.join(missed)}")


def _evaluate_pruning(options: argparse.Namespace) -> None:
    from visionsel.embedded import load_lvlm
    from visionsel.embedded.pruning_quality import MEASURES, evaluate_pruning, plot_rows, write_rows

    rows = evaluate_pruning(
        *load_lvlm(),
        options.methods,
        options.keep,
        options.size,
        options.seed,
        progress=lambda name: print(name, file=sys.stderr, flush=True),
    )
    if options.csv is not None:
        write_rows(rows, options.csv)
    if options.plot is not None:
        plot_rows(rows, options.plot)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    numbers = ["equivalent_tokens", "flops_ratio", "cache_ratio", *MEASURES]
    _print_table(
        ["method", "keep", "tokens", "FLOPs", "cache", *MEASURES.values()],
        [
            [row["method"], "-" if row["keep"] is None else f"{row['keep']:g}"]
            + [
                "-" if row[name] is None else f"{row[name]:.{1 if 'tokens' in name else 3}f}"
                for name in numbers
            ]
            for row in rows
        ],
    )


def _evaluate_hallucination(options: argparse.Namespace) -> None:
    from visionsel.embedded import load_lvlm
    from visionsel.embedded.hallucination_quality import MEASURES, evaluate_hallucination, write_rows

    rows = evaluate_hallucination(
        *load_lvlm(),
        options.methods,
        options.size,
        options.seeds,
        progress=lambda name: print(name, file=sys.stderr, flush=True),
    )
    if options.csv is not None:
        write_rows(rows, options.csv)
    if options.json:
        print(json.dumps(rows, indent=2))
        return

    def show(row: dict[str, Any], measure: str) -> str:
        digits = {"length": 1, "mentions": 2}.get(measure, 3)
        values = [row[measure + end] for end in ("", "_low", "_high")]
        mean, *ends = (f"{value:.{digits}f}" for value in values if value is not None)
        return f"{mean} ({'-'.join(ends)})" if ends else mean

    _print_table(
        ["method", *MEASURES.values()],
        [[row["method"], *(show(row, measure) for measure in MEASURES)] for row in rows],
    )


def _evaluate_chair(options: argparse.Namespace) -> None:
    from visionsel.multimodal.evaluation import (
        Hallucination,
        chair,
        files,
        read_synonyms,
        shapes_synonyms,
        table,
    )

    synonyms = None
    if options.synonyms is not None:
        synonyms = shapes_synonyms() if options.synonyms == "shapes" else read_synonyms(options.synonyms)
    objects: dict[int, set[str]] = {}
    for kind, paths in (("instances", options.instances), ("captions", options.references)):
        for path in paths:
            content = {kind: files.read_coco(path)}
            for image, names in chair.ground_truth(
                **content, synonyms=synonyms, parser=options.parser
            ).items():
                objects.setdefault(image, set()).update(names)
    if not options.instances and not options.references:
        raise ValueError("give the objects of the images: --instances, --references, or (as CHAIR does) both")
    results = {}
    for path in options.files:
        rows = files.read_captions(path)
        ids = [int(row["image_id"]) if str(row["image_id"]).isdecimal() else row["image_id"] for row in rows]
        if missing := [image for image in ids if image not in objects]:
            raise ValueError(f"{path}: no annotations of {len(missing)} images, such as {missing[0]}")
        results[str(path)] = chair.score(
            [row["caption"] for row in rows], [objects[image] for image in ids], synonyms, options.parser
        )
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print(table({name: Hallucination.of(chair=scores) for name, scores in results.items()}))
    print(f"\nparser: {options.parser}; invented most:")
    for name, scores in results.items():
        most = [f"{thing} {count}" for thing, count in list(scores["invented"].items())[:8]]
        print(f"  {name}: {', '.join(most) or 'nothing'}")


def _evaluate_pope(options: argparse.Namespace) -> None:
    from visionsel.multimodal.evaluation import Hallucination, files, pope, table

    asked = files.read_questions(options.questions)
    labels = [row["label"] for row in asked]
    results = {}
    for path in options.files:
        try:
            answers = files.match_answers(files.read_answers(path), asked)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        results[str(path)] = pope.score(answers, labels)
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        print(table({name: Hallucination.of(pope=scores) for name, scores in results.items()}))


def _show_progress(done: int, total: int) -> None:
    """A bar on stderr that redraws itself in place."""
    filled = 40 * done // total
    end = "\n" if done == total else ""
    print(f"\r[{'#' * filled:40}] {done}/{total}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
