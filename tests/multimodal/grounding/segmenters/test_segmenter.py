"""What all segmenters share: cache, precision, state, geometry, and what they refuse."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.multimodal.grounding.segmenters import models
from tests.multimodal.grounding.segmenters.models import image
from visionsel.multimodal.grounding.segmenters import Sam2Segmenter, SamSegmenter

BOXES = [[1.0, 2, 30, 40], [3, 3, 50, 30.5]]


class Counted(SamSegmenter):
    """Counts how often the encoder runs."""

    runs = 0

    def _encode(self, *args: Any) -> Any:
        self.runs += 1
        return super()._encode(*args)


def test_an_image_in_the_cache_answers_as_one_encoded_anew() -> None:
    segmenter = Counted(models.sam(), cache=2)
    first, second, third = (image(48, 80, seed) for seed in range(3))
    fresh = segmenter.set_image(first).predict(boxes=BOXES)
    segmenter.set_image(second)
    again = segmenter.set_image(Image.fromarray(first)).predict(boxes=BOXES)
    assert segmenter.runs == 2
    assert torch.equal(again.low_res, fresh.low_res)
    segmenter.set_image(third).set_image(first)  # the second was used longest ago
    assert segmenter.runs == 3
    segmenter.set_image(second)
    assert segmenter.runs == 4
    # the same bytes in another shape are another image
    segmenter.set_image(second.reshape(80, 48, 3))
    assert segmenter.runs == 5
    segmenter.forget()
    assert segmenter.set_image(second).runs == 6
    other = Counted(models.sam(), cache=0).set_image(first).set_image(first)
    assert other.runs == 2
    assert torch.equal(other.predict(boxes=BOXES).low_res, fresh.low_res)


def test_weights_that_change_ask_for_forgetting() -> None:
    model, pixels = models.sam(), image(48, 80)
    segmenter = SamSegmenter(model).set_image(pixels)
    before = segmenter._features[0]
    with torch.no_grad():
        model.image_encoder.pos_embed += 1
    assert torch.equal(segmenter.set_image(pixels)._features[0], before)
    segmenter.forget()
    assert not torch.equal(segmenter.set_image(pixels)._features[0], before)


def test_the_best_mask_is_the_one_with_the_highest_predicted_quality() -> None:
    found = SamSegmenter(models.sam()).set_image(image(48, 80)).predict(boxes=BOXES)
    for number, (masks, iou, best) in enumerate(zip(found.masks(), found.iou, found.best(), strict=True)):
        highest = max(range(3), key=lambda m: float(iou[m]))
        assert torch.equal(best, masks[highest])
        assert torch.equal(found.only_best().low_res[number, 0], found.low_res[number, highest])
    assert torch.equal(found.masks(0.3), found.logits() > 0.3)
    assert torch.equal(found.best(0.3), found.only_best().logits()[:, 0] > 0.3)


def test_the_best_of_earlier_masks_are_a_prompt() -> None:
    segmenter = SamSegmenter(models.sam()).set_image(image(48, 80))
    earlier = segmenter.predict(boxes=BOXES)
    one = segmenter.predict(boxes=BOXES, mask_input=earlier)
    other = segmenter.predict(boxes=BOXES, mask_input=earlier.only_best().low_res[:, 0])
    assert torch.equal(one.low_res, other.low_res)
    assert not torch.equal(one.low_res, earlier.low_res)


def test_the_model_is_left_as_it_was() -> None:
    model = models.sam2()
    model.train()
    model.mask_decoder.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    segmenter = Sam2Segmenter(model).set_image(image(48, 80))
    trained = segmenter.predict(boxes=BOXES, multimask=False)
    with pytest.raises(RuntimeError, match="broken"):
        _broken(segmenter).predict(boxes=BOXES)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    # it answers as in evaluation mode, in which an unstable mask is replaced
    model.eval()
    assert torch.equal(segmenter.predict(boxes=BOXES, multimask=False).low_res, trained.low_res)


def _broken(segmenter: Any) -> Any:
    def decode(*args: Any) -> None:
        assert not any(module.training for module in segmenter.model.modules())
        raise RuntimeError("broken")

    segmenter = Sam2Segmenter(segmenter.model).set_image(image(48, 80))
    segmenter._decode = decode
    return segmenter


def test_precision_is_autocast_of_the_image_encoder() -> None:
    model, pixels = models.sam(), image(48, 80)
    exact = SamSegmenter(model).set_image(pixels)
    for dtype in ("bfloat16", torch.float16):
        segmenter = SamSegmenter(model, dtype=dtype).set_image(pixels)
        asked = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        inside = exact.canvas.resize(pixels)[None]
        with torch.no_grad(), torch.autocast("cpu", asked):
            expected = model.image_encoder(model.preprocess(inside))
        assert torch.equal(segmenter._features[0], expected.float())
        assert not torch.equal(segmenter._features[0], exact._features[0])
        found = segmenter.predict(boxes=BOXES)
        assert found.low_res.dtype == found.iou.dtype == found.logits().dtype == torch.float32
        exact._features, kept = segmenter._features, exact._features
        assert torch.equal(exact.predict(boxes=BOXES).low_res, found.low_res)  # decoded in float32
        exact._features = kept
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):  # of others
        anew = SamSegmenter(model, dtype="float32").set_image(pixels).predict(boxes=BOXES)
    assert torch.equal(anew.low_res, exact.predict(boxes=BOXES).low_res)


@pytest.mark.parametrize("adapter", [SamSegmenter, Sam2Segmenter])
@pytest.mark.parametrize("size", [(48, 80), (200, 90)], ids=str)
def test_a_heatmap_keeps_its_place_as_mask_prompt(size: tuple[int, int], adapter: Any) -> None:
    """A plane stays a plane under bilinear scaling: its values say where a cell of the prompt lies."""
    segmenter = adapter(models.sam() if adapter is SamSegmenter else models.sam2()).set_image(image(*size))
    (height, width), canvas = size, segmenter.canvas
    rows, columns = torch.arange(height)[:, None] + 0.5, torch.arange(width) + 0.5
    plane = 2.0 * columns - 3.0 * rows  # in continuous coordinates
    prompt = segmenter.mask_prompt(plane)
    side, cells = canvas.side, prompt.shape[-1]
    assert prompt.shape == (1, *canvas.low_res)
    centers = (torch.arange(cells) + 0.5) * side / cells
    x, y = centers * width / canvas.inside[1], centers[:, None] * height / canvas.inside[0]
    expected = 2.0 * x - 3.0 * y
    step = 1.5 * side / cells  # the filters end at the border
    inner = (centers > step) & (centers < canvas.inside[1] - step)
    inner = inner & ((centers > step) & (centers < canvas.inside[0] - step))[:, None]
    assert inner.sum() > 10
    assert (prompt[0] - expected)[
        inner
    ].abs().max() < 0.1  # a twentieth of a pixel: weights of the filters add up to 1, not to the exact middle
    outside = (centers > canvas.inside[1] + step) | (centers > canvas.inside[0] + step)[:, None]
    assert bool(outside.any()) == (adapter is SamSegmenter)
    assert torch.allclose(prompt[0][outside], plane.min(), atol=1e-3)


def test_padding_of_a_mask_prompt_is_outside_whatever_the_heatmap() -> None:
    segmenter = SamSegmenter(models.sam()).set_image(image(32, 64))
    priors = torch.stack([torch.full((32, 64), 4.0), torch.full((32, 64), -7.0)])
    prompts = segmenter.mask_prompt(priors.numpy())
    assert torch.allclose(prompts[0, :7], torch.tensor(4.0))
    assert torch.allclose(prompts[0, 9:], torch.tensor(-1.0))
    assert torch.allclose(prompts[1], torch.tensor(-7.0))


POINT, INSIDE = [[[5.0, 6.0]]], [[1]]
REFUSED = [
    ({}, "no prompt; give points"),
    ({"points": POINT}, "points without labels"),
    ({"labels": INSIDE}, "no prompt"),
    ({"labels": INSIDE, "boxes": BOXES[:1]}, "labels without points"),
    ({"points": POINT[0], "labels": INSIDE}, r"points has shape \[1, 2\]; .*pass points\[None\]"),
    ({"points": [[[1.0, 2, 3]]], "labels": INSIDE}, r"expected \[N, P, 2\]"),
    ({"points": POINT, "labels": [[1, 0]]}, r"need labels \[1, 1\], got \[1, 2\]"),
    ({"points": POINT, "labels": [[2]]}, "label 2; a point has 1"),
    ({"points": POINT, "labels": [[0]]}, "prompt 0 has no point inside"),
    ({"points": POINT, "labels": [[-1]]}, "prompt 0 has no point inside"),
    ({"points": [[[80.5, 6]]], "labels": INSIDE}, r"point \(80.5, 6\) is outside the image of 80 x 48"),
    ({"points": [[[-1, 6]]], "labels": INSIDE}, "outside the image"),
    ({"points": [[[np.nan, 6]]], "labels": INSIDE}, "a point holds NaN"),
    ({"points": [[[1, 2], [3, 4]], [[1, 2]]], "labels": INSIDE}, "rows of different lengths"),
    ({"boxes": BOXES[0]}, r"pass boxes\[None\]"),
    ({"boxes": [[1, 2, 3]]}, r"expected \[N, 4\]"),
    ({"boxes": [[1, 2, 30, 49]]}, "outside the image"),
    ({"boxes": [[30, 2, 1, 40]]}, "ends before it begins"),
    ({"boxes": [[1, 2, np.inf, 40]]}, "NaN or infinity"),
    ({"boxes": torch.zeros(0, 4)}, "N is 0"),
    ({"boxes": BOXES, "points": POINT, "labels": INSIDE}, "1 points, 2 boxes: every prompt needs its own"),
    ({"boxes": BOXES, "mask_input": np.zeros((1, 16, 16))}, "2 boxes, 1 mask_input"),
    ({"mask_input": np.zeros((1, 32, 32))}, r"mask_input has shape \[1, 32, 32\]; .*\[N, 16, 16\]"),
    ({"mask_input": np.zeros((16, 16))}, r"pass mask_input\[None\]"),
    ({"mask_input": np.full((1, 16, 16), np.nan)}, "mask_input holds NaN"),
]


@pytest.fixture(scope="module")
def segmenter() -> SamSegmenter:
    return SamSegmenter(models.sam()).set_image(image(48, 80))


@pytest.mark.parametrize(("prompt", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_prompts_that_cannot_be_are_refused(segmenter: Any, prompt: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmenter.predict(**prompt)


def test_what_is_no_array_of_numbers_is_refused(segmenter: SamSegmenter) -> None:
    for prompt in ({"boxes": "left"}, {"boxes": [["a", "b", "c", "d"]]}, {"boxes": [[None, 1, 2, 3]]}):
        with pytest.raises(TypeError, match="boxes is no array of numbers"):
            segmenter.predict(**prompt)


def test_a_place_that_pads_may_be_anything_and_outside_points_need_something_wanted(segmenter: Any) -> None:
    padded = segmenter.predict([[[5, 6], [np.nan, -900]]], [[1, -1]])
    other = segmenter.predict([[[5, 6], [0, 0]]], [[1, -1]])
    assert torch.equal(padded.low_res, other.low_res)
    segmenter.predict([[[5, 6]]], [[0]], boxes=[[0, 0, 80, 48]])  # the far edges are inside


def test_masks_of_another_model_or_image_are_no_prompt(segmenter: SamSegmenter) -> None:
    other = Sam2Segmenter(models.sam2()).set_image(image(48, 80)).predict(boxes=BOXES)
    with pytest.raises(ValueError, match="these masks are of SAM 2"):
        segmenter.predict(boxes=BOXES[: len(other)], mask_input=other)
    other = SamSegmenter(segmenter.model).set_image(image(80, 48)).predict(boxes=BOXES[:1])
    with pytest.raises(ValueError, match=re.escape("for an image of (80, 48); ")):
        segmenter.predict(boxes=BOXES[: len(other)], mask_input=other)


def test_an_image_comes_first() -> None:
    segmenter = SamSegmenter(models.sam())
    for ask in (lambda: segmenter.predict(boxes=BOXES), lambda: segmenter.mask_prompt(np.zeros((48, 80)))):
        with pytest.raises(RuntimeError, match="call set_image"):
            ask()


def test_images_and_heatmaps_that_cannot_be_are_refused(segmenter: SamSegmenter) -> None:
    other = SamSegmenter(segmenter.model)
    for wrong, kind, message in (
        ([[1]], TypeError, "is a list"),
        (image(4, 4) / 255, TypeError, "float64; expected uint8"),
        (image(4, 4)[..., 0], ValueError, "expected .H, W, 3."),
        (image(4, 4)[None], ValueError, "one at a time"),
        (Image.new("I;16", (4, 4)), TypeError, "more than 8 bits"),
        (image(4, 900), ValueError, "900 x 4 pixels is 64 x 0"),
    ):
        with pytest.raises(kind, match=message):
            other.set_image(wrong)
    for wrong, message in (
        (np.zeros((80, 48)), r"expected \[48, 80\] or"),
        (np.zeros((0, 48, 80)), "prior has shape"),
        (np.zeros(48), "prior has shape"),
        (np.full((48, 80), -np.inf), "clamp it"),
    ):
        with pytest.raises(ValueError, match=message):
            segmenter.mask_prompt(wrong)


def test_other_modes_of_images_are_read_as_rgb() -> None:
    segmenter = Counted(models.sam())
    gray = Image.fromarray(image(48, 80)).convert("L")
    segmenter.set_image(gray).set_image(gray.convert("RGB"))
    assert segmenter.runs == 1


def test_settings_that_cannot_be_are_refused() -> None:
    model = models.sam()
    for settings, message in (
        ({"dtype": "half"}, "dtype 'half'; expected 'auto'"),
        ({"dtype": torch.float64}, "expected 'auto' or"),
        ({"cache": -1}, "0 or more"),
        ({"chunk": 0}, "1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            SamSegmenter(model, **settings)
    with pytest.raises(ValueError, match=r"bfloat16, .* load it in float32"):
        SamSegmenter(model.bfloat16())
