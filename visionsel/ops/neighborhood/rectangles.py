"""Tiles of a map and the rectangle of positions that each has to do with, for the fused kernels.

Positions of one remainder modulo the dilation never see the others and form a grid of their own. A grid is
cut into tiles: of queries, with the rectangle of the keys that some of them see, or of keys, with that of the
queries that see some of them. Where the tiles of an axis lie between its ends, all look alike; a kind is what
a tile and its rectangle look like, and tiles stand in the order of their kinds, so that one program serves
many tiles of one kind, in all samples, with one table of logits in its registers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.ops.plans import keep_plans

__all__ = ["build_plan", "kept_plan"]


def build_plan(
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    tile: tuple[int, int],
    of_keys: bool,
    batch: int,
    programs: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the programs of a call do; all int32.

    Args:
        size: of the map.
        kernel_size, dilation: of the neighborhoods.
        tile: positions of a tile, down and right.
        of_keys: whether tiles are of keys, and rectangles of queries.
        batch: samples.
        programs: of a head, about so many; fewer where there are fewer tiles.
        device: of the tables.

    Returns:
        `[tiles, 4]`: the first pixel of a tile and that of its rectangle, y and x.
        `[programs, 10]`: kind down and right, where its tiles begin and how many they are, the first and last
            item, tile by tile and sample by sample; rows and columns of its tiles and of its rectangles.
        Twice, down and right, `[kinds, positions of a tile, positions of a rectangle]`: the place of a key
            and a query in the table of biases, -1 where the query does not see the key.
    """
    axes = [_axis(*sizes, of_keys) for sizes in zip(size, kernel_size, dilation, tile, strict=True)]
    (first_h, kind_h, sides_h, relative_h), (first_w, kind_w, sides_w, relative_w) = axes
    places = torch.stack(
        [x.expand(len(first_h), len(first_w)) for n in (0, 1) for x in (first_h[:, n, None], first_w[:, n])],
        2,
    )
    kinds = (kind_h[:, None] * len(relative_w) + kind_w).flatten()
    share = max(1, -(-len(kinds) * batch // programs))
    rows, begin = [], 0
    for kind, number in enumerate(kinds.bincount().tolist()):
        down, right = divmod(kind, len(relative_w))
        sides = [*zip(sides_h[down], sides_w[right], strict=True)]
        parts = -(-number * batch // share)
        for part in range(parts):
            first, last = (number * batch * n // parts for n in (part, part + 1))
            rows.append((down, right, begin, number, first, last, *sides[0], *sides[1]))
        begin += number
    tiles = places.flatten(0, 1)[kinds.argsort(stable=True)]
    plan = tiles, torch.tensor(rows).view(-1, 10), relative_h, relative_w
    one, two, three, four = (x.to(device, torch.int32).contiguous() for x in plan)
    return one, two, three, four


def _axis(
    length: int, kernel_size: int, dilation: int, tile: int, of_keys: bool
) -> tuple[Tensor, Tensor, list[list[int]], Tensor]:
    """One axis.

    Returns:
        `[tiles, 2]`, the first pixels of tile and rectangle; the kinds of these; of each kind the positions
        of tile and rectangle; `[kinds, tile, rectangle]`, see `build_plan`.
    """
    found, sides, looks = [], [], []
    for grid in range(dilation):
        own = (length - grid + dilation - 1) // dilation
        position = torch.arange(own)
        start = (position - kernel_size // 2).clamp(0, own - kernel_size)[:, None]
        seen = (position >= start) & (position < start + kernel_size)
        relative = torch.where(seen, position - position[:, None] + kernel_size - 1, -1)
        if of_keys:
            relative = relative.T
        for first in range(0, own, tile):
            look = relative[torch.arange(first, first + tile).clamp(max=own - 1)]
            used = (look >= 0).any(0).nonzero()
            begin, end = int(used[0]), int(used[-1]) + 1
            found.append((grid + first * dilation, grid + begin * dilation))
            sides.append((min(tile, own - first), end - begin))
            looks.append(look[:, begin:end])
    widest = max(side for _, side in sides)
    padded = [F.pad(look, (0, widest - look.shape[1]), value=-1) for look in looks]
    described = [
        torch.cat([torch.tensor(two), look.flatten()]) for two, look in zip(sides, padded, strict=True)
    ]
    each, kinds = torch.unique(torch.stack(described), dim=0, return_inverse=True)
    return torch.tensor(found), kinds, each[:, :2].tolist(), each[:, 2:].view(-1, tile, widest)


kept_plan = keep_plans(build_plan)
