"""Idefics3 and SmolVLM: what the family says of patches, tokens and pixels, against models and processors."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Idefics3Processor
from transformers.models.idefics3.image_processing_idefics3 import Idefics3ImageProcessor
from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

from tests.multimodal.families.ramps import tokenizer
from tests.multimodal.families.tracing import (
    blinded,
    check_boxes,
    check_calls,
    check_pool,
    check_prompt,
    check_sources,
    encode,
    trace,
)
from tests.multimodal.tiny import IMAGE, make_inputs, make_model
from visionsel.multimodal.families.family import Encoded
from visionsel.multimodal.families.idefics3 import Idefics3

FAMILY = Idefics3()
KEYS = ("pixel_values", "pixel_attention_mask")
TILES = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}}
PROCESSORS = {"idefics3": Idefics3ImageProcessor, "smolvlm": SmolVLMImageProcessor}


@pytest.fixture(scope="module", params=["idefics3", "smolvlm"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    return blinded(FAMILY, name)


def arguments(batch: Any) -> dict[str, Tensor]:
    return {key: batch[key].double() if key == "pixel_values" else batch[key] for key in KEYS if key in batch}


def grey(*sizes: tuple[int, int]) -> list[np.ndarray]:
    return [np.full((*size, 3), 110, np.uint8) for size in sizes]


def test_pool_averages_the_patches_that_go_into_a_token(name: str, model: Any) -> None:
    encoded = Encoded("image", arguments(make_inputs(name, images=(2, 1))), {})
    traces = trace(FAMILY, model, encoded)
    check_pool(FAMILY, model, encoded, traces)
    layouts = FAMILY.layouts(model, encoded)
    for (picture, y, x), (_, token) in traces.items():
        assert layouts[picture].views[0].source[y // 2, x // 2] == token


def test_layouts_deal_out_the_placeholders_of_pictures(name: str, model: Any) -> None:
    layouts = check_prompt(FAMILY, model, make_inputs(name, images=(2, 0, 1), batch=3))["image"]
    assert [(layout.n, [view.kind for view in layout.views]) for layout in layouts] == [(16, ["image"])] * 3


def test_boxes_of_tiles_are_where_the_processor_takes_the_pixels(name: str, model: Any) -> None:
    processor = PROCESSORS[name](**TILES)

    def process(images: list) -> dict[str, Tensor]:  # the second sample is filled up with pictures of zeros
        return arguments(processor([images[:2], images[2:]], return_tensors="pt"))

    layouts = check_boxes(FAMILY, model, "image", process, [(75, 100), (180, 90), (60, 260)], processor, 5)
    kinds = [[view.kind for view in layout.views] for layout in layouts]
    assert kinds == [["tile"] * n + ["thumbnail"] for n in (9, 6, 3)]
    assert [view.box for view in layouts[1].views[:3]] == [(0, 0, 45, 60), (45, 0, 90, 60), (0, 60, 45, 120)]


def test_boxes_hold_where_images_are_not_split(model: Any) -> None:
    processor = Idefics3ImageProcessor(**TILES)

    def process(images: list) -> dict[str, Tensor]:  # the call, not the processor, says so
        return arguments(processor([images], return_tensors="pt", do_image_splitting=False))

    layouts = check_boxes(FAMILY, model, "image", process, [(75, 100), (180, 90)], processor, 2)
    assert [[view.kind for view in layout.views] for layout in layouts] == [["image"]] * 2


def test_boxes_hold_where_small_images_stay_whole_beside_large_ones(model: Any) -> None:
    processor = Idefics3ImageProcessor(do_resize=False, max_image_size={"longest_edge": 32})

    def process(images: list) -> dict[str, Tensor]:
        return arguments(processor([images], return_tensors="pt"))

    layouts = check_boxes(FAMILY, model, "image", process, [(31, 20), (60, 90)], processor, 4)
    assert [len(layout.views) for layout in layouts] == [1, 7]


def test_frames_of_a_video_are_images() -> None:
    processor = SmolVLMVideoProcessor(**TILES, do_sample_frames=False)
    model = blinded(FAMILY, "smolvlm")

    def process(frames: list) -> dict[str, Tensor]:
        return arguments(processor([np.stack(frames)], return_tensors="pt"))

    layouts = check_boxes(FAMILY, model, "image", process, [(45, 80)] * 3, processor, 3)
    assert [[view.kind for view in layout.views] for layout in layouts] == [["image"]] * 3


@pytest.mark.parametrize("longest", [64, 97])
def test_the_number_of_tiles_is_the_processors_for_any_size(model: Any, longest: int) -> None:
    processor = Idefics3ImageProcessor(size={"longest_edge": longest}, max_image_size={"longest_edge": 32})
    sizes = [tuple(size) for size in np.random.default_rng(0).integers(5, 120, (40, 2)).tolist()]
    batch = processor([grey(*sizes)], return_tensors="pt", return_row_col_info=True)
    layouts = FAMILY.layouts(model, Encoded("image", arguments(batch), {}), processor, sizes)
    tiles = [rows * columns for rows, columns in zip(batch["rows"][0], batch["cols"][0], strict=True)]
    assert [len(layout.views) for layout in layouts] == [1 + n for n in tiles]
    assert [len({view.box[1] for view in layout.views[:-1]}) for layout in layouts] == batch["rows"][0]


def test_prompts_of_the_whole_processor_have_a_run_of_tokens_for_each_view() -> None:
    model = blinded(FAMILY, "idefics3")
    words = tokenizer(["see"], image_token="<image>", fake_image_token="<fake_token_around_image>")
    processor = Idefics3Processor(Idefics3ImageProcessor(**TILES), words, image_seq_len=16)
    model.config.image_token_id = model.model.image_token_id = processor.image_token_id
    sizes = [(75, 100), (180, 90), (60, 260)]
    images = grey(*sizes)
    prompts = ["see <image> see <image>", "<image> see"]
    batch = processor([images[:2], images[2:]], prompts, return_tensors="pt", padding=True)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")} | arguments(batch)
    check_prompt(FAMILY, model, inputs)
    layouts = FAMILY.layouts(model, Encoded("image", arguments(batch), {}), processor, sizes)
    place = (inputs["input_ids"] == processor.image_token_id).int()
    assert place.sum(1).tolist() == [layouts[0].n + layouts[1].n, layouts[2].n]
    assert place.diff(prepend=torch.zeros(2, 1)).eq(1).sum(1).tolist() == [10 + 7, 4]


def test_attention_calls_join_to_tower_order(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    encoded = Encoded("image", arguments(make_inputs(name, images=(2, 1))), {})
    assert check_calls(monkeypatch, FAMILY, make_model(name), encoded) == [1, 1, 1]


def test_smolvlm_keeps_one_picture_where_all_are_zeros() -> None:
    model = blinded(FAMILY, "smolvlm")
    encoded = Encoded("image", {"pixel_values": torch.zeros(1, 2, 3, 32, 32, dtype=torch.float64)}, {})
    check_sources(FAMILY.layouts(model, encoded), len(encode(model, encoded)))


def test_sizes_that_do_not_fit_the_pictures_are_refused(model: Any) -> None:
    processor = Idefics3ImageProcessor(**TILES)
    encoded = Encoded("image", arguments(processor([grey((60, 90))], return_tensors="pt")), {})
    with pytest.raises(ValueError, match=r"1 images of these sizes make 10 pictures, but .* given 7"):
        FAMILY.layouts(model, encoded, processor, [(90, 90)])
    assert len(FAMILY.layouts(model, encoded, processor, [(60, 90)])) == 1


def test_pictures_that_are_not_square_are_refused(model: Any) -> None:
    encoded = Encoded("image", {"pixel_values": torch.ones(1, 1, 3, 32, 64)}, {})
    with pytest.raises(ValueError, match="pictures of 32 x 64 pixels"):
        FAMILY.layouts(model, encoded)


def test_parts_of_the_model_are_found(model: Any) -> None:
    assert FAMILY.decoder(model) is model.model.text_model
    assert FAMILY.token_ids(model) == {"image": IMAGE}
    assert FAMILY.feature_layer(model) == 2
