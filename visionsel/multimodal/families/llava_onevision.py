"""LLaVA-OneVision: tiles as LLaVA-NeXT where an image is alone, scaled down where they are many; videos."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionsel.multimodal.families.canvas import Canvas
from visionsel.multimodal.families.family import Box, Encoded, TokenLayout, View
from visionsel.multimodal.families.llava import Llava, check_sizes
from visionsel.multimodal.families.llava_next import (
    check_class_token,
    image_sizes,
    patches_per_side,
    tile_grid,
    tile_patches,
    tiled_layout,
    tiles_box,
    whole_box,
)

__all__ = ["LlavaOnevision"]


class LlavaOnevision(Llava):
    """A sample with several images has one picture an image, padded to a square, and a newline behind it."""

    name = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    has_cls = False

    def pool(self, model: nn.Module, values: Tensor, encoded: Encoded) -> Tensor:
        """Interpolates as the model does: frames of videos, and the tiles of large images."""
        config: Any = model.config
        side = patches_per_side(config)
        if encoded.modality == "video":
            half = -(-side // 2)
            frames = values.view(-1, side, side, *values.shape[1:])
            return torch.cat([_scaled(frame, (half, half)) for frame in frames])
        pooled, area = [], side * side
        for shape, alone in _images(encoded, None):
            pooled.append(values[:area])
            values = values[area:]
            if alone:
                rows, columns = tile_grid(config, shape)
                tiles, values = values[: rows * columns * area], values[rows * columns * area :]
                grid = tile_patches(config, shape)
                scaled = _scaled_shape(config, encoded, grid)
                pooled.append(tiles if scaled is None else _scaled(tiles[grid.to(tiles.device)], scaled))
        return torch.cat(pooled)

    def projector(self, model: nn.Module) -> None:
        """None: videos and large images are scaled behind it."""

    def layouts(
        self,
        model: nn.Module,
        encoded: Encoded,
        processor: Any = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[TokenLayout]:
        """Images: thumbnail and tiles, or one picture; videos: frame after frame and one newline token."""
        config: Any = model.config
        check_class_token(self.kept_class_tokens(model, encoded))
        boxed = processor is not None and sizes is not None
        if encoded.modality == "video":
            return _videos(config, encoded, sizes if boxed else None)
        layouts, first, side = [], 0, patches_per_side(config)
        area = side * side
        index = torch.arange(area).view(side, side)
        for shape, alone in _images(encoded, sizes):
            if not alone:
                view = View("image", index, first + index, _padded_box(config, shape) if boxed else None)
                layouts.append(TokenLayout(area + 1, (view,)))
                first += area
                continue
            grid = tile_patches(config, shape)
            scaled = _scaled_shape(config, encoded, grid)
            rows, columns = tile_grid(config, shape)
            number = rows * columns * area
            if scaled is not None:
                number = scaled[0] * scaled[1]
                grid = torch.arange(number).view(scaled)
            boxes = (whole_box(config, shape), tiles_box(config, shape)) if boxed else (None, None)
            layouts.append(tiled_layout(config, first, first + area + grid, boxes))
            first += area + number
        return layouts


def _images(encoded: Encoded, sizes: Sequence[Sequence[int]] | None) -> list[tuple[tuple[int, int], bool]]:
    """The images of a call: height and width, and whether it is alone in its sample, so that it has tiles."""
    shapes = image_sizes(encoded, sizes)
    numbers = encoded.arguments.get("batch_num_images")
    if numbers is None:
        return [(shape, True) for shape in shapes]
    numbers = torch.as_tensor(numbers).tolist()
    return list(zip(shapes, [number == 1 for number in numbers for _ in range(number)], strict=True))


def _scaled_shape(config: Any, encoded: Encoded, grid: Tensor) -> tuple[int, int] | None:
    """Height and width to which the grid of tiles is scaled; None where it is small enough."""
    limit = encoded.arguments.get("vision_aspect_ratio") or config.vision_aspect_ratio
    height, width = grid.shape
    most = int(limit.removeprefix("anyres_max_")) * patches_per_side(config) ** 2
    ratio = math.sqrt(height * width / most)
    return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else None


def _scaled(grid: Tensor, shape: tuple[int, int]) -> Tensor:
    """`[h, w, ...]` interpolated, as rows `[shape[0] * shape[1], ...]`."""
    flat = grid.flatten(2) if grid.ndim > 2 else grid[..., None]
    scaled = F.interpolate(flat.movedim(-1, 0)[None], size=shape, mode="bilinear")[0]
    return scaled.flatten(1).T.reshape(-1, *grid.shape[2:])


def _padded_box(config: Any, shape: tuple[int, int]) -> Box:
    """Of a picture padded to a square."""
    tile, used = config.vision_config.image_size, patches_per_side(config) * config.vision_config.patch_size
    return Canvas.of(shape).squared().resized(tile, tile).cropped(0, 0, used, used).box


def _videos(config: Any, encoded: Encoded, sizes: Sequence[tuple[int, int]] | None) -> list[TokenLayout]:
    pixels = encoded.arguments.get("pixel_values_videos", encoded.arguments.get("pixel_values"))  # by version
    videos, frames = pixels.shape[:2]
    check_sizes(sizes, videos)
    half = -(-patches_per_side(config) // 2)
    index = torch.arange(frames * half * half).view(frames, half, half)
    layouts = []
    for number in range(videos):
        box = None if sizes is None else whole_box(config, sizes[number])
        views = tuple(View("frame", frame, number * index.numel() + frame, box) for frame in index)
        layouts.append(TokenLayout(index.numel() + 1, views))
    return layouts
