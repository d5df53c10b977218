"""Uniform pruning: an even thinning of the image tokens, the baseline that knows nothing of the picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visionsel.multimodal.families.family import TokenLayout
from visionsel.multimodal.pruning.checks import check_keep, check_layer, counts, valid_or_all
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens

__all__ = ["UniformPrune", "select"]


@dataclass(frozen=True)
class UniformPrune(Pruner):
    """Keeps evenly spaced tokens.

    `t` of `n` things in a row are evenly spaced at `floor((i + 1/2) * n / t)`. The token grid of each view
    is thinned in two dimensions, since every k-th token of a grid read row by row would be a few whole
    columns: about `sqrt(t * h / w)` of its rows, evenly spaced, share the `t` tokens of the view as equally
    as they can, each evenly spaced in its row. Views, and the newline tokens of an image as one row of
    their own, get tokens in proportion to their size. Where other tokens of the sample were dropped before,
    those left are thinned as one row in the order of the prompt.

    Args:
        keep: ratio or number of tokens.
        layer: before which decoder layer; 0 is the input.

    Raises:
        ValueError: for a value out of range.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import UniformPrune
        >>> with UniformPrune(keep=0.25, layer=1)(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().visual_tokens  # of each decoder layer
        (64.0, 16.0, 16.0, 16.0)
    """

    keep: float | int
    layer: int = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.layer < 0:
            raise ValueError(f"layer must be 0 or more, got {self.layer}")

    def stages(self, layers: int) -> list[Stage]:
        """See `Pruner`."""
        return [Stage(check_layer(self.layer, layers), self._select)]

    def _select(self, tokens: VisualTokens) -> Tensor:
        whole = tokens.valid.sum(1) == tokens.total
        grids = [
            grids_of(layouts) if complete else None
            for layouts, complete in zip(tokens.layouts, whole.tolist(), strict=True)
        ]
        return select(tokens.valid, self.keep, grids)


def select(
    valid: Tensor, keep: float | int, grids: Sequence[Sequence[Tensor] | None] | None = None
) -> Tensor:
    """Evenly spaced tokens.

    Args:
        valid: bool `[B, N]`, True at tokens.
        keep: ratio or number of tokens.
        grids: for each sample its grids, int64 `[h, w]` each, which together hold the numbers of all its
            tokens (counted among the valid ones) once. None, for a sample or for all: the tokens are one
            row.

    Returns:
        bool `[B, N]`.
    """
    valid = valid_or_all(valid, valid)
    kept = torch.zeros_like(valid)
    for sample, number in enumerate(counts(keep, valid).tolist()):
        places = valid[sample].nonzero()[:, 0]
        of_sample = grids[sample] if grids is not None else None
        if of_sample is None:
            chosen = evenly(len(places), number)
        else:
            chosen = _over_grids(of_sample, number)
        kept[sample, places[chosen.to(places.device)]] = True
    return kept


def evenly(n: int, t: int) -> Tensor:
    """int64 `[t]`: the places of `t` evenly spaced ones of `n >= t` in a row."""
    return (2 * torch.arange(t) + 1) * n // max(2 * t, 1)


def grids_of(layouts: Sequence[TokenLayout]) -> list[Tensor]:
    """The grids of all views of a sample, and one row of the newline tokens for each image that has them."""
    grids, start = [], 0
    for layout in layouts:
        grids += [view.index + start for view in layout.views]
        newlines = (layout.source() < 0).nonzero()[:, 0]
        if len(newlines):
            grids.append(newlines[None] + start)
        start += layout.n
    return grids


def _over_grids(grids: Sequence[Tensor], number: int) -> Tensor:
    """int64 `[number]`: each grid gets its share, rounded so that the shares add up."""
    total = sum(grid.numel() for grid in grids)
    chosen, seen, given = [torch.zeros(0, dtype=torch.int64)], 0, 0
    for grid in grids:
        seen += grid.numel()
        until = (2 * number * seen + total) // (2 * total)  # number * seen / total, half up
        chosen.append(_over_grid(grid, until - given))
        given = until
    return torch.cat(chosen)


def _over_grid(grid: Tensor, number: int) -> Tensor:
    """int64 `[number]`: tokens of one grid `[h, w]`."""
    height, width = grid.shape
    rows = min(max(round(math.sqrt(number * height / width)), math.ceil(number / width), 1), height, number)
    chosen = [torch.zeros(0, dtype=torch.int64)]
    for i, row in enumerate(evenly(height, rows).tolist()):
        in_row = (i + 1) * number // rows - i * number // rows
        chosen.append(grid[row, evenly(width, in_row)])
    return torch.cat(chosen)
