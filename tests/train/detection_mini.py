"""A miniature data set in COCO's real layout: scenes of the shapes world, ids of categories with gaps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.train.conftest import TRAINER, merged
from visionsel.data.shapes import SHAPES, ShapesWorld
from visionsel.data.shapes.masks import encode_rle, trace_polygons

CATEGORIES = {3 * index + 1: name for index, name in enumerate(SHAPES)}

BACKBONE = {
    "backbone": "nat_mini",
    "backbone_args": {
        "embed_dim": 16,
        "depths": [1, 1, 1],
        "num_heads": [1, 1, 2],
        "kernel_size": 3,
        "drop_path_rate": 0.2,
    },
}
HEADS = {"pyramid_channels": 16, "box_channels": 32, "mask_channels": 16, "mask_layers": 1}
PROPOSALS = {
    "rpn_pre_nms_top_n_train": 50,
    "rpn_pre_nms_top_n_test": 50,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 20,
    "rpn_batch_size_per_image": 32,
    "box_batch_size_per_image": 16,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 10,
}


def make_coco(
    root: Path, train: int = 6, val: int = 3, edit: Callable[[str, Any], None] | None = None
) -> Path:
    """Write images of 64 x 48 pixels and instance files; `edit(split, content)` may change these first."""
    for seed, (split, count) in enumerate({"train": train, "val": val}.items(), 7):
        folder = root / f"{split}2017"
        folder.mkdir(parents=True)
        content: dict[str, Any] = {"images": [], "annotations": []}
        content["categories"] = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
        for index, sample in enumerate(ShapesWorld("balanced", seed, count)):
            number, name = 100 + index, f"{100 + index:012d}.jpg"
            sample.image.crop((0, 0, 64, 48)).save(folder / name, quality=95)
            content["images"].append({"id": number, "file_name": name, "height": 48, "width": 64})
            for thing in sample.objects:
                mask = thing.mask[:48]
                if mask.sum() < 20:
                    continue
                rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
                x0, y0, x1, y1 = (int(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
                content["annotations"].append(
                    {
                        "id": 10 * number + thing.index,
                        "image_id": number,
                        "category_id": 3 * SHAPES.index(thing.shape) + 1,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": int(mask.sum()),
                        "iscrowd": 0,
                        "segmentation": encode_rle(mask) if thing.index else trace_polygons(mask),
                    }
                )
        if edit is not None:
            edit(split, content)
        path = root / "annotations" / f"instances_{split}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return root


def make_config(root: Path, output: Path, **parts: Any) -> dict[str, Any]:
    """A configuration of a tiny Mask R-CNN over NAT; keyword arguments are merged into its parts."""
    config: dict[str, Any] = {
        "output": str(output),
        "trainer": TRAINER,
        "model": {
            **BACKBONE,
            **HEADS,
            "anchor_scales": [3],
            "detector_args": PROPOSALS,
            "lr": 1e-3,
            "warmup_steps": 1,
            "pictures": 2,
        },
        "data": {"root": str(root), "size": 48, "max_size": 64, "batch_size": 2},
    }
    return merged(config, parts)
