"""Idefics3 (Laurençon et al. 2024) and SmolVLM (Marafioti et al. 2025): tiles, then the whole image.

The processor stretches a large image to whole tiles and adds the image itself, stretched to one tile, behind
them. Each of these pictures is a run of image tokens in the prompt, with text between the runs. The model
gets pictures, not images: it is not told where an image ends.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from visionsel.multimodal.families.family import Encoded, Family, TokenLayout
from visionsel.multimodal.families.pictures import Picture, picture_layouts

__all__ = ["Idefics3"]

LARGEST = 4096  # pixels on the long side that the processor allows, whatever its size


class Idefics3(Family):
    """Idefics3 and SmolVLM. A pixel shuffle joins squares of patches to tokens."""

    name = "Idefics3"
    model_types = ("idefics3", "smolvlm")
    one_layout_an_image = False

    def decoder(self, model: nn.Module) -> nn.Module:
        return model.model.text_model  # type: ignore[union-attr, return-value]

    def tower_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return model.model.vision_model.encoder.layers  # type: ignore[union-attr, return-value]

    def pool(self, model: nn.Module, values: Tensor, encoded: Encoded) -> Tensor:
        side, scale = _side(model, encoded), model.config.scale_factor  # type: ignore[union-attr]
        squares = values.unflatten(0, (-1, side, scale, side, scale))
        return squares.mean((2, 4)).flatten(0, 2)

    def projector(self, model: nn.Module) -> nn.Module | None:
        return model.model.connector.modality_projection  # type: ignore[union-attr, return-value]

    def layouts(
        self,
        model: nn.Module,
        encoded: Encoded,
        processor: Any = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[TokenLayout]:
        """The layouts, in the order of the placeholders.

        With processor and sizes there is one for each image: a view for each tile, row by row, then one of
        the whole image. Without them there is one for each picture, tile or not, because the pixels do not
        say which pictures make up an image. Either way the tokens count on through the prompts in order.
        The frames of a SmolVLM video are images: each has its own size in `sizes`.

        Args:
            model: Idefics3 or SmolVLM.
            encoded: the call.
            processor: see `Family.layouts`; its sizes must be those in use when the pixels were made.
            sizes: height and width of each image of the call.

        Raises:
            ValueError: if the pictures are not square, or not those that the processor makes of such images.
        """
        pictures, side = _pictures(model, encoded), _side(model, encoded)
        images: list[list[Picture]] = [[("image", None)] for _ in range(pictures)]
        if processor is not None and sizes is not None:
            split = pictures > len(sizes)
            images = [_boxes(getattr(processor, "image_processor", processor), *s, split) for s in sizes]
        return picture_layouts(images, pictures, (side, side))


def _pictures(model: nn.Module, encoded: Encoded) -> int:
    """How many pictures the tower got: those of zeros only fill up samples and are left out."""
    pixels: Tensor = encoded.arguments["pixel_values"]
    number = int(pixels.to(model.dtype).flatten(2).ne(0).any(-1).sum())  # type: ignore[arg-type]
    if model.config.model_type == "smolvlm":  # type: ignore[union-attr]
        return max(number, 1)  # SmolVLM keeps the first picture where all are zeros
    return number


def _side(model: nn.Module, encoded: Encoded) -> int:
    """Rows and columns of tokens of a picture."""
    height, width = encoded.arguments["pixel_values"].shape[-2:]
    if height != width:
        raise ValueError(
            f"pictures of {height} x {width} pixels; the pixel shuffle takes squares, "
            "as the image processor makes them"
        )
    config: Any = model.config
    return height // config.vision_config.patch_size // config.scale_factor


def _boxes(processor: Any, height: int, width: int, split: bool) -> list[Picture]:
    """Kind and box of the pictures of an image of this size."""
    whole = (0.0, 0.0, float(width), float(height))
    rows, columns = _tiles(processor, height, width) if split else (1, 1)
    if rows * columns == 1:
        return [("image", whole)]
    tiles: list[Picture] = []
    for row in range(rows):
        for column in range(columns):
            x0, x1 = column * width / columns, (column + 1) * width / columns
            tiles.append(("tile", (x0, row * height / rows, x1, (row + 1) * height / rows)))
    return [*tiles, ("thumbnail", whole)]


def _tiles(processor: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tiles: the long side goes to `size`, then both are stretched to whole tiles."""
    tile, size = processor.max_image_size["longest_edge"], dict(processor.size)
    if processor.do_resize and size.get("longest_edge"):
        wide = width >= height
        height, width = _scaled(height, width, size["longest_edge"])
        height, width = (height + height % 2, width) if wide else (height, width + width % 2)
        if max(height, width) > LARGEST:
            height, width = _scaled(height, width, LARGEST)
    elif processor.do_resize:
        height, width = size["height"], size["width"]
    height, width = _scaled(height, width, math.ceil(max(height, width) / tile) * tile)
    return math.ceil(height / tile), math.ceil(width / tile)


def _scaled(height: int, width: int, longest: int) -> tuple[int, int]:
    """The size with this long side and the same shape; rounded down, as the processor does."""
    shape = width / height
    if width >= height:
        return max(int(longest / shape), 1), longest
    return longest, max(int(longest * shape), 1)
