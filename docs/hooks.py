"""What the site needs beyond Markdown, so that the pages in this folder stay readable where they lie.

Links to files of the repository outside this folder become addresses, code blocks lose the word that keeps
them from being tested, and the help of the command is printed where a comment asks for it.
"""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
HELP = "<!-- the help of every verb -->"
WIDTH = 80


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with the text of each page."""
    markdown = re.sub(r"^(```\w+) notest$", r"\1", markdown, flags=re.MULTILINE)
    if HELP in markdown:
        markdown = markdown.replace(HELP, "\n\n".join(command_help()))
    here = Path(page.file.abs_src_path).parent
    return linked(markdown, here, Path(config.docs_dir), config.extra["repository"])


def linked(markdown: str, here: Path, docs: Path, repository: str) -> str:
    """Text in which links from the folder `here` to files outside `docs` are addresses in the repository.

    A link to nothing stays as it is, and mkdocs warns of it. So does a picture, which would come from another
    host.
    """

    def address(match: re.Match[str]) -> str:
        path, anchor = match[2], match[3] or ""
        target = (here / path).resolve()
        if not target.exists() or target.is_relative_to(docs.resolve()) or not target.is_relative_to(ROOT):
            return match[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"{match[1]}({repository}/{kind}/main/{target.relative_to(ROOT).as_posix()}{anchor})"

    return re.sub(r"((?<!!)\[[^\[\]]*\])\((\.\./[^()\s#]+)(#[^()\s]*)?\)", address, markdown)


def command_help() -> Iterator[str]:
    """A heading and the help of `visionsel` and of each of its verbs."""
    from visionsel.cli import _parser

    with mock.patch.dict(os.environ, {"COLUMNS": str(WIDTH), "NO_COLOR": "1"}):
        for parser in _with_verbs(_parser()):
            yield f"## {parser.prog}\n\n```text\n{parser.format_help().rstrip()}\n```"


def _with_verbs(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _with_verbs(verb)
