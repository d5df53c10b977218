"""Masks and boxes drawn over images. Every function returns a new PIL image and leaves its input as it was.

Colours are what `PIL.ImageColor` reads, such as "#e69f00".
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

__all__ = ["HEAT", "OKABE_ITO", "draw_boxes", "draw_points", "enlarge", "overlay_heatmap", "overlay_masks"]

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

HEAT = ("#00224e", "#0072b2", "#56b4e9", "#f0e442")
"""A ramp from dark blue to yellow: its brightness rises, and nobody's eye mixes up blue and yellow."""


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


def overlay_heatmap(
    image: Image.Image, heatmap: np.ndarray, alpha: float = 0.6, legend: bool = True
) -> Image.Image:
    """Mix the colours of a map into the grey image: dark blue where it is lowest, yellow where highest.

    Args:
        image: of any mode, `H` by `W` pixels.
        heatmap: `[H, W]`; stretched between its least and its largest value, and all blue if it has one only.
        alpha: share of the colours, 0 to 1.
        legend: add a strip below the image with the colours and, where there is room, the two values.

    Returns:
        The picture, RGB, at the resolution of the image.

    Raises:
        ValueError: for a map of another size or with NaN or infinity, or an `alpha` out of range.
    """
    if heatmap.shape != (image.height, image.width):
        raise ValueError(
            f"a heatmap is [{image.height}, {image.width}] like the image, got {list(heatmap.shape)}"
        )
    if not np.isfinite(heatmap).all():
        raise ValueError("the heatmap holds NaN or infinity")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    low, high = float(heatmap.min()), float(heatmap.max())
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None]
    mixed = (1 - alpha) * grey + alpha * _heat((heatmap.astype(np.float64) - low) / ((high - low) or 1.0))
    picture = Image.fromarray(mixed.round().astype(np.uint8))
    return _with_legend(picture, low, high) if legend else picture


def _heat(shares: np.ndarray) -> np.ndarray:
    """RGB `[..., 3]` of values from 0 to 1."""
    ramp = np.array([_rgb(color) for color in HEAT], dtype=np.float64)
    steps = np.linspace(0, 1, len(ramp))
    return np.stack([np.interp(shares, steps, channel) for channel in ramp.T], -1)


def _with_legend(picture: Image.Image, low: float, high: float) -> Image.Image:
    font, bar = ImageFont.load_default(10), 8
    whole = Image.new("RGB", (picture.width, picture.height + bar + 14), "white")
    whole.paste(picture)
    colors = _heat(np.linspace(0, 1, picture.width))[None].repeat(bar, 0)
    whole.paste(Image.fromarray(colors.round().astype(np.uint8)), (0, picture.height))
    draw, y = ImageDraw.Draw(whole), picture.height + bar + 1
    texts = [f"{value:.2g}" for value in (low, high)]
    widths = [int(draw.textlength(text, font=font)) for text in texts]
    if sum(widths) + 8 <= picture.width:
        draw.text((1, y), texts[0], fill="black", font=font)
        draw.text((picture.width - widths[1] - 1, y), texts[1], fill="black", font=font)
    return whole


def draw_points(
    image: Image.Image, points: Sequence[Sequence[float]], labels: Sequence[int], radius: int = 3
) -> Image.Image:
    """Draw points with a white and a black rim: full ones are inside of something, hollow ones outside.

    Args:
        image: of any mode.
        points: (x, y) in pixels.
        labels: 1 inside, 0 outside, one for each point.
        radius: in pixels.

    Returns:
        The picture, RGB.

    Raises:
        ValueError: for another number of labels than of points.
    """
    if len(points) != len(labels):
        raise ValueError(f"one label for each point, got {len(labels)} for {len(points)}")
    picture = image.convert("RGB")
    if picture is image:
        picture = image.copy()
    draw = ImageDraw.Draw(picture)
    for (x, y), label in zip(points, labels, strict=True):
        for size, color in ((radius + 1, "black"), (radius, "white")):
            around = (x - size, y - size, x + size, y + size)
            draw.ellipse(around, fill=color if label else None, outline=color)
        if label:
            inner = radius - 1
            draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill=_rgb(OKABE_ITO["vermilion"]))
    return picture


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
