"""What a benchmark asks, and how it scores the answers: CHAIR, POPE, AMBER and MME.

    task = pope_task("val2014", "coco_pope_adversarial.json")
    rows = generate_all(model, processor, task.items, "answers.jsonl", said=task.said)
    task.score([row[task.said] for row in rows])

The lines that `generate_all` writes are in the format of the benchmark, so that they can be scored again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from visionsel.data.shapes import CAPTION_PROMPT, Sample, ShapesWorld
from visionsel.data.shapes.benchmarks import Scene, amber_files, mme_rows
from visionsel.multimodal.evaluation import amber, chair, files, mme, pope
from visionsel.multimodal.evaluation.answers import Item
from visionsel.multimodal.evaluation.synonyms import Synonyms, shapes_synonyms

__all__ = [
    "DEFAULT_PROMPT",
    "Task",
    "amber_task",
    "chair_task",
    "mme_task",
    "pope_task",
    "read_objects",
    "shapes_task",
]

DEFAULT_PROMPT = "Please describe this image in detail."
"""Of captions for CHAIR, as in most papers (Huang et al. 2024, OPERA)."""

CAPTION, ANSWER = 512, 16
"""Tokens after which captions are cut, as in most papers, and answers to yes-or-no questions."""
SHAPES_CAPTION = 64
"""The same for the shapes world, whose longest caption has some forty."""

_LAST_SEED = 2**28 - 4


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        items: what to ask.
        score: of the answers to all items, in their order.
        said: what an answer is called in the benchmark's files.
        max_new_tokens: after which an answer is cut where an item does not say.
    """

    items: Sequence[Item]
    score: Callable[[Sequence[str]], dict[str, Any]]
    said: str = "answer"
    max_new_tokens: int = ANSWER

    def cut(self, max_new_tokens: int) -> "Task":
        """The same with another limit, for all items."""
        items = [replace(item, max_new_tokens=None) for item in self.items]
        return replace(self, items=items, max_new_tokens=max_new_tokens)


def read_objects(
    instances: Sequence[str | Path] = (),
    references: Sequence[str | Path] = (),
    synonyms: Synonyms | None = None,
    parser: str = "nouns",
) -> tuple[dict[int, set[str]], dict[int, str]]:
    """The objects of each image as CHAIR defines them, and the names of the images' files.

    Args:
        instances, references: files of COCO's objects and captions.
        synonyms, parser: see `chair.ground_truth`.

    Raises:
        FileNotFoundError, ValueError: for what is no such file.
    """
    objects: dict[int, set[str]] = {}
    names: dict[int, str] = {}
    for kind, paths in (("instances", instances), ("captions", references)):
        for path in paths:
            content = {kind: files.read_coco(path)}
            found = chair.ground_truth(**content, synonyms=synonyms, parser=parser)
            for image, there in found.items():
                objects.setdefault(image, set()).update(there)
            names |= {
                row["id"]: row["file_name"] for row in content[kind].get("images", ()) if "file_name" in row
            }
    return objects, names


def chair_task(
    images: str | Path,
    instances: Sequence[str | Path] = (),
    references: Sequence[str | Path] = (),
    prompt: str = DEFAULT_PROMPT,
    limit: int | None = None,
    synonyms: Synonyms | None = None,
    parser: str = "nouns",
) -> Task:
    """Captions of those images of COCO's files that are in a folder, scored by CHAIR.

    Args:
        images: the folder.
        instances, references: files of COCO's objects and captions; CHAIR takes both.
        prompt: what to ask for.
        limit: the first so many images, in the order of the files.
        synonyms, parser: see `chair.score`.

    Raises:
        FileNotFoundError: when a file is missing, or the folder has none of the images.
        ValueError: for a file that is not COCO's.
    """
    folder = _folder(images)
    objects, names = read_objects(instances, references, synonyms, parser)
    there = [image for image, name in names.items() if (folder / name).is_file()]
    if not there:
        example = f", such as {next(iter(names.values()))}" if names else ""
        raise FileNotFoundError(f"{folder} has none of the {len(names)} annotated images{example}")
    chosen = there[: _check_limit(limit)]
    truth = [objects.get(image, set()) for image in chosen]
    return Task(
        [Item({"image_id": image}, folder / names[image], prompt) for image in chosen],
        lambda captions: chair.score(captions, truth, synonyms, parser),
        "caption",
        CAPTION,
    )


def pope_task(
    images: str | Path, questions: str | Path, prompt: str = "{}", limit: int | None = None
) -> Task:
    """Questions of a file of POPE about the images of a folder.

    Args:
        images: the folder.
        questions: the file.
        prompt: what to say to the model; `{}` stands for the question.
        limit: the questions to the first so many images.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for questions that are not POPE's, or a prompt without `{}`.
    """
    folder = _folder(images)
    rows = _limited(files.read_questions(questions), limit)
    labels = [row["label"] for row in rows]
    return Task(
        [
            Item(
                {"question_id": row.get("question_id", number), "image": row["image"]},
                folder / str(row["image"]),
                _ask(prompt, row["text"]),
            )
            for number, row in enumerate(rows, 1)
        ],
        lambda answers: pope.score(answers, labels),
    )


def amber_task(
    data: str | Path,
    images: str | Path,
    part: str = "all",
    prompt: str = "{}",
    limit: int | None = None,
) -> Task:
    """Captions and questions of AMBER; of an answer the first word counts, see `amber.parse`.

    Args:
        data: the folder of its files.
        images: that of its images.
        part: one of `amber.PARTS`.
        prompt: what to say to the model; `{}` stands for a question. Captions are asked for as AMBER does.
        limit: what is asked about the first so many images.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for files that are not AMBER's, another part, a prompt without `{}`, or nothing to ask.
    """
    queries = amber.read_queries(Path(data) / "query" / "query_all.json")
    return _amber(amber.read(data), _limited(queries, limit), _folder(images), part, prompt)


def _amber(
    data: amber.Amber,
    queries: Sequence[Mapping[str, Any]],
    images: Path | Mapping[str, Any],
    part: str,
    prompt: str,
) -> Task:
    if part not in amber.PARTS:
        raise ValueError(f"unknown part {part!r} of AMBER; choose of {', '.join(amber.PARTS)}")
    if unknown := [row["id"] for row in queries if row["id"] not in data.annotations]:
        raise ValueError(f"{len(unknown)} queries are not annotated, such as {unknown[0]}")
    kinds = {row["id"]: data.annotations[row["id"]]["type"] for row in queries}
    asked = [row for row in queries if kinds[row["id"]] in amber.PARTS[part]]
    if not asked:
        raise ValueError(f"AMBER's part {part!r} has no queries here")
    items = []
    for row in asked:
        caption = kinds[row["id"]] == "generative"
        image = images / row["image"] if isinstance(images, Path) else images[row["image"]]
        text = row["query"] if caption else _ask(prompt, row["query"])
        items.append(Item({"id": row["id"]}, image, text, None if caption else ANSWER))
    ids = [row["id"] for row in asked]
    return Task(
        items,
        lambda said: amber.score(dict(zip(ids, said, strict=True)), data, first_word=True),
        "response",
        CAPTION,
    )


def mme_task(data: str | Path, images: str | Path, prompt: str = "{}", limit: int | None = None) -> Task:
    """Questions of MME's subsets on hallucination.

    Args:
        data: the folder of the questions, see `mme`.
        images: the folder of the images, named as from `data`, in folders of the subsets, or side by side.
        prompt: what to say to the model; `{}` stands for the question, which asks for yes or no already.
        limit: the questions to the first so many images of each subset.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for questions that are not MME's, or a prompt without `{}`.
    """
    folder = _folder(images)
    rows = _limited(mme.read_questions(data), limit, "subset")
    return _mme(rows, lambda row: _mme_image(folder, row), prompt)


def _mme(rows: Sequence[Mapping[str, Any]], image: Callable[[Mapping[str, Any]], Any], prompt: str) -> Task:
    keys = ("question_id", "subset", "image")
    return Task(
        [Item({key: row[key] for key in keys}, image(row), _ask(prompt, row["text"])) for row in rows],
        lambda answers: mme.score(answers, rows),
    )


def _mme_image(folder: Path, row: Mapping[str, Any]) -> Path:
    name, subset = row["image"], row["subset"]
    places = [folder / name, folder / subset / name, folder / subset / "images" / name]
    places.append(folder / Path(name).name)
    return next((path for path in places if path.is_file()), places[0])


def shapes_task(
    name: str,
    distribution: str = "anti",
    size: int = 200,
    seed: int = 0,
    part: str = "all",
) -> Task:
    """A benchmark on scenes of the shapes world, for a model that knows its words: no files are needed.

    Args:
        name: `chair`, `pope` (the scenes' own questions), `amber` or `mme`.
        distribution: of the scenes; in those of `anti` the usual companion of a shape is absent.
        size: how many scenes.
        seed: of the scenes; those above 2**28 - 4 are for choosing heads and for training.
        part: of AMBER.

    Raises:
        ValueError: for another name, distribution or part, or a number out of range.
    """
    if size < 1 or not 0 <= seed <= _LAST_SEED:
        raise ValueError(f"size must be at least 1 and seed from 0 to {_LAST_SEED}, got {size} and {seed}")
    task = _shapes(name, list(ShapesWorld(distribution, seed, size)), f"{distribution}_{seed}", part)
    return replace(task, max_new_tokens=min(task.max_new_tokens, SHAPES_CAPTION))


def _shapes(name: str, samples: Sequence[Sample], place: str, part: str) -> Task:
    names = [f"{place}_{number:06d}" for number in range(len(samples))]
    pictures = {key: sample.image for key, sample in zip(names, samples, strict=True)}
    scenes: list[Scene] = [
        (key, [thing.shape for thing in sample.objects], sample.questions)
        for key, sample in zip(names, samples, strict=True)
    ]
    if name == "chair":
        truth = [set(shapes) for _, shapes, _ in scenes]
        return Task(
            [Item({"image_id": key}, pictures[key], CAPTION_PROMPT) for key in names],
            lambda captions: chair.score(captions, truth, shapes_synonyms()),
            "caption",
            CAPTION,
        )
    if name == "pope":
        asked = [(key, q) for key, _, questions in scenes for q in questions if q.kind == "exist"]
        labels = [question.answer for _, question in asked]
        return Task(
            [
                Item({"question_id": number, "image": key}, pictures[key], question.text)
                for number, (key, question) in enumerate(asked, 1)
            ],
            lambda answers: pope.score(answers, labels),
        )
    if name == "amber":
        content = amber_files(scenes)
        data = amber.Amber({row["id"]: row for row in content["annotations.json"]}, content["relation.json"])
        return _amber(data, content["query/query_all.json"], pictures, part, "{}")
    if name == "mme":
        return _mme(mme_rows(scenes), lambda row: pictures[row["image"]], "{}")
    raise ValueError(f"unknown benchmark {name!r}; choose of chair, pope, amber and mme")


def _folder(path: str | Path) -> Path:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"no folder of images at {path}")
    return Path(path)


def _check_limit(limit: int | None) -> int | None:
    if limit is not None and limit < 1:
        raise ValueError(f"the limit of images must be at least 1, got {limit}")
    return limit


def _limited(
    rows: Iterable[dict[str, Any]], limit: int | None, group: str | None = None
) -> list[dict[str, Any]]:
    """What is asked about the first so many images, of each group by itself."""
    _check_limit(limit)
    seen: dict[Any, set[Any]] = {}
    chosen = []
    for row in rows:
        images = seen.setdefault(row[group] if group else None, set())
        if limit is None or row["image"] in images or len(images) < limit:
            images.add(row["image"])
            chosen.append(row)
    return chosen


def _ask(prompt: str, question: str) -> str:
    if "{}" not in prompt:
        raise ValueError(f"the prompt needs {{}} where the question stands, got {prompt!r}")
    return prompt.replace("{}", question)
