"""Segmenters answer as the models do by their own ways."""

from typing import Any

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor
from torch import Tensor

from tests.multimodal.grounding.segmenters import models
from tests.multimodal.grounding.segmenters.models import image
from visionsel.data.shapes import ShapesWorld
from visionsel.multimodal.grounding.segmenters import (
    HFSamSegmenter,
    Sam2Segmenter,
    Sam3Segmenter,
    SamSegmenter,
    build_segmenter,
)

SIZES = [(48, 80), (90, 51), (64, 64)]  # wide and enlarged, tall and shrunk, as it is
POINTS = np.array([[[10.0, 20.5], [30, 31]], [[2, 3], [45.25, 40]], [[25, 25], [0, 0]]])
LABELS = np.array([[1, 0], [1, 1], [1, -1]])
BOXES = np.array([[1.0, 2, 30, 40], [3, 3, 50, 30.5], [0, 0, 51, 48]])
KINDS: dict[str, dict[str, Any]] = {
    "points": {"points": POINTS, "labels": LABELS},
    "boxes": {"boxes": BOXES},
    "points and boxes": {"points": POINTS, "labels": LABELS, "boxes": BOXES},
    "outside points in boxes": {"points": POINTS, "labels": -LABELS * LABELS + 1, "boxes": BOXES},
}
ROUNDING = 2e-6  # float32: logits reach 3
OTHER_CODE = 2e-5  # the same weights in other orders of sums


def apart(a: Tensor, b: Any) -> float:
    return (a - torch.as_tensor(b)).abs().max().item()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sam_answers_as_sam_predictor_does_one_prompt_at_a_time(size: tuple[int, int]) -> None:
    model, pixels = models.sam(), image(*size)
    segmenter, predictor = SamSegmenter(model, chunk=2).set_image(pixels), SamPredictor(model)
    predictor.set_image(pixels)
    assert torch.equal(segmenter._features[0], predictor.features)
    earlier = segmenter.predict(boxes=BOXES).low_res[:, 1]
    masks = {"mask_input": earlier}
    for kind in (*KINDS.values(), masks, KINDS["points and boxes"] | masks):
        for multimask in (True, False):
            found = segmenter.predict(**kind, multimask=multimask)
            logits, masks_ = found.logits(), found.masks()
            assert found.object_score is None
            assert torch.equal(masks_, logits > 0)
            for number in range(3):
                box, mask = kind.get("boxes"), kind.get("mask_input")
                expected = predictor.predict(
                    *(
                        None if x is None else x[number]
                        for x in (kind.get("points"), kind.get("labels"), box)
                    ),
                    None if mask is None else mask[number][None].numpy(),
                    multimask_output=multimask,
                    return_logits=True,
                )
                for ours, theirs in zip(
                    (logits[number], found.iou[number], found.low_res[number]), expected, strict=True
                ):
                    assert apart(ours, theirs) <= ROUNDING


def test_sam_of_transformers_with_the_same_weights_answers_alike() -> None:
    model = models.sam()
    one, other = SamSegmenter(model), HFSamSegmenter(models.hf_sam(model), chunk=2)
    for size in SIZES[:2]:
        pixels = image(*size)
        one.set_image(pixels)
        other.set_image(pixels)
        earlier = {"mask_input": one.predict(boxes=BOXES).low_res[:, 1]}
        for kind in (*KINDS.values(), earlier, KINDS["points"] | earlier):
            for multimask in (True, False):
                a, b = (x.predict(**kind, multimask=multimask) for x in (one, other))
                assert apart(a.low_res, b.low_res) <= OTHER_CODE
                assert apart(a.iou, b.iou) <= OTHER_CODE
                assert apart(a.logits(), b.logits()) <= OTHER_CODE


HF = {
    "sam2": (models.sam2, models.sam2_processor, Sam2Segmenter),
    "sam3": (models.sam3, models.sam3_processor, Sam3Segmenter),
    "sam_hq": (lambda: models.hf_sam(None, "SamHQ"), models.sam_hq_processor, HFSamSegmenter),
}


@pytest.mark.parametrize("name", HF)
def test_models_of_transformers_answer_as_they_do_behind_their_processors(name: str) -> None:
    make, make_processor, adapter = HF[name]
    # SAM-HQ's pixels are resized by Pillow; this size is enlarged, where both ways agree
    model, processor, pixels = make(), make_processor(), image(48, 60 if name == "sam_hq" else 80)
    segmenter = build_segmenter(model, chunk=2).set_image(pixels)
    assert type(segmenter) is adapter
    earlier = segmenter.predict(boxes=BOXES).low_res[:, 1]
    masks = {"mask_input": earlier}
    for kind in (*list(KINDS.values())[:3], masks, KINDS["points"] | masks):
        for multimask, numbers in ((True, (0, 2)), (False, (1,))):
            found = segmenter.predict(**kind, multimask=multimask)
            logits = found.logits()
            for number in numbers:
                inputs = {}
                if "points" in kind:
                    inputs = {
                        "input_points": [[POINTS[number].tolist()]],
                        "input_labels": [[LABELS[number].tolist()]],
                    }
                if "boxes" in kind:
                    inputs["input_boxes"] = [[BOXES[number].tolist()]]
                batch = processor(images=pixels, **inputs, return_tensors="pt")
                if "mask_input" in kind:
                    batch["input_masks"] = earlier[number][None, None]
                sizes = {key: batch.pop(key) for key in list(batch) if key.endswith("_sizes")}
                batch = {key: x.float() if x.is_floating_point() else x for key, x in batch.items()}
                with torch.no_grad():
                    expected = model(**batch, multimask_output=multimask)
                assert apart(found.low_res[number], expected.pred_masks[0, 0]) <= OTHER_CODE
                assert apart(found.iou[number], expected.iou_scores[0, 0]) <= OTHER_CODE
                if found.object_score is not None:
                    score = expected.object_score_logits[0, 0, 0]
                    assert apart(found.object_score[number], score) <= OTHER_CODE
                if name == "sam_hq":
                    sizes["pad_size"] = {"height": models.SIDE, "width": models.SIDE}
                whole = processor.post_process_masks(expected.pred_masks, **sizes, binarize=False)
                assert apart(logits[number], whole[0][0]) <= OTHER_CODE
    assert (found.object_score is None) == (name == "sam_hq")


@pytest.mark.parametrize("make", [models.sam, models.sam2], ids=["sam", "sam2"])
def test_how_many_prompts_are_decoded_at_a_time_changes_nothing(make: Any) -> None:
    model = make()
    boxes = BOXES[[0, 1, 2, 1, 0]]
    expected = build_segmenter(model).set_image(image(48, 80)).predict(boxes=boxes)
    for chunk in (1, 2):
        found = build_segmenter(model, chunk=chunk).set_image(image(48, 80)).predict(boxes=boxes)
        assert len(found) == 5
        assert apart(found.low_res, expected.low_res) <= ROUNDING
        assert apart(found.iou, expected.iou) <= ROUNDING


def test_the_small_sam_outlines_shapes_from_their_boxes() -> None:
    segmenter = build_segmenter("embedded", device="cpu")
    ious = []
    for sample in ShapesWorld("balanced", seed=11, size=6):
        segmenter.set_image(sample.image)
        found = segmenter.predict(boxes=[shape.box for shape in sample.objects], multimask=False).best()
        for mask, shape in zip(found.numpy(), sample.objects, strict=True):
            ious.append((mask & shape.mask).sum() / (mask | shape.mask).sum())
    assert len(ious) >= 6
    assert min(ious) > 0.8


@pytest.mark.gpu
@pytest.mark.parametrize("make", [models.sam, models.sam2, models.sam3], ids=["sam", "sam2", "sam3"])
def test_on_a_gpu_the_encoder_runs_in_bfloat16_and_answers_stay_close(make: Any) -> None:
    pixels = image(48, 80)
    slow = build_segmenter(make()).set_image(pixels).predict(**KINDS["points and boxes"])
    found = {}
    for dtype in ("float32", "auto", "bfloat16"):
        segmenter = build_segmenter(make(), "cuda", dtype).set_image(pixels)
        found[dtype] = segmenter.predict(**KINDS["points and boxes"])
        assert found[dtype].low_res.device.type == "cuda"
        assert found[dtype].low_res.dtype == found[dtype].iou.dtype == torch.float32
        assert all(feature.dtype == torch.float32 for feature in segmenter._features)
        assert found[dtype].best().shape == (3, 48, 80)
        earlier = found[dtype].only_best().low_res[:, 0].cpu()
        assert segmenter.predict(mask_input=earlier).low_res.isfinite().all()
    assert torch.equal(found["auto"].low_res, found["bfloat16"].low_res)
    exact = apart(found["float32"].low_res.cpu(), slow.low_res)
    assert exact <= 1e-2  # convolutions may run in TF32
    assert exact < apart(found["auto"].low_res.cpu(), slow.low_res) <= 0.5  # eight bits
