"""Prompts against the plain rule: components by flood fill, Otsu by trying every border."""

import numpy as np
import pytest

from visionsel.multimodal.grounding.prompts import (
    cut_at,
    find_components,
    mask_logits,
    otsu,
    sample_prompt,
)
from visionsel.multimodal.grounding.proposals import attention_consistency


def filled(active: np.ndarray) -> np.ndarray:
    labels, number = np.zeros(active.shape, dtype=int), 0
    for start in np.argwhere(active).tolist():
        if labels[tuple(start)]:
            continue
        number += 1
        todo = [tuple(start)]
        while todo:
            y, x = todo.pop()
            inside = 0 <= y < active.shape[0] and 0 <= x < active.shape[1]
            if inside and active[y, x] and not labels[y, x]:
                labels[y, x] = number
                todo += [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return labels


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45, 0.6])
def test_components_are_those_of_flood_fill_over_corners_too(share: float) -> None:
    rng = np.random.default_rng(int(100 * share))
    for shape in ((13, 17), (1, 20), (20, 1), (2, 40)):
        active = rng.random(shape) < share
        assert (find_components(active) == filled(active)).all()


def test_components_that_meet_late_are_one() -> None:
    spiral = np.array([list(row) for row in ("#.#.#", "#.#.#", "#...#", "#####", ".....", "#.#.#")]) == "#"
    assert (find_components(spiral) == filled(spiral)).all()
    assert find_components(spiral).max() == 5


def test_otsu_parts_two_groups_as_far_as_any_border_does() -> None:
    rng = np.random.default_rng(3)
    values = np.concatenate((rng.normal(0, 1, 300), rng.normal(8, 2, 80)))

    def spread(border: float) -> float:
        low, high = values[values <= border], values[values > border]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2

    found = otsu(values)
    best = max(spread(border) for border in np.sort(values)[:-1])
    assert spread(found) > 0.995 * best  # borders of bins, and their middles for values
    assert 2 < found < 5
    assert otsu(np.full((3, 3), 2.0)) == 2
    assert 0 < otsu(np.array([0.0, 0, 0, 1])) < 1


def test_points_and_box_are_those_of_the_largest_component() -> None:
    heatmap = np.random.default_rng(0).random((15, 22)).astype(np.float32)
    prompt = sample_prompt(heatmap, 0.6)
    active = heatmap > heatmap.min() + 0.6 * (heatmap.max() - heatmap.min())
    labels = filled(active)
    largest = max(range(1, labels.max() + 1), key=lambda number: (labels == number).sum())
    area = labels == largest
    assert prompt is not None
    assert (prompt.area == area).all()
    (x, y), (u, v) = prompt.points.astype(int).tolist()
    assert heatmap[y, x] == heatmap[area].max()
    assert heatmap[v, u] == heatmap[~area].min()
    assert prompt.labels.tolist() == [1, 0]
    ys, xs = np.nonzero(area)
    assert prompt.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_the_area_can_be_kept_inside_of_a_mask() -> None:
    heatmap = np.zeros((6, 8))
    heatmap[1:3, 1:3] = 0.9
    heatmap[4:6, 5:8] = 1.0
    inside = np.zeros((6, 8), dtype=bool)
    inside[:3, :2] = True
    prompt = sample_prompt(heatmap, 0.5, inside=inside)
    assert prompt is not None
    assert prompt.box == (1, 1, 2, 3)
    assert prompt.points.tolist() == [[1, 1], [0, 0]]
    assert sample_prompt(heatmap, 0.5, negative=False).points.tolist() == [[5, 4]]  # type: ignore[union-attr]


def test_a_map_in_which_nothing_stands_out_has_no_prompt() -> None:
    assert sample_prompt(np.full((4, 4), 0.3)) is None
    assert sample_prompt(np.full((1, 1), 0.3), "otsu") is None
    heatmap = np.eye(4)
    assert sample_prompt(heatmap, inside=heatmap == 0) is None


def test_thresholds_are_shares_of_the_range() -> None:
    values = np.array([[2.0, 4.0], [6.0, 10.0]])
    assert cut_at(values, 0.25) == 4
    assert cut_at(values, "otsu") == otsu(values)
    for bad in (1, -0.1, "mean"):
        with pytest.raises(ValueError, match='threshold is "otsu" or a share from 0 to below 1'):
            cut_at(values, bad)
    with pytest.raises(ValueError, match=r"a heatmap is \[H, W\], got \[2\]"):
        sample_prompt(np.zeros(2))
    with pytest.raises(ValueError, match="the heatmap holds NaN or infinity"):
        sample_prompt(np.array([[np.nan, 1]]))


def test_logits_are_positive_above_half_of_the_range() -> None:
    heatmap = np.array([[1.0, 2.0], [2.5, 3.0]])
    logits = mask_logits(heatmap)
    expected = np.log([[1e-3 / (1 - 1e-3), 1], [0.75 / 0.25, (1 - 1e-3) / 1e-3]])
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    assert (mask_logits(np.ones((2, 2))) < 0).all()


def test_consistency_is_the_heat_inside_and_falls_with_what_is_outside() -> None:
    heatmap = np.array([[0.0, 0.1, 0.8], [0.0, 0.2, 1.0]])
    mask = np.zeros((2, 3), dtype=bool)
    mask[1, 2] = True
    assert attention_consistency(mask, heatmap) == pytest.approx(1 / 1.8)
    mask[0, 2] = True
    assert attention_consistency(mask, heatmap) == pytest.approx(1)
    mask[1, 1] = True
    assert attention_consistency(mask, heatmap) == pytest.approx(0.8 / 1.8)
    assert attention_consistency(~mask, heatmap) == 0
    assert attention_consistency(mask, np.zeros((2, 3))) == 0
