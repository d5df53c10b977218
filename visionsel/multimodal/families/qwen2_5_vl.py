"""Qwen2.5-VL (Bai et al. 2025): as Qwen2-VL, with windows of attention in most layers of the tower.

The tower sorts the squares of patches by window before its first layer, and back only behind the merger:
queries, keys and attention are in window order, tokens are not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.multimodal.families.family import Encoded
from visionsel.multimodal.families.qwen2_vl import Qwen2VL, grids, mean_over_squares

__all__ = ["Qwen25VL", "window_order"]


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL. Only a few layers attend to the whole image; the last of them is read."""

    name = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)

    def feature_layer(self, model: nn.Module) -> int:
        """The last layer with full attention; the last one if all have windows."""
        last = len(self.tower_layers(model)) - 1
        vision: Any = model.config.vision_config  # type: ignore[union-attr]
        return max((layer for layer in vision.fullatt_block_indexes if layer <= last), default=last)

    def pool(self, model: nn.Module, values: Tensor, encoded: Encoded) -> Tensor:
        vision: Any = model.config.vision_config  # type: ignore[union-attr]
        side = vision.window_size // vision.patch_size // vision.spatial_merge_size
        order = window_order(grids(encoded), vision.spatial_merge_size, side).to(values.device)
        pooled = mean_over_squares(model, values)
        return torch.empty_like(pooled).index_copy(0, order, pooled)


def window_order(grids: Sequence[tuple[int, int, int]], merge: int, side: int) -> Tensor:
    """Which token comes where in the tower: window after window, row by row inside a window.

    Args:
        grids: steps in time, rows and columns of patches of each image or video.
        merge: rows and columns of patches to a token.
        side: rows and columns of tokens to a window; those at the right and lower border are smaller.

    Returns:
        int64 `[tokens]`: the number of the token at each place in the tower.
    """
    orders, start = [], 0
    for steps, height, width in grids:
        rows, columns = height // merge, width // merge
        token = torch.arange(steps * rows * columns)
        step, row, column = token // (rows * columns), token // columns % rows, token % columns
        window = (step * -(-rows // side) + row // side) * -(-columns // side) + column // side
        orders.append(start + torch.argsort(window, stable=True))
        start += len(token)
    return torch.cat(orders)
