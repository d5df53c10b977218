"""Files of JSON lines that a long run writes as it goes; a run that was stopped goes on.

Beside `rows.jsonl` stands `rows.jsonl.settings.json` with what the lines depend on; a file that was made with
other settings is refused.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visionsel.files import write_json

__all__ = ["appending", "own_luck", "resume_rows", "settings_path"]

Row = dict[str, Any]


def settings_path(path: str | Path) -> Path:
    """Where the settings of a file of lines are."""
    return Path(path).with_name(f"{Path(path).name}.settings.json")


def resume_rows(
    path: Path,
    fields: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    complete: Callable[[Row], bool],
    what: str = "the answer to item",
) -> list[Row]:
    """The lines that a file has; a line that is cut off is taken out of it.

    Args:
        path: of the file; it need not exist.
        fields: of each line in order, what it says beside its result.
        settings: what the lines depend on, values of JSON.
        complete: whether what a line has beside its fields is a result.
        what: a line is, for errors: "the answer to item".

    Raises:
        ValueError: for a file without settings or with others, or with lines that are not of these fields.
    """
    content = path.read_bytes() if path.is_file() else b""
    if not content:
        return []
    beside = settings_path(path)
    if not beside.is_file():
        raise ValueError(
            f"{path} exists, and {beside.name} that says how it was made does not; name another file, or "
            "delete it"
        )
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside} is not JSON: {error}; delete it and {path.name}") from error
    wanted = json.loads(json.dumps(settings))
    if found != wanted:
        keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
        differences = "; ".join(f"{key} {found.get(key)!r}, now {wanted.get(key)!r}" for key in keys)
        raise ValueError(
            f"{path} was made with other settings: {differences}. Name another file, or delete it and "
            f"{beside.name}"
        )
    whole = content.rfind(b"\n") + 1
    rows: list[Row] = []
    for number, line in enumerate(content[:whole].decode("utf-8").split("\n")[:-1]):
        try:
            row = json.loads(line)
            own = json.loads(json.dumps(dict(fields[number])))
            kept = {key: row.pop(key) for key in own}
            right = kept == own and complete(row)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError):
            right = False
        if not right:
            raise ValueError(
                f"{path}: line {number + 1} is not {what} {number + 1} of {len(fields)}; the file "
                f"was changed: delete it and {beside.name}, or name another"
            )
        rows.append(json.loads(line))
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return rows


@contextmanager
def appending(path: Path, settings: Mapping[str, Any]) -> Iterator[Callable[[Row], None]]:
    """A function that adds a line to a file; its settings are written first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(dict(settings), settings_path(path))
    with path.open("a", encoding="utf-8", newline="\n", buffering=1) as file:

        def add(row: Row) -> None:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

        yield add


@contextmanager
def own_luck(device: torch.device, *key: int) -> Iterator[None]:
    """Random numbers of torch that belong to a key; those of the caller go on as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
        yield
