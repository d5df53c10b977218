"""How scattered a map over a grid is, and where a sorted curve bends: the rules that tell localization heads.

Kang et al. 2025, arXiv:2503.06287, sections 3 and 4; spatial entropy is of Peruzzo et al. 2022.
"""

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

__all__ = ["active", "bend", "blur", "components", "fills_bottom", "spatial_entropy"]


def bend(values: Tensor) -> float:
    """The value at which a curve of rising values bends most: the farthest from the line between its ends.

    Args:
        values: `[number]`, in any order.

    Returns:
        one of them; the smallest where the curve is a line.
    """
    curve = values.flatten().double().cpu().sort().values
    if len(curve) < 3 or not float(curve[-1] - curve[0]):
        return float(curve[0])
    # distances to the chord are in proportion to the vertical ones
    chord = curve[0] + (curve[-1] - curve[0]) * torch.linspace(0, 1, len(curve), dtype=torch.float64)
    away = (chord - curve).abs()
    return float(curve[int(away.argmax())]) if float(away.max()) > 1e-12 else float(curve[0])


def active(maps: Tensor) -> Tensor:
    """bool: cells above the mean of their map `[..., h, w]`; none of a flat one, however its mean rounds."""
    flat = maps.amax((-2, -1), keepdim=True) == maps.amin((-2, -1), keepdim=True)
    return (maps > maps.mean((-2, -1), keepdim=True)) & ~flat


def components(cells: Tensor) -> Tensor:
    """Connected components of active cells, neighbours over corners counted.

    Args:
        cells: bool `[..., h, w]`.

    Returns:
        int64 `[..., h, w]`: for active cells a number that the cells of a component share, from 1; else 0.
    """
    height, width = cells.shape[-2:]
    numbers = torch.arange(1, height * width + 1, device=cells.device).view(height, width)
    labels = (numbers * cells).double()  # exact: cells are fewer than 2**53
    while True:  # the largest number of a component runs through it
        spread = max_pool2d(labels.view(-1, 1, height, width), 3, 1, 1).view_as(labels) * cells
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def spatial_entropy(maps: list[Tensor]) -> Tensor:
    """Entropy of how the active cells share out among connected components: low where they hold together.

    Args:
        maps: grids `[..., h, w]` of one map, such as several images; components end at their edges.

    Returns:
        float64 `[...]`; infinite for a flat map, which holds nothing.
    """
    sizes = []
    for grid in maps:
        labels = components(active(grid)).flatten(-2)
        counts = torch.zeros(*labels.shape[:-1], labels.shape[-1] + 1, dtype=torch.double, device=grid.device)
        sizes.append(counts.scatter_add(-1, labels, torch.ones_like(labels, dtype=torch.double))[..., 1:])
    counts = torch.cat(sizes, -1)
    total = counts.sum(-1, keepdim=True)
    shares = counts / total.clamp(min=1)
    entropy = -torch.special.xlogy(shares, shares).sum(-1)
    return entropy.masked_fill(total[..., 0] == 0, torch.inf)


def fills_bottom(maps: list[Tensor]) -> Tensor:
    """bool `[...]`: whether all cells of the bottom row of some grid `[..., h, w]` are active.

    Such heads look at the end of the image, whatever it shows.
    """
    return torch.stack([active(grid)[..., -1, :].all(-1) for grid in maps]).any(0)


def blur(maps: Tensor, sigma: float = 1.0, size: int = 7) -> Tensor:
    """A Gaussian filter; at the edges its weights that are inside share out among themselves.

    Args:
        maps: `[..., h, w]`.
        sigma: of the Gaussian, in cells.
        size: of the filter, an odd number of cells.
    """
    down, across = (_filter(length, sigma, size).to(maps) for length in maps.shape[-2:])
    return down @ maps @ across.T


def _filter(length: int, sigma: float, size: int) -> Tensor:
    """`[length, length]`, rows sum to 1."""
    place = torch.arange(length, dtype=torch.float64)
    away = (place[:, None] - place).abs()
    weights = torch.exp(-away.square() / (2 * sigma**2)).masked_fill(away > size // 2, 0)
    return weights / weights.sum(1, keepdim=True)
