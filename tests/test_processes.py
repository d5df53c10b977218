"""Several processes give the lines of one, however often they are killed and with however many they go on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionsel.cli import main
from visionsel.multimodal.evaluation.resume import finish_rows, settings_path
from visionsel.processes import ALONE, Processes, join_processes

LINES = 11
FIELDS = [{"id": number, "who": "ü"} for number in range(LINES)]
SETTINGS = {"model": "none", "seed": 3}


@dataclass
class Meeting:
    """Where threads wait for one another, in the place of torch.distributed."""

    barrier: threading.Barrier
    values: list[Any]


@dataclass(frozen=True)
class Thread(Processes):
    """A process of a test."""

    meeting: Meeting | None = field(default=None, compare=False)

    def gather(self, value: Any) -> list[Any]:
        if self.count == 1:
            return [value]
        assert self.meeting is not None
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait(20)
        values = list(self.meeting.values)
        self.meeting.barrier.wait(20)  # nobody overwrites what another has not read
        return values


class Killed(Exception):
    """The process ends here."""


def run_together(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    """What each of `count` processes returns; one that raises takes the others with it, as torchrun does."""
    meeting = Meeting(threading.Barrier(count), [None] * count)
    results: list[Any] = [None] * count

    def run(rank: int) -> None:
        try:
            results[rank] = work(Thread(rank, count, meeting))
        except Exception as error:
            results[rank] = error
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, threading.BrokenBarrierError | Killed):
            raise result
    return results


def finish(
    path: Path,
    count: int,
    batch: int,
    life: int | None = None,
    asked: list[int] | None = None,
    last: threading.Barrier | None = None,
) -> list[Any]:
    """A run of `count` processes; each is killed at the line that is its number `life`.

    The first that is killed takes the others with it wherever they are, or, with a barrier `last`, only once
    all of them are as far.
    """

    def work(processes: Processes) -> list[dict[str, Any]]:
        def measure(start: int, stop: int) -> list[dict[str, Any]]:
            (asked if asked is not None else []).extend(range(start, stop))
            return [{"result": number**2} for number in range(start, stop)]

        made: list[int] = []

        def progress(done: int, total: int) -> None:
            assert 0 <= done <= total <= LINES
            made.append(done)
            if life is not None and len(made) > life:
                if last is not None:
                    last.wait(20)
                raise Killed

        batches = [(start, min(start + batch, LINES)) for start in range(0, LINES, batch)]
        return finish_rows(
            path, FIELDS, SETTINGS, complete, batches, measure, processes=processes, progress=progress
        )

    return run_together(count, work)


def complete(row: dict[str, Any]) -> bool:
    return set(row) == {"result"}


ROWS = [{**FIELDS[number], "result": number**2} for number in range(LINES)]
CONTENT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@settings(max_examples=60, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5), st.binary(max_size=3)), max_size=4),
    batch=st.integers(1, 4),
    last=st.integers(1, 4),
)
def test_whoever_is_killed_the_file_ends_as_that_of_one_process(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[int, int, bytes]], batch: int, last: int
) -> None:
    path = tmp_path_factory.mktemp("runs") / "rows.jsonl"
    for count, life, torn in runs:
        finish(path, count, batch, life)
        for file in {*path.parent.glob("rows.jsonl*")} - {settings_path(path)}:
            file.write_bytes(file.read_bytes() + torn.replace(b"\n", b""))
    asked: list[int] = []
    there = lines_of(path)
    assert finish(path, last, batch, asked=asked) == [ROWS] * last
    assert path.read_bytes() == CONTENT
    assert sorted(file.name for file in path.parent.iterdir()) == ["rows.jsonl", settings_path(path).name]
    assert len(asked) == len(set(asked))
    for start in range(0, LINES, batch):
        lines = set(range(start, min(start + batch, LINES)))
        assert lines.isdisjoint(asked) if lines <= there else lines <= set(asked)


def lines_of(path: Path) -> set[int]:
    """The numbers of the whole lines in a file and in its parts."""
    found = set()
    for file in {*path.parent.glob("rows.jsonl*")} - {settings_path(path)}:
        for line in file.read_bytes().split(b"\n")[:-1]:
            row = json.loads(line)
            found.add(row[0] if isinstance(row, list) else row["id"])
    return found


def test_parts_of_other_settings_or_of_another_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    finish(path, 2, 2, 2, last=threading.Barrier(2))
    parts = sorted(tmp_path.glob("rows.jsonl.part-*"))
    assert [part.name for part in parts] == ["rows.jsonl.part-0", "rows.jsonl.part-1"]
    before = [part.read_bytes() for part in parts]
    with pytest.raises(ValueError, match=r"part-0 was made with other settings: seed 3, now 4"):
        finish_rows(path, FIELDS, {**SETTINGS, "seed": 4}, complete, [(0, LINES)], lambda *_: [])
    for wrong in (b"3\n", b"[99, {}]\n", b'[true, {"id": 1}]\n', b"no json\n"):
        parts[1].write_bytes(before[1] + wrong)
        with pytest.raises(ValueError, match=r"part-1: line \d+ is not"):
            finish(path, 1, 2)
    parts[1].write_bytes(before[1])
    settings_path(path).unlink()
    with pytest.raises(ValueError, match=r"part-0 exists, and rows.jsonl.settings.json .* does not"):
        finish(path, 1, 2)
    assert [part.read_bytes() for part in parts] == before


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_items_are_shared_in_their_order(count: int) -> None:
    for size in range(7):
        did: list[int] = []
        shared = run_together(
            count, lambda team, size=size, did=did: team.share(range(size), lambda n: did.append(n) or n * n)
        )
        assert shared == [[number**2 for number in range(size)]] * count
        assert sorted(did) == list(range(size))


def test_an_ordinary_program_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_processes() is ALONE
    assert ALONE.first
    assert ALONE.gather("x") == ["x"]


LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
POPE = ["evaluate", "pope", "--data", "shapes", "--device", "cpu", "--json", "--out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "evaluation",
    [
        "pope --data shapes --limit 5 --batch-size 3 --device cpu --out",
        "embedded --models classifier_nat classifier_biformer --size 10",
        "pruning --methods random fastv --keep 0.5 --size 4 --device cpu --csv",
    ],
    ids=lambda words: words.split()[0],
)
def test_torchrun_writes_and_prints_what_one_process_does(
    evaluation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line in two real processes: the same file, one table, once."""
    torch.set_num_threads(1)  # as ENVIRONMENT has it: sums in another order may end otherwise
    command = ["evaluate", *evaluation.split()]
    writes = command[-1] in ("--out", "--csv")
    one, two = ([str(tmp_path / name)] if writes else [] for name in ("one", "two"))
    status = main([*command, *one, "--json"])
    expected = without_times(json.loads(capsys.readouterr().out))
    run = subprocess.run(
        [*LAUNCHER, "-m", "visionsel", *command, *two, "--json"],
        **{"capture_output": True, "text": True, "env": ENVIRONMENT, "timeout": 300},
    )
    assert bool(run.returncode) == bool(status), run.stderr  # goals are missed on ten scenes
    assert without_times(json.loads(run.stdout)) == expected
    for path in two:
        found, wanted = Path(path).read_bytes(), Path(*one).read_bytes()
        assert found.count(b"\n") == wanted.count(b"\n")
        assert found == wanted or command[-1] == "--csv"  # which has times


def without_times(found: Any) -> Any:
    """Results less the seconds that they took."""
    if isinstance(found, list):
        return [{key: value for key, value in row.items() if "seconds" not in key} for row in found]
    return found


@pytest.mark.slow
def test_one_process_finishes_what_two_that_were_killed_began(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL of torchrun and both of its processes, with some answers written."""
    torch.set_num_threads(1)  # as ENVIRONMENT has it: sums in another order may end otherwise
    limits = ["--limit", "12", "--batch-size", "1"]
    path = tmp_path / "killed.jsonl"
    with subprocess.Popen(
        [*LAUNCHER, "-m", "visionsel", *POPE, str(path), *limits],
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL},
        **{"env": ENVIRONMENT, "start_new_session": True},
    ) as run:
        deadline = time.monotonic() + 240
        while not any(b"\n" in part.read_bytes() for part in tmp_path.glob("killed.jsonl.part-*")):
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for child in children(run.pid):
            os.kill(child, signal.SIGKILL)
        run.kill()
    there = b"".join(part.read_bytes() for part in tmp_path.glob("killed.jsonl.part-*")).count(b"\n")
    assert there > 0
    assert not path.exists()
    assert main([*POPE, str(path), *limits]) == 0
    resumed = json.loads(capsys.readouterr().out)
    assert main([*POPE, str(tmp_path / "whole.jsonl"), *limits]) == 0
    assert json.loads(capsys.readouterr().out) == resumed
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert there < len(path.read_bytes().splitlines())
    assert not list(tmp_path.glob("*.part-*"))


def children(pid: int) -> list[int]:
    """The processes that a process started (of Linux)."""
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
