"""Boxes around masks."""

import torch
from torch import Tensor

__all__ = ["mask_boxes"]


def mask_boxes(masks: Tensor) -> Tensor:
    """The smallest box around each mask.

    Args:
        masks: bool `[N, H, W]`.

    Returns:
        float32 `[N, 4]`: (x0, y0, x1, y1) in pixels, the last two one past the end. An empty mask has the box
        of the whole image: it says nothing about where to look.

    Examples:
        >>> import torch
        >>> from visionsel.boxes import mask_boxes
        >>> mask = torch.zeros(1, 8, 8, dtype=torch.bool)
        >>> mask[0, 2:4, 1:7] = True
        >>> mask_boxes(mask)
        tensor([[1., 2., 7., 4.]])
    """
    sides = []
    for axis in (1, 2):  # over rows is x, over columns is y
        filled = masks.any(axis).to(torch.uint8)
        sides.append((filled.argmax(1), filled.shape[1] - filled.flip(1).argmax(1)))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], 1).float()
