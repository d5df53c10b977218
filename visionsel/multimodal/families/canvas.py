"""Where a picture that was resized, padded and cropped lies on the image it was made from."""

from collections.abc import Sequence
from dataclasses import dataclass

from visionsel.multimodal.families.family import Box

__all__ = ["Canvas"]


@dataclass(frozen=True)
class Canvas:
    """A picture on its way to the vision tower.

    Attributes:
        box: x0, y0, x1, y1 of what it shows, in pixels of the original image; over the border where padded.
        height: in its own pixels.
        width: in its own pixels.
    """

    box: Box
    height: float
    width: float

    @classmethod
    def of(cls, size: Sequence[int]) -> "Canvas":
        """The original image, of a height and a width."""
        height, width = (int(side) for side in size)
        return cls((0.0, 0.0, float(width), float(height)), height, width)

    def resized(self, height: float, width: float) -> "Canvas":
        """The same part of the image with another number of pixels."""
        return Canvas(self.box, height, width)

    def cropped(self, top: float, left: float, height: float, width: float) -> "Canvas":
        """A part of the picture; where it begins before the picture or ends behind it, it is padded."""
        x0, y0, x1, y1 = self.box
        x, y = (x1 - x0) / self.width, (y1 - y0) / self.height
        box = (x0 + left * x, y0 + top * y, x0 + (left + width) * x, y0 + (top + height) * y)
        return Canvas(box, height, width)

    def squared(self) -> "Canvas":
        """Padded to a square around it, one pixel more behind it where the padding is odd."""
        side = max(self.height, self.width)
        return self.cropped(-((side - self.height) // 2), -((side - self.width) // 2), side, side)
