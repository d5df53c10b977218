"""The `visionsel` command.

`visionsel models` lists the backbones, `visionsel predict` classifies images, `visionsel generate` answers
about an image, `visionsel ground` says where an answer is seen, `visionsel data` writes data sets, `visionsel
evaluate` measures models. Results go to stdout as text or, with `--json`, as JSON; messages go to stderr.
Exit status: 0 done, 1 the input was not usable or a goal was missed, 2 wrong arguments.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visionsel import __version__
from visionsel.cli_demo import add_demo
from visionsel.cli_evaluate import add_evaluate
from visionsel.cli_ground import add_ground
from visionsel.cli_text import print_table, show_progress

EPILOG = {
    "models": "example: visionsel models 'dinat_*'",
    "shapes": "example: visionsel data shapes --out shapes --size 2000 --image-size 64",
    "generate": "example: visionsel generate scene.png 'describe the image.' --prune fastv:keep=0.25,layer=1",
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
        "--decode",
        metavar="SPEC",
        help="a method of decoding: with two views, such as vcd:alpha=1 or m3id, or glc",
    )
    generate.add_argument("--max-new-tokens", type=int, default=64, help="of the answer (default: 64)")
    generate.add_argument("--out", type=Path, metavar="PICTURE", help="draw which patches were kept")
    generate.add_argument("--device", help="default: cuda if there is one, else cpu")
    generate.add_argument("--dtype", help="of the weights, such as bfloat16 (default: as they are stored)")
    generate.set_defaults(run=_generate)

    add_ground(verbs, common)

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

    add_evaluate(verbs, common)
    add_demo(verbs, common)
    return parser


def _models(options: argparse.Namespace) -> None:
    rows = list_releases(options.pattern)
    if not rows:
        raise ValueError(f"no visionsel model matches {options.pattern!r}; 'visionsel models' lists all")
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print_table(
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
    model, processor = load_lvlm(options.model, options.device, options.dtype)
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
        progress=show_progress if sys.stderr.isatty() else None,
    )
    card = json.loads((root / "shapes.json").read_text())
    if options.json:
        print(json.dumps({"out": str(root), **card}, indent=2))
        return
    print_table(
        ["split", "distribution", "seed", "images"],
        [
            [name, split["distribution"], str(split["seed"]), str(split["size"])]
            for name, split in card["splits"].items()
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
