"""What the server knows of each open page: results in memory and files, all of it gone with the page."""

import secrets
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["AGE", "Session", "Sessions"]

AGE = 3600
"""Seconds after which what nobody uses is deleted, for pages whose end was never told."""

FEW = 12


@dataclass(eq=False)
class Session:
    """One open page.

    Attributes:
        folder: for pictures and exports that are shown to it; its name cannot be guessed.
        uploads: files that came from it.
        results: the last result of each tab, by any name.
        used: when, by `time.monotonic`.
    """

    folder: Path
    uploads: set[Path] = field(default_factory=set)
    results: dict[str, Any] = field(default_factory=dict)
    used: float = field(default_factory=time.monotonic)

    def path(self, name: str) -> Path:
        """Where to write a new file; of each name the last few stay, for they may be on the page."""
        self.folder.mkdir(parents=True, exist_ok=True)
        old = sorted(self.folder.glob(f"*/{name}"), key=lambda path: path.stat().st_mtime_ns)
        for one in old[:-FEW]:
            shutil.rmtree(one.parent, ignore_errors=True)
        own = self.folder / secrets.token_hex(8)  # a new address, so that no browser shows an old picture
        own.mkdir()
        return own / name


class Sessions:
    """The open pages of an app.

    Args:
        root: the folder that the app may serve files from.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.kept: set[Path] = set()  # files of the app itself
        self._open: dict[str, Session] = {}
        self._lock = threading.Lock()

    def of(self, request: Any) -> Session:
        """The session of a request of Gradio's."""
        key = str(getattr(request, "session_hash", None))
        self._end_old()
        with self._lock:
            if key not in self._open:
                self._open[key] = Session(self.root / f"session-{secrets.token_hex(16)}")
            session = self._open[key]
            session.used = time.monotonic()
            return session

    def own(self, request: Any, path: str | Path | None) -> None:
        """A file was uploaded by this page; it is deleted with the last page that uploaded it."""
        if path is not None and (found := Path(path).resolve()).is_relative_to(self.root.resolve()):
            self.of(request).uploads.add(found)

    def end(self, request: Any) -> None:
        """The page was closed: its files are deleted."""
        self._end(str(getattr(request, "session_hash", None)))

    def end_all(self) -> None:
        """The server stops."""
        for key in list(self._open):
            self._end(key)

    def _end_old(self) -> None:
        now = time.monotonic()
        with self._lock:
            old = [key for key, session in self._open.items() if now - session.used > AGE]
        for key in old:
            self._end(key)

    def _end(self, key: str) -> None:
        with self._lock:
            session = self._open.pop(key, None)
            if session is None:
                return
            shared = set().union(*(other.uploads for other in self._open.values()))
        shutil.rmtree(session.folder, ignore_errors=True)
        for path in session.uploads - shared - self.kept:
            path.unlink(missing_ok=True)
