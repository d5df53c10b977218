"""MME's subsets on hallucination: existence, count, position and color (Fu et al. 2023).

    rows = mme.read_questions("MME_Benchmark_release_version")
    mme.score(answers, rows)        # total of 800; accuracy and accuracy+ of each subset

Source: arXiv 2306.13394 and the released scorer. Each image has two questions, one with the answer yes and
one with no. A subset scores 100 x accuracy + 100 x accuracy+, where accuracy+ is the share of images whose
two answers are both right: 200 at most, and 50 for a model that always says the same.

Files are read as they are released, whichever of these a folder has for a subset:

- `<subset>/<image>.txt` beside the image, or in `<subset>/questions_answers_YN/` with the images in
  `<subset>/images/`: a line has question and answer, parted by a tab;
- `<subset>.txt`: a line has the image's name, the question and the answer, and in files of results what the
  model said.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from visionsel.files import whole_file
from visionsel.multimodal.evaluation.files import read_text

__all__ = ["SUBSETS", "parse", "read_questions", "read_results", "score", "write_results"]

SUBSETS = ("existence", "count", "position", "color")
_ENDINGS = (".jpg", ".png", ".jpeg", ".JPG", ".PNG", ".JPEG")


def read_questions(folder: str | Path, subsets: Sequence[str] = SUBSETS) -> list[dict[str, Any]]:
    """Questions of the subsets that a folder has.

    Returns:
        rows of `question_id` (from 1), `subset`, `image` (a path from the folder, or a name), `text` and
        `label` ("yes" or "no"); the two of an image stand together.

    Raises:
        FileNotFoundError: when the folder has none of the subsets.
        ValueError: for a line that is none of the module's, another label, or an image that has not two
            questions, with the file and the line.
    """
    rows = [row for row, _ in _read(Path(folder), subsets, columns=(3, 4))]
    return [{"question_id": number, **row} for number, row in enumerate(rows, 1)]


def read_results(
    folder: str | Path, subsets: Sequence[str] = SUBSETS
) -> tuple[list[str], list[dict[str, Any]]]:
    """Answers and questions of a folder of results: `<subset>.txt` with four columns.

    Returns:
        what the model said, and rows as `read_questions` gives them.

    Raises:
        FileNotFoundError, ValueError: as for `read_questions`; or for a line without the model's answer.
    """
    pairs = list(_read(Path(folder), subsets, columns=(4,)))
    rows = [{"question_id": number, **row} for number, (row, _) in enumerate(pairs, 1)]
    return [answer for _, answer in pairs], rows


def write_results(
    rows: Sequence[Mapping[str, Any]], folder: str | Path, answers: Sequence[str] | None = None
) -> Path:
    """Write `<subset>.txt` for each subset, with what the model said where answers are given.

    Tabs and line ends inside a text become blanks.
    """
    said = answers if answers is not None else [None] * len(rows)
    lines: dict[str, list[str]] = {}
    for row, answer in zip(rows, said, strict=True):
        texts = [row["image"], row["text"], row["label"].capitalize(), *([] if answer is None else [answer])]
        line = "\t".join(" ".join(str(text).split()) for text in texts)
        lines.setdefault(row["subset"], []).append(line + "\n")
    for subset, content in lines.items():
        with whole_file(Path(folder) / f"{subset}.txt") as partial:
            partial.write_text("".join(content), encoding="utf-8")
    return Path(folder)


def _read(
    folder: Path, subsets: Sequence[str], columns: tuple[int, ...]
) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows, and what the model said (empty if the file has no such column)."""
    if unknown := [name for name in subsets if name not in SUBSETS]:
        raise ValueError(f"unknown subset {unknown[0]!r}; choose of {', '.join(SUBSETS)}")
    found = False
    for subset in subsets:
        table = folder / f"{subset}.txt"
        parts = [folder / subset / "questions_answers_YN", folder / subset]
        files = next((texts for part in parts if (texts := sorted(part.glob("*.txt")))), [])
        if table.is_file():
            lines = [(place, cells) for place, cells in _lines(table, columns)]
        elif 3 in columns:
            lines = [
                (place, [image, *cells])
                for path in files
                for image in [_image_of(path, folder)]
                for place, cells in _lines(path, (2,))
            ]
        else:
            lines = []
        found = found or bool(lines)
        if len(lines) % 2:
            raise ValueError(f"{lines[-1][0]}: the image {lines[-1][1][0]!r} has one question, not two")
        for number, (place, (image, text, label, *said)) in enumerate(lines):
            other = lines[number ^ 1][1][0]
            if image != other:
                raise ValueError(f"{place}: the image {image!r} needs two questions; beside it is {other!r}")
            label = label.strip().lower()
            if label not in ("yes", "no"):
                raise ValueError(f"{place}: the answer must be Yes or No, got {label!r}")
            yield {"subset": subset, "image": image, "text": text, "label": label}, "".join(said)
    if not found:
        names = ", ".join(f"{name}.txt" for name in subsets)
        folders = "" if 3 not in columns else ", nor folders of these names with texts beside the images"
        raise FileNotFoundError(f"{folder} has none of {names}{folders}")


def _lines(path: Path, columns: tuple[int, ...]) -> Iterator[tuple[str, list[str]]]:
    """The cells of each line that is not empty, with its place."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) not in columns:
            wanted = " or ".join(map(str, columns))
            raise ValueError(
                f"{path}: line {number} has {len(cells)} cells parted by tabs, not {wanted}: {line[:80]!r}"
            )
        yield f"{path}: line {number}", cells


def _image_of(path: Path, folder: Path) -> str:
    """The path from the folder of the image that a file of questions belongs to."""
    places = [path.parent] if path.parent.name != "questions_answers_YN" else [path.parents[1] / "images"]
    found = [place / f"{path.stem}{end}" for place in places for end in _ENDINGS]
    chosen = next((image for image in found if image.is_file()), found[0])
    return chosen.relative_to(folder).as_posix()


def parse(answer: str) -> str:
    """ "yes", "no" or "other", by the released rule: what the first four characters have, in any case.

    So "Not sure" and "Know" are no, and an answer that begins with two blanks or an explanation is other.

    Raises:
        TypeError: for an answer that is no string.
    """
    if not isinstance(answer, str):
        raise TypeError(f"an answer must be a string, got {type(answer).__name__}")
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score(answers: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of answers.

    Args:
        answers: one a question.
        rows: of `read_questions`: `subset`, `image` and `label`, the two questions of an image together.

    Returns:
        `total` of the subsets' scores and the `maximum` that it could be (200 a subset), `accuracy` of all
        questions, `yes_ratio`, and the counts `questions` and `other` (neither yes nor no: wrong); and for
        each subset a dict of `score`, `accuracy`, `accuracy_plus` and `images`.

    Raises:
        ValueError: for no answers, another number of questions, or an image without two questions.
    """
    if isinstance(answers, str):
        raise ValueError("answers must be a list of strings, got one string")
    if len(answers) != len(rows) or not answers:
        raise ValueError(
            f"each answer needs a question, and there must be one; got {len(answers)} answers and "
            f"{len(rows)} questions"
        )
    said = [parse(answer) for answer in answers]
    right: dict[str, list[bool]] = {}
    images: dict[str, list[str]] = {}
    for row, answer in zip(rows, said, strict=True):
        if row["label"] not in ("yes", "no"):
            raise ValueError(f"a label must be 'yes' or 'no', got {row['label']!r}")
        right.setdefault(row["subset"], []).append(answer == row["label"])
        images.setdefault(row["subset"], []).append(row["image"])
    subsets = {}
    for subset, hits in right.items():
        names = images[subset]
        if names[::2] != names[1::2]:
            wrong = next((a for a, b in zip(names[::2], names[1::2], strict=False) if a != b), names[-1])
            raise ValueError(f"{subset}: the image {wrong!r} needs two questions, one after the other")
        accuracy = sum(hits) / len(hits)
        plus = sum(a and b for a, b in zip(hits[::2], hits[1::2], strict=True)) / (len(hits) // 2)
        subsets[subset] = {
            "score": 100 * accuracy + 100 * plus,
            "accuracy": accuracy,
            "accuracy_plus": plus,
            "images": len(hits) // 2,
        }
    return {
        "total": sum(one["score"] for one in subsets.values()),
        "maximum": 200 * len(subsets),
        "accuracy": sum(map(sum, right.values())) / len(rows),
        "yes_ratio": said.count("yes") / len(rows),
        "questions": len(rows),
        "other": said.count("other"),
        **subsets,
    }
