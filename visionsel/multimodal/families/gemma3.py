"""Gemma 3 (Gemma Team 2025): the whole image stretched to a square, tokens by average pooling.

With pan and scan, off by default, a long image is also cut into crops along its long side. The prompt has one
run of image tokens for the image and one for each crop, with text between them; the model gets pictures and
is not told which belong to one image.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from visionsel.multimodal.families.family import Encoded, Family, TokenLayout
from visionsel.multimodal.families.pictures import Picture, picture_layouts

__all__ = ["Gemma3"]

# what `Gemma3Processor` says to its image processor, and published checkpoints leave open
PAN_AND_SCAN = {
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


class Gemma3(Family):
    """Gemma 3 with vision."""

    name = "Gemma 3"
    model_types = ("gemma3",)
    one_layout_an_image = False

    def tower_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return model.model.vision_tower.encoder.layers  # type: ignore[union-attr, return-value]

    def pool(self, model: nn.Module, values: Tensor, encoded: Encoded) -> Tensor:
        side, block = _grid(model)
        return values.unflatten(0, (-1, side, block, side, block)).mean((2, 4)).flatten(0, 2)

    def layouts(
        self,
        model: nn.Module,
        encoded: Encoded,
        processor: Any = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[TokenLayout]:
        """The layouts, in the order of the placeholders.

        With processor and sizes there is one for each image: a view of the whole image, then one for each
        crop of pan and scan. Without them there is one for each picture, because the pixels do not say which
        pictures make up an image; without pan and scan that is the same. Either way the tokens count on
        through the prompts in order.

        Args:
            model: Gemma 3.
            encoded: the call.
            processor: see `Family.layouts`; its crops must be those in use when the pixels were made.
            sizes: height and width of each image of the call.

        Raises:
            ValueError: if the pictures are not those that the processor makes of images of these sizes.
        """
        pictures, (side, _) = len(encoded.arguments["pixel_values"]), _grid(model)
        images: list[list[Picture]] = [[("image", None)] for _ in range(pictures)]
        if processor is not None and sizes is not None:
            crop = pictures > len(sizes)
            images = [_boxes(processor, *size, crop) for size in sizes]
        return picture_layouts(images, pictures, (side, side))


def _grid(model: nn.Module) -> tuple[int, int]:
    """Rows and columns of tokens of a picture, and of patches that a token is the mean of."""
    config: Any = model.config
    side = int(config.mm_tokens_per_image**0.5)
    return side, config.vision_config.image_size // config.vision_config.patch_size // side


def _boxes(processor: Any, height: int, width: int, crop: bool) -> list[Picture]:
    """Kind and box of the pictures of an image of this size: the whole, then the crops."""
    whole = (0.0, 0.0, float(width), float(height))
    longest, shortest = max(height, width), min(height, width)
    number = _crops(processor, longest, shortest) if crop else 0
    if number == 0:
        return [("image", whole)]
    boxes: list[Picture] = [("thumbnail", whole)]
    step = math.ceil(longest / number)
    for start in range(0, longest, step):
        end = min(start + step, longest)
        if width >= height:
            boxes.append(("tile", (float(start), 0.0, float(end), float(height))))
        else:
            boxes.append(("tile", (0.0, float(start), float(width), float(end))))
    return boxes


def _crops(processor: Any, longest: int, shortest: int) -> int:
    """How many crops pan and scan makes along the long side; 0 where it leaves the image alone."""
    least, most, ratio = (_setting(processor, name) for name in PAN_AND_SCAN)
    if longest / shortest < ratio:
        return 0
    number = min(max(min(math.floor(longest / least), math.floor(longest / shortest + 0.5)), 2), int(most))
    return number if min(math.ceil(longest / number), shortest) >= least else 0


def _setting(processor: Any, name: str) -> float:
    """A setting of pan and scan; a whole processor overrules the image processor inside it."""
    if hasattr(processor, "image_processor"):
        value = getattr(processor, "images_kwargs", {}).get(name)
    else:
        value = getattr(processor, name, None)
    return PAN_AND_SCAN[name] if value is None else value
