"""How well a SAM segments scenes of the shapes world from points, boxes and its own masks.

`P` prompts, one for each object of `B` images of `H = W` pixels.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from visionsel.boxes import mask_boxes
from visionsel.data.shapes import Sample
from visionsel.embedded.segmenter import decode_prompts

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

__all__ = [
    "Targets",
    "collect_targets",
    "find_centers",
    "intersection_over_union",
    "measure_segmenter",
    "pick_best",
    "pick_errors",
    "pick_pixels",
    "prompt_ious",
    "upscale",
]


class Targets(NamedTuple):
    """Images and the objects in them.

    Attributes:
        images: uint8 `[B, 3, H, W]`.
        masks: bool `[P, H, W]`.
        owners: the image of each object, int64 `[P]`.
    """

    images: Tensor
    masks: Tensor
    owners: Tensor


def collect_targets(scenes: Iterable[tuple[np.ndarray, np.ndarray]]) -> Targets:
    """Put scenes together, each an image, uint8 `[H, W, 3]`, and masks, bool `[objects, H, W]`."""
    images, masks = zip(*scenes, strict=True)
    counts = torch.tensor([len(each) for each in masks])
    return Targets(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
        torch.from_numpy(np.concatenate(masks)),
        torch.arange(len(counts)).repeat_interleave(counts),
    )


def pick_pixels(masks: Tensor, draws: Tensor) -> Tensor:
    """One pixel of each mask, all alike likely.

    Args:
        masks: bool `[P, H, W]`, none of them empty.
        draws: uniform in [0, 1), `[P]`.

    Returns:
        (x, y) `[P, 2]`, float32, counted from 0.
    """
    ranks = masks.flatten(1).cumsum(1)
    wanted = (draws.to(masks.device) * ranks[:, -1]).long().clamp(max=ranks[:, -1] - 1)
    return _coordinates((ranks > wanted[:, None]).to(torch.uint8).argmax(1), masks.shape[2])


def find_centers(masks: Tensor) -> Tensor:
    """The pixel deepest inside each mask, the one nearest to the mask's centre where several are.

    Args:
        masks: bool `[P, H, W]`, none of them empty.

    Returns:
        (x, y) `[P, 2]`, float32.
    """
    left, depth = masks.float()[:, None], torch.zeros(masks.shape, device=masks.device)
    while left.any():
        depth += left[:, 0]
        # beyond the border is outside too
        left = -max_pool2d(nn.functional.pad(-left, (1, 1, 1, 1)), 3, stride=1)
    height, width = masks.shape[1:]
    y = torch.arange(height, device=masks.device).float()[:, None].expand(height, width)
    x = torch.arange(width, device=masks.device).float().expand(height, width)
    area = masks.sum((1, 2)).float()
    middle = [(masks * axis).sum((1, 2)) / area for axis in (x, y)]
    away = (x - middle[0][:, None, None]) ** 2 + (y - middle[1][:, None, None]) ** 2
    best = (depth - away / (2 * (height**2 + width**2))).flatten(1).argmax(1)
    return _coordinates(best, width)


def _coordinates(positions: Tensor, width: int) -> Tensor:
    return torch.stack([positions % width, positions // width], 1).float()


def upscale(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits `[P, M, h, w]` at the image's size `[P, M, H, W]`, as `Sam.postprocess_masks` does."""
    if logits.shape[-2:] == tuple(size):
        return logits
    return interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def intersection_over_union(logits: Tensor, masks: Tensor) -> Tensor:
    """Of the masks that logits `[P, M, H, W]` say with `[P, H, W]`: `[P, M]`."""
    said, true = (logits > 0).flatten(2), masks.flatten(1)[:, None]
    shared = (said & true).sum(2).float()
    return shared / (said | true).sum(2).clamp(min=1)


def pick_best(logits: Tensor, scores: Tensor) -> Tensor:
    """Of the three masks of `decode_prompts` the one of the highest predicted IoU: `[P, 1, h, w]`."""
    best = 1 + scores[:, 1:].argmax(1)
    return logits[torch.arange(len(best), device=best.device), best][:, None]


def prompt_ious(sam: nn.Module, targets: Targets, draws: Tensor) -> dict[str, Tensor]:
    """IoU of every object from each kind of prompt.

    Args:
        sam: a `Sam` on the device of `targets`.
        targets: images of the size of its encoder, and objects.
        draws: uniform in [0, 1), `[P, 2]`: which pixel of the object and of the error is pointed at.

    Returns:
        `[P]` each: "point" (a pixel of the object; the best of three masks by predicted IoU), "single" (the
        same, the single mask), "center" (the deepest pixel, best of three), "box" (single mask) and
        "refined" (after "point", a second point where that was wrong with the mask as a prompt; single mask).
    """
    images, masks, owners = targets
    size = masks.shape[1:]
    embeddings = sam.image_encoder(sam.preprocess(images.float())).float()  # type: ignore[operator]
    inside = torch.ones(len(owners), 1, device=owners.device)

    def iou(logits: Tensor) -> Tensor:
        return intersection_over_union(upscale(logits, size), masks)[:, 0]

    point = pick_pixels(masks, draws[:, 0])[:, None]
    logits, scores = decode_prompts(sam, embeddings, owners, points=(point, inside))
    chosen = pick_best(logits, scores)
    ious = {"point": iou(chosen), "single": iou(logits[:, :1])}

    center = find_centers(masks)[:, None]
    ious["center"] = iou(pick_best(*decode_prompts(sam, embeddings, owners, points=(center, inside))))
    logits, _ = decode_prompts(sam, embeddings, owners, boxes=mask_boxes(masks))
    ious["box"] = iou(logits[:, :1])

    second, label = pick_errors(upscale(chosen, size)[:, 0] > 0, masks, draws[:, 1])
    points = torch.cat([point, second[:, None]], 1), torch.cat([inside, label[:, None]], 1)
    logits, _ = decode_prompts(sam, embeddings, owners, points=points, masks=chosen)
    ious["refined"] = iou(logits[:, :1])
    return ious


def pick_errors(said: Tensor, masks: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """A pixel of each error and its label; one of the mask where there is no error.

    Args:
        said, masks: bool `[P, H, W]`, predicted and true.
        draws: uniform in [0, 1), `[P]`.

    Returns:
        (x, y) `[P, 2]` and labels `[P]`, 1 inside the true mask and 0 outside, float32.
    """
    wrong = said ^ masks
    right = ~wrong.any(2).any(1)
    pixels = pick_pixels(torch.where(right[:, None, None], masks, wrong), draws)
    x, y = pixels.long().unbind(1)
    return pixels, masks[torch.arange(len(masks), device=masks.device), y, x].float()


def measure_segmenter(
    sam: "Sam", samples: Iterable[Sample], seed: int = 0, batch_size: int = 50
) -> dict[str, float]:
    """Mean IoU over all objects of the samples, for each kind of prompt of `prompt_ious`.

    Args:
        sam: on any device, in any mode: it has neither dropout nor batch norms.
        samples: of the size of its encoder.
        seed: of the random points, which do not depend on `batch_size`.
        batch_size: images at once.

    Returns:
        "objects", their number; "point_iou", "single_iou", "center_iou", "box_iou" and "refined_iou"; and
        each with "_solid" or "_faint" over such objects, where there are any.

    Raises:
        ValueError: without samples, or for samples of another size.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    size = sam.image_encoder.img_size
    faint: list[bool] = []
    parts: list[dict[str, Tensor]] = []
    iterator = iter(samples)
    while batch := list(islice(iterator, batch_size)):
        wrong = [sample.labels.shape for sample in batch if sample.labels.shape != (size, size)]
        if wrong:
            raise ValueError(f"this SAM takes {size} x {size} pixels, got a sample of {wrong[0]}")
        faint += [o.faint for sample in batch for o in sample.objects]
        targets = collect_targets((s.pixels, np.stack([o.mask for o in s.objects])) for s in batch)
        draws = torch.rand(len(targets.owners), 2, generator=generator)
        with torch.inference_mode():
            parts.append(prompt_ious(sam, Targets(*(part.to(sam.device) for part in targets)), draws))
    if not parts:
        raise ValueError("there are no samples to measure on")
    groups = {"": torch.ones(len(faint), dtype=torch.bool)}
    groups["_faint"] = torch.tensor(faint)
    groups["_solid"] = ~groups["_faint"]
    measured: dict[str, float] = {"objects": len(faint)}
    for name in parts[0]:
        values = torch.cat([part[name].cpu() for part in parts])
        for suffix, group in groups.items():
            if group.any():
                measured[f"{name}_iou{suffix}"] = values[group].mean().item()
    return measured
