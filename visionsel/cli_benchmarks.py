"""`visionsel evaluate chair`, `pope`, `amber` and `mme`: given files are scored, or a model is asked.

Without files, a model answers all that the benchmark asks (`cli_answers`), and its answers are scored.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from visionsel.cli_answers import add_answering, answer_task, shapes_distribution
from visionsel.cli_text import add_verb

__all__ = ["add_benchmarks"]

Results = dict[str, dict[str, Any]]


def add_benchmarks(evaluate: Any, common: argparse.ArgumentParser) -> None:
    """Add the benchmarks to `evaluate`; `common` has the options of every verb."""
    chair = add_verb(
        evaluate,
        "chair",
        common,
        "which objects captions invent (CHAIR), beside their recall and length",
        "visionsel evaluate chair llava.jsonl --instances instances_val2014.json "
        "--references captions_val2014.json",
        "visionsel evaluate chair --images val2014 --instances instances_val2014.json --model llava "
        "--modulate vhr --out vhr.jsonl",
    )
    chair.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="captions: JSON lines of image_id and caption"
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
        metavar="NAME",
        help="nouns, or one of published numbers: pattern (2018), wordnet (its ports) (default: nouns)",
    )
    add_answering(chair, "shapes[:DISTRIBUTION], for scenes of the shapes world instead of files")
    chair.set_defaults(run=_evaluate_chair)

    pope = add_verb(
        evaluate,
        "pope",
        common,
        "whether a model says yes to objects that are not there (POPE), beside its share of yes",
        "visionsel evaluate pope answers.jsonl --questions coco_pope_adversarial.json",
        "visionsel evaluate pope --data shapes --modulate 'vhr:alpha=2,layers=(1,2,3)'",
    )
    pope.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="answers: JSON lines of answer, in the order of the questions or with their question_id",
    )
    pope.add_argument("--questions", type=Path, metavar="FILE", help="as POPE releases them")
    add_answering(pope, "shapes[:DISTRIBUTION], for scenes of the shapes world instead of files")
    pope.set_defaults(run=_evaluate_pope)

    amber = add_verb(
        evaluate,
        "amber",
        common,
        "what captions invent and cover, and answers about existence, attributes, relations (AMBER)",
        "visionsel evaluate amber responses.json --data AMBER/data",
        "visionsel evaluate amber --data AMBER/data --images AMBER/image --model llava --part generative "
        "--out answers.jsonl",
    )
    amber.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="responses: JSON, or JSON lines, of id, response"
    )
    amber.add_argument(
        "--part",
        default="all",
        metavar="PART",
        help="of the queries: all, generative, discriminative, existence, attribute or relation "
        "(default: all)",
    )
    amber.add_argument(
        "--first-word",
        action="store_true",
        help="take Yes or No from the beginning of an answer; without it an answer in a file counts only if "
        "it is exactly that, as in the released scorer",
    )
    add_answering(amber, "the folder with annotations.json, or shapes[:DISTRIBUTION]")
    amber.set_defaults(run=_evaluate_amber)

    mme = add_verb(
        evaluate,
        "mme",
        common,
        "existence, count, position and color, two questions an image (MME)",
        "visionsel evaluate mme Your_Results",
        "visionsel evaluate mme --data MME_Benchmark_release_version --model llava --decode vcd "
        "--out vcd.jsonl",
    )
    mme.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="folders of results (existence.txt, ..., with a column of answers), or JSON lines of answer",
    )
    add_answering(mme, "the folder of the questions, or shapes[:DISTRIBUTION]")
    mme.set_defaults(run=_evaluate_mme)


def _evaluate_chair(options: argparse.Namespace) -> None:
    from visionsel.multimodal.evaluation import (
        Hallucination,
        chair,
        files,
        read_synonyms,
        shapes_synonyms,
        table,
    )
    from visionsel.multimodal.evaluation.tasks import DEFAULT_PROMPT, chair_task, read_objects, shapes_task

    synonyms = None
    if options.synonyms is not None:
        synonyms = shapes_synonyms() if options.synonyms == "shapes" else read_synonyms(options.synonyms)
    annotated = (options.instances, options.references)
    distribution = shapes_distribution(options)
    if distribution is None and not any(annotated):
        raise ValueError("give the objects of the images: --instances, --references, or (as CHAIR does) both")
    if not options.files:
        if distribution is not None:
            _refuse(options, "instances", "references", "synonyms")
            if options.parser != "nouns":
                raise ValueError(f"shapes have plain names; leave out --parser {options.parser}")
            task = shapes_task("chair", distribution, _scenes(options), options.seed)
        else:
            images = _required(options, "images")
            prompt = options.prompt or DEFAULT_PROMPT
            task = chair_task(images, *annotated, prompt, options.limit, synonyms, options.parser)
        results = answer_task(options, task)
    else:
        objects, _ = read_objects(*annotated, synonyms, options.parser)
        results = {}
        for path in options.files:
            rows = files.read_captions(path)
            ids = [
                int(row["image_id"]) if str(row["image_id"]).isdecimal() else row["image_id"] for row in rows
            ]
            if missing := [image for image in ids if image not in objects]:
                raise ValueError(f"{path}: no annotations of {len(missing)} images, such as {missing[0]}")
            results[str(path)] = chair.score(
                [row["caption"] for row in rows], [objects[image] for image in ids], synonyms, options.parser
            )

    def show(results: Mapping[str, Any]) -> str:
        most = [
            f"  {name}: {', '.join(f'{thing} {count}' for thing, count in list(found)[:8]) or 'nothing'}"
            for name, scores in results.items()
            for found in [scores["invented"].items()]
        ]
        lines = table({name: Hallucination.of(chair=scores) for name, scores in results.items()})
        parser = next(iter(results.values()))["parser"]
        return "\n".join([lines, f"\nparser: {parser}; invented most:", *most])

    _print(options, results, show)


def _evaluate_pope(options: argparse.Namespace) -> None:
    from visionsel.multimodal.evaluation import Hallucination, files, pope, table
    from visionsel.multimodal.evaluation.tasks import pope_task, shapes_task

    distribution = shapes_distribution(options)
    if distribution is not None:
        _refuse(options, "questions")
        results = answer_task(options, shapes_task("pope", distribution, _scenes(options), options.seed))
    elif not options.files:
        images, questions = _required(options, "images"), _required(options, "questions")
        results = answer_task(options, pope_task(images, questions, options.prompt or "{}", options.limit))
    else:
        asked = files.read_questions(_required(options, "questions"))
        labels = [row["label"] for row in asked]
        results = {}
        for path in options.files:
            with _naming(path):
                answers = files.match_answers(files.read_answers(path), asked)
            results[str(path)] = pope.score(answers, labels)
    _print(
        options,
        results,
        lambda found: table({name: Hallucination.of(pope=scores) for name, scores in found.items()}),
    )


def _evaluate_amber(options: argparse.Namespace) -> None:
    from visionsel.multimodal.evaluation import amber, amber_table
    from visionsel.multimodal.evaluation.tasks import amber_task, shapes_task

    distribution = shapes_distribution(options)
    if distribution is not None:
        task = shapes_task("amber", distribution, _scenes(options), options.seed, options.part)
        results = answer_task(options, task)
    elif not options.files:
        folders = _data_and_images(options)
        task = amber_task(*folders, options.part, options.prompt or "{}", options.limit)
        results = answer_task(options, task)
    else:
        data = amber.read(_required(options, "data"))
        results = {}
        for path in options.files:
            with _naming(path):
                results[str(path)] = amber.score(
                    amber.read_responses(path), data, options.part, options.first_word
                )
    _print(options, results, amber_table)


def _evaluate_mme(options: argparse.Namespace) -> None:
    from visionsel.multimodal.evaluation import files, mme, mme_table
    from visionsel.multimodal.evaluation.tasks import mme_task, shapes_task

    distribution = shapes_distribution(options)
    if distribution is not None:
        results = answer_task(options, shapes_task("mme", distribution, _scenes(options), options.seed))
    elif not options.files:
        results = answer_task(
            options, mme_task(*_data_and_images(options), options.prompt or "{}", options.limit)
        )
    else:
        results = {}
        for path in options.files:
            if path.is_dir():
                answers, rows = mme.read_results(path)
            else:
                rows = mme.read_questions(_required(options, "data"))
                with _naming(path):
                    answers = files.match_answers(files.read_answers(path), rows)
            results[str(path)] = mme.score(answers, rows)
    _print(options, results, mme_table)


def _print(options: argparse.Namespace, results: Results, show: Callable[[Mapping[str, Any]], str]) -> None:
    if options.processes.first:
        print(json.dumps(results, indent=2) if options.json else show(results))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors inside say which file they are about."""
    try:
        yield
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: {error}") from error


def _required(options: argparse.Namespace, name: str) -> Path:
    value = getattr(options, name)
    if value is None:
        other = "" if options.files else "; or give FILE to score, or --data shapes"
        raise ValueError(f"--{name} is missing{other}")
    return value


def _scenes(options: argparse.Namespace) -> int:
    return 200 if options.limit is None else options.limit


def _refuse(options: argparse.Namespace, *names: str) -> None:
    if given := [name for name in names if getattr(options, name)]:
        raise ValueError(f"the shapes world has its own data; leave out --{given[0]}")


def _data_and_images(options: argparse.Namespace) -> tuple[Path, Path]:
    """The folders of questions and of images, which may be one."""
    data, images = options.data, options.images
    if data is None and images is None:
        raise ValueError("give FILE to score, or --data and --images (one will do if all is in one folder)")
    return Path(data or images), Path(images or data)
