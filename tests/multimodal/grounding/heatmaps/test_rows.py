"""Where the image tokens of an answer's maps lie on grids, in every kind of layout."""

import pytest
import torch

from tests.multimodal.runs import tiny
from tests.multimodal.tiny import IMAGE, WITH_VIDEO, make_inputs
from visionsel.multimodal.grounding import Replay
from visionsel.multimodal.grounding.heatmaps.rows import image_rows, image_views

KINDS = {  # how many grids an image has, all of them and those that show it whole
    "llava_next": (2, 1),
    "llava_onevision": (2, 1),
    "qwen3_vl": (1, 1),
    "internvl": (1, 1),
    "smolvlm": (1, 1),
}


@pytest.mark.parametrize("name", KINDS)
def test_grids_number_the_columns_of_the_images_and_leave_videos_out(name: str) -> None:
    images = (1, 1) if name == "llava_onevision" else (2, 1)
    inputs = make_inputs(name, images=images, video=name in WITH_VIDEO)
    replay = Replay(tiny(name), inputs, torch.tensor([[5, 6], [7, 8]]))
    with pytest.raises(RuntimeError, match="has not run"):
        image_views(replay)
    replay.run()
    every, whole = image_views(replay), image_views(replay, whole=True)
    for b, number in enumerate(images):
        assert (len(every[b]), len(whole[b])) == tuple(number * kinds for kinds in KINDS[name])
        numbers = torch.cat([view.flatten() for view in every[b]]).tolist()
        assert len(set(numbers)) == len(numbers)
        tokens = int((inputs["input_ids"][b] == IMAGE).sum())
        newlines = tokens - len(numbers)
        assert max(numbers) < tokens
        assert newlines == 0 or name in ("llava_next", "llava_onevision")
        assert {n for view in whole[b] for n in view.flatten().tolist()} <= set(numbers)


def test_rows_of_other_places_are_read_too() -> None:
    inputs = make_inputs("llava")
    replay = Replay(tiny("llava"), inputs, torch.tensor([[5, 6, 7], [8, 9, 10]]))
    rows, others = [], []
    image_rows(replay, lambda layer, seen: rows.append(seen), [0, 2], "token")
    image_rows(replay, lambda layer, seen: others.append(seen), [0, 2], places=replay.rows[:, 1:] + 1)
    assert [tuple(one.shape) for one in rows] == [(2, 4, 3, 16)] * 2
    for one, other in zip(rows, others, strict=True):
        torch.testing.assert_close(one[:, :, 1:], other)
