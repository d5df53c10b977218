"""Average pooling of the token grid: the baseline that keeps a bit of everything."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visionsel.multimodal.families.family import TokenLayout
from visionsel.multimodal.pruning.checks import check_keep, count, require_finite, valid_or_all
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens

__all__ = ["PoolPrune", "block_numbers", "block_shape", "select"]


@dataclass(frozen=True)
class PoolPrune(Pruner):
    """Averages blocks of the token grid of each view at the input of the decoder.

    A block becomes one token, at the place of its first cell (row by row). Blocks at the right and the
    bottom border may be smaller and average the cells that there are. Newline tokens stay as they are.

    With `keep` all views of a sample have one shape of blocks, see `block_shape`. The number kept is
    therefore the nearest possible to the one asked for, not always the same.

    Args:
        keep: ratio or number of tokens to come near to.
        window: rows and columns of a block, in place of `keep`; one number for a square.

    Raises:
        ValueError: for a value out of range, or unless exactly one of the two is given.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import PoolPrune
        >>> with PoolPrune(window=2)(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().visual_tokens  # of each decoder layer
        (16.0, 16.0, 16.0, 16.0)
    """

    keep: float | int | None = None
    window: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.window is None):
            raise ValueError(
                f"give keep or window, one of the two; got keep={self.keep}, window={self.window}"
            )
        if self.keep is not None:
            check_keep(self.keep)
        elif len(self._block()) != 2 or any(not isinstance(n, int) or n < 1 for n in self._block()):
            raise ValueError(f"window must be one or two whole numbers from 1 up, got {self.window!r}")

    def stages(self, layers: int) -> list[Stage]:
        """See `Pruner`."""
        return [Stage(0, self._select)]

    def _block(self) -> tuple[int, ...]:
        assert self.window is not None
        return (self.window, self.window) if isinstance(self.window, int) else tuple(self.window)

    def _select(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        blocks = torch.zeros_like(tokens.index)
        for sample, layouts in enumerate(tokens.layouts):
            if not layouts:
                continue
            if self.keep is None:
                shape = self._block()
            else:
                total = sum(layout.n for layout in layouts)
                grids = [tuple(view.index.shape) for layout in layouts for view in layout.views]
                newlines = total - sum(height * width for height, width in grids)
                shape = block_shape(grids, count(self.keep, total) - newlines)
            numbers = block_numbers(layouts, shape).to(tokens.index.device)
            blocks[sample] = numbers[tokens.index[sample]]
        return select(tokens.features, blocks, tokens.valid)


def block_shape(grids: Sequence[tuple[int, ...]], target: int) -> tuple[int, int]:
    """The shape of blocks with which the number of blocks comes nearest to a target.

    Of several such shapes the one nearest to a square is taken, then the smallest, then the wider.

    Args:
        grids: height and width of each grid.
        target: the number of blocks wanted of all grids together.

    Returns:
        rows and columns of a block.
    """

    kinds = Counter(grids)

    def cost(shape: tuple[int, int]) -> tuple[int, int, int, int]:
        rows, columns = shape
        blocks = sum(n * math.ceil(h / rows) * math.ceil(w / columns) for (h, w), n in kinds.items())
        return abs(blocks - target), abs(rows - columns), rows * columns, rows

    highest = max((height for height, _ in grids), default=1)
    widest = max((width for _, width in grids), default=1)
    return min(((r, c) for r in range(1, highest + 1) for c in range(1, widest + 1)), key=cost)


def block_numbers(layouts: Sequence[TokenLayout], shape: tuple[int, ...]) -> Tensor:
    """int64 `[total]`: the block of each image token of a sample; newline tokens are alone in theirs."""
    numbers, start = [], 0
    for layout in layouts:
        number = torch.arange(layout.n) + start
        for view in layout.views:
            height, width = view.index.shape
            row = torch.arange(height) // shape[0] * shape[0]
            column = torch.arange(width) // shape[1] * shape[1]
            # a block is called by the number of its first cell
            number[view.index] = view.index[row][:, column] + start
        numbers.append(number)
        start += layout.n
    return torch.cat(numbers)


def select(features: Tensor, blocks: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token for each block, the mean of its members, at the first of them.

    Args:
        features: `[B, N, C]`.
        blocks: int64 `[B, N]`: tokens of a sample with the same number are one block.
        valid: bool `[B, N]`, True at tokens; None: all.

    Returns:
        bool `[B, N]`, and `features` with the means at the kept tokens.
    """
    valid = valid_or_all(valid, features)
    require_finite("features", features, valid)
    length = valid.shape[1]
    if length == 0:
        return valid, features
    place = torch.arange(length, device=valid.device)
    together = (blocks[:, :, None] == blocks[:, None]) & valid[:, :, None] & valid[:, None]
    kept = valid & (together.byte().argmax(2) == place)
    # one row for each block; a product sums in a fixed order, which atomic additions do not
    rows = (~kept).byte().argsort(dim=1, stable=True)[:, : int(kept.sum(1).max())]
    values = features.to(torch.promote_types(features.dtype, torch.float32))
    values = values.masked_fill(~valid[..., None], 0.0)
    members = together.gather(1, rows[..., None].expand(-1, -1, length)).to(values.dtype)
    mean = members @ values / members.sum(2).clamp(min=1)[..., None]
    merged = features.scatter(1, rows[..., None].expand_as(mean), mean.to(features.dtype))
    alone = together.sum(2) == 1  # stays as it is, to the last bit
    return kept, torch.where((kept & ~alone)[..., None], merged, features)
