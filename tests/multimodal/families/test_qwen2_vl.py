"""Qwen2-VL: what the family says of patches, tokens and pixels, against the model and its processors."""

from typing import Any

import pytest
import torch
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
from visionsel.multimodal.families.qwen2_vl import Qwen2VL

FAMILY = Qwen2VL()
PIXELS = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
RANGE = {"shortest_edge": 64, "longest_edge": 4096}
KEYS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


@pytest.fixture(scope="module")
def model() -> Any:
    return blinded(FAMILY, "qwen2_vl")


def call(modality: str) -> Encoded:
    """A call with images of 3 x 5 and 2 x 3 tokens, or with two videos."""
    inputs = make_inputs("qwen2_vl", image_sizes=((24, 40), (16, 24)), video=True)
    return Encoded(modality, {key: inputs[key] for key in KEYS[modality]}, {})


@pytest.mark.parametrize("modality", ["image", "video"])
def test_pool_averages_the_patches_that_go_into_a_token(model: Any, modality: str) -> None:
    encoded = call(modality)
    check_pool(FAMILY, model, encoded, trace(FAMILY, model, encoded))


def test_layouts_deal_out_the_placeholders_of_images_and_videos(model: Any) -> None:
    layouts = check_prompt(FAMILY, model, make_inputs("qwen2_vl", images=(2, 1), video=True))
    assert [layout.n for layout in layouts["image"]] == [20, 12, 20]
    assert [[view.kind for view in layout.views] for layout in layouts["image"]] == [["image"]] * 3
    assert [tuple(view.index.shape) for layout in layouts["image"] for view in layout.views] == [
        (4, 5),
        (3, 4),
        (4, 5),
    ]
    assert [[view.kind for view in layout.views] for layout in layouts["video"]] == [["frame"] * 2] * 2
    assert [tuple(layout.views[1].index.shape) for layout in layouts["video"]] == [(2, 3), (2, 4)]


def test_a_sample_without_images_takes_no_layout(model: Any) -> None:
    check_prompt(FAMILY, model, make_inputs("qwen2_vl", images=(0, 2), batch=2))


def test_boxes_of_images_are_where_the_processor_takes_the_pixels(model: Any) -> None:
    processor = Qwen2VLImageProcessor(**PIXELS, size=RANGE)

    def process(images: list) -> dict[str, torch.Tensor]:
        batch = processor(images, return_tensors="pt")
        return {"pixel_values": batch["pixel_values"].double(), "image_grid_thw": batch["image_grid_thw"]}

    layouts = check_boxes(FAMILY, model, "image", process, [(37, 61), (24, 90), (70, 33)], processor, 4)
    assert [layout.views[0].box for layout in layouts] == [(0, 0, 61, 37), (0, 0, 90, 24), (0, 0, 33, 70)]


def test_boxes_of_videos_are_where_the_processor_takes_the_pixels(model: Any) -> None:
    processor = Qwen2VLVideoProcessor(**PIXELS, size=RANGE, do_sample_frames=False)

    def process(videos: list) -> dict[str, torch.Tensor]:
        batch = processor(videos, return_tensors="pt")
        pixels = batch["pixel_values_videos"].double()
        return {"pixel_values_videos": pixels, "video_grid_thw": batch["video_grid_thw"]}

    layouts = check_boxes(FAMILY, model, "video", process, [(3, 21, 40), (4, 33, 17)], processor, 2)
    assert [len(layout.views) for layout in layouts] == [2, 2]


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("together", [False, True])
def test_attention_calls_join_to_tower_order(
    monkeypatch: pytest.MonkeyPatch, modality: str, together: bool
) -> None:
    encoded = call(modality)
    calls = check_calls(monkeypatch, FAMILY, make_model("qwen2_vl"), encoded, together)
    assert calls == [1 if together else {"image": 2, "video": 4}[modality]] * 3


def test_the_number_of_sizes_must_be_that_of_the_images(model: Any) -> None:
    with pytest.raises(ValueError, match="3 sizes for 2 images; give height and width of each image"):
        FAMILY.layouts(model, call("image"), object(), [(24, 40)] * 3)


def test_boxes_are_unknown_without_processor_or_sizes(model: Any) -> None:
    for given in ({}, {"processor": object()}, {"sizes": [(24, 40)] * 2}):
        layouts = FAMILY.layouts(model, call("image"), **given)
        assert all(view.box is None for layout in layouts for view in layout.views)


def test_parts_of_the_model_are_found(model: Any) -> None:
    assert FAMILY.decoder(model) is model.model.language_model
    assert FAMILY.token_ids(model) == {"image": IMAGE, "video": VIDEO}
    assert FAMILY.feature_layer(model) == 2
    assert not FAMILY.has_cls
