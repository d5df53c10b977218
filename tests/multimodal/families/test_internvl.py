"""InternVL: pixel shuffle by tracing patches, tiles and thumbnails against the image processor."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from tests.multimodal.families.ramps import MEAN, STD, check_boxes, ramp, tokenizer
from tests.multimodal.families.tracing import changed, each_patch, encode
from tests.multimodal.tiny import IMAGE, make_inputs, make_model
from visionsel.multimodal.families import find_family
from visionsel.multimodal.families.family import Encoded

SIZES = [(300, 460), (211, 97), (64, 64), (40, 333), (20, 20)]  # height, width


def image_processor(**changes: Any) -> Any:
    settings = {"size": {"height": 32, "width": 32}, "image_mean": MEAN, "image_std": STD, "max_patches": 6}
    return tf.GotOcr2ImageProcessor(**settings | {"crop_to_patches": True} | changes)


def call(processor: Any, sizes: list[tuple[int, int]]) -> Encoded:
    inputs = processor([ramp(*size) for size in sizes], return_tensors="pt")
    return Encoded("image", {"pixel_values": inputs["pixel_values"].double()}, {})


def test_a_token_depends_on_the_square_of_patches_that_its_layout_names() -> None:
    model = make_model("internvl")
    family = find_family(model)
    for layer in family.tower_layers(model):
        nn.init.zeros_(family.tower_attention(layer).projection_layer.weight)
    encoded = Encoded("image", {"pixel_values": make_inputs("internvl")["pixel_values"]}, {})
    features, layouts = encode(model, encoded), family.layouts(model, encoded)
    source = torch.cat([layout.source() for layout in layouts])
    assert [layout.n for layout in layouts] == [16, 16]
    assert torch.equal(source, torch.arange(len(features)))
    parts = torch.zeros(2 * 64, len(features))
    for number, ((image, row, column), other) in enumerate(each_patch(encoded)):
        (token,) = changed(features, encode(model, other))
        assert layouts[image].views[0].source[row // 2, column // 2] == source[token]
        assert number == 64 * image + 8 * row + column
        parts[number, token] = 1
    pooled = family.pool(model, torch.eye(2 * 64), encoded)
    torch.testing.assert_close(pooled, parts.T / 4)


@pytest.mark.parametrize("layer", [-1, -2, 1, 3])
def test_the_feature_layer_is_the_last_that_the_features_depend_on(layer: int) -> None:
    model = make_model("internvl")
    model.config.vision_feature_layer = layer
    family, encoded = find_family(model), Encoded("image", {"pixel_values": torch.randn(1, 3, 32, 32)}, {})
    features, depends = encode(model, encoded), []
    for number, tower_layer in enumerate(family.tower_layers(model)):
        with torch.no_grad():
            tower_layer.lambda_2.mul_(-3)
        if changed(features, other := encode(model, encoded)):
            depends.append(number)
        features = other
    assert family.feature_layer(model) == max(depends)


def test_boxes_lie_where_the_image_processor_takes_the_pixels() -> None:
    model, processor = make_model("internvl"), image_processor()
    family, encoded = find_family(model), call(processor, SIZES)
    layouts = family.layouts(model, encoded, processor, SIZES)
    kinds = [[view.kind for view in layout.views] for layout in layouts]
    assert kinds[0] == ["tile"] * 6 + ["thumbnail"]
    assert kinds[4] == ["image"]
    assert layouts[0].views[1].box == pytest.approx((460 / 3, 0, 2 * 460 / 3, 150))
    assert torch.equal(
        torch.cat([layout.source() for layout in layouts]), torch.arange(sum(layout.n for layout in layouts))
    )
    # a cell of the thumbnail of the small images is two pixels wide
    assert check_boxes(family, model, encoded, layouts, SIZES, tolerance=0.1) > 150


@pytest.mark.parametrize("patches", [(1, 12), (1, 1), (2, 4), (3, 3)])
def test_images_of_any_shape_have_as_many_tiles_as_the_processor_cuts(patches: tuple[int, int]) -> None:
    model = make_model("internvl")
    processor = image_processor(min_patches=patches[0], max_patches=patches[1])
    sides = (9, 20, 31, 40, 57, 64, 80, 96, 128, 150)  # ties of aspect ratios among them
    sizes = [(height, width) for height in sides for width in sides]
    for size in sizes:
        number = processor.get_number_of_image_patches(*size)
        encoded = Encoded("image", {"pixel_values": torch.zeros(number, 3, 32, 32)}, {})
        (layout,) = find_family(model).layouts(model, encoded, processor, [size])
        assert len(layout.views) == number
        columns = len({view.box[0] for view in layout.views if view.kind == "tile"})
        if columns * 2 in (2, 4) and number == 3:  # one row or one column: the longer side is cut
            assert (columns == 2) == (size[1] > size[0])


def test_without_processor_every_picture_is_laid_out_by_itself() -> None:
    model, encoded = make_model("internvl"), call(image_processor(), SIZES[:2])
    layouts = find_family(model).layouts(model, encoded)
    assert [layout.n for layout in layouts] == [16] * len(encoded.arguments["pixel_values"])
    assert all(view.box is None for layout in layouts for view in layout.views)
    assert torch.equal(
        torch.cat([layout.source() for layout in layouts]), torch.arange(sum(layout.n for layout in layouts))
    )


def test_images_that_were_not_cut_have_one_picture() -> None:
    model, processor = make_model("internvl"), image_processor()
    family, encoded = find_family(model), call(image_processor(crop_to_patches=False), SIZES)
    layouts = family.layouts(model, encoded, processor, SIZES)
    assert [[view.kind for view in layout.views] for layout in layouts] == [["image"]] * 5
    assert check_boxes(family, model, encoded, layouts, SIZES, tolerance=0.1) > 15


def test_the_processor_makes_as_many_placeholders_as_the_layouts_have_tokens() -> None:
    words = tokenizer(
        ["red"],
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    processor = tf.InternVLProcessor(
        image_processor(), words, tf.InternVLVideoProcessor(), image_seq_length=16, chat_template=None
    )
    token = processor.image_token
    inputs = processor(
        images=[ramp(*size) for size in SIZES],
        text=[f"{token} red {token}", f"red {token}", f"{token} {token}"],
    )
    model = make_model("internvl")
    encoded = Encoded("image", {"pixel_values": torch.zeros(len(inputs["pixel_values"]), 3, 32, 32)}, {})
    n = [layout.n for layout in find_family(model).layouts(model, encoded, processor, SIZES)]
    count = [row.count(processor.image_token_id) for row in inputs["input_ids"]]
    assert count == [n[0] + n[1], n[2], n[3] + n[4]]


def test_other_pictures_than_the_processor_makes_are_refused() -> None:
    model, processor = make_model("internvl"), image_processor()
    family, encoded = find_family(model), call(processor, SIZES[:2])
    with pytest.raises(ValueError, match=r"make 12 pictures, but the model was given 10"):
        family.layouts(model, encoded, processor, [SIZES[0], SIZES[2]])


def test_what_cannot_be_shuffled_is_refused() -> None:
    model = make_model("internvl")
    family = find_family(model)
    arguments = {"pixel_values": torch.zeros(1, 3, 32, 32), "vision_feature_select_strategy": "full"}
    with pytest.raises(
        ValueError, match='keeps the class token, which cannot be shuffled; set it to "default"'
    ):
        family.layouts(model, Encoded("image", arguments, {}))
    with pytest.raises(ValueError, match="pictures of 16 x 64 pixels; pixel shuffle takes squares"):
        family.layouts(model, Encoded("image", {"pixel_values": torch.zeros(1, 3, 16, 64)}, {}))


def test_image_tokens_are_those_of_the_config() -> None:
    model = make_model("internvl")
    assert find_family(model).token_ids(model) == {"image": IMAGE}
