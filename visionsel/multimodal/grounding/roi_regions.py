"""From the map of `RoIHead` to regions of the image, and the question asked again with a closer look at them.

Shi et al. 2025, SD-RPN, arXiv:2509.16944. There the features of the crops are put right behind those of the
image, and the prompt is read from the start. Here the crops are further images of the prompt, which come
behind the image: the same tokens with what the model's processor writes around each image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from visionsel.multimodal.families.family import View
from visionsel.multimodal.grounding.grid import TokenGrid
from visionsel.multimodal.grounding.heatmaps.spatial import blur, components
from visionsel.multimodal.grounding.reading import open_upright
from visionsel.multimodal.grounding.roi_head import RoIHead, read_prompt
from visionsel.multimodal.prompts import chat_inputs, user_turn

__all__ = ["Regions", "Requeried", "crop_regions", "find_regions", "propose_regions", "requery"]

Box = tuple[float, float, float, float]
Cells = tuple[int, int, int, int]
CROPS = ("beside", "instead")


@dataclass(frozen=True)
class Regions:
    """Where to look closer.

    Attributes:
        map: float32 `[h, w]`: how likely each token is part of it, before the blur.
        boxes: x0, y0, x1, y1 in pixels of the image; none where nothing reaches the threshold.
    """

    map: Tensor
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Requeried:
    """An answer to a question that was asked again.

    Attributes:
        answer: its text.
        regions: what was looked at.
        crops: as the processor got them; without any, the image alone was asked about.
    """

    answer: str
    regions: Regions
    crops: tuple[Image.Image, ...]


def find_regions(
    likely: Tensor, threshold: float = 0.15, relative: bool = False, union: bool = False
) -> list[Cells]:
    """Boxes around what is likely.

    The map is blurred (3 x 3, sigma 1; at the border the weights inside share out). Components of cells above
    the threshold, neighbours over corners counted, have a box each. Single cells are noise and dropped; for
    fewer than 4 cells the box is widened to at least 3 x 3, and moved where it would reach out of the map.

    Args:
        likely: `[h, w]`, from 0 to 1.
        threshold: 0.15 in the release for LLaVA-1.5.
        relative: the threshold is a share of the blurred map's maximum.
        union: one box around all.

    Returns:
        x0, y0, x1, y1 in cells, the last ones not counted; from the top.

    Raises:
        ValueError: for another shape, or a threshold out of [0, 1).
    """
    if likely.ndim != 2:
        raise ValueError(f"the map must be [h, w], got {list(likely.shape)}")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be at least 0 and below 1, got {threshold}")
    smooth = blur(likely.float(), sigma=1.0, size=3)
    labels = components(smooth > (threshold * smooth.amax() if relative else threshold))
    boxes = []
    for number in labels.unique().tolist():
        cells = (labels == number).nonzero()
        if number == 0 or len(cells) == 1:
            continue
        (y0, x0), (y1, x1) = cells.amin(0).tolist(), (cells.amax(0) + 1).tolist()
        if len(cells) < 4:
            x0, x1 = _at_least(x0, x1, 3, likely.shape[1])
            y0, y1 = _at_least(y0, y1, 3, likely.shape[0])
        boxes.append((x0, y0, x1, y1))
    boxes.sort(key=lambda box: (box[1], box[0]))
    if union and boxes:
        x0, y0, x1, y1 = zip(*boxes, strict=True)
        return [(min(x0), min(y0), max(x1), max(y1))]
    return boxes


def propose_regions(
    model: nn.Module,
    processor: Any,
    image: Any,
    question: str,
    roi_head: RoIHead,
    threshold: float = 0.15,
    relative: bool = False,
    union: bool = False,
) -> Regions:
    """Where a question wants the model to look closer, without an answer: one pass below the head's layers.

    Args:
        model: that the head was made of.
        processor: its own.
        image: what is asked about, as `open_upright` takes it: a file, a PIL image, an array.
        question: the user's words.
        roi_head: the head.
        threshold, relative, union: see `find_regions`.

    Raises:
        ValueError: for a head of another model, or impossible numbers.
        NotImplementedError: where the image is cut into tiles, and no one grid shows all of it.
    """
    image = open_upright(image)
    inputs = chat_inputs(processor, [[user_turn(question)]], [[image]])
    inputs = inputs.to(cast(Any, model).device, cast(Any, model).dtype)
    grid = TokenGrid.from_inputs(model, processor, inputs, (image.height, image.width))
    view = _whole(grid)
    with torch.no_grad():
        logits = roi_head(read_prompt(model, inputs))[0]
    likely = logits[view.index.to(logits.device)].sigmoid().cpu()
    cells = find_regions(likely, threshold, relative, union)
    return Regions(likely, tuple(_pixels(box, view, grid.size) for box in cells))


def crop_regions(image: Image.Image, boxes: Sequence[Box], stretch: bool = False) -> tuple[Image.Image, ...]:
    """Parts of an image, magnified until their longer side is that of the image.

    Args:
        image: the whole.
        boxes: x0, y0, x1, y1 in its pixels; whole pixels that they touch are taken.
        stretch: into a square, for processors that would cut the ends off.
    """
    crops, side = [], max(image.size)
    for x0, y0, x1, y1 in boxes:
        part = image.crop(
            (int(x0), int(y0), max(int(x0) + 1, -int(-x1 // 1)), max(int(y0) + 1, -int(-y1 // 1)))
        )
        scale = side / max(part.size)
        size = (max(1, round(part.width * scale)), max(1, round(part.height * scale)))
        crops.append(part.resize((side, side) if stretch else size, Image.Resampling.BILINEAR))
    return tuple(crops)


@torch.inference_mode()
def requery(
    model: nn.Module,
    processor: Any,
    image: Any,
    question: str,
    roi_head: RoIHead,
    *,
    crop: str = "beside",
    threshold: float = 0.15,
    relative: bool = False,
    union: bool = False,
    stretch: bool | None = None,
    max_new_tokens: int = 64,
    **options: Any,
) -> Requeried:
    """Ask a question with a closer look at what it is about; where there is nothing, about the image alone.

    Args:
        model: that the head was made of. It must have learned to read several images in a prompt for
            `"beside"`: Qwen2-VL and later, LLaVA-OneVision, InternVL and SmolVLM have; LLaVA-1.5 and
            LLaVA-NeXT have not, though the paper does so with LLaVA-1.5 and gains by it.
        processor: its own.
        image: what is asked about, as `open_upright` takes it: a file, a PIL image, an array.
        question: the user's words.
        roi_head: the head.
        crop: `"beside"`, the crops follow the image, as in the paper; `"instead"`, in place of it.
        threshold, relative, union: see `find_regions`.
        stretch: see `crop_regions`, as the release does for LLaVA; None: where the image processor crops the
            centre.
        max_new_tokens: after which the answer is cut.
        options: others of `generate()`; by default it is greedy.

    Raises:
        ValueError: for another `crop`, see also `propose_regions`.
    """
    if crop not in CROPS:
        raise ValueError(f"crop must be one of {', '.join(CROPS)}, got {crop!r}")
    image = open_upright(image)
    regions = propose_regions(model, processor, image, question, roi_head, threshold, relative, union)
    if stretch is None:
        stretch = bool(getattr(getattr(processor, "image_processor", processor), "do_center_crop", False))
    crops = crop_regions(image, regions.boxes, stretch)
    images = [*crops] if crops and crop == "instead" else [image, *crops]
    inputs = chat_inputs(processor, [[user_turn(question, len(images))]], [images])
    inputs = inputs.to(cast(Any, model).device, cast(Any, model).dtype)
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, **options}
    tokens = cast(Any, model).generate(**inputs, **options)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    answer: str = processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    return Requeried(answer, regions, crops)


def _at_least(first: int, last: int, length: int, most: int) -> tuple[int, int]:
    """An interval of at least some length, about the same middle, inside 0 to `most`."""
    wanted = min(max(length, last - first), most)
    first = min(max(0, first - (wanted - (last - first)) // 2), most - wanted)
    return first, first + wanted


def _whole(grid: TokenGrid) -> View:
    """The one grid that shows the whole image.

    Raises:
        NotImplementedError: when there is none.
    """
    for kinds in (("image", "thumbnail"), ("tiles",)):
        if found := [view for view in grid.views if view.kind in kinds]:
            return found[0]
    if len(grid.views) == 1:
        return grid.views[0]
    raise NotImplementedError(
        f"the image is cut into {len(grid.views)} tiles, and no one grid shows all of it; use a processor "
        "that adds a thumbnail"
    )


def _pixels(cells: Cells, view: View, size: tuple[int, int]) -> Box:
    """A box of cells in pixels, cut at the border of the image."""
    assert view.box is not None
    (rows, columns), (height, width) = view.index.shape, size
    left, top, right, bottom = view.box
    across, down = (right - left) / columns, (bottom - top) / rows
    x0, y0, x1, y1 = cells
    return (
        min(max(left + x0 * across, 0.0), float(width)),
        min(max(top + y0 * down, 0.0), float(height)),
        min(max(left + x1 * across, 0.0), float(width)),
        min(max(top + y1 * down, 0.0), float(height)),
    )
