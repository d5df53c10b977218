"""Qwen2.5-VL: what the family says of patches, tokens and pixels, against the model and its processors."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from tests.multimodal.families.tracing import (
    blinded,
    check_boxes,
    check_calls,
    check_pool,
    check_prompt,
    trace,
)
from tests.multimodal.tiny import IMAGE, VIDEO, make_inputs, make_model
from visionsel.multimodal.families.family import Encoded
from visionsel.multimodal.families.qwen2_5_vl import Qwen25VL, window_order
from visionsel.multimodal.families.qwen2_vl import mean_over_squares

FAMILY = Qwen25VL()
PIXELS = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
RANGE = {"shortest_edge": 64, "longest_edge": 4096}
KEYS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


@pytest.fixture(scope="module")
def model() -> Any:
    return blinded(FAMILY, "qwen2_5_vl")


def call(modality: str) -> Encoded:
    """A call with images of 3 x 5 and 2 x 3 tokens, or with two videos."""
    inputs = make_inputs("qwen2_5_vl", image_sizes=((24, 40), (16, 24)), video=True)
    return Encoded(modality, {key: inputs[key] for key in KEYS[modality]}, {})


@pytest.mark.parametrize("modality", ["image", "video"])
def test_pool_turns_window_order_into_token_order(model: Any, modality: str) -> None:
    encoded = call(modality)
    traces = trace(FAMILY, model, encoded)
    rows = torch.tensor([row for row, _ in traces.values()])
    assert not torch.equal(rows, torch.arange(len(rows))), "the tower kept the order: nothing was tried"
    check_pool(FAMILY, model, encoded, traces)
    values = torch.arange(float(len(rows)))
    assert not torch.equal(FAMILY.pool(model, values, encoded), mean_over_squares(model, values))


def test_layouts_deal_out_the_placeholders_of_images_and_videos(model: Any) -> None:
    layouts = check_prompt(FAMILY, model, make_inputs("qwen2_5_vl", images=(2, 1), video=True))
    assert [layout.n for layout in layouts["image"]] == [20, 12, 20]
    assert [tuple(layout.views[0].index.shape) for layout in layouts["image"]] == [(4, 5), (3, 4), (4, 5)]
    assert [[view.kind for view in layout.views] for layout in layouts["video"]] == [["frame"] * 2] * 2


def test_boxes_of_images_are_where_the_processor_takes_the_pixels(model: Any) -> None:
    processor = Qwen2VLImageProcessor(**PIXELS, size=RANGE)

    def process(images: list) -> dict[str, Tensor]:
        batch = processor(images, return_tensors="pt")
        return {"pixel_values": batch["pixel_values"].double(), "image_grid_thw": batch["image_grid_thw"]}

    check_boxes(FAMILY, model, "image", process, [(37, 61), (24, 90), (70, 33)], processor, 4)


def test_boxes_of_videos_are_where_the_processor_takes_the_pixels(model: Any) -> None:
    processor = Qwen2VLVideoProcessor(**PIXELS, size=RANGE, do_sample_frames=False)

    def process(videos: list) -> dict[str, Tensor]:
        batch = processor(videos, return_tensors="pt")
        pixels = batch["pixel_values_videos"].double()
        return {"pixel_values_videos": pixels, "video_grid_thw": batch["video_grid_thw"]}

    check_boxes(FAMILY, model, "video", process, [(4, 21, 40), (2, 33, 17)], processor, 2)


def test_attention_calls_of_windows_and_of_images_join_to_tower_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    windowed = make_model("qwen2_5_vl")
    calls = check_calls(monkeypatch, FAMILY, windowed, call("image"))
    windows = 2 * 3 + 1 * 2  # of 2 x 2 tokens, smaller at the border
    assert calls == [windows, 2, windows], "layer 1 attends to whole images"
    assert FAMILY.feature_layer(windowed) == 1


def test_the_flash_path_calls_once_in_tower_order(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = check_calls(monkeypatch, FAMILY, make_model("qwen2_5_vl"), call("video"), together=True)
    assert calls == [1, 1, 1]


def test_window_order_goes_window_by_window() -> None:
    order = window_order([(1, 6, 8), (2, 2, 6)], merge=2, side=2)
    # 3 x 4 tokens in windows of 2 x 2, then two steps of 1 x 3 tokens
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17]


def test_the_last_layer_is_read_where_all_have_windows() -> None:
    windowed = make_model("qwen2_5_vl")
    windowed.config.vision_config.fullatt_block_indexes = [7]  # beyond the tower
    assert FAMILY.feature_layer(windowed) == 2


def test_parts_of_the_model_are_found(model: Any) -> None:
    assert FAMILY.decoder(model) is model.model.language_model
    assert FAMILY.token_ids(model) == {"image": IMAGE, "video": VIDEO}
