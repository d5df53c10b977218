"""`visionsel export`: a classifier as a folder for the hub, a program of `torch.export`, or ONNX."""

import argparse
import json
from pathlib import Path
from typing import Any

from visionsel.cli_text import add_verb, writing

__all__ = ["add_export"]


def add_export(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb `export` to the command; `common` has the options of every verb."""
    export = add_verb(
        verbs,
        "export",
        common,
        "write a classifier for other programs: hub folder, torch.export, ONNX",
        "visionsel export --checkpoint runs/flowers/checkpoints/best.ckpt --to onnx -o flowers.onnx",
        "visionsel export nat_tiny --checkpoint nat_tiny.pth --to program -o nat_tiny.pt2",
        "visionsel export --checkpoint runs/flowers/checkpoints/best.ckpt --to hub -o rose --push me/rose",
    )
    export.add_argument("model", nargs="?", help="a timm model name, with its tag if it has several releases")
    export.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights: a released file, or a checkpoint of train.classification, which also names the "
        "model; without it the model's released weights are downloaded",
    )
    export.add_argument(
        "--to",
        choices=("hub", "program", "onnx"),
        required=True,
        help="hub: a folder of safetensors, config and card, as timm loads it; program: torch.export (.pt2); "
        "onnx: checked in onnxruntime",
    )
    export.add_argument(
        "-o", "--out", type=Path, required=True, metavar="PATH", help="the file or, for the hub, the folder"
    )
    export.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="height and width to trace with, one number for both (default: the model's input size)",
    )
    export.add_argument(
        "--fixed-size",
        action="store_true",
        help="serve images of this size alone (default: of every size); batches are free always",
    )
    export.add_argument("--push", metavar="OWNER/NAME", help="with --to hub: upload it too")
    export.add_argument("--private", action="store_true", help="with --push: where only you see it")
    export.add_argument(
        "--license",
        help="with --to hub: of the weights, for the card (default: that of the release; other for a file)",
    )
    export.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    from visionsel import export
    from visionsel.prediction import load_classifier

    if options.to != "hub" and (options.push or options.private or options.license):
        raise ValueError("--push, --private and --license are for --to hub")
    if options.private and not options.push:
        raise ValueError("--private says where --push uploads to; give --push OWNER/NAME")
    if options.to == "hub" and (options.size or options.fixed_size):
        raise ValueError("--size and --fixed-size are for --to program and --to onnx")
    if options.size and (len(options.size) > 2 or min(options.size) < 1):
        raise ValueError(f"--size takes one or two numbers above 0, got {options.size}")
    if options.to != "hub" and options.out.is_dir():
        raise ValueError(f"{options.out} is a folder; name a file in it")
    classifier = load_classifier(options.model, options.checkpoint, "cpu")
    model: Any = classifier.model
    result: dict[str, Any]
    if options.to == "hub":
        licence = options.license or (
            "other" if options.checkpoint else model.pretrained_cfg.get("license") or "other"
        )
        source = (
            f"the file {options.checkpoint.name}" if options.checkpoint else f"the release {options.model}"
        )
        name = f"hf-hub:{options.push}" if options.push else f"local-dir:{options.out}"
        card = export.model_card(classifier, name, licence, source)
        result = {"path": str(export.save_hub_folder(classifier, options.out, card))}
        if options.push:
            result["commit"] = export.push_to_hub(classifier, options.push, card, options.private)
    else:
        height, width = (options.size * 2)[:2] if options.size else model.pretrained_cfg["input_size"][1:]
        write = export.write_onnx if options.to == "onnx" else export.write_program
        with writing(options.out, alone=False):
            result = write(model, options.out, (height, width), not options.fixed_size)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"written: {result['path']}")
    if "difference" in result:
        shapes = " and ".join(str(shape) for shape in result["shapes"])
        print(
            f"run with images of {shapes}: logits differ by {result['difference']:.1e} of the largest at most"
        )
    if "commit" in result:
        print(f"uploaded: {result['commit']}")
