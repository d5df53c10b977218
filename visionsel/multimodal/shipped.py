"""The models that ship with the package, for names that promise them, such as `build_segmenter("embedded")`.

They stand on a floor above, so nothing here imports them: they are looked up by name when one is asked for.
This is the only place that looks up.
"""

from importlib import import_module
from typing import Any

__all__ = ["shipped"]


def shipped(loader: str) -> Any:
    """What a loader of `visionsel.embedded` gives.

    Args:
        loader: its name, such as `"load_segmenter"`.
    """
    return getattr(import_module("visionsel.embedded"), loader)()
