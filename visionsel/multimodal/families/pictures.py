"""Layouts of images that reach the model as a row of equal pictures: the whole, its tiles, its crops."""

from collections.abc import Sequence

import torch

from visionsel.multimodal.families.family import Box, TokenLayout, View

__all__ = ["Picture", "picture_layouts"]

Picture = tuple[str, Box | None]  # kind and box of its view


def picture_layouts(
    images: Sequence[Sequence[Picture]], pictures: int, grid: tuple[int, int]
) -> list[TokenLayout]:
    """The layouts of images whose pictures, and their tokens, follow each other in the call and the prompts.

    Args:
        images: the pictures of each image.
        pictures: how many pictures the model was given.
        grid: rows and columns of tokens of a picture.

    Raises:
        ValueError: if the images do not have as many pictures as the model was given.
    """
    expected = sum(map(len, images))
    if expected != pictures:
        raise ValueError(
            f"{len(images)} images of these sizes make {expected} pictures, "
            f"but the model was given {pictures}; "
            "give height and width of each image of the call, in the order of the prompts, "
            "and an image processor with the settings that were used"
        )
    layouts, start = [], 0
    for image in images:
        index = torch.arange(len(image) * grid[0] * grid[1]).view(len(image), *grid)
        views = tuple(
            View(kind, numbers, numbers + start, box)
            for (kind, box), numbers in zip(image, index, strict=True)
        )
        layouts.append(TokenLayout(index.numel(), views))
        start += index.numel()
    return layouts
