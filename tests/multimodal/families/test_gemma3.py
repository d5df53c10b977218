"""Gemma 3: what the family says of patches, tokens and pixels, against the model and its processors."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Gemma3Processor
from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor

from tests.multimodal.families.ramps import tokenizer
from tests.multimodal.families.tracing import (
    blinded,
    check_boxes,
    check_calls,
    check_pool,
    check_prompt,
    trace,
)
from tests.multimodal.tiny import IMAGE, make_inputs, make_model
from visionsel.multimodal.families.family import Encoded
from visionsel.multimodal.families.gemma3 import Gemma3

FAMILY = Gemma3()
SQUARE = {"size": {"height": 32, "width": 32}}
CROPS = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 32,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return blinded(FAMILY, "gemma3")


def arguments(batch: Any) -> dict[str, Tensor]:
    return {"pixel_values": batch["pixel_values"].double()}


def grey(*sizes: tuple[int, int]) -> list[np.ndarray]:
    return [np.full((*size, 3), 110, np.uint8) for size in sizes]


def test_pool_averages_the_patches_that_go_into_a_token(model: Any) -> None:
    encoded = Encoded("image", arguments(make_inputs("gemma3", images=(2, 1))), {})
    traces = trace(FAMILY, model, encoded)
    check_pool(FAMILY, model, encoded, traces)
    layouts = FAMILY.layouts(model, encoded)
    for (picture, y, x), (_, token) in traces.items():
        assert layouts[picture].views[0].source[y // 2, x // 2] == token


def test_layouts_deal_out_the_placeholders_of_pictures(model: Any) -> None:
    layouts = check_prompt(FAMILY, model, make_inputs("gemma3", images=(2, 0, 1), batch=3))["image"]
    assert [(layout.n, [view.kind for view in layout.views]) for layout in layouts] == [(16, ["image"])] * 3


def test_boxes_are_where_the_processor_takes_the_pixels(model: Any) -> None:
    processor = Gemma3ImageProcessor(**SQUARE)

    def process(images: list) -> dict[str, Tensor]:
        return arguments(processor(images, return_tensors="pt"))

    layouts = check_boxes(FAMILY, model, "image", process, [(50, 163), (100, 110)], processor)
    assert [layout.views[0].box for layout in layouts] == [(0, 0, 163, 50), (0, 0, 110, 100)]


def test_boxes_of_pan_and_scan_are_where_the_processor_takes_the_pixels(model: Any) -> None:
    processor = Gemma3ImageProcessor(**SQUARE, **CROPS)

    def process(images: list) -> dict[str, Tensor]:
        return arguments(processor(images, return_tensors="pt"))

    shapes = [(50, 163), (100, 110), (203, 90)]
    layouts = check_boxes(FAMILY, model, "image", process, shapes, processor)
    wide, plain, tall = ([(view.kind, view.box) for view in layout.views] for layout in layouts)
    assert plain == [("image", (0, 0, 110, 100))], "1.1 is below the ratio"
    assert wide == [
        ("thumbnail", (0, 0, 163, 50)),
        ("tile", (0, 0, 55, 50)),
        ("tile", (55, 0, 110, 50)),
        ("tile", (110, 0, 163, 50)),
    ]
    assert tall == [
        ("thumbnail", (0, 0, 90, 203)),
        ("tile", (0, 0, 90, 102)),
        ("tile", (0, 102, 90, 203)),
    ]


@pytest.mark.parametrize("most", [2, 4])
def test_the_number_of_crops_is_the_processors_for_any_size(model: Any, most: int) -> None:
    processor = Gemma3ImageProcessor(**SQUARE, **CROPS | {"pan_and_scan_max_num_crops": most})
    sizes = [tuple(size) for size in np.random.default_rng(0).integers(16, 200, (60, 2)).tolist()]
    batch = processor(grey(*sizes), return_tensors="pt")
    layouts = FAMILY.layouts(model, Encoded("image", arguments(batch), {}), processor, sizes)
    assert [len(layout.views) - 1 for layout in layouts] == list(batch["num_crops"])
    assert {0, 2} < {len(layout.views) - 1 for layout in layouts} | {3, 4}


def test_prompts_of_the_whole_processor_have_a_run_of_tokens_for_each_view() -> None:
    model = blinded(FAMILY, "gemma3")
    words = tokenizer(["see"], boi_token="<start>", eoi_token="<end>", image_token="<image>")
    processor = Gemma3Processor(Gemma3ImageProcessor(**SQUARE), words, image_seq_length=16)
    model.config.image_token_id = words.image_token_id
    sizes = [(300, 1000), (300, 301), (600, 280)]
    images, prompts = grey(*sizes), ["see <start> see <start>", "<start> see"]
    batch = processor(
        images=[images[:2], images[2:]], text=prompts, return_tensors="pt", padding=True, do_pan_and_scan=True
    )
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")} | arguments(batch)
    check_prompt(FAMILY, model, inputs)
    layouts = FAMILY.layouts(model, Encoded("image", arguments(batch), {}), processor, sizes)
    assert [len(layout.views) for layout in layouts] == [4, 1, 3]
    place = (inputs["input_ids"] == words.image_token_id).int()
    assert place.sum(1).tolist() == [layouts[0].n + layouts[1].n, layouts[2].n]
    assert place.diff(prepend=torch.zeros(2, 1)).eq(1).sum(1).tolist() == [5, 3]


def test_attention_calls_join_to_tower_order(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = Encoded("image", arguments(make_inputs("gemma3", images=(2, 1))), {})
    assert check_calls(monkeypatch, FAMILY, make_model("gemma3"), encoded) == [1, 1, 1]


def test_sizes_that_do_not_fit_the_pictures_are_refused(model: Any) -> None:
    processor = Gemma3ImageProcessor(**SQUARE, **CROPS)
    encoded = Encoded("image", arguments(processor(grey((50, 163)), return_tensors="pt")), {})
    with pytest.raises(ValueError, match=r"1 images of these sizes make 3 pictures, but .* given 4"):
        FAMILY.layouts(model, encoded, processor, [(100, 163)])


def test_parts_of_the_model_are_found(model: Any) -> None:
    assert FAMILY.decoder(model) is model.model.language_model
    assert FAMILY.token_ids(model) == {"image": IMAGE}
    assert FAMILY.feature_layer(model) == 2
