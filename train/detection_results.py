"""What a detector found: as COCO's results, as average precisions and as pictures."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from visionsel.data.shapes.masks import encode_rle
from visionsel.files import whole_file
from visionsel.processes import Processes
from visionsel.viz import OKABE_ITO, draw_boxes, enlarge, overlay_masks

__all__ = [
    "average_precision",
    "coco_rows",
    "draw_detections",
    "gather",
    "precision_metric",
    "sheet",
    "write_results",
]

Detection = dict[str, Tensor]

_SCORES = {
    "map": "ap",
    "map_50": "ap50",
    "map_75": "ap75",
    "map_small": "ap_small",
    "map_medium": "ap_medium",
    "map_large": "ap_large",
}


def precision_metric(masks: bool) -> MeanAveragePrecision:
    """torchmetrics' mean average precision of boxes and perhaps masks, computed by faster-coco-eval."""
    metric = MeanAveragePrecision(
        iou_type=("bbox", "segm") if masks else "bbox",
        backend="faster_coco_eval",
        # COCO's, which are torchmetrics' defaults but for float32, where 0.6 is above 0.6
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        sync_on_compute=False,  # torchmetrics needs as many images on each device; `gather` does not
    )
    metric.warn_on_many_detections = False  # of the detections of an image the best 100 count, as in COCO
    return metric


def gather(own: list[Any]) -> list[Any]:
    """The items of all devices, where there are several."""
    if not torch.distributed.is_initialized():
        return own
    parts = Processes(count=torch.distributed.get_world_size()).gather(own)
    return [item for part in parts for item in part]


def average_precision(metric: MeanAveragePrecision) -> dict[str, Tensor]:
    """COCO's scores: `box_ap`, `box_ap50`, ..., and `mask_ap`, ...; sizes without objects are left out.

    `small` is below 32 x 32 pixels, `large` from 96 x 96 on.

    Args:
        metric: with what this device measured, on the CPU; it then has what all did.
    """
    for name, items in metric.metric_state.items():
        setattr(metric, name, gather(cast(list[Any], items)))
    values = metric.compute()
    kinds = {"bbox_": "box", "segm_": "mask"} if len(metric.iou_type) > 1 else {"": "box"}
    scores = {
        f"{kind}_{name}": values[f"{prefix}{theirs}"].float()
        for prefix, kind in kinds.items()
        for theirs, name in _SCORES.items()
    }
    sizes = ("_small", "_medium", "_large")
    return {name: value for name, value in scores.items() if value >= 0 or not name.endswith(sizes)}


def coco_rows(found: Detection, image_id: int, categories: Sequence[int]) -> list[dict[str, Any]]:
    """Detections of an image in COCO's format for results.

    Args:
        found: `boxes` (x0, y0, x1, y1), `scores`, `labels` from 1, and perhaps `masks`, bool `[N, H, W]`.
        image_id: of the image.
        categories: ids by class.
    """
    corners = found["boxes"].float()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    rows = [
        {"image_id": image_id, "category_id": categories[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(boxes, found["labels"].tolist(), found["scores"].tolist(), strict=True)
    ]
    if "masks" in found:
        for row, mask in zip(rows, found["masks"].numpy(), strict=True):
            row["segmentation"] = encode_rle(mask)
    return rows


def write_results(rows: list[dict[str, Any]], path: Path) -> None:
    """Write COCO's results, in the order of the images; pycocotools' `loadRes` reads them."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(sorted(rows, key=lambda row: row["image_id"])))


def draw_detections(
    image: Tensor, found: Detection, names: Sequence[str], threshold: float, side: int = 256
) -> Image.Image:
    """The image with its detections.

    Args:
        image: uint8 `[3, H, W]`.
        found: see `coco_rows`.
        names: of the classes.
        threshold: scores below it are not drawn.
        side: small images are enlarged to about as many pixels.
    """
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    factor = max(1, side // max(picture.size))
    boxes = found["boxes"].float() * factor
    sides = boxes.round()[:, 2:] - boxes.round()[:, :2]
    shown = ((found["scores"] >= threshold) & (sides >= 1).all(1)).nonzero()[:, 0].tolist()
    colors = list(OKABE_ITO.values())
    labels = found["labels"].tolist()
    chosen = [colors[(labels[i] - 1) % len(colors)] for i in shown]
    if "masks" in found:
        masks: list[np.ndarray] = [found["masks"][i].numpy() for i in shown]
        picture = overlay_masks(picture, masks, chosen)
    texts = [f"{names[labels[i] - 1]} {found['scores'][i]:.2f}" for i in shown]
    return draw_boxes(enlarge(picture, factor), boxes[shown].tolist(), chosen, texts)


def sheet(pictures: Sequence[Image.Image], gap: int = 4) -> Image.Image:
    """Pictures side by side, in about as many rows as columns."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = (max(p.size[axis] for p in pictures) + gap for axis in (0, 1))
    whole = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for place, picture in enumerate(pictures):
        whole.paste(picture, (place % columns * width, place // columns * height))
    return whole
