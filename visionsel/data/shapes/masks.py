"""Masks as COCO writes them: compressed run lengths and polygons, both exact."""

from typing import Any

import numpy as np

__all__ = ["decode_rle", "encode_rle", "trace_polygons"]


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """A bool mask `[H, W]` as COCO's compressed run lengths: `{"size": [H, W], "counts": "..."}`.

    Runs go down the columns and begin with zeros. From the third on each is stored as the difference to the
    one before the last, in groups of five bits, lowest first, as characters from "0".
    """
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    if flat.size and flat[0]:
        runs.insert(0, 0)
    characters = []
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            bits, value = value & 31, value >> 5
            last = value == (-1 if bits & 16 else 0)
            characters.append(chr(48 + (bits if last else bits | 32)))
            if last:
                break
    return {"size": list(mask.shape), "counts": "".join(characters)}


def decode_rle(rle: dict[str, Any]) -> np.ndarray:
    """The bool mask `[H, W]` of COCO's compressed run lengths.

    Raises:
        ValueError: when the runs do not fill the size.
    """
    runs: list[int] = []
    value = shift = 0
    for character in rle["counts"]:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    height, width = rle["size"]
    if shift or sum(runs) != height * width or min(runs, default=0) < 0:
        raise ValueError(f"run lengths {rle['counts']!r} do not fill {height} x {width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def trace_polygons(mask: np.ndarray) -> list[list[int]]:
    """The outlines of a bool mask `[H, W]` along the borders of its pixels, as COCO's `[x0, y0, x1, y1,
    ...]`.

    COCO's polygons have no holes, so a mask with a hole is cut in two through it; together the polygons are
    the mask.
    """
    polygons = []
    for corners in _loops(mask):
        x, y = np.array(corners).T
        if (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() < 0:  # runs the other way round: a hole
            middle = (int(x.min()) + int(x.max()) + 1) // 2
            right = trace_polygons(mask[:, middle:])
            shifted = [[side + middle * (i % 2 == 0) for i, side in enumerate(polygon)] for polygon in right]
            return trace_polygons(mask[:, :middle]) + shifted
        polygons.append([side for corner in corners for side in corner])
    return polygons


def _loops(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Corners of every border, pixels on the right hand; pixels that touch in a corner only are apart."""
    padded = np.pad(mask, 1)
    inner = padded[1:-1, 1:-1]
    # neighbour that is missing, where the edge begins in the pixel, and its direction
    sides = (
        (padded[:-2, 1:-1], (0, 0), (1, 0)),
        (padded[1:-1, 2:], (1, 0), (0, 1)),
        (padded[2:, 1:-1], (1, 1), (-1, 0)),
        (padded[1:-1, :-2], (0, 1), (0, -1)),
    )
    leaving: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for neighbour, (dx, dy), direction in sides:
        for y, x in np.argwhere(inner & ~neighbour).tolist():
            leaving.setdefault((x + dx, y + dy), []).append(direction)
    unused = {(point, step): None for point, steps in leaving.items() for step in steps}
    loops = []
    while unused:
        point, step = next(iter(unused))
        corners = []
        while (point, step) in unused:
            del unused[point, step]
            point = point[0] + step[0], point[1] + step[1]
            right = -step[1], step[0]
            turn = right if right in leaving[point] else leaving[point][0]
            if turn != step:
                corners.append(point)
            step = turn
        loops.append(corners)
    return loops
