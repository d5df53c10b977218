"""Drawing for the shapes world: outlines, antialiased coverage and backgrounds, in integers only.

Pillow's and the platform's drawing differ among versions by a pixel here and there. Polygons with integer
corners filled by the even-odd rule on a 4 x 4 grid of samples a pixel do not.
"""

import math
from functools import cache

import numpy as np

from visionsel.data.shapes.dice import Dice

__all__ = ["BACKGROUNDS", "COLORS", "RGB", "SHAPES", "UNITS", "background", "coverage"]

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon", "arrow", "bar")
RGB = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (150, 60, 190),
    "orange": (245, 135, 25),
    "cyan": (50, 205, 215),
    "white": (245, 245, 245),
}
COLORS = tuple(RGB)
BACKGROUNDS = ("plain", "shaded", "striped", "speckled")

UNITS = 1 << 16  # the side of an image, in the integers of a layout
FULL = 16  # coverage of a pixel that lies wholly inside
_SUB = 4  # samples a pixel and direction
_RADIUS = 1 << 10  # the radius of a shape, in the integers of its outline
_TURN = 256  # tilts are tan(angle / 2) in 1/256, so that sine and cosine are ratios of integers
_DIRECTIONS = ((8, 0), (7, 3), (6, 6), (3, 7), (0, 8), (-3, 7), (-6, 6), (-7, 3))


def coverage(
    shape: str, center: tuple[int, int], radius: int, tilt: int, image_size: int
) -> tuple[int, int, np.ndarray]:
    """How much of each pixel a shape covers.

    Args:
        shape: one of `SHAPES`.
        center: x and y, in `UNITS` a side.
        radius: in `UNITS` a side; no outline reaches further than 1.25 radii from the centre.
        tilt: tan(angle / 2) * 256, clockwise.
        image_size: pixels a side.

    Returns:
        Row and column of the window's first pixel, and the window, uint8 `[h, w]`, 0 to `FULL`.
    """
    corners, following = _outline(shape)
    # an odd multiple of UNITS is the middle of a sample, an even one is between samples
    scale = 2 * _SUB * image_size
    start = _place(corners, center, radius, tilt) * scale
    end = start[following]
    pixel = 2 * _SUB * UNITS
    left, top = (max(0, int(low)) for low in start.min(0) // pixel)
    right, bottom = (min(image_size, int(high) + 1) for high in start.max(0) // pixel)
    rows, columns = (bottom - top) * _SUB, (right - left) * _SUB

    low, high = np.minimum(start, end), np.maximum(start, end)
    upper = np.where(start[:, 1] < end[:, 1], start[:, 0], end[:, 0])[
        :, None
    ]  # x at the end with the lower y
    run = np.where(start[:, 1] < end[:, 1], end[:, 0] - start[:, 0], start[:, 0] - end[:, 0])[:, None]
    rise = np.maximum(high[:, 1:] - low[:, 1:], 1)
    middles = (2 * np.arange(top * _SUB, bottom * _SUB, dtype=np.int64) + 1) * UNITS
    crossed = (low[:, 1:] <= middles) & (middles < high[:, 1:])
    edge, row = np.nonzero(crossed)
    offset = upper[edge, 0] * rise[edge, 0] + (middles[row] - low[edge, 1]) * run[edge, 0]
    first = (offset - UNITS * rise[edge, 0]) // (2 * UNITS * rise[edge, 0]) + 1 - left * _SUB
    flips = np.bincount(row * (columns + 1) + np.clip(first, 0, columns), minlength=rows * (columns + 1))
    inside = np.cumsum(flips.astype(np.uint8).reshape(rows, columns + 1)[:, :-1], axis=1, dtype=np.uint8) & 1
    lines = inside.reshape(rows, -1, _SUB)
    lines = lines[..., 0] + lines[..., 1] + lines[..., 2] + lines[..., 3]
    lines = lines.reshape(-1, _SUB, columns // _SUB)
    return top, left, lines[:, 0] + lines[:, 1] + lines[:, 2] + lines[:, 3]


def _place(points: np.ndarray, center: tuple[int, int], radius: int, tilt: int) -> np.ndarray:
    cosine, sine, length = _TURN**2 - tilt**2, 2 * _TURN * tilt, _TURN**2 + tilt**2
    x, y = points[:, 0], points[:, 1]
    turned = np.stack([x * cosine - y * sine, x * sine + y * cosine], axis=1)
    return turned * radius // (_RADIUS * length) + np.array(center, dtype=np.int64)


@cache
def _outline(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Corners, int64 `[corners, 2]`, and for each the index of the next one in its loop; y points down.

    Rounding hides the differences among platforms' sines.
    """
    corners: list[tuple[int, int]] = []
    following: list[int] = []
    for loop in _loops(shape):
        first = len(corners)
        corners += [(round(x * _RADIUS), round(y * _RADIUS)) for x, y in loop]
        following += [*range(first + 1, len(corners)), first]
    return np.array(corners, dtype=np.int64), np.array(following)


def _loops(shape: str) -> list[list[tuple[float, float]]]:
    if shape == "circle":
        return [_arc(0, 1.0)]
    if shape == "ring":
        return [_arc(0, 1.0), _arc(0, 0.55)]
    if shape == "square":
        return [[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]]
    if shape == "bar":
        return [[(-1.1, -0.3), (1.1, -0.3), (1.1, 0.3), (-1.1, 0.3)]]
    if shape == "triangle":
        return [[(0, -1.02), (0.95, 0.76), (-0.95, 0.76)]]
    if shape == "star":
        tips = [(1.12 if i % 2 == 0 else 0.45, math.pi * i / 5) for i in range(10)]
        return [[(r * math.sin(a), -r * math.cos(a)) for r, a in tips]]
    if shape == "cross":
        arm = [(-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32)]
        return [arm + [(-x, -y) for x, y in arm]]
    if shape == "arrow":
        half = [(-1.05, -0.27), (0.1, -0.27), (0.1, -0.85), (1.05, 0)]
        return [half + [(x, -y) for x, y in half[-2::-1]]]
    if shape == "heart":
        turns = [2 * math.pi * i / 32 for i in range(32)]
        curve = [
            (math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
            for t in turns
        ]
        return [[(1.05 * x, -0.065 * y - 0.15) for x, y in curve]]
    if shape == "moon":  # a unit circle less a circle of radius 0.75 around (0.5, 0); they meet at x = 0.6875
        outer, inner = math.acos(0.6875), math.acos(0.25)
        rim = _arc(outer, 1.0, 2 * math.pi - outer)
        bite = [(x + 0.5, y) for x, y in _arc(2 * math.pi - inner, 0.75, inner)]
        return [[(x + 0.15, y) for x, y in rim + bite]]
    raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")


def _arc(begin: float, radius: float, end: float | None = None) -> list[tuple[float, float]]:
    """Points of a circle around 0, all of it without `end`."""
    steps = 32 if end is None else 24
    span = 2 * math.pi if end is None else end - begin
    angles = [begin + span * i / steps for i in range(steps + (end is not None))]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def background(dice: Dice, image_size: int) -> tuple[str, np.ndarray]:
    """A dim, nearly grey background.

    Returns:
        Its name, one of `BACKGROUNDS`, and its pixels, int16 `[H, W, 3]`, 0 to 255.
    """
    name = dice.choose(BACKGROUNDS)
    grey = dice.between(30, 120)
    base = np.array([grey + dice.between(-18, 18) for _ in range(3)], dtype=np.int64)
    across, down = dice.choose(_DIRECTIONS)
    depth = dice.choose((-1, 1)) * dice.between(40, 60)
    period = dice.between(6, 14) * UNITS * 8 // 64
    contrast = dice.between(14, 22)

    steps = (2 * np.arange(image_size, dtype=np.int64) + 1) * UNITS // (2 * image_size)  # middles of pixels
    along = across * steps[None, :] + down * steps[:, None]  # [H, W], 8 * UNITS is about one side
    if name == "shaded":
        relief = depth * (along - 4 * (across + down) * UNITS // 8) // (8 * UNITS)
    elif name == "striped":
        relief = np.where(along // (period // 2) % 2 == 0, contrast, -contrast)
    elif name == "speckled":
        relief = 2 * dice.noise(image_size, image_size)
    else:
        relief = np.zeros((image_size, image_size), dtype=np.int64)
    return name, np.clip(base + relief[..., None], 0, 255).astype(np.int16)
