"""Tables of what methods do to hallucination, which always show what such numbers are bought with.

CHAIR falls when captions get shorter or name less, POPE's F1 rises when a model says yes more often: so
recall (AMBER's Cover) and length stand beside CHAIR, and the share of yes beside accuracy and F1, for each
method.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Hallucination", "amber_table", "mme_table", "table"]


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
    return _write(_COLUMNS, {name: scores.to_dict() for name, scores in methods.items()})


def amber_table(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each method, from `generative` and `discriminative` scores of AMBER.

    Args:
        methods: what `amber.generative` and `amber.discriminative` return, under these names; one may be
            missing.

    Raises:
        ValueError: for no methods.
    """
    rows = {}
    for name, scores in methods.items():
        answers = scores.get("discriminative", {})
        parts = {f"{part}_f1": answers[part]["f1"] for part in _AMBER_PARTS if part in answers}
        rows[name] = {**scores.get("generative", {}), **answers, **parts}
    return _write(_AMBER_COLUMNS, rows)


def mme_table(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each method, from what `mme.score` returns.

    Raises:
        ValueError: for no methods.
    """
    rows = {
        name: {**scores} | {subset: scores[subset]["score"] for subset in _MME_SUBSETS if subset in scores}
        for name, scores in methods.items()
    }
    return _write(_MME_COLUMNS, rows)


_AMBER_PARTS = ("existence", "attribute", "relation")
_AMBER_COLUMNS = {
    "chair": "CHAIR",
    "cover": "Cover",
    "hal": "Hal",
    "cog": "Cog",
    "length": "words",
    "accuracy": "accuracy",
    "f1": "F1(no)",
    **{f"{part}_f1": part for part in _AMBER_PARTS},
    "yes_ratio": "yes",
    "other": "other",
}
_MME_SUBSETS = ("existence", "count", "position", "color")
_MME_COLUMNS = {
    **{subset: subset for subset in _MME_SUBSETS},
    "total": "total",
    "maximum": "of",
    "accuracy": "accuracy",
    "yes_ratio": "yes",
    "other": "other",
}
_DIGITS = {"length": 1, "other": 0, "maximum": 0, "total": 1, **dict.fromkeys(_MME_SUBSETS, 1)}


def _write(columns: Mapping[str, str], methods: Mapping[str, Mapping[str, Any]]) -> str:
    if not methods:
        raise ValueError("there is no method to show")
    rows = [["method", *columns.values()]]
    for name, scores in methods.items():
        rows.append([name, *(_show(key, scores.get(key)) for key in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def _show(key: str, value: float | None) -> str:
    return "-" if value is None else f"{value:.{_DIGITS.get(key, 3)}f}"
