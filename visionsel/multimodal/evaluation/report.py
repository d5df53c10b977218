"""A table of what methods do to hallucination, which always shows what such numbers are bought with.

CHAIR falls when captions get shorter or name less, POPE's F1 rises when a model says yes more often: so
recall and length stand beside CHAIR, and the share of yes beside accuracy and F1, for each method.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Hallucination", "table"]


@dataclass(frozen=True)
class Hallucination:
    """What one method did; None where it was not measured.

    Attributes:
        chair_i, chair_s: shares of invented mentions, and of captions with one.
        object_recall: share of the objects that the captions mention.
        length: words a caption.
        accuracy, f1: of the answers to yes-or-no questions.
        yes_ratio: share of yes among them.
    """

    chair_i: float | None = None
    chair_s: float | None = None
    object_recall: float | None = None
    length: float | None = None
    accuracy: float | None = None
    f1: float | None = None
    yes_ratio: float | None = None

    @classmethod
    def of(
        cls, chair: Mapping[str, Any] | None = None, pope: Mapping[str, Any] | None = None
    ) -> "Hallucination":
        """From what `chair.score` and `pope.score` return.

        Raises:
            ValueError: for neither, or scores that lack recall, length or the share of yes.
        """
        if chair is None and pope is None:
            raise ValueError("give the scores of captions, of answers, or both")
        values: dict[str, float] = {}
        for name, scores, keys in (
            ("chair", chair, {"chair_i": "", "chair_s": "", "recall": "object_recall", "length": ""}),
            ("pope", pope, {"accuracy": "", "f1": "", "yes_ratio": ""}),
        ):
            if scores is None:
                continue
            if missing := [key for key in keys if key not in scores]:
                raise ValueError(f"{name} has no {', '.join(missing)}; give all that {name}.score returns")
            values |= {field or key: float(scores[key]) for key, field in keys.items()}
        return cls(**values)

    def to_dict(self) -> dict[str, float | None]:
        """All columns as plain numbers."""
        return asdict(self)


_COLUMNS = {
    "chair_i": "CHAIR_I",
    "chair_s": "CHAIR_S",
    "object_recall": "recall",
    "length": "words",
    "accuracy": "accuracy",
    "f1": "F1",
    "yes_ratio": "yes",
}


def table(methods: Mapping[str, Hallucination]) -> str:
    """A line for each method, with all columns; "-" where something was not measured.

    Raises:
        ValueError: for no methods.
    """
    if not methods:
        raise ValueError("there is no method to show")
    rows = [["method", *_COLUMNS.values()]]
    for name, scores in methods.items():
        rows.append([name, *(_show(key, getattr(scores, key)) for key in _COLUMNS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _show(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if key == "length" else f"{value:.3f}"
