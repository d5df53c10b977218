"""Tables of logits of the tiles that a map is cut into; see `visionsel.ops.neighborhood.tiled`.

Everything here is in the TorchScript subset.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["axis_tables", "kind_tables", "tile_sizes"]


def tile_sizes(length: int, dilation: int) -> tuple[int, int, int]:
    """Along one axis: the length of the longest grid, of a tile, and the number of tiles."""
    longest = (length + dilation - 1) // dilation
    tile = longest if longest <= 14 else 7
    return longest, tile, (longest + tile - 1) // tile


def kind_tables(table: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """What a bias table `[heads, 2Kh-1, 2Kw-1]` and the limits of the neighborhoods add to the logits.

    Returns:
        `[heads, kinds, queries, keys]`.
    """
    heads = table.shape[0]
    kinds_h, th, keys_h = rows.shape
    kinds_w, tw, keys_w = columns.shape
    table = F.pad(table, [0, 1, 0, 1], value=-float("inf"))
    # both selections copy whole rows, and their backward adds whole rows
    table = table.transpose(1, 2).index_select(1, columns.flatten())
    table = table.transpose(1, 2).contiguous().view(heads, -1, keys_w)
    line = torch.arange(kinds_w * tw, device=rows.device).view(kinds_w, 1, tw, 1)
    line = rows.view(kinds_h, 1, th, 1, keys_h) * (kinds_w * tw) + line
    table = table.index_select(1, line.flatten())
    return table.view(heads, kinds_h * kinds_w, th * tw, keys_h * keys_w)


def axis_tables(
    length: int, kernel_size: int, dilation: int, grids: int, device: torch.device, tile: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """One axis: keys `[tiles, keys]`, relative positions `[kinds, queries, keys]`, kinds `[grids, tiles]`.

    Tiles are of `tile` queries; 0 for the usual number.
    """
    longest, usual, _ = tile_sizes(length, dilation)
    tile = tile if tile > 0 else usual
    tiles = (longest + tile - 1) // tile
    keys = min(tile + kernel_size - 1, longest)
    grid_length = (length + dilation - 1 - torch.arange(grids, device=device)[:, None, None]) // dilation
    first = torch.arange(tiles, device=device)[:, None] * tile
    # queries behind the map's end take the window of the last one: a row of -inf would give NaN
    query = (first + torch.arange(tile, device=device)).minimum(grid_length - 1)  # [grids, tiles, queries]
    start = (query - kernel_size // 2).clamp(min=0).minimum(grid_length - kernel_size)
    key = (first - kernel_size // 2).clamp(min=0).clamp(max=longest - keys)
    key = key + torch.arange(keys, device=device)
    query, start = query.unsqueeze(3), start.unsqueeze(3)
    inside = (key[:, None] >= start) & (key[:, None] < start + kernel_size)
    relative = torch.where(inside, key[:, None] - query + kernel_size - 1, 2 * kernel_size - 1).flatten(0, 1)
    kinds = torch.arange(grids * tiles, device=device)
    if torch.jit.is_scripting():
        pass
    elif not torch.compiler.is_compiling() and type(relative) is Tensor and not relative.is_meta:
        relative, kinds = torch.unique(relative, dim=0, return_inverse=True)
    return key, relative, kinds.view(grids, tiles)
