"""A picture of what was kept: over each image the patches of its tokens, and at which layer the others went.

What was kept is as it was, pixel for pixel, within a white line. A dropped patch lies under a veil, and where
there are several stages, the tint of the veil says at which of them it went: the later, the lighter. What the
model never saw (cut off by the processor) fades to white.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from visionsel.multimodal.dropping import Record
from visionsel.multimodal.families.family import TokenLayout, View
from visionsel.multimodal.families.raster import axis_cells
from visionsel.viz import enlarge

__all__ = ["draw_kept", "token_fates"]

SMALLEST, LARGEST = 384, 1024  # pixels of the longer side of a panel
TEXT, GAP, MARGIN, SWATCH, LINE = 13, 8, 20, 14, 22  # pixels beside panels of SMALLEST; larger have more
PAPER, INK, FAINT = (255, 255, 255), (32, 36, 44), (110, 116, 128)
RAMP = np.array([(44, 52, 76), (92, 74, 132), (150, 92, 138), (196, 128, 128)], dtype=float)
TINT = 0.78  # share of the tint in a dropped patch; the rest is the picture in grey
UNSEEN = -2
KEPT = -1


def draw_kept(record: Record, images: Any, processor: Any = None) -> Image.Image:
    """Draw one prompt; `Pruned.picture` calls it.

    Args:
        record: of the prompt.
        images: PIL images in the order of the prompt (of the prompts of a batch); one, or several. Before
            version 5.20 transformers copies them for beams and several answers: then as often here.
        processor: that made the pixels.

    Returns:
        RGB: a panel for each image, two where the model saw it both whole and in tiles, and a legend.

    Raises:
        ValueError: for no images in the prompt, another number of them, or where the processor is needed.
    """
    pictures = [image.convert("RGB") for image in ([images] if isinstance(images, Image.Image) else images)]
    layers = [layer for layer, _ in record.kept]
    layouts = _layouts(record, pictures, processor)
    every = token_fates(record).split([layout.n for layout in layouts])
    panels: list[list[_Panel]] = []
    totals, unseen = np.zeros(len(layers) + 1, dtype=int), False
    for picture, layout, fates in zip(pictures, layouts, every, strict=True):
        totals += [int((fates == stage).sum()) for stage in (KEPT, *range(len(layers)))]
        name = f"image {len(panels) + 1}" if len(pictures) > 1 else ""
        row = []
        for title, views in _groups(layout):
            states = _stages(picture, views, fates)
            unseen |= bool((states == UNSEEN).any())
            label = ", ".join(part for part in (name, title) if part) or "image"
            index = torch.cat([view.index.flatten() for view in views])
            note = f"{int((fates[index] == KEPT).sum())} of {len(index)} kept"
            row.append(_Panel(_shade(picture, states, len(layers)), label, note))
        panels.append(row)
    return _page(panels, _legend(layers, totals, unseen))


def token_fates(record: Record) -> torch.Tensor:
    """For each image token of the prompts int64 `[n]`: the stage that dropped it, or -1 where it stayed.

    The tokens follow each other as the images do; the rows of beams, which share images, count once.
    """
    found: dict[int, torch.Tensor] = {}
    for row, pictures in enumerate(record.scope.pictures):
        for picture in pictures:
            if picture.modality != "image" or picture.number in found:
                continue
            fates = torch.full((picture.layout.n,), KEPT)
            for stage, (_, mask) in reversed(list(enumerate(record.kept))):
                fates[~mask[row].cpu()[picture.positions]] = stage
            found[picture.number] = fates
    return torch.cat([found[number] for number in sorted(found)])


def _layouts(record: Record, pictures: Sequence[Image.Image], processor: Any) -> list[TokenLayout]:
    """One for each image."""
    scope = record.scope
    if "image" not in scope.encoded:
        raise ValueError("the prompt has no images whose pixels the model saw, so there is nothing to draw")
    encoded = scope.encoded["image"]
    if processor is not None:
        sizes = [(picture.height, picture.width) for picture in pictures]
        return scope.family.layouts(scope.model, encoded, processor, sizes)
    layouts = scope.family.layouts(scope.model, encoded)
    if len(layouts) != len(pictures):
        raise ValueError(
            f"{len(pictures)} images for a prompt with {len(layouts)}; pass those of the last prompt, in its "
            "order, and processor= where the model cuts images into tiles"
        )
    return layouts


def _groups(layout: TokenLayout) -> list[tuple[str, list[View]]]:
    """The views of an image for one panel each: the whole, and its tiles."""
    whole = [view for view in layout.views if view.kind in ("image", "thumbnail")]
    parts = [view for view in layout.views if view not in whole]
    both = bool(whole and parts)
    groups = [("whole" if both else "", whole), ("tiles" if both else "", parts)]
    return [(title, views) for title, views in groups if views]


def _stages(picture: Image.Image, views: Sequence[View], fates: torch.Tensor) -> np.ndarray:
    """int64 `[H, W]`: for each pixel the stage that dropped it, `KEPT` or `UNSEEN`."""
    states = np.full((picture.height, picture.width), UNSEEN)
    for view in views:
        # without a processor there is no box, and one grid lies over the whole image
        x0, y0, x1, y1 = view.box or (0.0, 0.0, float(picture.width), float(picture.height))
        grid = fates[view.index].numpy()
        # a pixel belongs to the patch that holds its centre
        rows = axis_cells(picture.height, y0, y1, grid.shape[0]).numpy()
        columns = axis_cells(picture.width, x0, x1, grid.shape[1]).numpy()
        down, across = rows >= 0, columns >= 0
        states[np.ix_(down, across)] = grid[np.ix_(rows[down], columns[across])]
    return states


def _shade(picture: Image.Image, states: np.ndarray, stages: int) -> Image.Image:
    """The image at the size of a panel, with its patches shaded."""
    longer = max(picture.size)
    if longer > LARGEST:
        picture = picture.copy()
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    factor = max(1, round(SMALLEST / longer))
    picture = enlarge(picture, factor)
    size = picture.size
    states = np.array(Image.fromarray(states.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    pixels = np.asarray(picture, dtype=float)
    grey = pixels @ np.array([0.299, 0.587, 0.114])
    shaded = pixels.copy()
    for stage, tint in enumerate(_tints(stages)):
        here = states == stage
        shaded[here] = (1 - TINT) * grey[here, None] + TINT * tint
    unseen = states == UNSEEN
    shaded[unseen] = 0.2 * grey[unseen, None] + 0.8 * 255
    for width, strength in ((2, 0.55), (1, 0.9)):  # a line around what was kept, on the side of what was not
        kept = np.pad(states == KEPT, width)
        across = kept[width:-width]
        beside = kept[: -2 * width, width:-width] | kept[2 * width :, width:-width]
        beside |= across[:, : -2 * width] | across[:, 2 * width :]
        edge = beside & (states != KEPT)
        shaded[edge] = (1 - strength) * shaded[edge] + strength * 255
    return Image.fromarray(shaded.round().astype(np.uint8))


def _tints(stages: int) -> np.ndarray:
    """`[stages, 3]`: from dark to glowing, the later the lighter."""
    place = np.linspace(0, len(RAMP) - 1, stages) if stages > 1 else np.zeros(stages)
    return np.stack([np.interp(place, range(len(RAMP)), channel) for channel in RAMP.T], axis=1)


@dataclass(frozen=True)
class _Panel:
    """A shaded image under two lines of text."""

    picture: Image.Image
    title: str
    note: str


def _legend(
    layers: Sequence[int], totals: np.ndarray, unseen: bool
) -> list[tuple[tuple[int, ...] | None, str]]:
    """Swatch (None: what was kept) and text of each entry."""
    entries: list[tuple[tuple[int, ...] | None, str]] = [(None, f"kept ({totals[0]} of {totals.sum()})")]
    for layer, tint, number in zip(layers, _tints(len(layers)), totals[1:], strict=True):
        where = "at the input" if layer == 0 else f"before layer {layer}"
        color = tuple(int(c) for c in (TINT * tint + (1 - TINT) * 128).round())
        entries.append((color, f"dropped {where} ({number})"))
    if unseen:
        entries.append(((232, 232, 232), "outside of what the model sees"))
    return entries


def _page(
    panels: Sequence[Sequence[_Panel]], legend: Sequence[tuple[tuple[int, ...] | None, str]]
) -> Image.Image:
    """Panels in rows, the legend below."""
    if max(map(len, panels)) == 1:  # one panel an image: a grid
        flat = [row[0] for row in panels]
        across = min(4, int(np.ceil(np.sqrt(len(flat)))))
        panels = [flat[start : start + across] for start in range(0, len(flat), across)]
    longest = max(max(panel.picture.size) for row in panels for panel in row)
    unit = max(1.0, longest / SMALLEST)  # so that a thumbnail of any page can be read
    margin, swatch, line, gap = (round(unit * length) for length in (MARGIN, SWATCH, LINE, GAP))
    font, small = ImageFont.load_default((TEXT + 2) * unit), ImageFont.load_default(TEXT * unit)
    widths = [sum(panel.picture.width + margin for panel in row) for row in panels]
    heights = [max(panel.picture.height for panel in row) + margin + line for row in panels]
    entries = [(color, text, swatch + gap + round(small.getlength(text)) + margin) for color, text in legend]
    width = margin + max(*widths, max(entry[2] for entry in entries))
    lines, used = 1, margin
    for *_, length in entries:
        if used + length > width and used > margin:
            lines, used = lines + 1, margin
        used += length
    page = Image.new("RGB", (width, margin // 2 + sum(heights) + lines * line + margin // 2), PAPER)
    draw = ImageDraw.Draw(page)
    top = margin // 2
    for row, height in zip(panels, heights, strict=True):
        left = margin
        for panel in row:
            draw.text((left, top), panel.title, fill=INK, font=font)
            right = left + panel.picture.width
            draw.text((right, top + 1), panel.note, fill=FAINT, font=small, anchor="ra")
            page.paste(panel.picture, (left, top + line))
            left = right + margin
        top += height
    left = margin
    for color, text, length in entries:
        if left + length > width and left > margin:
            left, top = margin, top + line
        _swatch(page, draw, (left, top), swatch, color)
        draw.text((left + swatch + gap, top - 1), text, fill=INK, font=small)
        left += length
    return page


def _swatch(page: Image.Image, draw: ImageDraw.ImageDraw, at: tuple[int, int], side: int, color: Any) -> None:
    """A small square; for what was kept one in full colour."""
    x, y = at
    if color is not None:
        draw.rectangle((x, y, x + side, y + side), fill=color, outline=FAINT)
        return
    for i, hue in enumerate(("#e69f00", "#009e73", "#0072b2")):
        third = side // 3 + 1
        draw.rectangle((x + i * third, y, min(x + side, x + (i + 1) * third), y + side), fill=hue)
    draw.rectangle((x, y, x + side, y + side), outline=FAINT)
