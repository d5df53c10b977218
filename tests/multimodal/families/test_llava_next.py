"""LLaVA-NeXT: tokens against what the projector makes of each tile, boxes against the image processor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from tests.multimodal.families.ramps import MEAN, STD, check_boxes, ramp, tokenizer
from tests.multimodal.families.tracing import encode
from tests.multimodal.tiny import IMAGE, TEXT, TOWER, make_inputs, make_model
from visionsel.multimodal.families import find_family
from visionsel.multimodal.families.family import Encoded, TokenLayout

SIZES = [(300, 460), (211, 97), (64, 64), (40, 333), (128, 64), (37, 64)]  # height, width


def build(tile: int = 32, strategy: str = "default") -> Any:
    """A model with 8 x 8 patches of 4 pixels a tile."""
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**TOWER, image_size=tile, patch_size=4, projection_dim=32),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=pinpoints(tile),
        vision_feature_select_strategy=strategy,
    )
    return tf.LlavaNextForConditionalGeneration(config).double().eval()


def pinpoints(tile: int) -> list[list[int]]:
    return [[rows * tile, columns * tile] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def image_processor(tile: int = 32) -> Any:
    return tf.LlavaNextImageProcessor(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=pinpoints(tile),
        image_mean=MEAN,
        image_std=STD,
    )


def call(processor: Any, sizes: list[tuple[int, int]], dtype: torch.dtype = torch.float64) -> Encoded:
    inputs = processor([ramp(*size) for size in sizes], return_tensors="pt")
    return Encoded("image", inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}, {})


def check_tokens(
    model: Any, encoded: Encoded, run: Callable[[Any, Encoded], Tensor] = encode
) -> list[TokenLayout]:
    """Every token is the projected patch that its layout names, or the newline.

    Args:
        model: of the family.
        encoded: the call.
        run: makes the call and returns its tokens `[tokens, C]`.
    """
    family, seen = find_family(model), []
    handle = model.model.multi_modal_projector.register_forward_hook(lambda _, args, out: seen.append(out))
    tokens = run(model, encoded)
    handle.remove()
    patches = seen[0].flatten(0, 1)  # as they leave the projector, crop after crop
    layouts = family.layouts(model, encoded)
    source = torch.cat([layout.source() for layout in layouts])
    assert len(source) == len(tokens)
    newline = source < 0
    torch.testing.assert_close(tokens[~newline], family.pool(model, patches, encoded)[source[~newline]])
    assert torch.equal(tokens[newline], model.model.image_newline.expand(int(newline.sum()), -1))
    for layout in layouts:
        index = torch.cat([view.index.flatten() for view in layout.views])
        assert len(index.unique()) == len(index) == int((layout.source() >= 0).sum())
    return layouts


def test_tokens_are_the_projected_patches_and_newlines() -> None:
    model = build()
    encoded = call(image_processor(), SIZES)
    layouts = check_tokens(model, encoded)
    for layout, (height, width) in zip(layouts, SIZES, strict=True):
        whole, grid = layout.views
        assert (whole.kind, whole.index.shape, grid.kind) == ("thumbnail", (8, 8), "tiles")
        rows, columns = grid.index.shape
        assert (layout.source() < 0).sum() == rows
        assert layout.n == 64 + rows * (columns + 1)
        assert abs(rows / columns - height / width) < 2 / min(rows, columns)  # the padding is cut off


def test_a_batch_without_a_processor_is_laid_out_too() -> None:
    model = make_model("llava_next")
    inputs = make_inputs("llava_next", images=(1, 2))
    arguments = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    layouts = check_tokens(model, Encoded("image", arguments, {}))
    assert [layouts[0].n, layouts[1].n + layouts[2].n] == (inputs["input_ids"] == IMAGE).sum(1).tolist()
    assert all(view.box is None for layout in layouts for view in layout.views)
    values = torch.randn(7 * 16, 2, 3)
    assert torch.equal(find_family(model).pool(model, values, Encoded("image", arguments, {})), values)


def test_pixels_may_come_as_one_row_of_tiles() -> None:
    model, encoded = build(), call(image_processor(), SIZES[:3])
    pixels = encoded.arguments["pixel_values"].flatten(0, 1)
    row = Encoded("image", encoded.arguments | {"pixel_values": pixels[pixels.flatten(1).any(1)]}, {})
    for one, other in zip(check_tokens(model, row), check_tokens(model, encoded), strict=True):
        assert torch.equal(one.source(), other.source())


def test_boxes_lie_where_the_image_processor_takes_the_pixels() -> None:
    model, processor = build(), image_processor()
    family, encoded = find_family(model), call(processor, SIZES)
    layouts = family.layouts(model, encoded, processor, SIZES)
    assert layouts[0].views[0].box == (0, 0, 460, 300)
    assert check_boxes(family, model, encoded, layouts, SIZES) > 400


def test_boxes_are_right_to_half_a_cell_where_patches_do_not_fill_the_tiles() -> None:
    model, processor = build(tile=34), image_processor(34)
    family, encoded = find_family(model), call(processor, SIZES)
    layouts = family.layouts(model, encoded, processor, SIZES)
    assert layouts[0].views[0].box == pytest.approx((0, 0, 460 * 32 / 34, 300 * 32 / 34))
    assert check_boxes(family, model, encoded, layouts, SIZES, tolerance=0.5) > 400
    thumbnails = [type(layout)(layout.n, layout.views[:1]) for layout in layouts]
    check_boxes(family, model, encoded, thumbnails, SIZES)


def test_the_processor_makes_as_many_placeholders_as_the_layouts_have_tokens() -> None:
    model, words = build(), tokenizer(["red"], image_token="<image>")
    processor = tf.LlavaNextProcessor(
        image_processor(),
        words,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    inputs = processor(
        images=[ramp(*size) for size in SIZES],
        text=["<image> red <image>", "red <image>", "<image> <image> <image>"],
        padding=True,
        return_tensors="pt",
    )
    arguments = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    layouts = find_family(model).layouts(model, Encoded("image", arguments, {}), processor, SIZES)
    n = [layout.n for layout in layouts]
    count = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert count == [n[0] + n[1], n[2], n[3] + n[4] + n[5]]


def test_other_sizes_than_the_calls_are_refused() -> None:
    model, processor = build(), image_processor()
    family, encoded = find_family(model), call(processor, SIZES[:2])
    with pytest.raises(ValueError, match="image 0 is 300 x 460 by image_sizes, but 460 x 300 by sizes"):
        family.layouts(model, encoded, processor, [(460, 300), (97, 211)])
    with pytest.raises(ValueError, match="3 sizes for 2 images"):
        family.layouts(model, encoded, processor, SIZES[:3])


def test_a_kept_class_token_is_refused() -> None:
    model = build(strategy="full")
    with pytest.raises(ValueError, match='has no place in a grid of tiles; set it to "default"'):
        find_family(model).layouts(model, call(image_processor(), SIZES[:1]))
