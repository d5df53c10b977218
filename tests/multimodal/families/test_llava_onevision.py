"""LLaVA-OneVision: tiles, tiles scaled down, several images a sample, videos; tokens, boxes and counts."""

import inspect
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from tests.multimodal.families.ramps import MEAN, STD, check_boxes, ramp, tokenizer
from tests.multimodal.families.test_llava_next import check_tokens, pinpoints
from tests.multimodal.tiny import IMAGE, TEXT, TOWER, VIDEO, make_inputs, make_model
from visionsel.multimodal.families import find_family
from visionsel.multimodal.families.family import Encoded

SIZES = [(300, 460), (211, 97), (64, 64), (40, 333), (37, 64)]  # height, width


def build(limit: int = 9, tile: int = 32) -> Any:
    """A model with 8 x 8 patches of 4 pixels a tile, whose tiles may make `limit` tiles of tokens."""
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**TOWER, image_size=tile, patch_size=4, vision_use_head=False),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=pinpoints(tile),
        vision_aspect_ratio=f"anyres_max_{limit}",
    )
    return tf.LlavaOnevisionForConditionalGeneration(config).double().eval()


def image_processor() -> Any:
    return tf.LlavaOnevisionImageProcessor(
        size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints(32), image_mean=MEAN, image_std=STD
    )


def call(processor: Any, samples: list[list[tuple[int, int]]]) -> Encoded:
    inputs = processor([[ramp(*size) for size in sizes] for sizes in samples], return_tensors="pt")
    return Encoded("image", inputs | {"pixel_values": inputs["pixel_values"].double()}, {})


def call_with_videos(model: Any, pixels: Tensor) -> Encoded:
    name = next(iter(inspect.signature(model.model.get_video_features).parameters))  # differs by version
    return Encoded("video", {name: pixels}, {})


@torch.no_grad()
def video_tokens(model: Any, encoded: Encoded) -> Tensor:
    """`[tokens, C]` as they enter the decoder: versions differ in where they add the newline."""
    (pixels,) = encoded.arguments.values()
    layouts = find_family(model).layouts(model, encoded)
    ids, seen = torch.full((len(layouts), layouts[0].n), VIDEO), []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(input_ids=ids, pixel_values_videos=pixels)
    handle.remove()
    return seen[0].flatten(0, 1)


@pytest.mark.parametrize("limit", [1, 2, 9])
def test_tokens_are_the_projected_patches_scaled_where_there_are_too_many(limit: int) -> None:
    model, encoded = build(limit), call(image_processor(), [[size] for size in SIZES])
    layouts = check_tokens(model, encoded)
    grids = [layout.views[1].index for layout in layouts]
    full = [layout.views[1].index for layout in find_family(build()).layouts(model, _limited(encoded, 9))]
    for grid, whole in zip(grids, full, strict=True):
        assert grid.numel() <= whole.numel()
        assert grid.numel() <= 1.21 * 64 * limit
        assert (grid.shape == whole.shape) == (whole.numel() <= 1.21 * 64 * limit)
    scaled = sum(len(grid) < len(whole) for grid, whole in zip(grids, full, strict=True))
    assert (scaled > 0) == (limit < 9)
    assert scaled < len(SIZES)


def _limited(encoded: Encoded, limit: int) -> Encoded:
    return Encoded("image", encoded.arguments | {"vision_aspect_ratio": f"anyres_max_{limit}"}, {})


def test_the_limit_of_the_call_wins_over_the_config() -> None:
    model, encoded = build(9), _limited(call(image_processor(), [[SIZES[0]]]), 1)
    (layout,) = check_tokens(model, encoded)
    assert layout.n == 64 + 6 * (10 + 1)


def test_samples_with_several_images_have_one_picture_an_image() -> None:
    model, encoded = build(1), call(image_processor(), [SIZES[:2], [SIZES[0]], SIZES[2:]])
    layouts = check_tokens(model, encoded)
    assert [len(layout.views) for layout in layouts] == [1, 1, 2, 1, 1, 1]
    assert [layout.n for layout in layouts if len(layout.views) == 1] == [65] * 5
    assert layouts[0].views[0].kind == "image"
    assert [layout.source()[-1] for layout in layouts] == [-1] * 6


def test_a_batch_without_a_processor_is_laid_out_too() -> None:
    model = make_model("llava_onevision")
    inputs = make_inputs("llava_onevision", images=(1, 2), video=True)
    names = ("pixel_values", "image_sizes", "batch_num_images")
    layouts = check_tokens(model, Encoded("image", {name: inputs[name] for name in names}, {}))
    assert [layouts[0].n, layouts[1].n + layouts[2].n] == (inputs["input_ids"] == IMAGE).sum(1).tolist()
    videos = call_with_videos(model, inputs["pixel_values_videos"])
    layouts = check_tokens(model, videos, video_tokens)
    assert [layout.n for layout in layouts] == (inputs["input_ids"] == VIDEO).sum(1).tolist()
    assert all(view.box is None for layout in layouts for view in layout.views)


@pytest.mark.parametrize("limit", [2, 9])
def test_boxes_lie_where_the_image_processor_takes_the_pixels(limit: int) -> None:
    model, processor = build(limit), image_processor()
    samples = [[size] for size in SIZES] + [SIZES]
    encoded, sizes = call(processor, samples), SIZES * 2
    family = find_family(model)
    layouts = family.layouts(model, encoded, processor, sizes)
    assert layouts[5].views[0].box == (0, -80, 460, 380)
    # scaling takes a patch or two of several, so a token's middle is not quite that of its cell
    assert check_boxes(family, model, encoded, layouts, sizes, tolerance=0.3 if limit == 2 else 0.06) > 400


@pytest.mark.parametrize("tile", [32, 36])
def test_videos_are_frames_of_half_the_side_and_one_newline(tile: int) -> None:
    model, half = build(tile=tile), -(-tile // 4 // 2)
    processor = tf.LlavaOnevisionVideoProcessor(
        size={"height": tile, "width": tile}, image_mean=MEAN, image_std=STD
    )
    sizes = [(300, 460), (211, 97)]
    videos = [torch.from_numpy(ramp(*size)).permute(2, 0, 1)[None].expand(3, -1, -1, -1) for size in sizes]
    pixels = processor(videos, return_tensors="pt")["pixel_values_videos"].double()
    encoded = call_with_videos(model, pixels)
    layouts = check_tokens(model, encoded, video_tokens)
    assert [(layout.n, len(layout.views)) for layout in layouts] == [(3 * half * half + 1, 3)] * 2
    family = find_family(model)
    assert {view.kind for view in layouts[0].views} == {"frame"}
    layouts = family.layouts(model, encoded, processor, sizes)
    assert layouts[0].views[2].box == (0, 0, 460, 300)
    assert check_boxes(family, model, encoded, layouts, sizes, tolerance=0.2 if tile == 36 else 0.06) > 20
    with pytest.raises(ValueError, match="1 sizes for 2 images"):
        family.layouts(model, encoded, processor, sizes[:1])


@pytest.mark.parametrize("limit", [1, 9])
def test_the_processor_makes_as_many_placeholders_as_the_layouts_have_tokens(limit: int) -> None:
    model = build(limit)
    processor = tf.LlavaOnevisionProcessor(
        image_processor(),
        tokenizer(["red"], image_token="<image>", video_token="<video>"),
        tf.LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}),
        num_image_tokens=64,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{limit}",
    )
    inputs = processor(
        images=[[ramp(*SIZES[0]), ramp(*SIZES[1])], [ramp(*SIZES[3])], [ramp(*SIZES[2])]],
        text=["<image> red <image>", "red <image>", "<image>"],
        padding=True,
        return_tensors="pt",
    )
    names = ("pixel_values", "image_sizes", "batch_num_images")
    sizes = [SIZES[0], SIZES[1], SIZES[3], SIZES[2]]
    encoded = Encoded("image", {name: inputs[name] for name in names}, {})
    n = [layout.n for layout in find_family(model).layouts(model, encoded, processor, sizes)]
    count = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert count == [n[0] + n[1], n[2], n[3]]
