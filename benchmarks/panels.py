"""Pages of panels for `benchmarks.pictures`: titles, images side by side, text below, on white."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from visionsel.multimodal.pruning.picture import RAMP, TINT
from visionsel.viz import OKABE_ITO, ink_on

__all__ = ["Panel", "Piece", "page", "tag", "veil"]

WIDTH, MARGIN, GAP = 1640, 32, 24  # pixels; pages show it at about half the size
LARGEST = 400  # side of a panel
PAPER, INK, FAINT = "#ffffff", "#20242c", "#5c6470"
LARGE, SMALL = 34, 26  # of letters


@dataclass(frozen=True)
class Piece:
    """A word or more, in a coloured field or not, struck through or not."""

    text: str
    fill: str | None = None
    struck: bool = False


@dataclass(frozen=True)
class Panel:
    """A square image under its title, and paragraphs below."""

    title: str
    image: Image.Image
    below: Sequence[Sequence[Piece]] = ()


def page(question: str, answer: Sequence[Piece], panels: Sequence[Panel]) -> Image.Image:
    """Panels in a row; above them what was asked and answered, if anything."""
    gaps = 2 * MARGIN + GAP * (len(panels) - 1)
    side = min(LARGEST, (WIDTH - gaps) // len(panels))
    width = side * len(panels) + gaps
    inner = width - 2 * MARGIN
    canvas = Image.new("RGB", (width, 4000), PAPER)
    draw, top = ImageDraw.Draw(canvas), MARGIN
    if question:
        draw.text((MARGIN, top), question, fill=FAINT, font=ImageFont.load_default(SMALL))
        top += SMALL + 20
    if answer:
        top = _write(draw, (MARGIN, top), answer, inner, LARGE) + 16
    bottom = top
    for number, panel in enumerate(panels):
        left, y = MARGIN + number * (side + GAP), top
        draw.text((left, y), panel.title, fill=INK, font=ImageFont.load_default(SMALL))
        y += SMALL + 14
        canvas.paste(panel.image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (left, y))
        y += side + 16
        for paragraph in panel.below:
            y = _write(draw, (left, y), paragraph, side, SMALL) + 8
        bottom = max(bottom, y)
    return canvas.crop((0, 0, width, bottom - 16 + MARGIN))


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], pieces: Sequence[Piece], width: int, size: int
) -> int:
    """Write pieces in lines of some width; returns the height at which the last one ends."""
    font, space, pad = ImageFont.load_default(size), size * 0.28, size * 0.2
    x, y = float(at[0]), at[1]
    for piece in pieces:
        for word in [piece.text] if piece.fill else piece.text.split():
            length = font.getlength(word) + (2 * pad if piece.fill else 0)
            if x + length > at[0] + width and x > at[0]:
                x, y = float(at[0]), y + round(size * 1.45)
            ink = INK
            if piece.fill:
                draw.rounded_rectangle(
                    (x, y - pad / 2, x + length, y + size * 1.2), radius=6, fill=piece.fill
                )
                ink = ink_on(ImageColor.getrgb(piece.fill)[:3])
                x += pad
            draw.text((x, y), word, fill=ink, font=font)
            end = x + font.getlength(word)
            if piece.struck:
                draw.line((x, y + size * 0.64, end, y + size * 0.64), fill=ink, width=max(2, size // 10))
            x = end + (pad if piece.fill else 0) + space
    return y + round(size * 1.45)


def tag(image: Image.Image, at: tuple[int, int], text: str, color: str, size: int = 30) -> None:
    """Draw a number into the corner of a box."""
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    width = round(font.getlength(text)) + 14
    x = min(max(at[0], 0), image.width - width)
    y = min(max(at[1], 0), image.height - size - 6)
    draw.rectangle((x, y, x + width, y + size + 6), fill=color)
    draw.text((x + 7, y), text, fill=ink_on(ImageColor.getrgb(color)[:3]), font=font)


def veil(image: Image.Image, kept: np.ndarray, query: tuple[int, int] | None = None) -> Image.Image:
    """The image with all cells of a grid under a veil but some.

    Args:
        image: RGB.
        kept: bool `[rows, columns]`, which divide the image: cells that stay as they are.
        query: row and column of a cell to mark.
    """
    rows, columns = image.height // kept.shape[0], image.width // kept.shape[1]
    pixels = np.asarray(image, dtype=float)
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    shaded = (1 - TINT) * grey[..., None] + TINT * RAMP[0]  # as what a pruner dropped
    shown = kept.repeat(rows, 0).repeat(columns, 1)
    picture = Image.fromarray(np.where(shown[..., None], pixels, shaded).round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for row, column in np.argwhere(kept):  # a white line where kept and dropped meet
        x0, y0 = column * columns, row * rows
        x1, y1 = x0 + columns - 1, y0 + rows - 1
        for (down, across), line in {
            (-1, 0): (x0, y0, x1, y0),
            (1, 0): (x0, y1, x1, y1),
            (0, -1): (x0, y0, x0, y1),
            (0, 1): (x1, y0, x1, y1),
        }.items():
            r, c = row + down, column + across
            if 0 <= r < kept.shape[0] and 0 <= c < kept.shape[1] and not kept[r, c]:
                draw.line(line, fill="white", width=2)
    if query is not None:
        y, x = query[0] * rows, query[1] * columns
        draw.rectangle((x - 2, y - 2, x + columns + 1, y + rows + 1), outline="white", width=2)
        draw.rectangle((x, y, x + columns - 1, y + rows - 1), outline=OKABE_ITO["vermilion"], width=4)
    return picture
