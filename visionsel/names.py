"""Names that are nearly right, for the messages about those that are wrong."""

import difflib
from collections.abc import Iterable

__all__ = ["near"]


def near(name: str, names: Iterable[str]) -> str:
    """`"; near it are A, B"` for the end of a message; empty where nothing is near.

    Args:
        name: that is unknown.
        names: that are known.
    """
    found = difflib.get_close_matches(name, list(names), n=4, cutoff=0.6)
    return f"; near it {'is' if len(found) == 1 else 'are'} {', '.join(found)}" if found else ""
