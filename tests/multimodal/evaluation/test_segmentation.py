import numpy as np
import pytest

from visionsel.multimodal.evaluation import segmentation
from visionsel.multimodal.evaluation.segmentation import Overlap


def _mask(*cells: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((4, 5), dtype=bool)
    for cell in cells:
        mask[cell] = True
    return mask


def test_overlaps_count_pixels() -> None:
    found = segmentation.overlap(_mask((0, 0), (0, 1), (1, 1)), _mask((0, 1), (3, 4)))
    assert found == Overlap(intersection=1, union=4, predicted=3, truth=2)
    assert found.iou == 0.25


def test_referring_scores_equal_a_computation_by_hand() -> None:
    scores = segmentation.score([Overlap(6, 8, 6, 8), Overlap(1, 10, 5, 6), Overlap(0, 4, 0, 4)])
    assert scores["c_iou"] == pytest.approx(7 / 22)
    assert scores["g_iou"] == pytest.approx((0.75 + 0.1 + 0) / 3)
    assert scores["precision_50"] == scores["precision_70"] == pytest.approx(1 / 3)
    assert scores["precision_80"] == 0
    assert "n_acc" not in scores


def test_an_expression_that_means_nothing_is_right_when_nothing_is_predicted() -> None:
    scores = segmentation.score(
        [Overlap(0, 0, 0, 0), Overlap(0, 9, 9, 0), Overlap(3, 3, 3, 3), Overlap(0, 2, 0, 2)]
    )
    assert scores["n_acc"] == 0.5
    assert scores["t_acc"] == 0.5
    assert scores["g_iou"] == pytest.approx((1 + 0 + 1 + 0) / 4)
    assert scores["c_iou"] == pytest.approx(3 / 14)  # the false alarm counts in the union


def test_average_recall_is_the_area_under_recall_in_the_steps_of_the_released_code() -> None:
    ious = [0.9, 0.25, 0.6, 0.0]
    overlaps = [Overlap(round(100 * iou), 100, 100, 100) for iou in ious]
    steps = np.arange(0, 1, 1e-5)
    recall = np.array([(np.array(ious) > step).mean() for step in steps])
    area = float((recall[1:] + recall[:-1]).sum() / 2 * 1e-5)
    scores = segmentation.average_recall(
        overlaps, {"things": [True, True, False, False], "none": [False] * 4}
    )
    assert scores["all"] == pytest.approx(area, abs=2e-5)
    assert scores["things"] == pytest.approx(0.575)
    assert np.isnan(scores["none"])


def test_boxes_are_right_from_half_their_union() -> None:
    assert segmentation.box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert segmentation.box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    scores = segmentation.box_scores([(0, 0, 2, 1), None], [(0, 0, 1, 1), (0, 0, 1, 1)])
    assert scores == {"samples": 2, "accuracy": 0.5, "iou": 0.25}


def test_the_pointing_game_and_the_energy_look_at_the_heatmap_alone() -> None:
    heat = np.array([[0.0, 3.0, -5.0], [1.0, 0.0, 0.0]])
    mask = np.array([[False, False, False], [True, True, False]])
    assert not segmentation.peak_inside(heat, mask)
    assert segmentation.peak_inside(heat, mask, tolerance=1)
    assert segmentation.energy_inside(heat, mask) == 0.25
    assert segmentation.energy_inside(-np.abs(heat), mask) == 0


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="masks are bool and of one size"):
        segmentation.overlap(_mask(), np.zeros((4, 4), dtype=bool))
    with pytest.raises(ValueError, match="no samples"):
        segmentation.score([])
    with pytest.raises(ValueError, match="group a has 1 entries for 2 phrases"):
        segmentation.average_recall([Overlap(1, 1, 1, 1)] * 2, {"a": [True]})
    with pytest.raises(ValueError, match="one predicted box"):
        segmentation.box_scores([], [(0, 0, 1, 1)])
