"""What happens to an image and its label map on the way to the model.

Training follows mmsegmentation's recipe for ADE20K: random scale, a crop of which no class fills more than a
share, flip, photometric distortion. Two things differ from it: brightness is multiplied, not added
(torchvision's), and shrinking smooths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

__all__ = ["IGNORED", "EvalTransform", "TrainTransform", "pad_pair", "scaled_size"]

IGNORED = 255
"""The label of pixels that neither loss nor metrics count."""

CROP_ATTEMPTS = 10  # mmsegmentation's


def scaled_size(
    height: int, width: int, image_scale: tuple[int, int] | None, ratio: float = 1.0
) -> tuple[int, int]:
    """The size `(height, width)` of a resized image, its shape kept.

    Args:
        height, width: of the image.
        image_scale: what the longer and the shorter side may have at most; the image fills one of them. None
            keeps the size.
        ratio: factor on the result.
    """
    factor = ratio
    if image_scale is not None:
        longest, shortest = max(image_scale), min(image_scale)
        factor = min(longest * ratio / max(height, width), shortest * ratio / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


@dataclass(frozen=True)
class TrainTransform:
    """Random scale, crop, flip and colours: uint8 `[3, H, W]` and `[H, W]` to float and uint8 of one size.

    Args:
        crop_size: pixels a side of the result; a smaller image is padded at the right and bottom, with the
            mean colour and the label 255.
        image_scale: see `scaled_size`.
        ratio_range: of the random scale.
        cat_max_ratio: of ten random crops, the first in which no class has more than this share of the
            labelled pixels is taken, else the last; 1 takes the first.
        hflip: probability of a horizontal flip.
        photometric: change brightness, contrast, saturation and hue, each with probability 0.5.
        mean, std: of the normalization.
    """

    crop_size: int
    image_scale: tuple[int, int] | None
    ratio_range: tuple[float, float]
    cat_max_ratio: float
    hflip: float
    photometric: bool
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.ratio_range
        ratio = low + (high - low) * float(torch.rand(()))
        size = list(scaled_size(image.shape[1], image.shape[2], self.image_scale, ratio))
        pair = tv_tensors.Image(image), tv_tensors.Mask(labels[None])
        pair = tuple(functional.resize(part, size, antialias=True) for part in pair)
        pair = self._crop(*pair)
        pair = v2.RandomHorizontalFlip(self.hflip)(*pair)
        if self.photometric:
            pair = distortion()(*pair)
        image = functional.normalize(
            functional.to_dtype(pair[0], torch.float32, scale=True), self.mean, self.std
        )
        return pad_pair(image.as_subclass(Tensor), pair[1].as_subclass(Tensor)[0], self.crop_size)

    def _crop(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        height, width = labels.shape[-2:]
        rows, columns = min(height, self.crop_size), min(width, self.crop_size)
        for _ in range(CROP_ATTEMPTS):
            top = int(torch.randint(height - rows + 1, ()))
            left = int(torch.randint(width - columns + 1, ()))
            box = top, left, rows, columns
            if self.cat_max_ratio >= 1 or _is_mixed(functional.crop(labels, *box), self.cat_max_ratio):
                break
        return functional.crop(image, *box), functional.crop(labels, *box)


def _is_mixed(labels: Tensor, share: float) -> bool:
    """Whether there are several classes and none has `share` of the labelled pixels or more."""
    counts = torch.bincount(labels.flatten().long(), minlength=IGNORED + 1)[:IGNORED]
    return int((counts > 0).sum()) > 1 and float(counts.max()) < share * float(counts.sum())


def distortion() -> v2.Compose:
    """Brightness, contrast, saturation and hue, each with probability 0.5, as strong as mmsegmentation's."""
    changes: tuple[dict[str, float], ...] = (
        {"brightness": 32 / 255},
        {"contrast": 0.5},
        {"saturation": 0.5},
        {"hue": 0.1},  # 18 of the 180 degrees that OpenCV has
    )
    return v2.Compose([v2.RandomApply([v2.ColorJitter(**change)], 0.5) for change in changes])


def pad_pair(image: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Pad a normalized image with 0, the mean, and its labels with 255, at the right and bottom."""
    padding = (0, max(size - labels.shape[1], 0), 0, max(size - labels.shape[0], 0))
    return pad(image, padding), pad(labels, padding, value=IGNORED)


@dataclass(frozen=True)
class EvalTransform:
    """Resize and normalize; labels stay at the size of the file, where predictions are compared.

    Args:
        image_scale: see `scaled_size`.
        mean, std: of the normalization.
    """

    image_scale: tuple[int, int] | None
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 `[3, H, W]` to float `[3, h, w]`."""
        size = list(scaled_size(image.shape[1], image.shape[2], self.image_scale))
        if size != list(image.shape[1:]):
            image = functional.resize(image, size, antialias=True)
        return functional.normalize(
            functional.to_dtype(image, torch.float32, scale=True), self.mean, self.std
        )
