"""VizWiz-VQA-Grounding: where in an image the answer to a question is seen (Chen et al. 2022).

A folder holds `<split>_grounding.json` (a dict by image name) and, for evaluation, the binary masks as PNGs
in `binary_masks_png/<split>/`; without them the polygon of `answer_grounding` is filled.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionsel.data.coco import annotation_mask, read_json

__all__ = ["AnswerGrounding", "read_answer_groundings"]


@dataclass(frozen=True)
class AnswerGrounding:
    """A question about an image, its answers and where they are seen.

    Attributes:
        file_name: of the image.
        question: its text.
        answers: of the crowd.
        size: `(height, width)` of the image.
        polygon: corners `[x0, y0, x1, y1, ...]` in pixels.
        png: the mask as a file; None where the folder has none.
    """

    file_name: str
    question: str
    answers: tuple[str, ...]
    size: tuple[int, int]
    polygon: tuple[float, ...]
    png: Path | None

    def mask(self) -> np.ndarray:
        """bool `[H, W]`."""
        if self.png is not None:
            return np.asarray(Image.open(self.png).convert("L")) > 0
        return annotation_mask([list(self.polygon)] if self.polygon else [], *self.size)


def read_answer_groundings(folder: str | Path, split: str = "val") -> list[AnswerGrounding]:
    """The questions of a split.

    Raises:
        FileNotFoundError: when the file is missing.
        ValueError: for a file of another form.
    """
    folder = Path(folder)
    path = folder / f"{split}_grounding.json"
    rows = read_json(path)
    if not isinstance(rows, dict):
        raise ValueError(f"{path} is a dict by image name")
    found = []
    for name, row in rows.items():
        try:
            height, width = int(row["height"]), int(row["width"])
            corners = tuple(float(side) for corner in row["answer_grounding"] for side in _corner(corner))
            answers = row.get("answers") or [row["most_common_answer"]]
            question = row["question"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {name} is no grounded answer: {error!r}") from error
        png = folder / "binary_masks_png" / split / f"{Path(name).stem}.png"
        found.append(
            AnswerGrounding(
                name, question, tuple(answers), (height, width), corners, png if png.is_file() else None
            )
        )
    return found


def _corner(corner: Any) -> tuple[float, float]:
    return (corner["x"], corner["y"]) if isinstance(corner, dict) else tuple(corner)
