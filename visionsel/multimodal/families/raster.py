"""From the pixels of an image to the cells of a grid that lies over it, one axis at a time."""

import torch
from torch import Tensor

__all__ = ["axis_cells", "axis_weights"]


def axis_cells(pixels: int, start: float, end: float, cells: int) -> Tensor:
    """int64 `[pixels]`: the cell that holds the middle of each pixel; -1 beside the grid.

    Args:
        pixels: along the axis.
        start: where the grid begins, in pixels.
        end: where it ends.
        cells: of the grid.
    """
    cell = _places(pixels, start, end, cells).floor().long()
    return cell.masked_fill((cell < 0) | (cell >= cells), -1)


def axis_weights(pixels: int, start: float, end: float, cells: int) -> Tensor:
    """float64 `[pixels, cells]`: how much of each cell goes into a pixel.

    Rows sum to 1, and to 0 beside the grid. Values are linear between the middles of the cells and constant
    beyond the first and the last; where cells are smaller than pixels, a pixel has the mean of what lies in
    it, so that no cell is left out.
    """
    inside = axis_cells(pixels, start, end, cells) >= 0
    if end - start >= cells:
        place = (_places(pixels, start, end, cells) - 0.5).clamp(0, cells - 1)
        weights = (1 - (place[:, None] - torch.arange(cells)).abs()).clamp(min=0)
    else:
        edges = start + torch.arange(cells + 1, dtype=torch.float64) * (end - start) / cells
        left = torch.arange(pixels, dtype=torch.float64)[:, None]
        weights = (torch.minimum(left + 1, edges[1:]) - torch.maximum(left, edges[:-1])).clamp(min=0)
        inside = weights.sum(1) > 0
        weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-12)
    return weights * inside[:, None]


def _places(pixels: int, start: float, end: float, cells: int) -> Tensor:
    """float64 `[pixels]`: where the middle of each pixel lies, in cells from the start of the grid."""
    return (torch.arange(pixels, dtype=torch.float64) + 0.5 - start) / (end - start) * cells
