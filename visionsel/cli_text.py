"""How the `visionsel` command shows help, tables, progress and errors, and names the files it writes."""

import argparse
import errno
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import get_terminal_size
from typing import Any

from tqdm import tqdm

__all__ = [
    "Parser",
    "Progress",
    "add_markdown",
    "add_verb",
    "add_verbs",
    "check_form",
    "count",
    "output_file",
    "print_table",
    "report_error",
    "table",
    "writing",
]

LONGEST = 1000  # characters of an error: a list of all methods fits, one of all weights does not
# what is raised on purpose; anything else is named by its type
EXPECTED = (ValueError, OSError, ImportError, NotImplementedError, RuntimeError, TypeError, MemoryError)


class Parser(argparse.ArgumentParser):
    """A parser whose help keeps the lines of its description and its examples."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        named.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*positional, **named)


def add_verb(
    verbs: Any, name: str, common: argparse.ArgumentParser, help: str, *examples: str
) -> argparse.ArgumentParser:
    """Add a verb whose help says what it does and ends with examples.

    Args:
        verbs: of `add_verbs`.
        name: of the verb.
        common: with the options of every verb.
        help: what it does, in a line.
        examples: command lines that parse.
    """
    made: argparse.ArgumentParser = verbs.add_parser(
        name, parents=[common], help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=lines(examples)
    )
    return made


def lines(examples: Sequence[str]) -> str:
    """Examples below one another, as an epilog."""
    return "\n  ".join([f"example{'s' if len(examples) > 1 else ''}:", *examples])


def add_verbs(parser: argparse.ArgumentParser, dest: str, **named: Any) -> Any:
    """What verbs are added to; without one, the help goes to stderr and the exit status is 2."""
    parser.set_defaults(run=lambda options: parser.exit(2, parser.format_help()))
    return parser.add_subparsers(dest=dest, **named)


def add_markdown(parser: argparse.ArgumentParser) -> None:
    """Add `--markdown`, beside the `--json` of every verb."""
    parser.add_argument(
        "--markdown", action="store_true", default=argparse.SUPPRESS, help="print a table of Markdown"
    )


def check_form(options: argparse.Namespace) -> None:
    """Refuse two forms of one result.

    Raises:
        ValueError: for `--json` with `--markdown`.
    """
    if options.json and options.markdown:
        raise ValueError("--json and --markdown are two forms of one result; choose one")


def count(text: str) -> int:
    """An option that is a number of things: 1, 2, ..."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def output_file(*endings: str) -> Callable[[str], Path]:
    """An option that names a file to write, checked before the work begins.

    Args:
        endings: that it may have, such as `".png"`; none: those of the pictures that Pillow writes.
    """

    def read(text: str) -> Path:
        allowed = endings
        if not allowed:
            from PIL import Image

            known = Image.registered_extensions()
            allowed = tuple(ending for ending, kind in known.items() if kind in Image.SAVE)
        path = Path(text)
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
        if path.suffix.lower() not in allowed:
            some = [ending for ending in (".png", ".jpg", ".webp") if ending in allowed] or allowed
            raise argparse.ArgumentTypeError(f"{text!r} must end in one of {', '.join(endings or some)}")
        return path

    return read


@contextmanager
def writing(path: Path, alone: bool = True) -> Iterator[None]:
    """Errors of the disk name the file that the user named, not a temporary one or none.

    Args:
        path: of the file.
        alone: whether nothing else is read or written inside.

    Raises:
        OSError: where one is raised inside.
    """
    try:
        yield
    except OSError as error:
        if not alone and (error.errno is None or not _is_of(path, error.filename)):
            raise
        why = error.strerror or error
        if isinstance(error, FileExistsError | NotADirectoryError):
            why = f"{error.filename} is no folder"
        raise OSError(f"cannot write {path}: {why}") from error


def _is_of(path: Path, named: Any) -> bool:
    """Whether an error that names this file, or none, is about what is written at `path`."""
    if named is None:
        return True
    file = Path(named)
    beside = file.parent == path.parent and path.name in file.name  # a temporary one, or of settings
    return beside or file in path.parents


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool = False) -> None:
    """Print a `table`."""
    print(table(header, rows, markdown))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Columns, each as wide as its widest cell; or a table of Markdown."""
    if markdown:
        cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
        cells.insert(1, ["---"] * len(header))
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    )


class Progress:
    """How far long work is, on stderr: a bar on a terminal; elsewhere a line for each step that has a name.

        with Progress("images") as progress:
            work(progress=progress.count)  # or progress.say

    Args:
        name: of the bar.
        step: whether the name is told, once, where there is no bar.
        shown: whether anything is; of several processes one does.
    """

    def __init__(self, name: str = "", step: bool = False, shown: bool = True) -> None:
        self.name = name
        self.shown = shown
        self.bar: Any = None
        self.stepwise = False
        if step and not sys.stderr.isatty():
            self.say(name)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self.bar is None:
            return
        if self.stepwise and kind is None:  # the last step has ended
            self.bar.update(self.bar.total - self.bar.n)
        self.bar.close()

    def count(self, done: int, total: int) -> None:
        """So many are done."""
        if self.bar is None:
            self.bar = tqdm(
                desc=self.name or None,
                total=total,
                initial=done,
                file=sys.stderr,
                disable=None if self.shown else True,  # None: where stderr is no terminal
                ncols=min(100, get_terminal_size().columns) - 1,
                nrows=2,  # tqdm would hide the bar of a terminal that does not know its size
            )
        self.bar.update(done - self.bar.n)

    def go_on(self, done: int, total: int) -> None:
        """As `count`, for work of which some may be there already, which the first call tells."""
        if self.bar is None and done:
            self.say(f"{done} of {total} were there already")
        self.count(done, total)

    def say(self, text: str) -> None:
        """What is done next: `"[2/9] fastv"` is a step of the bar, other words stand above it."""
        step = re.fullmatch(r"\[(\d+)/(\d+)\] (.*)", text)
        if not self.shown:
            return
        if not sys.stderr.isatty():
            print(text, file=sys.stderr, flush=True)
        elif step is None:
            tqdm.write(text, file=sys.stderr)
        else:
            number, total, name = int(step[1]), int(step[2]), step[3]
            self.name, self.stepwise = name, True
            self.count(number - 1, total)
            self.bar.set_description(name)


def report_error(options: argparse.Namespace, error: Exception) -> None:
    """One line on stderr; with `--debug` the traceback."""
    with suppress(OSError, AttributeError):  # what was printed stands above it, where both are one file
        sys.stdout.flush()
    if options.debug:
        traceback.print_exception(error)
    else:
        verbs = (options.verb, getattr(options, "evaluation", None), getattr(options, "benchmark", None))
        print(f"visionsel {' '.join(filter(None, verbs))}: {_in_a_line(error)}", file=sys.stderr)


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        if error.errno == errno.ENOSPC and not error.filename:
            text = f"cannot write what was found: {text}"
    if not isinstance(error, EXPECTED) or not text:
        text = f"{type(error).__name__}: {text or 'no words'}; --debug shows where"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ...; --debug shows all"
