"""How an image lies on the square that a SAM sees, and the ways from one to the other.

SAM scales the longest side to the square and pads at the right and at the bottom. SAM 2 and the tracker of
SAM 3 stretch the image over the square, with a scale of its own for each axis.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.v2.functional import resize

__all__ = ["Canvas"]

FEW = 16  # masks at a time at the square's size: 16 of 1024 x 1024 are 64 MB


@dataclass(frozen=True)
class Canvas:
    """The place of one image on the square.

    Attributes:
        image: height and width of the image.
        inside: height and width of the image on the square; the rest is padding.
        side: pixels a side of the square.
        low_res: height and width of the square in logits that the model gives and takes.
        stretched: the image fills the square, whatever its shape.
    """

    image: tuple[int, int]
    inside: tuple[int, int]
    side: int
    low_res: tuple[int, int]
    stretched: bool

    @classmethod
    def of(cls, image: tuple[int, int], side: int, low_res: tuple[int, int], stretch: bool) -> Self:
        """The canvas of an image of a size.

        Raises:
            ValueError: for an image so thin that nothing of it would be left.
        """
        if stretch:
            return cls(image, (side, side), side, low_res, True)
        scale = side * 1.0 / max(image)
        height, width = (int(length * scale + 0.5) for length in image)
        if min(height, width) < 1:
            raise ValueError(
                f"an image of {image[1]} x {image[0]} pixels is {width} x {height} on the model's square of "
                f"{side}; crop it to a shape of at most {2 * side} to 1"
            )
        return cls(image, (height, width), side, low_res, False)

    def resize(self, image: np.ndarray) -> Tensor:
        """uint8 `[H, W, 3]` at its size on the square, uint8 `[3, h, w]`, bilinear, without aliases.

        By Pillow as `SamPredictor` does, or by torchvision as the processors of SAM 2 and SAM 3: the two
        differ by a grey level here and there.
        """
        height, width = self.inside
        if self.stretched:
            return resize(torch.from_numpy(np.array(image)).permute(2, 0, 1), [height, width])
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()

    def place(self, points: Tensor) -> Tensor:
        """Points (x, y) `[..., 2]` of the image on the square; multiplied in float64, given in float32."""
        (height, width), (inside_height, inside_width) = self.image, self.inside
        scale = torch.tensor([inside_width / width, inside_height / height], dtype=torch.float64)
        return (points.double() * scale).float()

    def enlarge(self, logits: Tensor) -> Tensor:
        """Low-resolution logits `[n, h, w]` in pixels of the image `[n, H, W]`, as the models' authors do."""
        parts = [self._enlarge(part) for part in logits[:, None].split(FEW)]
        return torch.cat(parts)[:, 0]

    def _enlarge(self, logits: Tensor) -> Tensor:
        if not self.stretched:  # in two steps, for the padding ends between two cells
            side = (self.side, self.side)
            logits = interpolate(logits, side, mode="bilinear", align_corners=False)
            logits = logits[..., : self.inside[0], : self.inside[1]]
        return interpolate(logits, self.image, mode="bilinear", align_corners=False)

    def shrink(self, logits: Tensor) -> Tensor:
        """Logits in pixels of the image `[n, H, W]` in low resolution `[n, h, w]`.

        Padding gets the lowest logit of each, and at most -1: it is outside (Wu et al. 2025, F-LMM).
        """
        height, width = self.inside
        parts = []
        for part in logits[:, None].float().split(FEW):
            outside = part.amin((1, 2, 3), keepdim=True).clamp(max=-1)
            part = interpolate(part, (height, width), mode="bilinear", align_corners=False, antialias=True)
            # padded around zero, so that each may have its own value there
            part = pad(part - outside, (0, self.side - width, 0, self.side - height)) + outside
            parts.append(
                interpolate(part, self.low_res, mode="bilinear", align_corners=False, antialias=True)
            )
        return torch.cat(parts)[:, 0]
