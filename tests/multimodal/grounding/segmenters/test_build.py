"""Segmenters from names and models."""

from pathlib import Path
from typing import Any

import pytest
import segment_anything
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

from tests.multimodal.grounding.segmenters import models
from tests.multimodal.grounding.segmenters.models import image
from visionsel.multimodal.grounding.segmenters import (
    HFSamSegmenter,
    Sam2Segmenter,
    Sam3Segmenter,
    SamSegmenter,
    build_segmenter,
)

BOXES = [[1.0, 2, 30, 40]]


@pytest.mark.parametrize(
    ("make", "adapter"),
    [
        (models.sam2, Sam2Segmenter),
        (models.sam3, Sam3Segmenter),
        (lambda: models.hf_sam(None), HFSamSegmenter),
    ],
    ids=["sam2", "sam3", "sam"],
)
def test_a_folder_of_transformers_is_read_by_its_type_and_in_float32(
    tmp_path: Path, make: Any, adapter: Any
) -> None:
    model = make()
    halved = {name: value.bfloat16() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(halved))
    model.load_state_dict(halved)
    assert all(value.dtype == torch.bfloat16 for value in load_file(tmp_path / "model.safetensors").values())
    segmenter = build_segmenter(f"hf:{tmp_path}", "cpu", cache=1, chunk=3)
    assert type(segmenter) is adapter
    assert (segmenter.cache, segmenter.chunk) == (1, 3)
    assert not segmenter.model.training
    found = segmenter.set_image(image(48, 80)).predict(boxes=BOXES)
    expected = build_segmenter(model).set_image(image(48, 80)).predict(boxes=BOXES)
    assert torch.equal(found.low_res, expected.low_res)


def test_a_sam2_saved_with_its_video_parts_serves_for_images(tmp_path: Path) -> None:
    """As `facebook/sam2.1-hiera-*` are."""
    model = models.sam2()
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    assert '"model_type": "sam2",' in text
    config.write_text(text.replace('"model_type": "sam2",', '"model_type": "sam2_video",'))
    segmenter = build_segmenter(f"hf:{tmp_path}", "cpu")
    assert type(segmenter) is Sam2Segmenter
    found = segmenter.set_image(image(48, 80)).predict(boxes=BOXES)
    expected = build_segmenter(model).set_image(image(48, 80)).predict(boxes=BOXES)
    loaded = segmenter.model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    # where weights lie in memory moves the last bit in old releases
    torch.testing.assert_close(found.low_res, expected.low_res, rtol=0, atol=1e-6)


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    model = models.sam2()
    state = {name: value for name, value in model.state_dict().items() if "iou_token" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lacks 1 weights of a Sam2Model, such as mask_decoder"):
        build_segmenter(f"hf:{tmp_path}")


def test_a_released_checkpoint_is_read_by_its_path(tmp_path: Path, monkeypatch: Any) -> None:
    model = models.sam()
    for name, make in (("vit_b", models.sam), ("vit_l", lambda: nn.Linear(2, 2))):
        monkeypatch.setitem(segment_anything.sam_model_registry, name, make)  # at a size for tests
    path = tmp_path / "sam_vit_b.pth"
    with torch.no_grad():
        model.image_encoder.pos_embed.add_(1)  # not what the constructor makes
    torch.save(model.state_dict(), path)
    segmenter = build_segmenter("sam:vit_b", "cpu", checkpoint=path)
    assert type(segmenter) is SamSegmenter
    found = segmenter.set_image(image(48, 80)).predict(boxes=BOXES)
    expected = SamSegmenter(model).set_image(image(48, 80)).predict(boxes=BOXES)
    assert torch.equal(found.low_res, expected.low_res)
    with pytest.raises(ValueError, match=r"sam_vit_b.pth is not the checkpoint of vit_l: "):
        build_segmenter("sam:vit_l", checkpoint=path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a file of weights, or is cut off"):
        build_segmenter("sam:vit_b", checkpoint=path)


def test_names_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for spec, more, kind, message in (
        ("sam:vit_b", {}, ValueError, r"needs checkpoint=, .*sam_vit_b_\*.pth"),
        ("sam:vit_b", {"checkpoint": tmp_path / "no.pth"}, FileNotFoundError, "no checkpoint at"),
        ("sam:vit_x", {}, ValueError, "no SAM 'vit_x'; there are vit_b"),
        ("sam", {}, ValueError, "no segmenter 'sam'"),
        ("hf:", {}, ValueError, "no segmenter 'hf:'"),
        ("tiny", {}, ValueError, "no segmenter 'tiny'; expected \"embedded\""),
        ("embedded", {"checkpoint": "a.pth"}, ValueError, "has its own weights"),
        (3, {}, TypeError, "a int is no segmenter"),
        (nn.Linear(2, 2), {}, NotImplementedError, "Linear is not used as a segmenter"),
    ):
        with pytest.raises(kind, match=message):
            build_segmenter(spec, **more)
    with pytest.raises(OSError, match=r"nowhere"):
        build_segmenter(f"hf:{tmp_path / 'nowhere'}")


def test_other_models_of_transformers_are_refused_by_name(tmp_path: Path) -> None:
    class Sam3Model(nn.Module):
        """By name as the one that finds noun phrases."""

    with pytest.raises(NotImplementedError, match=r"Sam3Model is not .*as Sam3TrackerModel"):
        build_segmenter(Sam3Model())
    tf.CLIPVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(
        NotImplementedError, match=f"'clip_vision_model', for which transformers {tf.__version__}"
    ):
        build_segmenter(f"hf:{tmp_path}")


def test_the_small_sam_is_built_by_its_name_and_a_model_stays_where_it_is() -> None:
    segmenter = build_segmenter("embedded", "cpu")
    assert type(segmenter) is SamSegmenter
    model = models.sam()
    assert build_segmenter(model).model is model
    assert build_segmenter(model).device == torch.device("cpu")
    moved = build_segmenter(models.sam(), device="meta")
    assert moved.device.type == "meta"
