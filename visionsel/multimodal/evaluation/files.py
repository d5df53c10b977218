"""Files of captions, questions and answers, as the benchmarks release them.

One JSON object a line, or one JSON list of them, whatever the name of the file:

- captions: `image_id`, `caption`; other keys are left alone
- POPE's questions: `question_id`, `image`, `text`, `label`
- answers: `answer`, and `question_id` where they are not in the order of the questions
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visionsel.files import whole_file

__all__ = [
    "match_answers",
    "parse_json",
    "read_answers",
    "read_captions",
    "read_coco",
    "read_questions",
    "read_rows",
    "read_text",
    "write_questions",
]

_QUESTION = re.compile(r"Is there an? (.+) in the iman?ge\?")  # one generator writes "imange"


def read_captions(path: str | Path) -> list[dict[str, Any]]:
    """Rows with `image_id` and `caption`.

    Raises:
        FileNotFoundError: when there is no file.
        ValueError: for what is not JSON, or a row without these keys, with the line.
    """
    return read_rows(path, {"image_id": (int, str), "caption": (str,)})


def read_questions(path: str | Path) -> list[dict[str, Any]]:
    """Rows of POPE's files as they are, and `object`, the name that a question asks for ("" if unknown).

    Raises:
        FileNotFoundError: when there is no file.
        ValueError: for what is not JSON, a row without `image`, `text` and `label`, or another label than
            "yes" and "no".
    """
    rows = read_rows(path, {"image": (str, int), "text": (str,), "label": (str,)})
    for number, row in enumerate(rows, 1):
        if row["label"] not in ("yes", "no"):
            raise ValueError(f"{path}: question {number} has the label {row['label']!r}, not 'yes' or 'no'")
        asked = _QUESTION.match(row["text"])
        row.setdefault("object", asked[1] if asked else "")
    return rows


def write_questions(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Write questions (of `pope.questions`) as POPE does: numbered from 1, one a line."""
    keys = ("image", "text", "label")
    numbered = [{"question_id": i} | {key: row[key] for key in keys} for i, row in enumerate(rows, 1)]
    with whole_file(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in numbered), encoding="utf-8")
    return Path(path)


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """Rows with `answer`.

    Raises:
        FileNotFoundError: when there is no file.
        ValueError: for what is not JSON, or a row without it.
    """
    return read_rows(path, {"answer": (str,)})


def match_answers(answers: Sequence[Mapping[str, Any]], asked: Sequence[Mapping[str, Any]]) -> list[str]:
    """The answer to each question: by `question_id` where all answers have one, by their order otherwise.

    Raises:
        ValueError: when a question has no answer, or an answer no question, or several answers one.
    """
    if all("question_id" in row for row in (*answers, *asked)):
        found = {row["question_id"]: row["answer"] for row in answers}
        ids = [row["question_id"] for row in asked]
        if len(found) != len(answers) or len(set(ids)) != len(ids):
            raise ValueError("some question_id stands twice; each question has one answer")
        if odd := sorted(map(str, found.keys() ^ set(ids))):
            raise ValueError(
                f"answers and questions differ in {len(odd)} question_id, such as {odd[0]}; "
                "answer the questions of this file, all of them"
            )
        return [found[i] for i in ids]
    if len(answers) != len(asked):
        raise ValueError(
            f"{len(answers)} answers to {len(asked)} questions; give one a question, in their order"
        )
    return [row["answer"] for row in answers]


def read_coco(path: str | Path) -> dict[str, Any]:
    """The content of a file of COCO's annotations.

    Raises:
        FileNotFoundError: when there is no file.
        ValueError: when it is not JSON, or has no `annotations`.
    """
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict) or "annotations" not in content:
        raise ValueError(f"{path} has no 'annotations'; give a file of COCO's instances or captions")
    return content


def read_text(path: str | Path) -> str:
    """What a file holds.

    Raises:
        FileNotFoundError: when there is no file.
        ValueError: when it is no text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def read_rows(path: str | Path, keys: Mapping[str, tuple[type, ...]]) -> list[dict[str, Any]]:
    """Rows that have these keys with values of these types: JSON lines, or one JSON list.

    Raises:
        FileNotFoundError: when there is no file.
        ValueError: for what is not JSON, no rows, or a row without these keys, with its place.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        rows = [(f"entry {i}", row) for i, row in enumerate(parse_json(text, f"{path}: the list"), 1)]
    else:  # not splitlines(): JSON allows other separators inside a string
        lines = [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(place, parse_json(line, f"{path}: {place}")) for place, line in lines]
    if not rows:
        raise ValueError(f"{path} is empty; it should have one JSON object a line")
    for place, row in rows:
        for key, types in keys.items():
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, types) or isinstance(value, bool):
                known = isinstance(row, dict) and key not in row
                have = f"the keys {', '.join(row)}" if known else repr(row)[:40]
                kinds = " or ".join(t.__name__ for t in types)
                raise ValueError(f"{path}: {place} needs {key!r} ({kinds}); it has {have}")
    return [row for _, row in rows]


def parse_json(text: str, where: str) -> Any:
    """JSON; `where` is what an error calls it.

    Raises:
        ValueError: for what is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
