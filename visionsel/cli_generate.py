"""`visionsel generate`: an answer about an image, with interventions or without."""

import argparse
import json
from pathlib import Path
from typing import Any

from visionsel.cli_text import add_verb, output_file, writing

__all__ = ["add_generate"]


def add_generate(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb `generate` to the command; `common` has the options of every verb."""
    generate = add_verb(
        verbs,
        "generate",
        common,
        "answer about an image; if wished with fewer image tokens, or with methods against invention",
        "visionsel generate scene.png 'describe the image.'",
        "visionsel generate scene.png 'describe the image.' --prune fastv:keep=0.25,layer=1 --out kept.png",
        "visionsel generate scene.png 'is there a star?' --modulate vhr:alpha=2 --decode vcd:alpha=1 --json",
        "visionsel generate photo.jpg 'what is this?' --model llava-1.5-7b-hf --dtype bfloat16",
    )
    generate.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
    generate.add_argument("prompt", metavar="PROMPT", help="a question or an instruction")
    generate.add_argument(
        "--model",
        default="embedded",
        metavar="FOLDER",
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
    generate.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="of the answer (default: 64)"
    )
    generate.add_argument(
        "-o", "--out", type=output_file(), metavar="PICTURE", help="draw which patches were kept"
    )
    generate.add_argument("--device", help="default: cuda if there is one, else cpu")
    generate.add_argument("--dtype", help="of the weights, such as bfloat16 (default: as they are stored)")
    generate.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> None:
    from visionsel.files import whole_file
    from visionsel.generation import generate_answer, load_lvlm, open_image, read_methods

    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if not options.prompt.strip():
        raise ValueError("the prompt is empty; say something, such as 'describe the image.'")
    image = open_image(options.image)  # what cannot be is found before a large model is loaded
    read_methods(options.prune, options.modulate, options.decode)
    model, processor = load_lvlm(options.model, options.device, options.dtype)
    result = generate_answer(
        model,
        processor,
        image,
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
        picture = result.picture()
        with writing(options.out), whole_file(options.out) as partial:
            picture.save(partial)
