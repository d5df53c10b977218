"""Masks, boxes and enlarging, pixel by pixel."""

import numpy as np
import pytest
from PIL import Image

from visionsel import viz
from visionsel.viz import (
    CHANGE,
    HEAT,
    OKABE_ITO,
    draw_boxes,
    draw_points,
    enlarge,
    overlay_heatmap,
    overlay_masks,
    text_size,
)

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


def test_a_heatmap_goes_from_dark_blue_to_yellow_over_the_grey_image() -> None:
    image = Image.new("RGB", (3, 2), (255, 0, 0))
    heatmap = np.array([[1.0, 2, 3], [1, 2.5, 3]])
    out = np.asarray(overlay_heatmap(image, heatmap, alpha=1, legend=False))
    assert out[0, 0].tolist() == [0x00, 0x22, 0x4E]
    assert out[1, 2].tolist() == [0xF0, 0xE4, 0x42]
    assert out[0, 1].tolist() == [43, 147, 206]  # half way between the two middle colours
    half = np.asarray(overlay_heatmap(image, heatmap, alpha=0.5, legend=False)).astype(int)
    assert abs(2 * half[0, 0] - out[0, 0] - np.asarray(image.convert("L"))[0, 0]).max() <= 1
    assert (np.asarray(overlay_heatmap(image, np.ones((2, 3)), 1, False)) == out[0, 0]).all()


def test_the_ramp_grows_brighter_all_the_way() -> None:
    ramp = overlay_heatmap(Image.new("RGB", (64, 1)), np.arange(64.0)[None], alpha=1, legend=False)
    assert (np.diff(np.asarray(ramp.convert("L"), dtype=int)[0]) >= 0).all()
    assert len(HEAT) == 4


def test_the_legend_is_below_the_picture_and_has_the_values_where_there_is_room() -> None:
    heatmap = np.arange(100.0)[None].repeat(4, 0)
    out = np.asarray(overlay_heatmap(Image.new("RGB", (100, 4)), heatmap))
    assert out.shape[1] == 100
    assert (out[:4] == np.asarray(overlay_heatmap(Image.new("RGB", (100, 4)), heatmap, legend=False))).all()
    assert out[4, 0].tolist() == [0x00, 0x22, 0x4E]
    assert (out[12:] < 80).any()
    assert (out[-1] == 255).all()
    narrow = np.asarray(overlay_heatmap(Image.new("RGB", (4, 4)), heatmap[:, :4]))
    assert (narrow[12:] == 255).all()


@pytest.mark.parametrize(
    ("heatmap", "alpha", "message"),
    [
        (np.zeros((3, 4)), 2, "alpha must be from 0 to 1, got 2"),
        (np.zeros((4, 3)), 1, r"a heatmap is \[3, 4\] like the image, got \[4, 3\]"),
        (np.full((3, 4), np.nan), 1, "the heatmap holds NaN"),
    ],
)
def test_heatmaps_that_do_not_fit_are_refused(grey, heatmap, alpha, message) -> None:
    with pytest.raises(ValueError, match=message):
        overlay_heatmap(grey, heatmap, alpha)


def test_points_inside_are_full_and_points_outside_hollow() -> None:
    image = Image.new("RGB", (30, 12), (100, 100, 100))
    out = np.asarray(draw_points(image, [(6, 6), (22, 6)], [1, 0]))
    assert out[6, 6].tolist() == [213, 94, 0]
    assert out[6, 22].tolist() == [100, 100, 100]
    assert out[6, 22 + 3].tolist() == [255, 255, 255]
    assert (np.asarray(image) == 100).all()
    with pytest.raises(ValueError, match="one label for each point, got 1 for 2"):
        draw_points(image, [(1, 1), (2, 2)], [1])
    with pytest.raises(ValueError, match="radius must be at least 1 pixel, got 0"):
        draw_points(image, [(1, 1)], [1], radius=0)


def plate(size: tuple[int, int], label: str = "triangle", **options) -> tuple[int, int]:
    """Width and height of what a label covers, in pixels."""
    blank, box = Image.new("RGB", size, "white"), [(0, 0, *size)]
    plain = np.asarray(draw_boxes(blank, box, ["#0072b2"], **options))
    changed = (np.asarray(draw_boxes(blank, box, ["#0072b2"], [label], **options)) != plain).any(2)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    return int(columns[-1] - columns[0]) + 1, int(rows[-1] - rows[0]) + 1


@pytest.mark.parametrize("size", [(384, 384), (1600, 900), (3000, 2000)])
def test_labels_have_the_same_part_of_every_larger_image(size) -> None:
    width, height = plate(size)
    side = (size[0] * size[1]) ** 0.5
    assert 0.12 < width / side < 0.19
    assert 0.03 < height / side < 0.06


def test_labels_of_a_small_image_are_legible_and_inside_of_it() -> None:
    assert text_size(Image.new("L", (64, 64))) == text_size(Image.new("L", (9, 9))) == 8
    assert text_size(Image.new("L", (7303, 5477))) == 211
    width, height = plate((64, 64))
    assert width < 48
    assert 9 <= height < 16
    assert plate((200, 200), "a very long name of something that was found")[0] <= 200


def test_sizes_can_be_chosen() -> None:
    assert plate((400, 400), font_size=40)[1] > 2 * plate((400, 400))[1]
    for size in (0, -3, float("nan")):
        with pytest.raises(ValueError, match="font_size must be a number of pixels above 0"):
            plate((40, 40), font_size=size)
    blank, heatmap = Image.new("RGB", (100, 100)), np.eye(100)
    heights = [overlay_heatmap(blank, heatmap, font_size=size).height for size in (8, 20)]
    assert heights[0] < heights[1]
    large = Image.new("RGB", (1200, 900), (90, 90, 90))
    for picture, (at, thick) in (
        (draw_boxes(large, [(100, 100, 900, 800)], ["red"]), ((500, 100), range(4, 9))),
        (draw_points(large, [(600, 400)], [1]), ((600, 388), range(8, 26))),
    ):
        column = np.asarray(picture)[:, at[0]]
        assert int((column[at[1] - 20 : at[1] + 10] != 90).any(1).sum()) in thick


def test_maps_with_the_same_limits_have_the_same_colours() -> None:
    image = Image.new("RGB", (3, 1))
    one = np.asarray(overlay_heatmap(image, np.array([[0.0, 1, 2]]), 1, False, limits=(0, 4)))
    two = np.asarray(overlay_heatmap(image, np.array([[2.0, 4, 9]]), 1, False, limits=(0, 4)))
    assert one[0, 2].tolist() == two[0, 0].tolist()
    assert two[0, 1].tolist() == two[0, 2].tolist() == [0xF0, 0xE4, 0x42]
    change = overlay_heatmap(image, np.array([[-1.0, 0, 1]]), 1, False, limits=(-1, 1), colors=CHANGE)
    assert np.asarray(change)[0].tolist() == [[0x00, 0x72, 0xB2], [0xF7] * 3, [0xD5, 0x5E, 0x00]]
    with pytest.raises(ValueError, match="the lower one first; got"):
        overlay_heatmap(image, np.zeros((1, 3)), limits=(1, 1))
    with pytest.raises(ValueError, match="at least two colours"):
        overlay_heatmap(image, np.zeros((1, 3)), colors=["red"])


def test_a_picture_is_the_same_however_many_rows_are_mixed_at_a_time(monkeypatch) -> None:
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (11, 7, 3), dtype=np.uint8))
    masks, heatmap = generator.random((2, 11, 7)) < 0.5, generator.random((11, 7))

    def draw() -> list[bytes]:
        pictures = overlay_masks(image, masks, ["red", "#009e73"], 0.3), overlay_heatmap(image, heatmap)
        return [picture.tobytes() for picture in pictures]

    whole = draw()
    monkeypatch.setattr(viz, "ROWS", 4)
    assert draw() == whole
