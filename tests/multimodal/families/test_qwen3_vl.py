"""Qwen3-VL: what the family says of patches, tokens and pixels, against the model and its processors."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from tests.multimodal.families.tracing import (
    blinded,
    changed,
    check_boxes,
    check_calls,
    check_pool,
    check_prompt,
    each_patch,
    trace,
)
from tests.multimodal.tiny import IMAGE, VIDEO, make_inputs, make_model
from visionsel.multimodal.families.family import Encoded
from visionsel.multimodal.families.qwen3_vl import Qwen3VL

FAMILY = Qwen3VL()
PIXELS = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
KEYS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


@pytest.fixture(scope="module")
def model() -> Any:
    return blinded(FAMILY, "qwen3_vl")


def call(modality: str) -> Encoded:
    """A call with images of 3 x 5 and 2 x 3 tokens, or with two videos."""
    inputs = make_inputs("qwen3_vl", image_sizes=((24, 40), (16, 24)), video=True)
    return Encoded(modality, {key: inputs[key] for key in KEYS[modality]}, {})


@pytest.mark.parametrize("modality", ["image", "video"])
def test_pool_averages_the_patches_that_go_into_a_token(model: Any, modality: str) -> None:
    encoded = call(modality)
    check_pool(FAMILY, model, encoded, trace(FAMILY, model, encoded))


@torch.no_grad()
def test_features_of_earlier_layers_have_the_same_order(model: Any) -> None:
    encoded = call("image")

    def deep(encoded: Encoded) -> list[Tensor]:
        found = model.model.get_image_features(**encoded.arguments, return_dict=True)
        features = (found.pooler_output, *found.deepstack_features)
        return [f if isinstance(f, Tensor) else torch.cat(f) for f in features]  # 5.17 does not split all

    before = deep(encoded)
    assert len(before) == 3
    for place, other in list(each_patch(encoded))[::7]:
        tokens = [changed(b, a) for b, a in zip(before, deep(other), strict=True)]
        assert tokens == [[place[0] // 4]] * 3


def test_layouts_deal_out_the_placeholders_of_images_and_videos(model: Any) -> None:
    inputs = make_inputs("qwen3_vl", images=(2, 1), video=True)
    layouts = check_prompt(FAMILY, model, inputs)
    assert [layout.n for layout in layouts["image"]] == [20, 12, 20]
    video = inputs["input_ids"][1] == VIDEO
    assert int(video.int().diff().eq(1).sum()) == 2, "the tokens of a video stand in one run"
    assert layouts["video"][1].n == int(video.sum())
    assert [[view.kind for view in layout.views] for layout in layouts["video"]] == [["frame"] * 2] * 2


def test_boxes_of_images_are_where_the_processor_takes_the_pixels(model: Any) -> None:
    processor = Qwen2VLImageProcessor(**PIXELS, size={"shortest_edge": 64, "longest_edge": 4096})

    def process(images: list) -> dict[str, Tensor]:
        batch = processor(images, return_tensors="pt")
        return {"pixel_values": batch["pixel_values"].double(), "image_grid_thw": batch["image_grid_thw"]}

    check_boxes(FAMILY, model, "image", process, [(37, 61), (24, 90), (70, 33)], processor, 4)


def test_boxes_of_videos_are_where_the_processor_takes_the_pixels(model: Any) -> None:
    size = {"shortest_edge": 256, "longest_edge": 16384}
    processor = Qwen3VLVideoProcessor(**PIXELS, size=size, do_sample_frames=False)

    def process(videos: list) -> dict[str, Tensor]:
        batch = processor(videos, return_tensors="pt")
        pixels = batch["pixel_values_videos"].double()
        return {"pixel_values_videos": pixels, "video_grid_thw": batch["video_grid_thw"]}

    check_boxes(FAMILY, model, "video", process, [(4, 21, 40), (5, 33, 17)], processor, 2)


@pytest.mark.parametrize("together", [False, True])
def test_attention_calls_join_to_tower_order(monkeypatch: pytest.MonkeyPatch, together: bool) -> None:
    calls = check_calls(monkeypatch, FAMILY, make_model("qwen3_vl"), call("image"), together)
    assert calls == [1 if together else 2] * 3


def test_parts_of_the_model_are_found(model: Any) -> None:
    assert FAMILY.decoder(model) is model.model.language_model
    assert FAMILY.token_ids(model) == {"image": IMAGE, "video": VIDEO}
    assert FAMILY.feature_layer(model) == 2
