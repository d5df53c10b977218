"""Masks and boxes drawn over images. Every function returns a new PIL image and leaves its input as it was.

Colours are what `PIL.ImageColor` reads, such as "#e69f00".
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

__all__ = ["OKABE_ITO", "draw_boxes", "enlarge", "overlay_masks"]

OKABE_ITO = {
    "orange": "#e69f00",
    "sky blue": "#56b4e9",
    "green": "#009e73",
    "yellow": "#f0e442",
    "purple": "#cc79a7",
    "blue": "#0072b2",
    "vermilion": "#d55e00",
}
"""Colours that every kind of colour vision tells apart (Okabe and Ito 2008), without black."""


def overlay_masks(
    image: Image.Image, masks: Sequence[np.ndarray], colors: Sequence[str], alpha: float = 0.5
) -> Image.Image:
    """Mix a colour into the pixels of each mask; where masks overlap, later ones lie above.

    Args:
        image: of any mode, `H` by `W` pixels.
        masks: bool `[H, W]` each, or one array `[N, H, W]`.
        colors: one for each mask.
        alpha: share of the colour, 0 to 1.

    Returns:
        The picture, RGB.

    Raises:
        ValueError: for another number of colours than of masks, a mask that is not bool or of another size,
            or an `alpha` out of range.
    """
    if len(colors) != len(masks):
        raise ValueError(f"one colour for each mask, got {len(colors)} for {len(masks)}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    pixels = np.array(image.convert("RGB"), dtype=np.float64)
    for mask, color in zip(masks, colors, strict=True):
        if mask.dtype != np.bool_ or mask.shape != pixels.shape[:2]:
            raise ValueError(
                f"a mask is bool {list(pixels.shape[:2])} like the image, got {mask.dtype} {list(mask.shape)}"
            )
        pixels[mask] = (1 - alpha) * pixels[mask] + alpha * np.array(_rgb(color))
    return Image.fromarray(pixels.round().astype(np.uint8))


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    colors: Sequence[str],
    labels: Sequence[str] | None = None,
    width: int = 2,
) -> Image.Image:
    """Draw the border of each box just inside it, and a label on its upper left corner.

    Args:
        image: of any mode.
        boxes: (x0, y0, x1, y1) in pixels, the last two one past the end; what lies outside is not seen.
        colors: one for each box.
        labels: one for each box; default none.
        width: of the border, in pixels.

    Returns:
        The picture, RGB.

    Raises:
        ValueError: for another number of colours or labels than of boxes, or a box without pixels.
    """
    for name, given in (("colour", colors), ("label", labels)):
        if given is not None and len(given) != len(boxes):
            raise ValueError(f"one {name} for each box, got {len(given)} for {len(boxes)}")
    picture = image.convert("RGB")
    if picture is image:
        picture = image.copy()
    draw = ImageDraw.Draw(picture)
    corners = [tuple(round(side) for side in box) for box in boxes]
    for (x0, y0, x1, y1), color in zip(corners, colors, strict=True):
        if x0 >= x1 or y0 >= y1:
            raise ValueError(f"a box is (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got {(x0, y0, x1, y1)}")
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=_rgb(color), width=width)
    font = ImageFont.load_default(12)
    for (x0, y0, *_), color, label in zip(corners, colors, labels or (), strict=bool(labels)):
        left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
        x = max(0, min(x0, picture.width - int(right - left) - 6))
        y = max(0, min(y0, picture.height - int(bottom - top) - 6))
        rgb = _rgb(color)
        draw.rectangle((x, y, x + right - left + 5, y + bottom - top + 5), fill=rgb)
        bright = np.dot(rgb, (0.299, 0.587, 0.114)) > 128
        draw.text((x + 3 - left, y + 3 - top), label, fill="black" if bright else "white", font=font)
    return picture


def enlarge(image: Image.Image, factor: int, smooth: bool = False) -> Image.Image:
    """The image, `factor` times as wide and high: pixels become squares, or with `smooth` are interpolated.

    Raises:
        ValueError: when `factor` is not a positive integer.
    """
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"factor must be a positive integer, got {factor!r}")
    filter_ = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return image.resize((factor * image.width, factor * image.height), filter_)


def _rgb(color: str) -> tuple[int, ...]:
    return ImageColor.getrgb(color)[:3]
