"""Files that cannot be used: named, listed in `bad_samples.csv`, and replaced or left out.

A run stops at a bad file by default, with its name. With `on_bad: report` it goes on: in training a bad
sample is replaced by the next good one, always the same, whichever process meets it and whether or not the
run was resumed; evaluation reads its files once before it starts and leaves the bad ones out, so that no good
one counts twice.
"""

import csv
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from visionsel.data.imagefolder import open_image

__all__ = [
    "BadSampleError",
    "ReplaceBadSamples",
    "bad_samples_file",
    "good_samples",
    "open_sample",
    "read_bad_samples",
    "record_bad_sample",
]

COLUMNS = ("file", "error")


class BadSampleError(ValueError):
    """A sample that cannot be used.

    Args:
        message: what is wrong, with the file's name.
        file: its name.
    """

    def __init__(self, message: str, file: str | Path = "") -> None:
        super().__init__(message)
        self.file = str(file)


def open_sample(path: str | Path) -> Image.Image:
    """Read an image as RGB; for `ImageFolder(loader=open_sample)` and other datasets.

    Raises:
        BadSampleError: when it cannot be read.
    """
    try:
        return open_image(path)
    except (ValueError, OSError) as error:
        raise BadSampleError(str(error), path) from error


class ReplaceBadSamples(Dataset[Any]):
    """A dataset that gives the next good sample in place of a bad one, and lists the bad one.

    The replacement depends on the files only. Wrap it in `SeededDataset`, not the other way round: then the
    replacement has the augmentation of the place that it takes, and the other samples keep theirs.

    Args:
        dataset: raises `BadSampleError` for a sample that cannot be used, before it draws random numbers.
        report: the CSV to list them in.

    Raises:
        ValueError: on reading, when no sample is good.
    """

    def __init__(self, dataset: Dataset[Any], report: str | Path) -> None:
        self.dataset = dataset
        self.report = Path(report)
        self.bad: set[int] = set()  # of this process; saves decoding them again

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        count = len(self)
        for step in range(count):
            candidate = (index + step) % count
            if candidate in self.bad:
                continue
            try:
                return self.dataset[candidate]
            except BadSampleError as error:
                self.bad.add(candidate)
                record_bad_sample(self.report, error)
        raise _none_left(count, self.report)


def good_samples(read: Callable[[int], Any], count: int, report: str | Path) -> list[int]:
    """Read every sample once, list the bad ones and return the positions of the others.

    Args:
        read: the sample of a position; raises `BadSampleError`.
        count: of the samples.
        report: the CSV to list the bad ones in.

    Raises:
        ValueError: when there is none left.
    """
    good = []
    for index in range(count):
        try:
            read(index)
        except BadSampleError as error:
            record_bad_sample(report, error)
        else:
            good.append(index)
    if not good:
        raise _none_left(count, report)
    return good


def _none_left(count: int, report: str | Path) -> ValueError:
    # the report goes with the folder of a run that did not start: say one of its lines
    first = next(iter(read_bad_samples(report).values()), "")
    return ValueError(f"all {count} samples are bad; the first of {report}: {first}")


def record_bad_sample(report: str | Path, error: BadSampleError) -> None:
    """Append a file and what is wrong with it, once; safe from several processes."""
    report = Path(report)
    report.parent.mkdir(parents=True, exist_ok=True)
    with report.open("a+", newline="") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # released when the file is closed
        stream.seek(0)
        known = {row["file"] for row in csv.DictReader(stream)}
        if error.file in known:
            return
        stream.seek(0, os.SEEK_END)
        writer = csv.writer(stream)
        if not known and stream.tell() == 0:
            writer.writerow(COLUMNS)
        writer.writerow([error.file, " ".join(str(error).split())])


def read_bad_samples(report: str | Path) -> dict[str, str]:
    """Files and errors of a report; empty where there is no report."""
    report = Path(report)
    if not report.is_file():
        return {}
    with report.open(newline="") as stream:
        return {row["file"]: row["error"] for row in csv.DictReader(stream)}


def bad_samples_file(output: str) -> str:
    """Where the bad samples of a run are listed: for the command lines, which know its folder."""
    return str(Path(output) / "bad_samples.csv")
