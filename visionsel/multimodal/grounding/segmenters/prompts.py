"""Prompts of a segmenter, looked over before a model sees them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionsel.multimodal.grounding.segmenters.canvas import Canvas

__all__ = ["Prompts", "check_prompts", "to_tensor"]


@dataclass(frozen=True)
class Prompts:
    """N prompts on the square of a model; any part may be missing, but not all.

    Attributes:
        points: float32 `[N, P, 2]`, (x, y).
        labels: int32 `[N, P]`: 1 inside, 0 outside, -1 no point.
        boxes: float32 `[N, 4]`, (x0, y0, x1, y1).
        masks: float32 logits `[N, h, w]`.
    """

    points: Tensor | None
    labels: Tensor | None
    boxes: Tensor | None
    masks: Tensor | None

    def __len__(self) -> int:
        return next(len(part) for part in (self.points, self.boxes, self.masks) if part is not None)

    def split(self, size: int, device: torch.device) -> Iterator["Prompts"]:
        """Up to `size` prompts at a time, on a device."""
        parts = (self.points, self.labels, self.boxes, self.masks)
        for start in range(0, len(self), size):
            yield Prompts(*(None if x is None else x[start : start + size].to(device) for x in parts))


def check_prompts(points: Any, labels: Any, boxes: Any, mask_input: Any, canvas: Canvas) -> Prompts:
    """Prompts in pixels of the image, looked over and placed on the square.

    Raises:
        TypeError: for what is no array of numbers.
        ValueError: for wrong shapes or numbers of prompts, NaN, places outside the image, unknown labels, and
            prompts that name nothing that is wanted.
    """
    if points is None and boxes is None and mask_input is None:
        raise ValueError("no prompt; give points with labels, boxes or mask_input")
    if (points is None) != (labels is None):
        given, missing = ("labels", "points") if points is None else ("points", "labels")
        raise ValueError(f"{given} without {missing}; points [N, P, 2] go with labels [N, P]")
    if points is not None:
        labels = _check_labels(labels)
        points = _check_points(points, labels, canvas)
    if boxes is not None:
        boxes = _check_boxes(boxes, canvas)
    if mask_input is not None:
        mask_input = _check_mask_input(mask_input, canvas)

    named = (("points", points), ("boxes", boxes), ("mask_input", mask_input))
    counts = {name: len(part) for name, part in named if part is not None}
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"{each}: every prompt needs its own; repeat what several prompts share")
    if 0 in counts.values():
        raise ValueError("no prompt: N is 0")
    if labels is not None and boxes is None and mask_input is None:
        lost = (~(labels == 1).any(1)).nonzero()[:, 0].tolist()
        if lost:
            raise ValueError(
                f"prompt {lost[0]} has no point inside (label 1), and neither box nor mask_input: what is "
                "not wanted alone names no object; add a point with label 1, a box or a mask"
            )
    return Prompts(
        None if points is None else canvas.place(points),
        labels,
        None if boxes is None else canvas.place(boxes.view(-1, 2, 2)).view(-1, 4),
        mask_input,
    )


def to_tensor(value: Any, name: str, dtype: torch.dtype, shape: str, axes: int) -> Tensor:
    """A detached tensor of a number of axes.

    Raises:
        TypeError: for what is no array of numbers.
        ValueError: for another number of axes, or rows of different lengths.
    """
    try:
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except ValueError as error:
        raise ValueError(f"{name} has rows of different lengths; expected {shape}") from error
    except TypeError as error:
        raise TypeError(f"{name} is no array of numbers; expected {shape}") from error
    if tensor.is_complex():
        raise TypeError(f"{name} is complex; expected {shape}, real")
    if tensor.ndim != axes:
        one = tensor.ndim == axes - 1
        hint = f"; for one prompt pass {name}[None]" if one else ""
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {shape}{hint}")
    return tensor.detach().to(dtype)


def _check_labels(labels: Any) -> Tensor:
    labels = to_tensor(labels, "labels", torch.float64, "[N, P]", 2).cpu()
    known = (labels == 1) | (labels == 0) | (labels == -1)
    if not known.all():
        raise ValueError(
            f"label {labels[~known][0].item():g}; a point has 1 (inside), 0 (outside) or -1 (no point: it "
            "fills up a row)"
        )
    return labels.to(torch.int32)


def _check_points(points: Any, labels: Tensor, canvas: Canvas) -> Tensor:
    points = to_tensor(points, "points", torch.float64, "[N, P, 2]", 3).cpu()
    if points.shape[2] != 2 or points.shape[1] == 0:
        raise ValueError(f"points has shape {list(points.shape)}; expected [N, P, 2], P at least 1")
    if points.shape[:2] != labels.shape:
        raise ValueError(
            f"points {list(points.shape)} need labels {list(points.shape[:2])}, got {list(labels.shape)}"
        )
    points = points.masked_fill((labels == -1)[..., None], 0.0)  # whatever stands there is no place
    _check_places(points.flatten(0, 1), "point", canvas)
    return points


def _check_boxes(boxes: Any, canvas: Canvas) -> Tensor:
    boxes = to_tensor(boxes, "boxes", torch.float64, "[N, 4]", 2).cpu()
    if boxes.shape[1] != 4:
        raise ValueError(f"boxes has shape {list(boxes.shape)}; expected [N, 4], (x0, y0, x1, y1)")
    _check_places(boxes, "box", canvas)
    wrong = (boxes[:, :2] > boxes[:, 2:]).any(1)
    if wrong.any():
        raise ValueError(
            f"box {_numbers(boxes[wrong][0])} ends before it begins; expected (x0, y0, x1, y1), not a width "
            "and a height"
        )
    return boxes


def _check_places(places: Tensor, name: str, canvas: Canvas) -> None:
    """Points `[n, 2]` or boxes `[n, 4]`; the far edges are inside, for boxes end one past the last pixel."""
    if not places.isfinite().all():
        raise ValueError(f"a {name} holds NaN or infinity")
    height, width = canvas.image
    limit = places.new_tensor([width, height]).repeat(places.shape[1] // 2)
    wrong = ((places < 0) | (places > limit)).any(1)
    if wrong.any():
        raise ValueError(
            f"{name} {_numbers(places[wrong][0])} is outside the image of {width} x {height} pixels; prompts "
            "are in pixels of the image that was set, (x, y)"
        )


def _check_mask_input(masks: Any, canvas: Canvas) -> Tensor:
    shape = f"[N, {canvas.low_res[0]}, {canvas.low_res[1]}]"
    masks = to_tensor(masks, "mask_input", torch.float32, shape, 3)
    if masks.shape[1:] != canvas.low_res:
        raise ValueError(
            f"mask_input has shape {list(masks.shape)}; this model takes {shape}: logits of its own, "
            "Masks.low_res[:, m], or mask_prompt(logits in pixels of the image)"
        )
    if not masks.isfinite().all():
        raise ValueError("mask_input holds NaN or infinity")
    return masks


def _numbers(values: Tensor) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values.tolist()) + ")"
