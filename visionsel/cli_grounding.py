"""`visionsel evaluate refcoco|png|coco|lvis|coda|vizwiz-grounding`: masks from attention, against the truth.

Lines are written as they come (`--out`), and a run that was stopped goes on from there.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from visionsel import __version__
from visionsel.cli_ground import add_grounder_options, build_grounder, grounder_settings
from visionsel.cli_text import Progress, add_verb, output_file, print_table, writing

__all__ = ["add_grounding"]

EXAMPLES = {
    "refcoco": "refcoco --data refcoco --images train2014 --split testA --model llava --segmenter hf:sam2.1 "
    "--heatmap localization_heads --out rows.jsonl",
    "png": "png --data png --images val2017 --model llava --out rows.jsonl",
    "coco": "coco --data instances_val2017.json --images val2017 --model llava --clip ViT-L-14:openai "
    "--out rows.jsonl --results detections.json",
    "lvis": "lvis --data lvis_v1_minival.json --images val2017 --model llava --clip ViT-L-14:openai "
    "--out rows.jsonl",
    "coda": "coda --data annotations.json --images images --corner-cases --model llava --out rows.jsonl",
    "vizwiz-grounding": "vizwiz-grounding --data vizwiz --images val --model llava --out rows.jsonl",
}
BASELINES = ("points", "center")


def add_grounding(evaluate: Any, common: argparse.ArgumentParser) -> None:
    """Add the benchmarks to `evaluate`; `common` has the options of every verb."""

    def add(name: str, help: str, data: str, run: Any) -> argparse.ArgumentParser:
        parser = add_verb(evaluate, name, common, help, f"visionsel evaluate {EXAMPLES[name]}")
        parser.add_argument("--data", type=Path, required=True, metavar="PATH", help=data)
        parser.add_argument(
            "--images", type=Path, required=True, metavar="DIR", help="the folder of the images"
        )
        parser.set_defaults(run=run)
        return parser

    refcoco = add(
        "refcoco",
        "referring expressions: cIoU, gIoU, precision, boxes (RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO)",
        "the folder with instances.json and the file of refs",
        _refcoco,
    )
    refcoco.add_argument(
        "--split", default="val", metavar="NAME", help="such as val, testA, testB, test (default: val)"
    )
    refcoco.add_argument("--refs", metavar="NAME", help="the file of refs, where the folder has several")
    refcoco.add_argument(
        "--sentences",
        default="all",
        choices=("all", "first"),
        help="of each ref: numbers of the two protocols do not compare (default: all)",
    )
    png = add(
        "png",
        "panoptic narratives: average recall of the phrases of true captions",
        "the folder with png_coco_SPLIT.json and panoptic_SPLIT.json",
        _png,
    )
    png.add_argument("--split", default="val2017", metavar="NAME", help="default: val2017")
    png.add_argument("--prompt", metavar="TEXT", help="what the captions are taken to answer")
    for name, text in (
        ("coco", "open-ended detection: COCO's AP of boxes and masks"),
        ("lvis", "open-ended detection: LVIS's fixed AP, rare, common and frequent"),
        ("coda", "open-ended detection: class-agnostic recall"),
    ):
        detection = add(name, text, "the instance file", _detection)
        detection.add_argument(
            "--questions",
            nargs="+",
            metavar="TEXT",
            help='asked about each view (default: ten; "model": the model writes its own)',
        )
        detection.add_argument("--no-crops", action="store_true", help="do not look at quarters of the image")
        detection.add_argument(
            "--results", type=output_file(".json"), metavar="FILE", help="write COCO results (JSON)"
        )
        if name == "coda":
            detection.add_argument(
                "--corner-cases", action="store_true", help="count objects that are marked as such alone"
            )
        else:
            _add_matching(detection)
    vizwiz = add(
        "vizwiz-grounding",
        "where the model looks while it answers: IoU with where people see the answer",
        "the folder with SPLIT_grounding.json",
        _vizwiz,
    )
    vizwiz.add_argument("--split", default="val", metavar="NAME", help="default: val")
    vizwiz.add_argument("--prompt", metavar="TEXT", help="what to say, {} is where the question stands")
    for name in EXAMPLES:
        _add_running(evaluate.choices[name])


def _add_matching(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which category a name is")
    group.add_argument(
        "--clip",
        metavar="SPEC",
        help="by a CLIP of open_clip, NAME:WEIGHTS, local-dir:FOLDER or embedded (default: none; names that "
        "are no category's, nor a synonym that the file lists, do not count)",
    )
    group.add_argument(
        "--exact", action="store_true", help="names that are a category's are it, whatever --clip says"
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="spread scores over the five most similar categories (default: the most similar one alone)",
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    add_grounder_options(parser)
    parser.add_argument(
        "--baseline",
        choices=BASELINES,
        help="random points or the centre of the image in the place of the heatmap",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="the first N samples")
    parser.add_argument("--seed", type=int, default=0, help="of random points (default: 0)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="at a time (default: 8)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="keep what was found (JSON lines); a run that was stopped goes on from there",
    )


def _refcoco(options: argparse.Namespace) -> None:
    from visionsel.multimodal.evaluation.grounding_tasks import refcoco_task

    task = refcoco_task(
        options.data, options.images, options.split, options.sentences, options.refs, options.limit
    )
    _run(options, task)


def _png(options: argparse.Namespace) -> None:
    from visionsel.multimodal.evaluation.grounding_tasks import NARRATIVE_PROMPT, narratives_task

    prompt = options.prompt or NARRATIVE_PROMPT
    _run(options, narratives_task(options.data, options.images, options.split, prompt, options.limit))


def _vizwiz(options: argparse.Namespace) -> None:
    from visionsel.multimodal.evaluation.grounding_tasks import VIZWIZ_PROMPT, vizwiz_task

    prompt = options.prompt or VIZWIZ_PROMPT
    _run(options, vizwiz_task(options.data, options.images, options.split, prompt, options.limit))


def _detection(options: argparse.Namespace) -> None:
    from visionsel.multimodal.evaluation.detection_tasks import detection_task

    match, matching = (None, "") if options.evaluation == "coda" else _matcher(options)
    detect: dict[str, Any] = {"crops": False} if options.no_crops else {}
    if options.questions:
        detect["questions"] = "model" if options.questions == ["model"] else options.questions
    task = detection_task(
        options.evaluation,
        options.data,
        options.images,
        match,
        options.limit,
        matching=matching,
        corner_cases=getattr(options, "corner_cases", False),
        detect=detect,
    )
    _run(options, task, detect=detect)


def _matcher(options: argparse.Namespace) -> tuple[Any, str]:
    """What gives names their categories, and the same in words."""
    from visionsel.multimodal.evaluation.detection_tasks import read_categories
    from visionsel.multimodal.evaluation.labels import LabelMatcher, load_text_model

    categories, synonyms = read_categories(options.data)
    if options.clip is None:
        if options.temperature is not None:
            raise ValueError("--temperature is for --clip: equal names have no similarity")
        return LabelMatcher(categories, exact=True, synonyms=synonyms), "equal names"
    words = f"text similarity by {options.clip}"
    words += ", the most similar" if options.temperature is None else f", temperature {options.temperature:g}"
    matcher = LabelMatcher(
        categories,
        *load_text_model(options.clip, options.device),
        exact=options.exact,
        temperature=options.temperature,
        synonyms=synonyms,
    )
    return matcher, f"equal names, else {words}" if options.exact else words


def _run(options: argparse.Namespace, task: Any, **more: Any) -> None:
    """Ground, score, show."""
    import transformers

    from visionsel.files import write_json
    from visionsel.multimodal.evaluation.grounded import ground_all

    grounder = build_grounder(options, _baseline(options))
    settings = {
        "benchmark": options.evaluation,
        **grounder_settings(options, grounder),
        "baseline": options.baseline,
        **more,
        "visionsel": __version__,
        "transformers": transformers.__version__,
    }
    shown = Progress(options.evaluation, shown=options.processes.first)
    with tempfile.TemporaryDirectory() as folder, shown as progress:
        path = options.out or Path(folder) / "rows.jsonl"
        with writing(path, alone=False):
            rows = ground_all(
                grounder,
                task,
                path,
                batch_size=options.batch_size,
                seed=options.seed,
                settings=settings,
                processes=options.processes,
                progress=progress.go_on,
            )
    if not options.processes.first:
        return
    _show(options, task.protocol, task.score(rows))
    if getattr(options, "results", None) is not None:
        with writing(options.results):
            write_json(task.results(rows), options.results)


def _show(options: argparse.Namespace, protocol: str, scores: dict[str, Any]) -> None:
    method = options.baseline or options.heatmap
    if options.json:
        result = {"benchmark": options.evaluation, "method": method, "protocol": protocol, **scores}
        print(json.dumps(_finite(result), indent=2))
        return
    print(f"{options.evaluation}, {protocol}\nprompts from: {method}\n")
    tables = {name: value for name, value in scores.items() if isinstance(value, dict)}
    plain = {name: value for name, value in scores.items() if name not in tables}
    print_table(list(plain), [[_number(value) for value in plain.values()]])
    if tables:
        print()
        keys = list(next(iter(tables.values())))
        print_table(
            ["of", *keys],
            [[name, *(_number(value[key]) for key in keys)] for name, value in tables.items()],
        )


def _baseline(options: argparse.Namespace) -> Any:
    """The method in the place of the heatmap; None: none."""
    from visionsel.multimodal.grounding.heatmaps.chance import CentrePoint, RandomPoint

    methods: dict[str | None, Any] = {"points": RandomPoint, "center": CentrePoint}
    return methods[options.baseline]() if options.baseline else None


def _finite(value: Any) -> Any:
    """With null for what there is no number for, as of a group without objects; JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if math.isfinite(value) else "-"
    return str(value)
