"""LLaVA-NeXT: the whole image, then its tiles as one grid without padding, each row with a newline token."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from visionsel.multimodal.families.canvas import Canvas
from visionsel.multimodal.families.family import Box, Encoded, TokenLayout, View
from visionsel.multimodal.families.llava import Llava, check_sizes

__all__ = ["LlavaNext"]


class LlavaNext(Llava):
    """Several images a sample have tiles each."""

    name = "LLaVA-NeXT"
    model_types = ("llava_next",)

    def layouts(
        self,
        model: nn.Module,
        encoded: Encoded,
        processor: Any = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[TokenLayout]:
        """A thumbnail and a grid of tiles an image."""
        config: Any = model.config
        check_class_token(self.kept_class_tokens(model, encoded))
        shapes = image_sizes(encoded, sizes)
        boxed = processor is not None and sizes is not None
        layouts, first, area = [], 0, patches_per_side(config) ** 2
        for shape in shapes:
            grid = tile_patches(config, shape)
            boxes = (whole_box(config, shape), tiles_box(config, shape)) if boxed else (None, None)
            source = first + area + grid
            layouts.append(tiled_layout(config, first, source, boxes))
            rows, columns = tile_grid(config, shape)
            first += area * (1 + rows * columns)
        return layouts


def check_class_token(kept: int) -> None:
    """ValueError when the class token of each tile is to be kept: the model cannot build a grid then."""
    if kept:
        raise ValueError(
            'vision_feature_select_strategy "full" keeps the class token, which has no place in a grid of '
            'tiles; set it to "default"'
        )


def image_sizes(encoded: Encoded, sizes: Sequence[Sequence[int]] | None) -> list[tuple[int, int]]:
    """Height and width of the images of a call.

    Raises:
        ValueError: when `sizes` says something else than the call.
    """
    given = torch.as_tensor(encoded.arguments["image_sizes"]).tolist()
    shapes = [(int(height), int(width)) for height, width in given]
    if sizes is not None:
        check_sizes(sizes, len(shapes))
        for number, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
            if shape != (int(size[0]), int(size[1])):
                raise ValueError(
                    f"image {number} is {shape[0]} x {shape[1]} by image_sizes, but {size[0]} x {size[1]} by "
                    "sizes; pass height and width of the original images"
                )
    return shapes


def patches_per_side(config: Any) -> int:
    """Of a tile."""
    return config.vision_config.image_size // config.vision_config.patch_size


def tile_grid(config: Any, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles of an image."""
    return get_anyres_image_grid_shape(shape, config.image_grid_pinpoints, config.vision_config.image_size)


def tile_patches(config: Any, shape: tuple[int, int]) -> Tensor:
    """int64 `[h, w]`: the patches of the tiles as one grid without padding, numbered tile after tile."""
    side, (rows, columns) = patches_per_side(config), tile_grid(config, shape)
    patches = torch.arange(rows * columns * side * side).view(rows, columns, side, side)
    whole = patches.transpose(1, 2).reshape(1, rows * side, columns * side)
    return unpad_image(whole, shape)[0]


def tiled_layout(
    config: Any, first: int, source: Tensor, boxes: tuple[Box | None, Box | None]
) -> TokenLayout:
    """The layout of an image with tiles.

    Args:
        config: of the model.
        first: row of the first patch of the whole image in the pooled outputs.
        source: int64 `[h, w]`: rows of the grid of tiles.
        boxes: of the whole image and of the grid.
    """
    side, (height, width) = patches_per_side(config), source.shape
    index = torch.arange(side * side).view(side, side)
    rows = side * side + torch.arange(height * (width + 1)).view(height, width + 1)
    views = (
        View("thumbnail", index, first + index, boxes[0]),
        View("tiles", rows[:, :-1], source, boxes[1]),  # the last token of a row is the newline
    )
    return TokenLayout(side * side + height * (width + 1), views)


def whole_box(config: Any, shape: tuple[int, int]) -> Box:
    """Of the whole image, stretched to a tile; patches leave out what is left at the right and the bottom."""
    tile, used = config.vision_config.image_size, patches_per_side(config) * config.vision_config.patch_size
    return Canvas.of(shape).resized(tile, tile).cropped(0, 0, used, used).box


def tiles_box(config: Any, shape: tuple[int, int]) -> Box:
    """Of the grid of tiles: resized to fit into the tiles, padded around, cut to the cells that are kept.

    A cell is taken as a tile over its patches a side, so a tile's rest that no patch covers is shared out.
    """
    tile, side = config.vision_config.image_size, patches_per_side(config)
    rows, columns = tile_grid(config, shape)
    height, width = shape
    if columns * tile / width < rows * tile / height:
        fit = (min(math.ceil(height * (columns * tile / width)), rows * tile), columns * tile)
    else:
        fit = (rows * tile, min(math.ceil(width * (rows * tile / height)), columns * tile))
    top, left = (rows * tile - fit[0]) // 2, (columns * tile - fit[1]) // 2
    canvas = Canvas.of(shape).resized(*fit).cropped(-top, -left, rows * tile, columns * tile)
    h, w = tile_patches(config, shape).shape
    cell = tile / side
    cut_top, cut_left = (rows * side - h) // 2, (columns * side - w) // 2
    return canvas.cropped(cut_top * cell, cut_left * cell, h * cell, w * cell).box
