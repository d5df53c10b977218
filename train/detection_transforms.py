"""Augmentation of images with boxes and masks, from torchvision's `transforms.v2`.

Everything is drawn from torch's global generator, which `SeededDataset` seeds for each sample.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

__all__ = ["AUGMENTATIONS", "Augmentation", "RandomWindow", "drop_lost_objects", "training_transform"]

Augmentation = Literal["resize", "crop", "jitter"]
AUGMENTATIONS: tuple[Augmentation, ...] = ("resize", "crop", "jitter")


def training_transform(
    augmentation: Augmentation,
    *,
    sizes: Sequence[int],
    size: int,
    max_size: int,
    jitter: tuple[float, float],
    hflip: float,
    color_jitter: float,
) -> v2.Transform:
    """What training does to an image and its target; see `CocoData` for the arguments.

    Raises:
        ValueError: naming the argument that is out of range.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes must be at least 1 pixel each, got {list(sizes)}")
    if max(sizes) > max_size:
        raise ValueError(f"sizes up to {max(sizes)} do not fit into max_size {max_size}")
    if not 0 < jitter[0] <= jitter[1]:
        raise ValueError(f"jitter is a range of scales above 0, got {jitter}")
    if not 0 <= hflip <= 1:
        raise ValueError(f"hflip is a probability from 0 to 1, got {hflip}")
    if not 0 <= color_jitter <= 1:
        raise ValueError(f"color_jitter must be from 0 to 1, got {color_jitter}")
    steps: list[Any] = []
    if color_jitter:
        steps.append(v2.ColorJitter(color_jitter, color_jitter, color_jitter, color_jitter / 4))
    steps.append(v2.RandomHorizontalFlip(hflip))
    resize = v2.RandomShortestSize(list(sizes), max_size)
    if augmentation == "resize":
        steps.append(resize)
    elif augmentation == "crop":
        window = v2.Compose([v2.RandomShortestSize([400, 500, 600]), RandomWindow(384, 600), resize])
        steps.append(v2.RandomChoice([resize, window]))
    elif augmentation == "jitter":
        steps += [v2.ScaleJitter((size, size), jitter), v2.RandomCrop((size, size), pad_if_needed=True)]
    else:
        raise ValueError(f"unknown augmentation {augmentation!r}; choose one of {', '.join(AUGMENTATIONS)}")
    return v2.Compose([*steps, v2.ClampBoundingBoxes()])


class RandomWindow(v2.Transform):
    """Cut out a window whose sides are drawn from `least` to `most` pixels, as far as the image has them."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least = least
        self.most = most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        """Place and size of the window."""
        height, width = v2.functional.get_size(
            next(x for x in flat_inputs if isinstance(x, tv_tensors.Image))
        )
        h, w = (_between(min(side, self.least), min(side, self.most)) for side in (height, width))
        return {"top": _between(0, height - h), "left": _between(0, width - w), "height": h, "width": w}

    def transform(self, inpt: Any, params: dict[str, int]) -> Any:
        """Image, boxes or masks inside the window."""
        return self._call_kernel(v2.functional.crop, inpt, **params)


def drop_lost_objects(target: dict[str, Any]) -> dict[str, Any]:
    """Leave out the objects of which less than a pixel a side, or no pixel of the mask, is left."""
    sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
    keep = (sides >= 1).all(1)
    if "masks" in target and len(keep):
        keep &= target["masks"].flatten(1).any(1)
    return {key: value[keep] if isinstance(value, Tensor) else value for key, value in target.items()}


def _between(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))
