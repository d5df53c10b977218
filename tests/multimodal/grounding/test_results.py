"""Results: what a word says of its mask, COCO's format as its own reader sees it, pictures."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from visionsel.multimodal.grounding.prompts import sample_prompt
from visionsel.multimodal.grounding.proposals import Proposal, attention_consistency
from visionsel.multimodal.grounding.results import Grounding, Word

HEIGHT, WIDTH = 12, 20


def heat(shape: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    return np.random.default_rng(0).random(shape).astype(np.float32)


def make_word(mask: np.ndarray | None, name: str | None = "star", text: str = "Stars", **more: Any) -> Word:
    shape = (HEIGHT, WIDTH) if mask is None else mask.shape
    prompt = sample_prompt(heat(shape))
    assert prompt is not None
    proposal = None if mask is None else Proposal(0.8, prompt, lambda: np.where(mask, 2.0, -2.0))
    image = Image.new("RGB", (WIDTH, HEIGHT))
    return Word(text, (2, 7), 0.5, name, lambda: heat(shape), image, lambda: proposal, **more)


def blob(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[3:5, 2:6] = mask[4, 6] = True
    return mask


def test_box_and_score_are_those_of_the_mask() -> None:
    word = make_word(blob())
    assert word.box == (2, 3, 7, 5)
    assert word.score == 0.8 * 0.5
    assert (word.mask == blob()).all()
    assert word.points.shape == (2, 2)
    assert word.labels.tolist() == [1, 0]
    sure = make_word(blob(), consistency=0.5)
    assert sure.score == 0.4 * attention_consistency(blob(), heat(), 0.5)


@pytest.mark.parametrize("mask", [None, np.zeros((HEIGHT, WIDTH), dtype=bool)])
def test_an_empty_mask_has_no_box_and_scores_nothing(mask: np.ndarray | None) -> None:
    word = make_word(mask)
    assert word.box is None
    assert word.score == 0
    assert word.mask.shape == (HEIGHT, WIDTH)
    assert not word.mask.any()
    assert len(word.points) == (0 if mask is None else 2)
    assert Grounding("a", [word], word.image).to_coco() == []
    assert Grounding("a", [word], word.image).plot().size == (WIDTH, HEIGHT)


def test_what_was_seen_in_a_window_is_put_on_the_whole_image() -> None:
    inside = blob(6, 10)
    word = make_word(inside, window=(8, 5, 18, 11))
    whole = np.zeros((HEIGHT, WIDTH), dtype=bool)
    whole[5:11, 8:18] = inside
    assert (word.mask == whole).all()
    assert (word.heatmap[5:11, 8:18] == heat((6, 10))).all()
    assert word.heatmap.sum() == pytest.approx(heat((6, 10)).sum())
    bare = make_word(inside, window=(0, 0, 10, 6))
    assert (word.points - bare.points).tolist() == [[8, 5], [8, 5]]
    assert word.box == (10, 8, 15, 10)


# pycocotools of 2025 under numpy 2
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_coco_reads_the_results_and_finds_the_masks(tmp_path) -> None:
    other = np.zeros((HEIGHT, WIDTH), dtype=bool)
    other[0, 0] = other[-1, -1] = True
    words = [make_word(blob()), make_word(other, "ring"), make_word(blob(), None, "the")]
    grounding = Grounding("a", words, words[0].image)
    results = json.loads(json.dumps(grounding.to_coco(7, {"star": 3, "ring": 5})))
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 7, "height": HEIGHT, "width": WIDTH}],
        "categories": [{"id": 3, "name": "star"}, {"id": 5, "name": "ring"}],
        "annotations": [],
        "info": {},
    }
    truth.createIndex()
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    read = truth.loadRes(str(path))
    assert len(read.anns) == 2
    for number, mask in ((1, blob()), (2, other)):
        assert (read.annToMask(read.anns[number]) == mask).all()
        assert results[number - 1]["area"] == mask.sum()
    assert read.anns[1]["bbox"] == [2, 3, 5, 2]
    assert read.anns[1]["score"] == 0.4
    assert [one["category_id"] for one in results] == [3, 5]
    assert [one["category_id"] for one in grounding.to_coco()] == [1, 2]
    assert [one["name"] for one in grounding.to_coco(words=words)] == ["star", "ring", "the"]
    with pytest.raises(ValueError, match="'ring' is none of the categories star"):
        grounding.to_coco(7, {"star": 3})


def test_pictures_have_the_resolution_of_the_image_or_a_multiple() -> None:
    word = make_word(blob())
    grounding = Grounding("a", [word], word.image)
    assert grounding.plot().size == (WIDTH, HEIGHT)
    assert grounding.plot(scale=3).size == (3 * WIDTH, 3 * HEIGHT)
    assert word.plot(legend=False).size == (WIDTH, HEIGHT)
    assert word.plot(2, legend=False).size == (2 * WIDTH, 2 * HEIGHT)
    assert word.plot().width == WIDTH
    assert word.plot().height > HEIGHT
    assert "1" not in repr(grounding)
    assert "star" in repr(grounding)


def test_an_object_keeps_its_colour_when_it_is_drawn_alone() -> None:
    words = [make_word(blob()), make_word(np.roll(blob(), 6, 0)), make_word(None)]
    grounding = Grounding("a", words, words[0].image)
    together, alone = (np.asarray(grounding.plot(some, scale=8)) for some in (None, [words[1]]))
    row, column = 8 * 10 + 4, 8 * 6 + 4  # in the second mask, away from its label
    assert together[row, column].any()
    assert (together[row, column] == alone[row, column]).all()
    first = np.asarray(grounding.plot([words[0]], scale=8))
    assert (first[8 * 4 + 4, column] != alone[row, column]).any()
