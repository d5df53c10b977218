"""The recycling of VFlowOpt: tokens that are not kept are merged, block by block of their grid."""

from collections.abc import Sequence

import torch
from torch import Tensor

from visionsel.multimodal.families.family import TokenLayout
from visionsel.multimodal.pruning.checks import counts, top, valid_or_all

__all__ = ["check_block", "layout_blocks", "merge", "recycle", "whole_tokens"]


def recycle(
    features: Tensor, importance: Tensor, keep: float | int, grid: tuple[int, int], block: float
) -> tuple[Tensor, Tensor]:
    """Keep the most important tokens and merge the others, one for each block of the grid.

    `keep - N // block ** 2` tokens stay whole. The others are summed block by block, weighted by their share
    of the importance of the others there, into the most important of them (the first of several). Negative
    importance weighs nothing; where no weight is left, all weigh the same. More than `keep` tokens are left
    of a grid that the blocks do not divide, fewer where some blocks have no others. With a `keep` of all
    tokens nothing changes.

    Args:
        features: `[B, N, C]`, the grid row by row.
        importance: `[B, N]`.
        keep: a ratio or a number of tokens.
        grid: rows and columns of tokens.
        block: side of a block in tokens; any number from 1 up.

    Returns:
        bool `[B, N]`, the tokens that are left, and `[B, N, C]`, where the merged ones are replaced.

    Raises:
        ValueError: for sizes that do not fit the grid, a block below 1, or NaN.
    """
    check_block(block)
    n = grid[0] * grid[1]
    if features.shape[1] != n or importance.shape != features.shape[:2]:
        raise ValueError(
            f"a grid of {grid[0]} x {grid[1]} has {n} tokens; got features {list(features.shape)} and "
            f"importance {list(importance.shape)}"
        )
    valid = valid_or_all(None, importance)
    whole = [whole_tokens(number, n, block) for number in counts(keep, valid).tolist()]
    blocks = _grid_blocks(grid, block).flatten().to(importance.device).expand_as(importance)
    return merge(features, importance, blocks.new_tensor(whole), blocks, valid)


def check_block(block: float) -> None:
    """Refuse a side below one token.

    Raises:
        ValueError: naming what is allowed.
    """
    if not 1 <= block < float("inf"):
        raise ValueError(f"block must be a number of tokens from 1 up, got {block}")


def whole_tokens(keep: int, n: int, block: float) -> int:
    """How many of `n` tokens stay whole where `keep` are to be left."""
    return n if keep >= n else max(0, keep - int(n // block**2))


def _grid_blocks(grid: tuple[int, int], block: float) -> Tensor:
    """int64 `[h, w]`: the number of the block of each token."""
    rows, columns = (torch.tensor([int(place // block) for place in range(side)]) for side in grid)
    return rows[:, None] * (int(columns[-1]) + 1) + columns


def layout_blocks(layouts: Sequence[TokenLayout], block: float) -> Tensor:
    """int64 `[total]`: the number of each token's block in its sample; -1 on no grid (newlines).

    Args:
        layouts: of the images of a sample; blocks do not reach over from one view to another.
        block: side of a block in tokens.
    """
    blocks = torch.full((sum(layout.n for layout in layouts),), -1)
    start = number = 0
    for layout in layouts:
        for view in layout.views:
            height, width = view.index.shape
            own = _grid_blocks((height, width), block) + number
            blocks[start + view.index.flatten()] = own.flatten()
            number = int(own[-1, -1]) + 1
        start += layout.n
    return blocks


def merge(
    features: Tensor, importance: Tensor, whole: Tensor, blocks: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep some tokens, merge the others of each block into one, as `recycle` says.

    Args:
        features: `[B, N, C]`.
        importance: `[B, N]`.
        whole: int64 `[B]`: how many tokens, the most important, stay as they are.
        blocks: int64 `[B, N]`: the number of each token's block; others with -1 are dropped.
        valid: bool `[B, N]`.

    Returns:
        bool `[B, N]` and `[B, N, C]`.

    Raises:
        ValueError: for NaN importance at a valid token.
    """
    kept = top(importance, whole, valid)
    rest = valid & ~kept & (blocks >= 0)
    slot = blocks.clamp(min=0)
    size = int(slot.amax()) + 1
    wide = torch.promote_types(features.dtype, torch.float32)
    score = importance.to(torch.promote_types(importance.dtype, torch.float32))

    def over_block(values: Tensor, reduce: str) -> Tensor:
        """`[B, N]`: at each token the sum, maximum or minimum over its block."""
        found = values.new_zeros(len(values), size).scatter_reduce(
            1, slot, values, reduce, include_self=False
        )
        return found.gather(1, slot)

    weight = score.clamp(min=0).masked_fill(~rest, 0)
    weight = torch.where(over_block(weight, "sum") > 0, weight, rest.to(weight.dtype))
    share = (weight / over_block(weight, "sum").masked_fill(~rest, 1)).to(wide)[..., None]
    into = slot[..., None].expand_as(features)
    parts = (features.to(wide) * share).masked_fill(~rest[..., None], 0)
    merged = parts.new_zeros(len(parts), size, parts.shape[2]).scatter_add(1, into, parts).gather(1, into)

    others = score.masked_fill(~rest, -torch.inf)
    best = rest & (others == over_block(others, "amax"))
    place = torch.arange(slot.shape[1], device=slot.device).expand_as(slot)
    place = place.masked_fill(~best, slot.shape[1])
    target = best & (place == over_block(place, "amin"))
    return kept | target, torch.where(target[..., None], merged.to(features.dtype), features)
