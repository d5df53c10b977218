"""Tokens on pixels: a bright patch in the image, sent through the real image processors, finds its token."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor
from transformers.models.idefics3.image_processing_idefics3 import Idefics3ImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor
from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor

from tests.multimodal.families import test_internvl, test_llava_next, test_llava_onevision
from tests.multimodal.families.tracing import BLANK, MARK, encode
from tests.multimodal.tiny import IMAGE, make_inputs, make_model
from visionsel.data.shapes import ShapesWorld
from visionsel.embedded import load_lvlm
from visionsel.multimodal.families import find_family
from visionsel.multimodal.families.family import Encoded, View
from visionsel.multimodal.families.raster import axis_cells, axis_weights
from visionsel.multimodal.grounding import TokenGrid

SIZE = (60, 100)  # height, width
SQUARE = {"size": {"height": 32, "width": 32}}
SPLIT = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
PATCHES = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
PIXELS = {"size": {"shortest_edge": 64, "longest_edge": 4096}}
CROPS = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 32,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


def _clip() -> Any:
    return tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def _padded() -> Any:
    settings = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return tf.LlavaImageProcessor(**settings, do_pad=True, do_center_crop=False)


def _qwen() -> Any:
    return Qwen2VLImageProcessor(**PATCHES, **PIXELS)


# for each case: the model, the image processor, kinds and shapes of the views of an image of SIZE
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any], list[tuple[str, tuple[int, int]]]]] = {
    "llava, cropped": (partial(make_model, "llava"), _clip, [("image", (4, 4))]),
    "llava, padded": (partial(make_model, "llava"), _padded, [("image", (4, 4))]),
    "llava_next": (
        test_llava_next.build,
        test_llava_next.image_processor,
        [("thumbnail", (8, 8)), ("tiles", (10, 16))],
    ),
    "llava_onevision": (
        test_llava_onevision.build,
        test_llava_onevision.image_processor,
        [("thumbnail", (8, 8)), ("tiles", (10, 16))],
    ),
    "qwen2_vl": (partial(make_model, "qwen2_vl"), _qwen, [("image", (6, 10))]),
    "qwen2_5_vl": (partial(make_model, "qwen2_5_vl"), _qwen, [("image", (6, 10))]),
    "qwen3_vl": (partial(make_model, "qwen3_vl"), _qwen, [("image", (6, 10))]),
    "internvl": (
        partial(make_model, "internvl"),
        test_internvl.image_processor,
        [("tile", (4, 4))] * 6 + [("thumbnail", (4, 4))],
    ),
    "idefics3": (
        partial(make_model, "idefics3"),
        lambda: Idefics3ImageProcessor(**SPLIT),
        [("tile", (4, 4))] * 4 + [("thumbnail", (4, 4))],
    ),
    "smolvlm": (
        partial(make_model, "smolvlm"),
        lambda: SmolVLMImageProcessor(**SPLIT),
        [("tile", (4, 4))] * 4 + [("thumbnail", (4, 4))],
    ),
    "gemma3": (partial(make_model, "gemma3"), lambda: Gemma3ImageProcessor(**SQUARE), [("image", (4, 4))]),
    "gemma3, pan and scan": (
        partial(make_model, "gemma3"),
        lambda: Gemma3ImageProcessor(**SQUARE, **CROPS),
        [("thumbnail", (4, 4))] + [("tile", (4, 4))] * 2,
    ),
    "paligemma": (
        partial(make_model, "paligemma"),
        lambda: SiglipImageProcessor(size={"height": 16, "width": 16}),
        [("image", (4, 4))],
    ),
}


def blind(model: Any) -> Any:
    """Each token of the tower depends on its own patches alone."""
    family = find_family(model)
    for layer in family.tower_layers(model):
        attention: Any = family.tower_attention(layer)
        for name in ("out_proj", "proj", "projection_layer"):
            if hasattr(attention, name):
                for parameter in getattr(attention, name).parameters():
                    nn.init.zeros_(parameter)
    return model


def processed(processor: Any, *images: np.ndarray) -> dict[str, Tensor]:
    """What a processor makes of images of one sample."""
    batch = processor([list(images)], return_tensors="pt") if _nested(processor) else None
    batch = processor(list(images), return_tensors="pt") if batch is None else batch
    return {**batch, "pixel_values": batch["pixel_values"].double()}


def _nested(processor: Any) -> bool:
    return isinstance(
        processor, Idefics3ImageProcessor | SmolVLMImageProcessor | tf.LlavaOnevisionImageProcessor
    )


def tokens_of(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """`[n, C]` in the order of the placeholders."""
    names = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
    return encode(model, Encoded("image", {name: inputs[name] for name in names if name in inputs}, {}))


@pytest.mark.parametrize("case", CASES)
def test_a_bright_patch_changes_the_token_that_the_grid_names(case: str) -> None:
    make, make_processor, shapes = CASES[case]
    model, processor = blind(make()), make_processor()
    blank = np.full((*SIZE, 3), BLANK, np.uint8)
    inputs = processed(processor, blank)
    grid = TokenGrid.from_inputs(model, processor, inputs, image_size=SIZE)
    assert (grid.size, grid.sample, grid.start) == (SIZE, None, None)
    assert [(view.kind, tuple(view.index.shape)) for view in grid.views] == shapes
    before = tokens_of(model, inputs)
    assert grid.n == len(before)
    checked = 0
    for view in grid.views:
        (x0, y0, x1, y1), (rows, columns) = view.box, view.index.shape
        wide, high = (x1 - x0) / columns, (y1 - y0) / rows
        for cell in range(0, rows * columns, max(1, rows * columns // 8)):
            row, column = divmod(cell, columns)
            x, y = x0 + (column + 0.5) * wide, y0 + (row + 0.5) * high
            if not (0 < x < SIZE[1] and 0 < y < SIZE[0]):
                continue
            marked = blank.copy()
            top, left = max(0, round(y - high / 4)), max(0, round(x - wide / 4))
            marked[top : round(y + max(1, high / 4)), left : round(x + max(1, wide / 4))] = MARK
            change = (tokens_of(model, processed(processor, marked)) - before).norm(dim=-1)
            alike = torch.cat([one.index.flatten() for one in grid.views if one.kind == view.kind])
            found = int(alike[change[alike].argmax()])
            assert found == int(view.index[row, column]), (view.kind, row, column)
            checked += 1
    assert checked >= 4


@pytest.mark.parametrize("case", CASES)
def test_an_indicator_of_a_token_lies_in_the_box_of_its_cell(case: str) -> None:
    make, make_processor, _ = CASES[case]
    processor = make_processor()
    inputs = processed(processor, np.full((*SIZE, 3), BLANK, np.uint8))
    grid = TokenGrid.from_inputs(make(), processor, inputs, image_size=SIZE)
    every = grid.rasterize(torch.eye(grid.n, dtype=torch.float64), smooth=False)
    smooth = grid.rasterize(torch.eye(grid.n))
    assert every.shape == smooth.shape == (grid.n, *SIZE)
    assert every.dtype == torch.float64
    assert smooth.dtype == torch.float32
    y, x = torch.arange(SIZE[0])[:, None] + 0.5, torch.arange(SIZE[1]) + 0.5
    seen = torch.zeros(SIZE, dtype=torch.bool)
    for view in grid.views:
        (x0, y0, x1, y1), (rows, columns) = view.box, view.index.shape
        seen |= (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
        for row in range(rows):
            for column in range(columns):
                inside = (y >= y0 + row * (y1 - y0) / rows) & (y < y0 + (row + 1) * (y1 - y0) / rows)
                inside = inside & (x >= x0 + column * (x1 - x0) / columns)
                inside = inside & (x < x0 + (column + 1) * (x1 - x0) / columns)
                token = int(view.index[row, column])
                assert torch.equal(every[token] > 0, inside)
                if inside.any():
                    assert inside.flatten()[smooth[token].argmax()]
    # all tokens of the views together make 1 wherever a view is
    for raster in (every, smooth.double()):
        torch.testing.assert_close(raster.sum(0), seen.double(), rtol=0, atol=1e-6)


def test_of_several_images_each_has_its_own_grid_and_its_first_column() -> None:
    # the second sample has two images; LLaVA-NeXT knows their sizes itself
    model, inputs = make_model("llava_next"), make_inputs("llava_next", images=(1, 2))
    processor = tf.LlavaNextImageProcessor(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=model.config.image_grid_pinpoints,
    )
    sizes = [(16, 40), (40, 24), (16, 40)]
    grids = [TokenGrid.from_inputs(model, processor, inputs, sizes[i], image=i) for i in range(3)]
    counts = (inputs["input_ids"] == IMAGE).sum(1).tolist()
    assert [grid.sample for grid in grids] == [0, 1, 1]
    assert [grid.start for grid in grids] == [0, 0, grids[1].n]
    assert counts == [grids[0].n, grids[1].n + grids[2].n]
    every = TokenGrid.from_inputs(model, processor, inputs, sizes, image=2)
    assert [view.box for view in every.views] == [view.box for view in grids[2].views]
    with pytest.raises(ValueError, match="image 3 does not exist: the inputs hold images 0 to 2"):
        TokenGrid.from_inputs(model, processor, inputs, (16, 40), image=3)


def test_sizes_of_all_images_are_needed_where_tiles_do_not_say_whose_they_are() -> None:
    model, processor = make_model("internvl"), test_internvl.image_processor()
    images = [np.zeros((*size, 3), np.uint8) for size in ((32, 64), (64, 32))]
    inputs = processed(processor, *images)
    grid = TokenGrid.from_inputs(model, processor, inputs, [(32, 64), (64, 32)], image=1)
    assert [view.box for view in grid.views] == [(0, 0, 32, 32), (0, 32, 32, 64), (0, 0, 32, 64)]
    with pytest.raises(ValueError, match=r"1 images of these sizes make 3 pictures, but .* given 6"):
        TokenGrid.from_inputs(model, processor, inputs, (64, 32), image=1)


@pytest.mark.parametrize("whole", [True, False])
def test_the_processor_or_its_image_processor_will_do(whole: bool) -> None:
    model, processor = load_lvlm()
    image = ShapesWorld("balanced", seed=0, size=1)[0].image.resize((96, 64))
    inputs = processor(images=image, text="<image>", return_tensors="pt")
    used = processor if whole else processor.image_processor
    grid = TokenGrid.from_inputs(model, used, inputs, image_size=(64, 96))
    (view,) = grid.views
    assert (grid.n, grid.sample, grid.start) == (64, 0, 0)
    assert view.box == (16, 0, 80, 64)  # the processor cuts off what is left and right
    raster = grid.rasterize(torch.rand(2, 3, 64))
    assert raster.shape == (2, 3, 64, 96)
    assert not raster[..., :16].any()
    assert not raster[..., 80:].any()


def test_views_over_each_other_are_averaged_and_can_be_chosen() -> None:
    index = torch.arange(4).view(2, 2)
    whole = View("thumbnail", index, index, (0, 0, 8, 8))
    corner = View("tile", index + 4, index, (0, 0, 4, 4))
    grid = TokenGrid(9, (8, 8), (whole, corner))
    values = torch.tensor([1.0] * 4 + [3.0] * 4 + [100.0])  # the last is a newline
    expected = torch.ones(8, 8)
    expected[:4, :4] = 2
    for smooth in (True, False):
        torch.testing.assert_close(grid.rasterize(values, smooth=smooth), expected)
        torch.testing.assert_close(grid.rasterize(values, ["thumbnail"], smooth), torch.ones(8, 8))
    assert grid.rasterize(torch.arange(9)).dtype == torch.float32
    with pytest.raises(ValueError, match="no view is of kind frame; this image has thumbnail, tile"):
        grid.rasterize(values, ["frame"])
    with pytest.raises(ValueError, match=r"the image has 9 tokens, got values of shape \[4\]"):
        grid.rasterize(values[:4])


@pytest.mark.parametrize("box", [(0.0, 12.0), (-3.5, 20.25), (2.0, 7.5), (0.3, 2.1)])
def test_weights_along_an_axis_are_linear_or_mean(box: tuple[float, float]) -> None:
    pixels, cells = 12, 5
    (start, end), size = box, (box[1] - box[0]) / 5
    cell, weights = axis_cells(pixels, *box, cells), axis_weights(pixels, *box, cells)
    for pixel in range(pixels):
        middle = pixel + 0.5
        expected = int((middle - start) // size) if start <= middle < end else -1
        assert int(cell[pixel]) == expected
        plain = torch.zeros(cells, dtype=torch.float64)
        if size >= 1 and expected >= 0:
            place = min(max((middle - start) / size - 0.5, 0), cells - 1)
            for one in range(cells):
                plain[one] = max(0.0, 1 - abs(place - one))
        elif size < 1:
            for one in range(cells):
                left, right = start + one * size, start + (one + 1) * size
                plain[one] = max(0.0, min(right, pixel + 1) - max(left, pixel))
            plain = plain / plain.sum() if plain.sum() > 0 else plain
        torch.testing.assert_close(weights[pixel], plain)


def test_what_cannot_be_a_grid_is_refused() -> None:
    model, inputs = make_model("qwen2_vl"), make_inputs("qwen2_vl", batch=1, image_sizes=((24, 40),))
    processor = _qwen()
    assert TokenGrid.from_inputs(model, processor, inputs, (24, 40)).n == 15
    cases: list[tuple[Any, str]] = [
        ({"image_size": (40, 24)}, "has 3 x 5 tokens, which cannot be 40 x 24 pixels"),
        ({"image_size": (24,)}, r"image_size must be \(height, width\) in pixels.*got \(24,\)"),
        ({"image_size": (0, 40)}, "got"),
        ({"image_size": "24x40"}, "got '24x40'"),
        ({"processor": None}, "processor is None; pass the processor"),
        ({"inputs": {"input_ids": inputs["input_ids"]}}, "the inputs hold no image"),
        ({"model": nn.Linear(2, 2)}, "Linear is no supported vision-language model"),
        ({"inputs": {**inputs, "input_ids": inputs["input_ids"][:, :-9]}}, "as the processor returned them"),
    ]
    good = {"model": model, "processor": processor, "inputs": inputs, "image_size": (24, 40)}
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            TokenGrid.from_inputs(**good | change)
    crop = make_model("llava")
    with pytest.raises(ValueError, match="the processor makes 8 x 8 pixels"):
        TokenGrid.from_inputs(
            crop,
            tf.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
            make_inputs("llava", batch=1),
            (24, 40),
        )
