"""Masks, boxes, points and heatmaps drawn over images, at the resolution of the image.

Every function returns a new PIL image and leaves its input as it was. Colours are what `PIL.ImageColor`
reads, such as "#e69f00". Text, borders and points grow with the image (`text_size`), so that thumbnails of
small and large images look the same; each has an argument for another size.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

__all__ = [
    "CHANGE",
    "HEAT",
    "OKABE_ITO",
    "draw_boxes",
    "draw_points",
    "enlarge",
    "heat_colors",
    "ink_on",
    "overlay_heatmap",
    "overlay_masks",
    "text_size",
]

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

CHANGE = ("#0072b2", "#f7f7f7", "#d55e00")
"""A ramp for changes, from blue (less) over white (none) to vermilion (more)."""

SMALLEST = 8  # pixels of legible text
ROWS = 256  # of pixels at a time, so that large images need little memory in floating point


def text_size(image: Image.Image) -> int:
    """The height of text on an image, in pixels: a thirtieth of the side of a square of its area, at least 8.

    It is 13 on 384 x 384 pixels and 211 on 40 megapixels.
    """
    return max(SMALLEST, round(math.sqrt(image.width * image.height) / 30))


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
    pixels = np.array(image.convert("RGB"))
    for mask in masks:
        if mask.dtype != np.bool_ or mask.shape != pixels.shape[:2]:
            raise ValueError(
                f"a mask is bool {list(pixels.shape[:2])} like the image, got {mask.dtype} {list(mask.shape)}"
            )
    rgbs = [np.array(_rgb(color)) for color in colors]
    for top in range(0, len(pixels), ROWS):
        part = slice(top, top + ROWS)
        mixed = pixels[part].astype(np.float64)
        for mask, rgb in zip(masks, rgbs, strict=True):
            mixed[mask[part]] = (1 - alpha) * mixed[mask[part]] + alpha * rgb
        pixels[part] = mixed.round()
    return Image.fromarray(pixels)


def overlay_heatmap(
    image: Image.Image,
    heatmap: np.ndarray,
    alpha: float = 0.6,
    legend: bool = True,
    *,
    limits: tuple[float, float] | None = None,
    colors: Sequence[str] = HEAT,
    font_size: float | None = None,
) -> Image.Image:
    """Mix the colours of a map into the grey image: dark blue where it is lowest, yellow where highest.

    Args:
        image: of any mode, `H` by `W` pixels.
        heatmap: `[H, W]`.
        alpha: share of the colours, 0 to 1.
        legend: add a strip below the image with the colours and, where there is room, the two values.
        limits: the values of the first and the last colour, so that several maps can be compared; what lies
            beyond has these colours. None: the least and the largest value; a map of one value has the first
            colour.
        colors: of the ramp, at equal distances; `CHANGE` with limits `(-x, x)` shows differences.
        font_size: of the values, in pixels; None: `text_size`.

    Returns:
        The picture, RGB, at the resolution of the image.

    Raises:
        ValueError: for a map of another size or with NaN or infinity, an `alpha` or a `font_size` out of
            range, limits that are not in order, or fewer than two colours.
    """
    if heatmap.shape != (image.height, image.width):
        raise ValueError(
            f"a heatmap is [{image.height}, {image.width}] like the image, got {list(heatmap.shape)}"
        )
    if not np.isfinite(heatmap).all():
        raise ValueError("the heatmap holds NaN or infinity")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    if limits is not None and not (np.isfinite(limits).all() and limits[0] < limits[1]):
        raise ValueError(f"limits are two finite numbers, the lower one first; got {limits}")
    low, high = limits or (float(heatmap.min()), float(heatmap.max()))
    pixels = np.array(image.convert("L").convert("RGB"))
    for top in range(0, len(pixels), ROWS):
        part = slice(top, top + ROWS)
        shares = (heatmap[part].astype(np.float64) - low) / ((high - low) or 1.0)
        pixels[part] = ((1 - alpha) * pixels[part] + alpha * heat_colors(shares, colors)).round()
    picture = Image.fromarray(pixels)
    return _with_legend(picture, (low, high), colors, _size(image, font_size)) if legend else picture


def heat_colors(shares: np.ndarray, colors: Sequence[str] = HEAT) -> np.ndarray:
    """RGB float `[..., 3]`, 0 to 255, of values `[...]` from 0 to 1 on a ramp; those beyond have its ends.

    Raises:
        ValueError: for fewer than two colours.
    """
    if len(colors) < 2:
        raise ValueError(f"a ramp has at least two colours, got {list(colors)}")
    ramp = np.array([_rgb(color) for color in colors], dtype=np.float64)
    steps = np.linspace(0, 1, len(ramp))
    return np.stack([np.interp(shares, steps, channel) for channel in ramp.T], -1)


def _with_legend(
    picture: Image.Image, limits: tuple[float, float], colors: Sequence[str], size: float
) -> Image.Image:
    font, bar, gap = ImageFont.load_default(size), max(8, round(0.7 * size)), max(1, round(0.1 * size))
    ascent, descent = font.getmetrics()  # type: ignore[union-attr]
    height = picture.height + bar + 2 * gap + ascent + descent
    whole = Image.new("RGB", (picture.width, height), "white")
    whole.paste(picture)
    strip = heat_colors(np.linspace(0, 1, picture.width), colors)[None].repeat(bar, 0)
    whole.paste(Image.fromarray(strip.round().astype(np.uint8)), (0, picture.height))
    draw, y = ImageDraw.Draw(whole), picture.height + bar + gap
    texts = [f"{value:.2g}" for value in limits]
    widths = [math.ceil(draw.textlength(text, font=font)) for text in texts]
    if sum(widths) + size <= picture.width:
        draw.text((gap, y), texts[0], fill="black", font=font)
        draw.text((picture.width - widths[1] - gap, y), texts[1], fill="black", font=font)
    return whole


def draw_points(
    image: Image.Image,
    points: Sequence[Sequence[float]],
    labels: Sequence[int],
    radius: int | None = None,
) -> Image.Image:
    """Draw points with a white and a black rim: full ones are inside of something, hollow ones outside.

    Args:
        image: of any mode.
        points: (x, y) in pixels.
        labels: 1 inside, 0 outside, one for each point.
        radius: in pixels; None: a third of `text_size`.

    Returns:
        The picture, RGB.

    Raises:
        ValueError: for another number of labels than of points, or a radius below 1.
    """
    if len(points) != len(labels):
        raise ValueError(f"one label for each point, got {len(labels)} for {len(points)}")
    if radius is None:
        radius = round(text_size(image) / 3)
    elif radius < 1:
        raise ValueError(f"radius must be at least 1 pixel, got {radius}")
    rim = max(1, round(radius / 4))
    picture = _copy(image)
    draw = ImageDraw.Draw(picture)
    for (x, y), label in zip(points, labels, strict=True):
        for size, color in ((radius + rim, "black"), (radius, "white")):
            around = (x - size, y - size, x + size, y + size)
            draw.ellipse(around, fill=color if label else None, outline=color, width=rim)
        if label:
            inner = radius - rim
            draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill=_rgb(OKABE_ITO["vermilion"]))
    return picture


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    colors: Sequence[str],
    labels: Sequence[str] | None = None,
    width: int | None = None,
    font_size: float | None = None,
) -> Image.Image:
    """Draw the border of each box just inside it, and a label on its upper left corner.

    Args:
        image: of any mode.
        boxes: (x0, y0, x1, y1) in pixels, the last two one past the end; what lies outside is not seen.
        colors: one for each box.
        labels: one for each box; default none.
        width: of the border, in pixels; None: a sixth of `text_size`.
        font_size: of the labels, in pixels; None: `text_size`. A label that is wider than the image is made
            smaller until it fits, or has 8 pixels.

    Returns:
        The picture, RGB.

    Raises:
        ValueError: for another number of colours or labels than of boxes, a box without pixels, or a
            `font_size` that is not above 0.
    """
    for name, given in (("colour", colors), ("label", labels)):
        if given is not None and len(given) != len(boxes):
            raise ValueError(f"one {name} for each box, got {len(given)} for {len(boxes)}")
    size = _size(image, font_size)
    if width is None:
        width = round(text_size(image) / 6)
    picture = _copy(image)
    draw = ImageDraw.Draw(picture)
    corners = [tuple(round(side) for side in box) for box in boxes]
    for (x0, y0, x1, y1), color in zip(corners, colors, strict=True):
        if x0 >= x1 or y0 >= y1:
            raise ValueError(f"a box is (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got {(x0, y0, x1, y1)}")
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=_rgb(color), width=width)
    for (x0, y0, *_), color, label in zip(corners, colors, labels or (), strict=bool(labels)):
        _draw_label(draw, picture, (x0, y0), label, _rgb(color), size)
    return picture


def _draw_label(
    draw: ImageDraw.ImageDraw,
    picture: Image.Image,
    corner: tuple[int, int],
    label: str,
    color: tuple[int, ...],
    size: float,
) -> None:
    """Black or white text on a plate of a colour, moved so that it is inside of the picture."""
    font = ImageFont.load_default(size)
    if (wide := draw.textlength(label, font=font) + size / 2) > picture.width and size > SMALLEST:
        size = max(SMALLEST, size * picture.width / wide)
        font = ImageFont.load_default(size)
    rim = max(1, round(size / 4))
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    x = max(0, min(corner[0], picture.width - int(right - left) - 2 * rim))
    y = max(0, min(corner[1], picture.height - int(bottom - top) - 2 * rim))
    draw.rectangle((x, y, x + right - left + 2 * rim - 1, y + bottom - top + 2 * rim - 1), fill=color)
    draw.text((x + rim - left, y + rim - top), label, fill=ink_on(color), font=font)


def ink_on(rgb: Sequence[float]) -> str:
    """The colour of letters on a colour: "black" or "white".

    Args:
        rgb: of the ground, from 0 to 255 each.
    """
    return "black" if np.dot(rgb, (0.299, 0.587, 0.114)) > 128 else "white"


def enlarge(image: Image.Image, factor: int, smooth: bool = False) -> Image.Image:
    """The image, `factor` times as wide and high: pixels become squares, or with `smooth` are interpolated.

    Raises:
        ValueError: when `factor` is not a positive integer.
    """
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"factor must be a positive integer, got {factor!r}")
    filter_ = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return image.resize((factor * image.width, factor * image.height), filter_)


def _copy(image: Image.Image) -> Image.Image:
    """A copy in RGB."""
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _rgb(color: str) -> tuple[int, ...]:
    return ImageColor.getrgb(color)[:3]


def _size(image: Image.Image, font_size: float | None) -> float:
    if font_size is not None and not 0 < font_size < math.inf:
        raise ValueError(f"font_size must be a number of pixels above 0, got {font_size}")
    return text_size(image) if font_size is None else font_size
