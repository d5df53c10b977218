"""The small SAM: SAM's own answers in batches, files, and the measurement."""

import json
import sys

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor

from visionsel.boxes import mask_boxes
from visionsel.data.shapes import ShapesWorld
from visionsel.embedded.segmentation_quality import (
    collect_targets,
    find_centers,
    measure_segmenter,
    pick_best,
    pick_errors,
    pick_pixels,
    prompt_ious,
)
from visionsel.embedded.segmenter import (
    SamConfig,
    build_sam,
    decode_prompts,
    load_segmenter,
    save_segmenter,
)

TINY = {"encoder_dim": 32, "encoder_depth": 2, "global_layers": [1], "embed_dim": 32, "decoder_mlp_dim": 32}
WORLD = ShapesWorld("balanced", seed=5, size=5)


@pytest.fixture(autouse=True)
def _one_thread(_one_seed_and_the_workers_share_of_threads: None) -> None:
    torch.set_num_threads(1)  # the tensors here are too small for more


@pytest.fixture
def sam():
    """Untrained, in eval mode, with biases that are not zero."""
    sam = build_sam(TINY).eval()
    with torch.no_grad():
        for parameter in sam.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return sam


@pytest.fixture
def targets():
    return collect_targets((s.pixels, np.stack([o.mask for o in s.objects])) for s in WORLD)


def test_the_decoder_of_many_images_answers_as_sam_predictor_does(sam, targets) -> None:
    predictor, draws = SamPredictor(sam), torch.rand(len(targets.owners))
    points, boxes = pick_pixels(targets.masks, draws)[:, None], mask_boxes(targets.masks)
    inside = torch.ones(len(points), 1)
    others, outside = pick_pixels(~targets.masks, draws)[:, None], torch.zeros(len(points), 1)
    pairs = torch.cat([points, others], 1), torch.cat([inside, outside], 1)
    with torch.no_grad():
        embeddings = sam.image_encoder(sam.preprocess(targets.images.float()))
        by_point = decode_prompts(sam, embeddings, targets.owners, points=(points, inside))
        shown = pick_best(*by_point)
        by_box = decode_prompts(sam, embeddings, targets.owners, boxes=boxes)
        by_all = decode_prompts(sam, embeddings, targets.owners, points=pairs, boxes=boxes, masks=shown)
        by_mask = decode_prompts(sam, embeddings, targets.owners, points=pairs, masks=shown)
    for index in range(0, len(points), 4):
        predictor.set_image(WORLD[int(targets.owners[index])].pixels)
        point = {"point_coords": points[index].numpy(), "point_labels": inside[index].numpy()}
        pair = {"point_coords": pairs[0][index].numpy(), "point_labels": pairs[1][index].numpy()}
        box, mask = {"box": boxes[index].numpy()}, {"mask_input": shown[index].numpy()}
        for (logits, scores), prompt in (
            (by_point, point),
            (by_box, box),
            (by_all, pair | box | mask),
            (by_mask, pair | mask),
        ):
            for multiple, part in ((False, slice(0, 1)), (True, slice(1, 4))):
                expected, quality, _ = predictor.predict(
                    **prompt, multimask_output=multiple, return_logits=True
                )
                np.testing.assert_allclose(logits[index, part], expected, rtol=1e-4, atol=1e-4)
                np.testing.assert_allclose(scores[index, part], quality, rtol=1e-4, atol=1e-4)


def test_the_measured_ious_are_those_of_sam_predictor(sam, targets) -> None:
    draws = torch.rand(len(targets.owners), 2)
    with torch.no_grad():
        ious = prompt_ious(sam, targets, draws)
    points = pick_pixels(targets.masks, draws[:, 0]).numpy()
    predictor, label = SamPredictor(sam), np.ones(1)

    def iou(said: np.ndarray, true: np.ndarray) -> float:
        return (said & true).sum() / (said | true).sum()

    for index, owner in enumerate(targets.owners.tolist()):
        mask = targets.masks[index].numpy()
        predictor.set_image(WORLD[owner].pixels)
        masks, scores, logits = predictor.predict(points[index][None], label)
        best = scores.argmax()
        assert ious["point"][index].item() == pytest.approx(iou(masks[best], mask), abs=2e-3)
        single, _, _ = predictor.predict(points[index][None], label, multimask_output=False)
        assert ious["single"][index].item() == pytest.approx(iou(single[0], mask), abs=2e-3)
        box, _, _ = predictor.predict(box=mask_boxes(targets.masks)[index].numpy(), multimask_output=False)
        assert ious["box"][index].item() == pytest.approx(iou(box[0], mask), abs=2e-3)
        said = torch.from_numpy(masks[best])[None]
        second, kind = pick_errors(said, targets.masks[index : index + 1], draws[index : index + 1, 1])
        refined, _, _ = predictor.predict(
            np.concatenate([points[index][None], second]),
            np.concatenate([label, kind]),
            mask_input=logits[best][None],
            multimask_output=False,
        )
        assert ious["refined"][index].item() == pytest.approx(iou(refined[0], mask), abs=2e-3)


def test_the_measurement_does_not_depend_on_the_batch_size_and_has_solid_and_faint_apart(sam) -> None:
    measured = measure_segmenter(sam, WORLD, seed=3, batch_size=2)
    assert measured == pytest.approx(measure_segmenter(sam, WORLD, seed=3), abs=1e-3)
    count = sum(len(sample.objects) for sample in WORLD)
    assert measured["objects"] == count
    faint = sum(o.faint for sample in WORLD for o in sample.objects)
    assert 0 < faint < count
    for name in ("point", "single", "center", "box", "refined"):
        parts = faint * measured[f"{name}_iou_faint"] + (count - faint) * measured[f"{name}_iou_solid"]
        assert measured[f"{name}_iou"] == pytest.approx(parts / count, abs=1e-5)


def test_a_model_that_knows_the_masks_measures_one(sam, targets, monkeypatch) -> None:
    truth = torch.where(targets.masks, 9.0, -9.0)[:, None].expand(-1, 4, -1, -1)
    monkeypatch.setattr(
        "visionsel.embedded.segmentation_quality.decode_prompts",
        lambda sam, embeddings, owners, **prompts: (truth, torch.rand(len(owners), 4)),
    )
    measured = measure_segmenter(sam, WORLD)
    assert {value for name, value in measured.items() if name != "objects"} == {1.0}


def test_samples_that_cannot_be_measured_are_refused(sam) -> None:
    with pytest.raises(ValueError, match=r"takes 64 x 64 pixels, got a sample of \(32, 32\)"):
        measure_segmenter(sam, ShapesWorld("balanced", size=1, image_size=32))
    with pytest.raises(ValueError, match="no samples"):
        measure_segmenter(sam, [])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        measure_segmenter(sam, WORLD, batch_size=0)


def test_boxes_are_those_of_the_objects(targets) -> None:
    expected = [o.box for sample in WORLD for o in sample.objects]
    assert mask_boxes(targets.masks).tolist() == [list(map(float, box)) for box in expected]


def test_pixels_lie_in_the_mask_and_every_one_can_be_drawn() -> None:
    mask = torch.zeros(1, 5, 7, dtype=torch.bool)
    mask[0, 1, 2] = mask[0, 4, 6] = mask[0, 3, 0] = True
    drawn = pick_pixels(mask.expand(30, -1, -1), torch.arange(30) / 30).tolist()
    assert drawn == [[2, 1]] * 10 + [[0, 3]] * 10 + [[6, 4]] * 10


def test_the_centre_is_the_deepest_pixel() -> None:
    masks = torch.zeros(2, 16, 16, dtype=torch.bool)
    masks[0, 2:9, 4:11] = True  # a square of 7 with a tail
    masks[0, 5, 11:16] = True
    masks[1, 0:3, 0:9] = True  # a bar at the border: of its ridge the middle
    assert find_centers(masks).tolist() == [[7, 5], [4, 1]]


def test_an_error_is_pointed_at_with_its_label_and_a_perfect_mask_inside() -> None:
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[:, 1, 1:3] = True
    said = masks.clone()
    said[0, 1, 2] = False  # missed
    said[1, 3, 0] = True  # too much
    pixels, labels = pick_errors(said, masks, torch.zeros(3))
    assert pixels.tolist() == [[2, 1], [0, 3], [1, 1]]
    assert labels.tolist() == [1, 0, 1]


def test_a_saved_segmenter_is_loaded_in_eval_mode_with_half_precision_weights(sam, tmp_path) -> None:
    folder = save_segmenter(sam, TINY, tmp_path / "segmenter")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = load_segmenter(folder)
    assert not loaded.training
    for key, value in sam.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.half().float()), key
    assert SamConfig(**json.loads((folder / "config.json").read_text())) == SamConfig(**TINY)


def test_a_configuration_of_another_model_is_refused(sam, tmp_path) -> None:
    with pytest.raises(ValueError, match="not that of this SAM"):
        save_segmenter(sam, {**TINY, "encoder_depth": 3}, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    folder = save_segmenter(sam, TINY, tmp_path / "segmenter")
    (folder / "config.json").write_text(json.dumps({**TINY, "encoder_depth": 3}))
    with pytest.raises(ValueError, match=r"config.json does not fit .*model.safetensors"):
        load_segmenter(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not the configuration"),
        ("[]", "not an object"),
        ('{"dim": 3}', "unknown size 'dim'"),
    ],
)
def test_a_broken_configuration_is_named(sam, tmp_path, text, message) -> None:
    folder = save_segmenter(sam, TINY, tmp_path / "segmenter")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_segmenter(folder)


def test_missing_and_cut_off_files_are_named(sam, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        load_segmenter(tmp_path)
    weights = save_segmenter(sam, TINY, tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut off"):
        load_segmenter(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights at .*model.safetensors"):
        load_segmenter(tmp_path)


def test_a_missing_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(ImportError, match=r'pip install "visionsel\[multimodal\]"'):
        build_sam()


@pytest.mark.parametrize(
    ("size", "value", "message"),
    [
        ("image_size", 62, "image_size must be a multiple of 4"),
        ("encoder_heads", 5, "encoder_dim must be a multiple of 5"),
        ("embed_dim", 60, "embed_dim must be a multiple of 8"),
        ("decoder_heads", 3, "embed_dim must be a multiple of 6"),
        ("global_layers", [4], "global_layers are from 0 to 3, got 4"),
        ("encoder_depth", 0, "encoder_depth must be a positive number, got 0"),
        ("window_size", "8", "window_size must be a positive number, got '8'"),
    ],
)
def test_sizes_that_do_not_fit_are_named(size, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_sam({size: value})


def test_the_default_model_has_the_stated_size() -> None:
    assert 0.55e6 < sum(parameter.numel() for parameter in build_sam().parameters()) < 0.65e6
