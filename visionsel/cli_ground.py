"""`visionsel ground`: an answer whose words have places on the image; also the options of every grounder."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from visionsel.cli_text import add_verb, output_file, print_table, writing

__all__ = ["add_ground", "add_grounder_options", "build_grounder", "grounder_settings"]

_LEGIBLE = 512  # pixels that the longer side of a picture has, roughly, where the image is smaller


def add_ground(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb `ground` to the command; `common` has the options of every verb."""
    ground = add_verb(
        verbs,
        "ground",
        common,
        "answer about an image, and say where each word of the answer is seen",
        "visionsel ground scene.png 'describe the image.' -o grounded.png",
        "visionsel ground scene.png 'the red star' --refer --heatmap localization_heads",
        "visionsel ground scene.png --detect --json",
        "visionsel ground photo.jpg --detect --model llava --segmenter sam:vit_b --checkpoint sam_vit_b.pth",
    )
    ground.add_argument("image", type=Path, metavar="IMAGE", help="an image file")
    ground.add_argument(
        "question",
        nargs="?",
        metavar="QUESTION",
        help="what to ask; with --refer an expression such as 'the left dog'; with --detect it can be left "
        "out, and ten questions that list objects are asked",
    )
    kinds = ground.add_mutually_exclusive_group()
    kinds.add_argument("--refer", action="store_true", help="find what an expression means")
    kinds.add_argument("--detect", action="store_true", help="find all objects that the model names")
    ground.add_argument(
        "-o",
        "--out",
        type=output_file(),
        metavar="PICTURE",
        help="draw masks, boxes and names of the objects; small images are enlarged to make names legible",
    )
    ground.add_argument("--max-new-tokens", type=int, metavar="N", help="of an answer (default: 128)")
    add_grounder_options(ground)
    ground.set_defaults(run=_ground)


def add_grounder_options(parser: Any) -> None:
    """Add the options that `build_grounder` reads."""
    group = parser.add_argument_group("models and how attention becomes masks")
    group.add_argument(
        "--model",
        default="embedded",
        metavar="FOLDER",
        help="a folder (or cached name) of a vision-language model of transformers (default: the small one "
        "of the package, which knows coloured shapes)",
    )
    group.add_argument(
        "--segmenter",
        default="embedded",
        metavar="SPEC",
        help="sam:vit_b (or vit_l, vit_h) with --checkpoint, hf:NAME for a SAM, SAM 2 or SAM 3 of "
        "transformers, or embedded (default: the small one of the package); mask_head does without",
    )
    group.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights of sam:...")
    group.add_argument(
        "--heatmap",
        default="vl_sam",
        metavar="SPEC",
        help="a method with its settings, such as localization_heads or mean:layers=(2,) (default: vl_sam)",
    )
    group.add_argument(
        "--refine",
        nargs="*",
        metavar="ROUND",
        help="further rounds: mask, resample, and for one expression promac; nothing behind it: none "
        "(default: mask resample)",
    )
    group.add_argument(
        "--prompts",
        default="points",
        metavar="KIND",
        help="what the segmenter is shown: points, box, points+box, points+mask or points+box+mask "
        "(default: points)",
    )
    group.add_argument(
        "--threshold",
        default="0.5",
        metavar="SHARE",
        help="where a heatmap is cut, between its least and its largest value, or otsu (default: 0.5)",
    )
    group.add_argument("--device", help="default: cuda if there is one, else cpu")
    group.add_argument("--dtype", help="of the model's weights, such as bfloat16 (default: as stored)")


def build_grounder(options: argparse.Namespace, heatmap: Any = None, **settings: Any) -> Any:
    """A `Grounder` of the options.

    Args:
        options: with those of `add_grounder_options`.
        heatmap: a method in the place of theirs.
        settings: further arguments of `Grounder`.

    Raises:
        ValueError: for a threshold that is no number, and all that loading and `Grounder` refuse.
    """
    from visionsel.generation import load_lvlm
    from visionsel.multimodal.grounding.grounder import Grounder
    from visionsel.multimodal.grounding.segmenters import build_segmenter

    threshold: float | str = options.threshold
    if threshold != "otsu":
        try:
            threshold = float(threshold)
        except ValueError as error:
            raise ValueError(f"--threshold is a number or otsu, got {threshold!r}") from error
    # segmenters are quick to refuse: before a large model is loaded
    segmenter = build_segmenter(options.segmenter, options.device, checkpoint=options.checkpoint)
    model, processor = load_lvlm(options.model, options.device, options.dtype)
    return Grounder(
        model,
        processor,
        segmenter,
        heatmap or options.heatmap,
        options.refine,
        prompts=options.prompts,
        threshold=threshold,
        **settings,
    )


def grounder_settings(options: argparse.Namespace, grounder: Any) -> dict[str, Any]:
    """What the options say that results depend on; values of JSON."""
    return {
        "model": options.model,
        "dtype": str(grounder.model.dtype).removeprefix("torch."),
        "segmenter": options.segmenter,
        "checkpoint": None if options.checkpoint is None else options.checkpoint.name,
        "heatmap": options.heatmap,
        "refine": options.refine,
        "prompts": options.prompts,
        "threshold": options.threshold,
    }


def _ground(options: argparse.Namespace) -> None:
    from visionsel.files import whole_file
    from visionsel.generation import open_image
    from visionsel.multimodal.grounding.results import Grounding

    if options.question is None and not options.detect:
        raise ValueError("what is the question? give it after the image, or --detect")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if not options.image.is_file():
        raise FileNotFoundError(f"there is no image {options.image}")
    open_image(options.image)  # what is no image is found before large models are loaded
    grounder = build_grounder(options)
    limit = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    if options.refer:
        word = grounder.refer(options.image, options.question, **limit)
        result = Grounding(options.question, [word], word.image)
    elif options.detect:
        asked = {} if options.question is None else {"questions": options.question}
        result = grounder.detect(options.image, **asked, **limit)
    else:
        result = grounder.ask(options.image, options.question, **limit)
    words = [_record(word) for word in result.words]
    if options.json:
        size = {"width": result.image.width, "height": result.image.height}
        print(json.dumps({"answer": result.answer, "image": size, "words": words}, indent=2))
    else:
        _show(result.answer, words, options)
    if options.out is not None:
        picture = result.plot(scale=max(1, _LEGIBLE // max(result.image.size)))
        with writing(options.out), whole_file(options.out) as partial:
            picture.save(partial)


def _record(word: Any) -> dict[str, Any]:
    """A word as JSON; masks as COCO's compressed run lengths."""
    from visionsel.data.shapes.masks import encode_rle

    return {
        "text": word.text,
        "name": word.name,
        "span": list(word.span),
        "prob": word.prob,
        "points": word.points.tolist(),
        "labels": word.labels.tolist(),
        "box": None if word.box is None else list(word.box),
        "score": float(word.score),
        "segmentation": None if word.box is None else encode_rle(word.mask),
    }


def _show(answer: str, words: list[dict[str, Any]], options: argparse.Namespace) -> None:
    if not options.refer:
        print(f"{answer}\n")
    print_table(
        ["word", "object", "probability", "box (x0 y0 x1 y1)", "score"],
        [
            [
                word["text"],
                word["name"] or "-",
                f"{word['prob']:.3f}",
                "-" if word["box"] is None else " ".join(map(str, word["box"])),
                f"{word['score']:.3f}",
            ]
            for word in words
        ],
    )
    if all(word["name"] is None for word in words):
        print("no object is named", file=sys.stderr)
