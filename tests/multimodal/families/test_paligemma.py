"""PaliGemma: what the family says of patches, tokens and pixels, against the model and its processor."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor

from tests.multimodal.families.tracing import (
    blinded,
    check_boxes,
    check_calls,
    check_pool,
    check_prompt,
    encode,
    trace,
)
from tests.multimodal.tiny import IMAGE, make_inputs, make_model
from visionsel.multimodal.families.family import Encoded
from visionsel.multimodal.families.paligemma import PaliGemma

FAMILY = PaliGemma()


@pytest.fixture(scope="module")
def model() -> Any:
    return blinded(FAMILY, "paligemma")


def call() -> Encoded:
    inputs = make_inputs("paligemma", images=(2, 1))
    return Encoded("image", {"pixel_values": inputs["pixel_values"]}, {})


def test_each_patch_is_a_token(model: Any) -> None:
    encoded = call()
    traces = trace(FAMILY, model, encoded)
    check_pool(FAMILY, model, encoded, traces)
    layouts = FAMILY.layouts(model, encoded)
    for (picture, y, x), (_, token) in traces.items():
        assert layouts[picture].views[0].source[y, x] == token


def test_layouts_deal_out_the_placeholders_of_images(model: Any) -> None:
    layouts = check_prompt(FAMILY, model, make_inputs("paligemma", images=(2, 0, 1), batch=3))["image"]
    assert [(layout.n, [view.kind for view in layout.views]) for layout in layouts] == [(16, ["image"])] * 3


def test_boxes_are_where_the_processor_takes_the_pixels(model: Any) -> None:
    processor = SiglipImageProcessor(size={"height": 16, "width": 16})

    def process(images: list) -> dict[str, Tensor]:
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"].double()}

    layouts = check_boxes(FAMILY, model, "image", process, [(50, 163), (100, 90)], processor)
    assert [layout.views[0].box for layout in layouts] == [(0, 0, 163, 50), (0, 0, 90, 100)]


def test_larger_pictures_have_more_tokens(model: Any) -> None:
    pixels = torch.ones(1, 3, 24, 20, dtype=torch.float64)
    encoded = Encoded("image", {"pixel_values": pixels, "interpolate_pos_encoding": True}, {})
    (layout,) = FAMILY.layouts(model, encoded)
    assert layout.views[0].index.shape == (6, 5)
    assert layout.n == len(encode(model, encoded))


def test_attention_calls_join_to_tower_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_calls(monkeypatch, FAMILY, make_model("paligemma"), call()) == [1, 1, 1]


def test_the_number_of_sizes_must_be_that_of_the_images(model: Any) -> None:
    with pytest.raises(ValueError, match=r"2 images of these sizes make 2 pictures, but .* given 3"):
        FAMILY.layouts(model, call(), object(), [(16, 16)] * 2)


def test_parts_of_the_model_are_found(model: Any) -> None:
    assert FAMILY.decoder(model) is model.model.language_model
    assert FAMILY.token_ids(model) == {"image": IMAGE}
    assert FAMILY.feature_layer(model) == 2
