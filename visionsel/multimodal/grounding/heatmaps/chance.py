"""Maps that know nothing of the model, in the place of its attention: what every method must beat.

    Grounder(model, processor, segmenter, heatmap=RandomPoint())

All else is as it was: the answer, the cut of the map, the prompts, the segmenter. Places are cells of the
grid that shows a whole image, so that chance is as fine as attention is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visionsel.multimodal.grounding.heatmaps.rows import finished, image_views
from visionsel.multimodal.grounding.replay import Replay

__all__ = ["CentrePoint", "RandomBox", "RandomPoint"]


@dataclass(frozen=True)
class RandomPoint:
    """One cell of each image for each token, all alike likely.

    The numbers are torch's (`torch.manual_seed`). Cells have random heights, so that of the cells of a word
    of several tokens one is the highest.
    """

    reference: ClassVar[str | None] = None

    def __call__(self, replay: Replay, reference: Replay | None = None) -> Tensor:
        """float32 `[B, T, n]`, see `heatmaps`."""
        return _drawn(replay, _random_point)


@dataclass(frozen=True)
class CentrePoint:
    """The middle of each image: the cells that its centre touches."""

    reference: ClassVar[str | None] = None

    def __call__(self, replay: Replay, reference: Replay | None = None) -> Tensor:
        """float32 `[B, T, n]`, see `heatmaps`."""
        return _drawn(replay, _middle)


@dataclass(frozen=True)
class RandomBox:
    """Cells in a rectangle for each token; two columns and two rows of cells, each drawn alike, are its ends.

    For prompts that are boxes: points inside of it are all alike.
    """

    reference: ClassVar[str | None] = None

    def __call__(self, replay: Replay, reference: Replay | None = None) -> Tensor:
        """float32 `[B, T, n]`, see `heatmaps`."""
        return _drawn(replay, _random_box)


def _drawn(replay: Replay, draw: Callable[[int, int], Tensor]) -> Tensor:
    if replay.scope is None:
        replay.run()  # tells how the tokens lie
    maps = torch.zeros(*replay.tokens.shape, replay.image.shape[1])
    for row, views in enumerate(image_views(replay, whole=True)):
        for token in range(maps.shape[1]):
            for view in views:
                cells = draw(*view.shape)
                maps[row, token, view.flatten().cpu()] = cells.flatten()
    return finished(replay, maps.to(replay.tokens.device))


def _random_point(height: int, width: int) -> Tensor:
    cells = torch.zeros(height * width)
    place = int(torch.randint(height * width, ()))
    cells[place] = 0.5 + 0.5 * float(torch.rand(()))
    return cells.view(height, width)


def _middle(height: int, width: int) -> Tensor:
    cells = torch.zeros(height, width)
    cells[(height - 1) // 2 : height // 2 + 1, (width - 1) // 2 : width // 2 + 1] = 1
    return cells


def _random_box(height: int, width: int) -> Tensor:
    cells = torch.zeros(height, width)
    (top, bottom), (left, right) = (sorted(torch.randint(side, (2,)).tolist()) for side in (height, width))
    cells[top : bottom + 1, left : right + 1] = 1
    return cells
