"""Boxes checked with ramps: an image whose colour says where a pixel lies, sent through an image processor.

Red is the column and green the row. Resizing, padding and cropping carry the colours along, so the mean
colour of the patches of a token is the place of its middle on the original image.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionsel.multimodal.families.family import Encoded, Family, TokenLayout

MEAN, STD = (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)


def ramp(height: int, width: int) -> np.ndarray:
    """uint8 `[H, W, 3]`: red grows with the column, green with the row, from 0 to 255."""
    image = np.full((height, width, 3), 255, np.uint8)
    image[..., 0] = np.round((np.arange(width) + 0.5) / width * 255)[None]
    image[..., 1] = np.round((np.arange(height) + 0.5) / height * 255)[:, None]
    return image


def tokenizer(words: Sequence[str], **special: str) -> Any:
    """A tokenizer of whole words; `special` are tokens that it has as attributes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<unk>", *words, *special.values()]
    base = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=base,
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=special,
    )


def places(family: Family, model: nn.Module, encoded: Encoded, patch: int) -> Tensor:
    """`[rows, 2]`: for each row of `Family.pool` the place of its patches on the image, x and y in 0 to 1."""
    arguments = encoded.arguments
    pixels = arguments["pixel_values_videos" if "pixel_values_videos" in arguments else "pixel_values"]
    pictures = pixels.double().flatten(0, -4)
    pictures = pictures[pictures.flatten(1).any(1)]  # pictures of zeros fill up tensors
    colours = pictures[:, :2] * STD[0] + MEAN[0]
    patches = F.avg_pool2d(
        colours, patch
    )  # what is less than a patch at the end is left out, as by the tower
    return family.pool(model, patches.permute(0, 2, 3, 1).flatten(0, 2), encoded)


def check_boxes(
    family: Family,
    model: nn.Module,
    encoded: Encoded,
    layouts: Sequence[TokenLayout],
    sizes: Sequence[tuple[int, int]],
    patch: int = 4,
    tolerance: float = 0.05,
) -> int:
    """The middle of each cell of each box is where the colours of its patches say.

    Args:
        family: to be checked.
        model: of the family.
        encoded: a call with ramps.
        layouts: with boxes.
        sizes: of the images.
        patch: pixels a side.
        tolerance: in cells.

    Returns:
        How many cells were checked: those that lie within the image.
    """
    place, checked = places(family, model, encoded, patch), 0
    assert len(layouts) == len(sizes)
    for layout, (height, width) in zip(layouts, sizes, strict=True):
        for view in layout.views:
            assert view.box is not None
            x0, y0, x1, y1 = view.box
            rows, columns = view.index.shape
            cell_x, cell_y = (x1 - x0) / columns, (y1 - y0) / rows
            x = (x0 + (torch.arange(columns) + 0.5) * cell_x).expand(rows, columns)
            y = (y0 + (torch.arange(rows) + 0.5) * cell_y)[:, None].expand(rows, columns)
            # at the border the processors' interpolation repeats pixels: look at cells that keep away from it
            margin = 0.6
            inside = (x > margin * cell_x) & (x < width - margin * cell_x)
            inside &= (y > margin * cell_y) & (y < height - margin * cell_y)
            found = place[view.source]
            away_x = (found[..., 0] * width - x).abs() / cell_x
            away_y = (found[..., 1] * height - y).abs() / cell_y
            assert (away_x[inside] < tolerance).all(), (view.kind, view.box, away_x)
            assert (away_y[inside] < tolerance).all(), (view.kind, view.box, away_y)
            checked += int(inside.sum())
    return checked
