"""Masks, boxes and enlarging, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from visionsel.viz import OKABE_ITO, draw_boxes, enlarge, overlay_masks

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def grey() -> Image.Image:
    return Image.new("RGB", (4, 3), (100, 100, 100))


def test_masks_are_mixed_into_their_pixels_only_and_later_ones_lie_above(grey) -> None:
    masks = np.zeros((2, 3, 4), dtype=bool)
    masks[0, 0, :2] = True
    masks[1, 0, 1:] = True
    out = np.asarray(overlay_masks(grey, masks, ["#ff0000", "blue"], alpha=0.25))
    assert out[0].tolist() == [[139, 75, 75], [104, 56, 120], [75, 75, 139], [75, 75, 139]]
    assert (out[1:] == 100).all()
    assert (np.asarray(grey) == 100).all()


@pytest.mark.parametrize(("alpha", "expected"), [(0, (100, 100, 100)), (1, (230, 159, 0))])
def test_alpha_goes_from_the_image_to_the_colour_and_a_grey_image_becomes_rgb(alpha, expected) -> None:
    image = Image.new("L", (2, 2), 100)
    out = overlay_masks(image, [np.ones((2, 2), dtype=bool)], [OKABE_ITO["orange"]], alpha)
    assert out.mode == "RGB"
    assert (np.asarray(out) == expected).all()


@pytest.mark.parametrize(
    ("mask", "colors", "alpha", "message"),
    [
        (np.ones((3, 4), dtype=bool), [], 0.5, "one colour for each mask, got 0 for 1"),
        (np.ones((4, 3), dtype=bool), ["red"], 0.5, r"bool \[3, 4\] like the image, got bool \[4, 3\]"),
        (np.ones((3, 4)), ["red"], 0.5, r"got float64 \[3, 4\]"),
        (np.ones((3, 4), dtype=bool), ["red"], 1.5, "alpha must be from 0 to 1, got 1.5"),
        (np.ones((3, 4), dtype=bool), ["rot"], 0.5, "unknown color specifier: 'rot'"),
    ],
)
def test_overlays_that_cannot_be_are_refused(grey, mask, colors, alpha, message) -> None:
    with pytest.raises(ValueError, match=message):
        overlay_masks(grey, [mask], colors, alpha)


def test_a_box_is_drawn_just_inside_its_sides() -> None:
    image = Image.new("RGB", (6, 5))
    out = np.asarray(draw_boxes(image, [(1, 1, 5, 4.2)], ["red"], width=1))
    expected = np.zeros((5, 6, 3), dtype=np.uint8)
    expected[1:4, 1:5] = RED
    expected[2, 2:4] = 0
    assert (out == expected).all()
    assert not np.asarray(image).any()
    assert (np.asarray(draw_boxes(image, [(1, 1, 5, 4)], ["red"], width=2))[1:4, 1:5] == RED).all()


def test_what_lies_outside_the_image_is_not_seen() -> None:
    out = np.asarray(draw_boxes(Image.new("L", (3, 3)), [(-2, -2, 2, 9)], ["blue"], width=1))
    assert (out[:, 1] == BLUE).all()
    assert not out[:, [0, 2]].any()


@pytest.mark.parametrize(("color", "ink"), [("yellow", 0), ("#0072b2", 255)])
def test_a_label_stands_on_the_corner_in_black_or_white_and_stays_inside_the_image(color, ink) -> None:
    blank = Image.new("RGB", (60, 40), (90, 90, 90))
    plain = np.asarray(draw_boxes(blank, [(50, 30, 60, 40)], [color]))
    out = np.asarray(draw_boxes(blank, [(50, 30, 60, 40)], [color], ["12"]))
    changed = (out != plain).any(2)
    assert changed.any()
    assert not changed[:, :30].any()
    assert not changed[:15].any()
    assert np.abs(out[changed].astype(int) - ink).max(1).min() < 60  # strokes are thin and antialiased


@pytest.mark.parametrize(
    ("box", "colors", "labels", "message"),
    [
        ((0, 0, 2, 2), ["red", "blue"], None, "one colour for each box, got 2 for 1"),
        ((0, 0, 2, 2), ["red"], [], "one label for each box, got 0 for 1"),
        ((2, 0, 2, 2), ["red"], None, r"x0 < x1 and y0 < y1, got \(2, 0, 2, 2\)"),
        ((0, 2, 2, 1), ["red"], None, r"x0 < x1 and y0 < y1, got \(0, 2, 2, 1\)"),
    ],
)
def test_boxes_that_cannot_be_are_refused(grey, box, colors, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        draw_boxes(grey, [box], colors, labels)


def test_no_masks_and_no_boxes_leave_a_copy(grey) -> None:
    for out in (overlay_masks(grey, [], []), draw_boxes(grey, [], [], [])):
        assert out is not grey
        assert out.tobytes() == grey.tobytes()


def test_enlarging_makes_squares_or_interpolates() -> None:
    image = Image.fromarray(np.array([[0, 200]], dtype=np.uint8))
    assert np.asarray(enlarge(image, 2)).tolist() == [[0, 0, 200, 200]] * 2
    smooth = np.asarray(enlarge(image, 4, smooth=True))
    assert smooth.shape == (4, 8)
    assert 0 < smooth[0, 3] < smooth[0, 4] < 200
    for factor in (0, 1.5):
        with pytest.raises(ValueError, match="factor must be a positive integer"):
            enlarge(image, factor)  # type: ignore[arg-type]
