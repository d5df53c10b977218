"""Files of JSON lines that a long run writes as it goes; a run that was stopped goes on.

Beside `rows.jsonl` stands `rows.jsonl.settings.json` with what the lines depend on; a file that was made with
other settings is refused. Several processes write a file each, `rows.jsonl.part-0` and so on, with the number
of each line; the first one puts them together at the end. What is there goes on with any number of processes.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visionsel.files import whole_file, write_json
from visionsel.processes import ALONE, Processes

__all__ = ["finish_rows", "own_luck", "settings_path"]

Row = dict[str, Any]


def settings_path(path: str | Path) -> Path:
    """Where the settings of a file of lines are."""
    return Path(path).with_name(f"{Path(path).name}.settings.json")


def finish_rows(
    path: Path,
    fields: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    complete: Callable[[Row], bool],
    batches: Sequence[tuple[int, int]],
    measure: Callable[[int, int], Sequence[Row]],
    *,
    what: str = "the answer to item",
    processes: Processes = ALONE,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """All lines of a file; those that it has already are not made again, and the others are added.

    Args:
        path: of the file; it need not exist. A last line that is cut off is dropped.
        fields: of each line in order, what it says beside its result.
        settings: what the lines depend on, values of JSON.
        complete: whether what a line has beside its fields is a result.
        batches: `(start, stop)` of the lines that are made together; a batch that was cut is made again.
        measure: the results of a batch.
        what: a line is, for errors: "the answer to item".
        processes: that share the batches; all of them return all lines.
        progress: called with the number of lines that are done and of all, first and after each line; of
            several processes, each counts the lines that are its own to make.

    Raises:
        ValueError: for a file without settings or with others, or with lines that are not of these fields.
    """
    check = _Check(path, fields, complete, what)
    done = dict(enumerate(_read(path, settings, check)))
    parts = _parts(path)
    for part in parts:
        _check_settings(part, path, settings)
        done |= dict(_lines(part, partial(check.numbered, part)))
    known = processes.gather((done, bool(parts)))
    done = {number: row for one, _ in known for number, row in one.items()}
    together = processes.count > 1 or any(there for _, there in known)
    if len(done) == len(fields) and not any(there for _, there in known):
        (progress or _silent)(len(done), len(fields))
        _cut(path)
        return [done[number] for number in range(len(fields))]

    pending = [one for one in batches if any(number not in done for number in range(*one))]
    own = pending[processes.rank :: processes.count]
    count, total = len(done), len(fields)
    if processes.count > 1:
        count, total = 0, sum(number not in done for batch in own for number in range(*batch))
    report = progress if progress and total else _silent
    report(count, total)
    if processes.first:
        write_json(dict(settings), settings_path(path))
    processes.gather(None)
    if not settings_path(path).exists():  # another machine, with files of its own
        write_json(dict(settings), settings_path(path))
    new: dict[int, Row] = {}
    target = path.with_name(f"{path.name}.part-{processes.rank}") if together else path
    with _appending(target) as add:
        for start, stop in own:
            results = measure(start, stop)
            for number in range(start, stop):
                if number in done:
                    continue
                new[number] = done[number] = {**fields[number], **results[number - start]}
                add([number, new[number]] if together else new[number])
                count += 1
                report(count, total)
    for others in processes.gather(new):
        done |= others
    rows = [done[number] for number in range(len(fields))]
    if together:
        if processes.first:
            _write(rows, path)
        processes.gather(None)
        for part in {*parts, target}:
            part.unlink(missing_ok=True)
    return rows


def _silent(done: int, total: int) -> None:
    """No progress is shown."""


class _Check:
    """Whether lines are those of this run."""

    def __init__(
        self, path: Path, fields: Sequence[Mapping[str, Any]], complete: Callable[[Row], bool], what: str
    ) -> None:
        self.path, self.fields, self.complete, self.what = path, fields, complete, what

    def row(self, file: Path, number: int, line: str) -> Row:
        """The line of this number, from 0 on."""
        try:
            row = json.loads(line)
            own = json.loads(json.dumps(dict(self.fields[number])))
            kept = {key: row.pop(key) for key in own}
            right = kept == own and self.complete(row)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError):
            right = False
        if not right:
            raise ValueError(
                f"{file}: line {number + 1} is not {self.what} {number + 1} of {len(self.fields)}; the file "
                f"was changed: delete it and {settings_path(self.path).name}, or name another"
            )
        return json.loads(line)

    def numbered(self, file: Path, number: int, line: str) -> tuple[int, Row]:
        """A line of a part, which says its number."""
        try:
            index, row = json.loads(line)
            if not isinstance(index, int) or not 0 <= index < len(self.fields):
                raise ValueError
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{file}: line {number + 1} is not a numbered line of {self.path.name}; the file was "
                "changed: delete it"
            ) from error
        return index, self.row(file, index, json.dumps(row))


def _parts(path: Path) -> list[Path]:
    """What processes wrote that have not ended well."""
    if not path.parent.is_dir():
        return []
    return sorted(one for one in path.parent.iterdir() if one.name.startswith(f"{path.name}.part-"))


def _read(path: Path, settings: Mapping[str, Any], check: _Check) -> list[Row]:
    """The whole lines that the file has."""
    if not path.is_file() or not path.stat().st_size:
        return []
    _check_settings(path, path, settings)
    return _lines(path, partial(check.row, path))


def _check_settings(file: Path, path: Path, settings: Mapping[str, Any]) -> None:
    """Whether a file that exists was made as the one at `path` would be."""
    beside = settings_path(path)
    if not beside.is_file():
        raise ValueError(
            f"{file} exists, and {beside.name} that says how it was made does not; name another file, or "
            "delete it"
        )
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{beside} is not JSON: {error}; delete it and {file.name}") from error
    wanted = json.loads(json.dumps(settings))
    if found != wanted:
        keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
        differences = "; ".join(f"{key} {found.get(key)!r}, now {wanted.get(key)!r}" for key in keys)
        raise ValueError(
            f"{file} was made with other settings: {differences}. Name another file, or delete it and "
            f"{beside.name}"
        )


def _lines(path: Path, read: Callable[[int, str], Any]) -> list[Any]:
    """What `read` makes of the number and the text of each whole line."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].decode("utf-8").split("\n")[:-1]
    return [read(number, line) for number, line in enumerate(lines)]


def _cut(path: Path) -> None:
    """Take a last line that is not whole out of a file."""
    content = path.read_bytes() if path.is_file() else b""
    if (whole := content.rfind(b"\n") + 1) < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


@contextmanager
def _appending(path: Path) -> Iterator[Callable[[Any], None]]:
    """A function that adds a line to a file, behind its last whole one."""
    _cut(path)
    with path.open("a", encoding="utf-8", newline="\n", buffering=1) as file:

        def add(line: Any) -> None:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

        yield add


def _write(rows: Sequence[Row], path: Path) -> None:
    with whole_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def own_luck(device: torch.device, *key: int) -> Iterator[None]:
    """Random numbers of torch that belong to a key; those of the caller go on as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
        yield
