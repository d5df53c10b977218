"""RefCOCO, Panoptic Narrative Grounding and VizWiz grounding in the layout of their releases."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visionsel.data.coco import annotation_mask, read_instances
from visionsel.data.narratives import read_narratives
from visionsel.data.refcoco import read_references, read_refs
from visionsel.data.shapes import ShapesWorld, write_shapes
from visionsel.data.shapes.masks import encode_rle
from visionsel.data.vizwiz import read_answer_groundings

SQUARE = [[1, 1, 4, 1, 4, 3, 1, 3]]


def _mask() -> np.ndarray:
    mask = np.zeros((5, 6), dtype=bool)
    mask[1:3, 1:4] = True
    return mask


def test_segmentations_are_read_in_every_form_of_coco() -> None:
    mask = _mask()
    plain = {"size": [5, 6], "counts": [6, 2, 3, 2, 3, 2, 12]}
    for form in (
        SQUARE,
        encode_rle(mask),
        plain,
        {**encode_rle(mask), "counts": encode_rle(mask)["counts"].encode()},
    ):
        np.testing.assert_array_equal(annotation_mask(form, 5, 6), mask)
    assert not annotation_mask([], 5, 6).any()
    with pytest.raises(ValueError, match="three corners"):
        annotation_mask([[1, 2, 3, 4]], 5, 6)
    with pytest.raises(ValueError, match="are of"):
        annotation_mask(plain, 6, 5)


def _refcoco(folder: Path, rows: list[dict[str, Any]] | None = None, name: str = "refs(unc).p") -> Path:
    folder.mkdir(exist_ok=True)
    content = {
        "images": [{"id": 7, "file_name": "COCO_train2014_7.jpg", "height": 5, "width": 6}],
        "annotations": [
            {"id": 70, "image_id": 7, "category_id": 1, "bbox": [1, 1, 3, 2], "segmentation": SQUARE},
            {
                "id": 71,
                "image_id": 7,
                "category_id": 1,
                "bbox": [0, 4, 6, 1],
                "segmentation": [[0, 4, 6, 4, 6, 5, 0, 5]],
            },
        ],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    rows = rows or [
        {
            "ref_id": 3,
            "ann_id": 70,
            "image_id": 7,
            "split": "val",
            "category_id": 1,
            "sent_ids": [30, 31],
            "sentences": [{"sent_id": 30, "sent": "left dog"}, {"sent_id": 31, "sent": "the dog"}],
        }
    ]
    path = folder / name
    if name.endswith(".p"):
        path.write_bytes(pickle.dumps(rows, protocol=0))
    else:
        path.write_text(json.dumps(rows))
    return folder


def test_references_of_refcoco_come_one_a_sentence_or_one_a_ref(tmp_path: Path) -> None:
    folder = _refcoco(tmp_path)
    every = read_references(folder, "val")
    assert [one.text for one in every] == ["left dog", "the dog"]
    assert [one.id for one in every] == [30, 31]
    assert [one.text for one in read_references(folder, "val", sentences="first")] == ["left dog"]
    np.testing.assert_array_equal(every[0].mask(), _mask())
    assert every[0].box() == (1, 1, 4, 3)
    assert every[0].file_name == "COCO_train2014_7.jpg"


def test_grefcoco_means_several_or_nothing(tmp_path: Path) -> None:
    shared = {"image_id": 7, "split": "val"}
    rows = [
        {**shared, "ref_id": 1, "ann_id": [70, 71], "sentences": [{"sent_id": 1, "sent": "both dogs"}]},
        {**shared, "ref_id": 2, "ann_id": [-1], "sentences": [{"sent_id": 2, "sent": "the cat"}]},
    ]
    both, nothing = read_references(_refcoco(tmp_path, rows, "grefs(unc).json"), "val")
    assert both.mask().sum() == 12
    assert both.box() is None
    assert not nothing.mask().any()


def test_a_pickle_that_could_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([Path("x")]))
    with pytest.raises(ValueError, match="could run code"):
        read_refs(path)
    path.write_bytes(b"\x80\x04 torn")
    with pytest.raises(ValueError, match="no pickle of plain data"):
        read_refs(path)
    path.write_bytes(pickle.dumps([{"ref_id": 1}]))
    with pytest.raises(ValueError, match="no file of refs"):
        read_refs(path)


def test_missing_or_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"instances\.json"):
        read_references(tmp_path, "val")
    folder = _refcoco(tmp_path)
    with pytest.raises(ValueError, match="no split 'testA'; it has val"):
        read_references(folder, "testA")
    with pytest.raises(ValueError, match='"all" or "first"'):
        read_references(folder, "val", sentences="one")
    _refcoco(tmp_path, name="refs(google).p")
    with pytest.raises(ValueError, match="several files of refs"):
        read_references(folder, "val")
    assert len(read_references(folder, "val", refs="refs(unc).p")) == 2
    lost = {"ref_id": 1, "ann_id": 5, "image_id": 7, "split": "val", "sentences": []}
    _refcoco(tmp_path, [lost], "refs(bad).p")
    with pytest.raises(ValueError, match="annotation 5, which is not listed"):
        read_references(folder, "val", refs="refs(bad).p")
    (tmp_path / "instances.json").write_text("{}")
    with pytest.raises(ValueError, match="no instance file"):
        read_instances(tmp_path / "instances.json")


def test_references_of_the_shapes_world_mean_its_masks(tmp_path: Path) -> None:
    root = write_shapes(tmp_path / "world", size=4, test_size=2)
    references = read_references(root / "refcoco", "balanced")
    world = ShapesWorld("balanced", seed=2 << 30, size=2)
    expressions = [(sample, one) for sample in world for one in sample.expressions]
    assert sorted(one.text for one in references) == sorted(one.text for _, one in expressions)
    masks = {(one.text, one.mask().tobytes()) for one in references}
    assert masks == {(one.text, sample.objects[one.object].mask.tobytes()) for sample, one in expressions}


def _narratives(
    folder: Path, caption: str = "A dog on the grass .", panoptic: str = "panoptic_val2017"
) -> Path:
    ids = np.zeros((5, 6), dtype=np.int64)
    ids[1:3, 1:4], ids[4] = 300, 70000
    pixels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    (folder / panoptic).mkdir(parents=True)
    Image.fromarray(pixels).save(folder / panoptic / "7.png")
    listed = {
        "images": [{"id": 7, "file_name": "7.jpg", "height": 5, "width": 6}],
        "annotations": [
            {
                "image_id": 7,
                "file_name": "7.png",
                "segments_info": [{"id": 300, "category_id": 1}, {"id": 70000, "category_id": 2}],
            }
        ],
        "categories": [{"id": 1, "name": "dog", "isthing": 1}, {"id": 2, "name": "grass", "isthing": 0}],
    }
    (folder / "panoptic_val2017.json").write_text(json.dumps(listed))
    parts = [
        {"utterance": "A dog", "segment_ids": ["300"], "noun": True, "plural": False},
        {"utterance": "on", "segment_ids": [], "noun": False, "plural": False},
        {"utterance": "the grass", "segment_ids": ["70000"], "noun": True, "plural": True},
    ]
    row = {"image_id": "7", "annotator_id": 0, "caption": caption, "segments": parts}
    (folder / "png_coco_val2017.json").write_text(json.dumps([row]))
    return folder


@pytest.mark.parametrize("panoptic", ["panoptic_val2017", "panoptic_segmentation/val2017"])
def test_phrases_of_narratives_mean_segments(tmp_path: Path, panoptic: str) -> None:
    (one,) = read_narratives(_narratives(tmp_path, panoptic=panoptic))
    dog, grass = one.phrases
    assert [one.caption[slice(*phrase.span)] for phrase in one.phrases] == ["A dog", "the grass"]
    assert (dog.thing, dog.plural, grass.thing, grass.plural) == (True, False, False, True)
    masks = one.masks()
    np.testing.assert_array_equal(masks[0], _mask())
    assert masks[1].sum() == 6


def test_a_narrative_whose_parts_differ_from_its_text_is_its_parts(tmp_path: Path) -> None:
    (one,) = read_narratives(_narratives(tmp_path, "a Dog on the grass"))
    assert one.caption == "A dog on the grass"
    assert one.caption[slice(*one.phrases[1].span)] == "the grass"


def test_answers_of_vizwiz_have_masks(tmp_path: Path) -> None:
    row = {
        "question": "What is this?",
        "answers": ["dog", "a dog"],
        "height": 5,
        "width": 6,
        "answer_grounding": [{"x": x, "y": y} for x, y in ((1, 1), (4, 1), (4, 3), (1, 3))],
    }
    (tmp_path / "val_grounding.json").write_text(json.dumps({"VizWiz_val_1.jpg": row}))
    (one,) = read_answer_groundings(tmp_path)
    np.testing.assert_array_equal(one.mask(), _mask())
    assert one.answers == ("dog", "a dog")
    folder = tmp_path / "binary_masks_png" / "val"
    folder.mkdir(parents=True)
    Image.fromarray(~_mask()).convert("L").save(folder / "VizWiz_val_1.png")
    (one,) = read_answer_groundings(tmp_path)
    np.testing.assert_array_equal(one.mask(), ~_mask())
    (tmp_path / "val_grounding.json").write_text(json.dumps({"x.jpg": {"question": "?"}}))
    with pytest.raises(ValueError, match=r"x\.jpg is no grounded answer"):
        read_answer_groundings(tmp_path)
