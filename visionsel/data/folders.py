"""Folders that are written once: whole or not at all, with a card that says how."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["write_once"]


def write_once(root: Path, card_name: str, card: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Write a folder under a temporary name beside `root` and rename it, or reuse one with the same card.

    Args:
        root: the folder to make.
        card_name: of the JSON file inside it that holds the card.
        card: the settings that determine the contents.
        write: fills the folder that it is given.

    Returns:
        `root`.

    Raises:
        ValueError: when `root` was written with another card.
        FileExistsError: when `root` holds something else.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        _check_card(root, card_name, card)
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        write(partial)
        (partial / card_name).write_text(json.dumps(card, indent=2) + "\n")
        partial.chmod(0o755)  # mkdtemp makes it private
        if root.exists():
            root.rmdir()  # empty, as checked above
        try:
            os.rename(partial, root)
        except OSError:  # another process was first
            _check_card(root, card_name, card)
            shutil.rmtree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return root


def _check_card(root: Path, card_name: str, card: dict[str, Any]) -> None:
    try:
        found = json.loads((root / card_name).read_text())
    except (OSError, ValueError):
        raise FileExistsError(f"{root} exists and has no {card_name}; name another folder") from None
    if found != card:
        raise ValueError(f"{root} was written with {found}, not {card}; delete it or name another folder")
