"""What is where in a sample of the shapes world, and its pixels.

Which shapes come together is the distribution's law; everything else (colour, size, faintness, place) follows
one law. A layout is made in integers on a fixed grid, so that an image of another size shows the same scene
and has the same texts.
"""

from dataclasses import dataclass, replace

import numpy as np

from visionsel.data.shapes.dice import Dice
from visionsel.data.shapes.drawing import COLORS, FULL, RGB, SHAPES, UNITS, background, coverage

__all__ = ["DISTRIBUTIONS", "GRID", "MAX_OBJECTS", "PARTNERS", "SIZES", "ShapeObject", "draw_scene"]

DISTRIBUTIONS = ("train", "balanced", "anti")
PARTNERS = {"star": "ring", "heart": "moon", "cross": "arrow"}  # a star usually brings a ring, ...
SIZES = ("small", "large")
MAX_OBJECTS = 6

# the law of "train" and "anti": how often each of the shapes that come by themselves is drawn
_FREQUENCY = {"circle": 3, "square": 3, "triangle": 2, "star": 2, "cross": 2, "heart": 2, "bar": 2}
STRAY = 0.06  # a partner comes without the shape that brings it
REPEAT = 0.25  # one shape comes twice
FAINT = 0.2
FAINT_PARTNER = (
    0.4  # what usually comes along is hard to see more often: there the prior has something to decide
)
SMALL = 0.5
SMALL_PARTNER = 0.75

GRID = 64  # pixels a side of the raster on which visibility and the places of the texts are decided
MIN_VISIBLE = 12  # pixels of that raster
MIN_SHARE = (3, 5)  # of its own pixels an object shows at least three fifths
_RADII = {
    "small": (UNITS * 85 // 1000, UNITS * 120 // 1000),
    "large": (UNITS * 155 // 1000, UNITS * 200 // 1000),
}
_MAX_TILT = 64  # 28 degrees
_UPRIGHT = {"circle", "ring", "heart"}
_ATTEMPTS = 40
# least distance of centres, in thousandths of the sum of the radii; objects of one colour keep a border
# between them
_OVERLAPPING, _APART, _SAME_COLOR = 700, 1100, 300


@dataclass(frozen=True)
class Layout:
    """One object before it is drawn; centre and radius in `UNITS` a side."""

    shape: str
    color: str
    size: str
    radius: int
    tilt: int
    opacity: int  # of 256; what is below 256 is faint
    paint: tuple[int, int, int]
    center: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class ShapeObject:
    """One object of a sample.

    Attributes:
        shape, color, size: words of `SHAPES`, `COLORS` and `SIZES`.
        faint: its paint is mixed with the background's.
        box: `(x0, y0, x1, y1)` around the visible pixels; `x1` and `y1` are one past the last.
        index: its position in `Sample.objects`.
        grid_box: the box on a raster of 64 pixels a side, whatever the size of the image: what texts speak
            of.
        labels: the sample's label map `[H, W]`; the object's visible pixels are `index + 1`.
    """

    shape: str
    color: str
    size: str
    faint: bool
    box: tuple[int, int, int, int]
    index: int
    grid_box: tuple[int, int, int, int]
    labels: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """Visible pixels, bool `[H, W]`: those that it covers at least by half and nothing above it does."""
        return self.labels == self.index + 1

    @property
    def area(self) -> int:
        """Number of visible pixels."""
        return int(np.count_nonzero(self.mask))


def draw_scene(
    distribution: str, dice: Dice, image_size: int, co_occurrence: float, max_objects: int
) -> tuple[str, np.ndarray, np.ndarray, list[ShapeObject]]:
    """One scene.

    Returns:
        Name of the background, pixels (uint8 `[H, W, 3]`), label map (uint8 `[H, W]`, 0 for background, `j +
        1` for object `j`) and the objects, the largest visible area first.
    """
    if distribution == "balanced":
        shapes = _balanced_shapes(dice, max_objects)
    else:
        shapes = _paired_shapes(dice, co_occurrence, distribution == "anti")
    layouts, grid = _arrange(dice, _dress(dice, shapes))
    areas = np.bincount(grid.ravel(), minlength=len(layouts) + 1)[1:].tolist()
    order = sorted(range(len(layouts)), key=lambda j: (-areas[j], j))
    renamed = np.zeros(len(layouts) + 1, dtype=np.uint8)
    renamed[[j + 1 for j in order]] = np.arange(1, len(layouts) + 1)

    windows = [_window(layout, image_size) for layout in layouts]
    name, pixels = _paint(dice, layouts, windows, image_size)
    labels = renamed[grid if image_size == GRID else _label(windows, image_size)]
    boxes = _boxes(labels, len(order))
    grid_boxes = boxes if image_size == GRID else _boxes(renamed[grid], len(order))
    objects = [
        ShapeObject(
            layouts[j].shape,
            layouts[j].color,
            layouts[j].size,
            layouts[j].opacity < 256,
            boxes[index],
            index,
            grid_boxes[index],
            labels,
        )
        for index, j in enumerate(order)
    ]
    return name, pixels, labels, objects


def _balanced_shapes(dice: Dice, max_objects: int) -> list[str]:
    shapes = dice.draw(SHAPES, dice.between(1, max_objects))
    if len(shapes) > 1 and dice.chance(REPEAT):
        shapes[-1] = shapes[0]
    return shapes


def _paired_shapes(dice: Dice, co_occurrence: float, deprived: bool) -> list[str]:
    """One to three shapes, and the partner of each that has one with probability `co_occurrence`.

    Deprived: at least one has a partner, and none brings it.
    """
    count, base = dice.between(1, 3), []
    if deprived:
        base.append(dice.choose(tuple(PARTNERS)))
    others = [shape for shape in _FREQUENCY if shape not in base]
    base += dice.draw(others, count - len(base), [_FREQUENCY[shape] for shape in others])
    shapes = list(base)
    for shape, partner in PARTNERS.items():
        if dice.chance(STRAY if shape not in base else 0.0 if deprived else co_occurrence):
            shapes.append(partner)
    if len(shapes) < MAX_OBJECTS and dice.chance(REPEAT):
        shapes.append(dice.choose(shapes))
    return shapes


def _dress(dice: Dice, shapes: list[str]) -> list[Layout]:
    """Colours, sizes and the rest, in the order of drawing: what comes later hides what came earlier."""
    layouts: list[Layout] = []
    for shape in shapes:
        twins = [layout.color for layout in layouts if layout.shape == shape]
        color = twins[0] if twins and dice.chance(0.5) else dice.choose(COLORS)
        size = SIZES[0 if dice.chance(SMALL_PARTNER if shape in PARTNERS.values() else SMALL) else 1]
        faint = dice.chance(FAINT_PARTNER if shape in PARTNERS.values() else FAINT)
        layouts.append(
            Layout(
                shape,
                color,
                size,
                radius=dice.between(*_RADII[size]),
                tilt=0 if shape in _UPRIGHT else dice.between(-_MAX_TILT, _MAX_TILT),
                opacity=dice.between(80, 128) if faint else 256,
                paint=tuple(min(255, part + dice.between(-10, 10)) for part in RGB[color]),  # type: ignore[arg-type]
            )
        )
    return dice.draw(layouts, len(layouts))


def _arrange(dice: Dice, layouts: list[Layout]) -> tuple[list[Layout], np.ndarray]:
    """Places at which every object stays visible, and the label map on the grid.

    Half of the scenes keep their objects apart; in the others they may overlap. Where there is no room,
    distances and radii shrink, these not below the least of their size.
    """
    apart = dice.choose((_OVERLAPPING, _APART))
    while True:
        placed = _scatter(dice, layouts, apart)
        if placed is not None:
            windows = [_window(layout, GRID) for layout in placed]
            labels = _label(windows, GRID)
            visible = np.bincount(labels.ravel(), minlength=len(placed) + 1)[1:].tolist()
            drawn = [int(np.count_nonzero(2 * covered >= FULL)) for _, _, covered in windows]
            part, whole = MIN_SHARE
            if all(v >= MIN_VISIBLE and v * whole >= d * part for v, d in zip(visible, drawn, strict=True)):
                return placed, labels
        apart = max(_OVERLAPPING, apart - 100)
        layouts = [replace(o, radius=max(_RADII[o.size][0], o.radius * 49 // 50)) for o in layouts]


def _scatter(dice: Dice, layouts: list[Layout], apart: int) -> list[Layout] | None:
    """Random centres no closer than `apart` allows, or None when that was not found."""
    centers: dict[int, tuple[int, int]] = {}
    for j in sorted(range(len(layouts)), key=lambda j: -layouts[j].radius):  # the large ones find room first
        margin = layouts[j].radius * 5 // 4
        least = {
            k: (layouts[j].radius + layouts[k].radius)
            * (apart + _SAME_COLOR * (layouts[j].color == layouts[k].color))
            // 1000
            for k in centers
        }
        for _ in range(_ATTEMPTS):
            x, y = dice.between(margin, UNITS - margin), dice.between(margin, UNITS - margin)
            if all((x - u) ** 2 + (y - v) ** 2 >= least[k] ** 2 for k, (u, v) in centers.items()):
                centers[j] = x, y
                break
        else:
            return None
    return [replace(o, center=centers[j]) for j, o in enumerate(layouts)]


Window = tuple[int, int, np.ndarray]


def _window(layout: Layout, image_size: int) -> Window:
    return coverage(layout.shape, layout.center, layout.radius, layout.tilt, image_size)


def _label(windows: list[Window], image_size: int) -> np.ndarray:
    """Uint8 `[H, W]`: the last object that covers at least half of a pixel, counted from 1."""
    labels = np.zeros((image_size, image_size), dtype=np.uint8)
    for j, (top, left, covered) in enumerate(windows):
        height, width = covered.shape
        labels[top : top + height, left : left + width][2 * covered >= FULL] = j + 1
    return labels


def _paint(
    dice: Dice, layouts: list[Layout], windows: list[Window], image_size: int
) -> tuple[str, np.ndarray]:
    """Name of the background and pixels, uint8 `[H, W, 3]`.

    A faint object mixes its paint with the background and not with what lies below it, so that every pixel
    belongs to one object.
    """
    name, ground = background(dice, image_size)
    pixels = ground.copy()
    for layout, (top, left, covered) in zip(layouts, windows, strict=True):
        height, width = covered.shape
        place = slice(top, top + height), slice(left, left + width)
        paint = np.array(layout.paint, dtype=np.int32)
        if layout.opacity < 256:
            paint = (ground[place].astype(np.int32) * (256 - layout.opacity) + paint * layout.opacity) // 256
        below, share = pixels[place].astype(np.int32), covered[..., None].astype(np.int32)
        pixels[place] = (below * (FULL - share) + paint * share) // FULL
    pixels += dice.noise(image_size, image_size, 3) // 4  # a camera's
    return name, np.clip(pixels, 0, 255).astype(np.uint8)


def _boxes(labels: np.ndarray, count: int) -> list[tuple[int, int, int, int]]:
    boxes = []
    for j in range(count):
        mask = labels == j + 1
        rows, columns = mask.any(1), mask.any(0)
        x0, y0 = int(columns.argmax()), int(rows.argmax())
        x1, y1 = len(columns) - int(columns[::-1].argmax()), len(rows) - int(rows[::-1].argmax())
        boxes.append((x0, y0, x1, y1))
    return boxes
