"""Qwen2-VL (Wang et al. 2024): images and videos of any size, one token for each square of patches.

The processor stretches an image to whole squares and deals out the patches square after square, so that the
patches that the merger joins stand together. Qwen2.5-VL and Qwen3-VL are made alike and share the functions
of this file.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.multimodal.families.family import Box, Encoded, Family, TokenLayout, View

__all__ = ["Qwen2VL", "grid_layouts", "grids", "mean_over_squares"]


class Qwen2VL(Family):
    """Qwen2-VL. Every layer of the tower attends within one image, or one pair of frames."""

    name = "Qwen2-VL"
    model_types = ("qwen2_vl",)

    def tower_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return model.model.visual.blocks  # type: ignore[union-attr, return-value]

    def tower_attention(self, layer: nn.Module) -> nn.Module:
        return layer.attn  # type: ignore[return-value]

    def pool(self, model: nn.Module, values: Tensor, encoded: Encoded) -> Tensor:
        return mean_over_squares(model, values)

    def layouts(
        self,
        model: nn.Module,
        encoded: Encoded,
        processor: Any = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[TokenLayout]:
        return grid_layouts(model, encoded, processor, sizes)


def grids(encoded: Encoded) -> list[tuple[int, int, int]]:
    """Steps in time, rows and columns of patches of each image or video of the call."""
    grid: Tensor = encoded.arguments[f"{encoded.modality}_grid_thw"]
    return [(t, h, w) for t, h, w in grid.tolist()]


def mean_over_squares(model: nn.Module, values: Tensor) -> Tensor:
    """`[patches, ...]` -> `[tokens, ...]`: the mean over the patches that the merger joins to a token."""
    merge: int = model.config.vision_config.spatial_merge_size  # type: ignore[union-attr, assignment]
    return values.unflatten(0, (-1, merge**2)).mean(1)


def grid_layouts(
    model: nn.Module, encoded: Encoded, processor: Any, sizes: Sequence[tuple[int, int]] | None
) -> list[TokenLayout]:
    """One layout for each image or video: a view for an image, one for each step in time of a video.

    A step is `temporal_patch_size` (2) frames. Qwen3-VL writes the time between the steps of a video; their
    tokens count on through such text. The processor stretches the whole image, so every box is all of it.

    Args:
        model: of the Qwen families.
        encoded: the call.
        processor: see `Family.layouts`; any stands for "the pixels are those of a processor".
        sizes: height and width of each image, or of the frames of each video.

    Raises:
        ValueError: if the number of sizes is not that of the images, or a size has another shape.
    """
    merge: int = model.config.vision_config.spatial_merge_size  # type: ignore[union-attr, assignment]
    call = grids(encoded)
    boxes: list[Box | None] = [None] * len(call)
    if processor is not None and sizes is not None:
        if len(sizes) != len(call):
            raise ValueError(
                f"{len(sizes)} sizes for {len(call)} {encoded.modality}s; "
                f"give height and width of each {encoded.modality} of the call, in the order of the prompts"
            )
        for number, ((_, h, w), (height, width)) in enumerate(zip(call, sizes, strict=True)):
            if not _fits((h // merge, w // merge), (height, width)):
                raise ValueError(
                    f"{encoded.modality} {number} has {h // merge} x {w // merge} tokens, which cannot be "
                    f"{height} x {width} pixels stretched; give (height, width) of the original"
                )
        boxes = [(0.0, 0.0, float(width), float(height)) for height, width in sizes]
    layouts, start = [], 0
    for (steps, height, width), box in zip(call, boxes, strict=True):
        n = steps * (height // merge) * (width // merge)
        index = torch.arange(n).view(steps, height // merge, width // merge)
        kind = "image" if encoded.modality == "image" else "frame"
        layouts.append(TokenLayout(n, tuple(View(kind, step, step + start, box) for step in index)))
        start += n
    return layouts


def _fits(grid: tuple[int, int], size: Sequence[int]) -> bool:
    """Whether one factor, with less than a token of rounding, makes rows and columns of height and width."""
    (rows, columns), (height, width) = grid, size
    least = max((rows - 1) / height, (columns - 1) / width)
    return least <= min((rows + 1) / height, (columns + 1) / width)
