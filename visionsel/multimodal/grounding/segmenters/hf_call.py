"""What the SAMs of transformers have in common: how pixels go in, and how prompts do."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from visionsel.multimodal.grounding.segmenters.canvas import Canvas
from visionsel.multimodal.grounding.segmenters.prompts import Prompts

__all__ = ["IMAGENET", "decode", "normalize"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalize(pixels: Tensor, canvas: Canvas, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 `[1, 3, h, w]` -> float32 `[1, 3, S, S]`; padding is 0 after normalisation."""
    mean_, std_ = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (mean, std))
    height, width = pixels.shape[-2:]
    normal = (pixels.float() / 255 - mean_) / std_
    return pad(normal, (0, canvas.side - width, 0, canvas.side - height))


def decode(model: Any, prompts: Prompts, multimask: bool, **features: Any) -> Any:
    """Call a model with N prompts about one image.

    A mask prompt is for an image there, not for a prompt, so the prompts stand on the axis of images: each
    with one prompt, and all with the same features, which are expanded and not copied.

    Args:
        model: of transformers.
        prompts: on its square.
        multimask: three proposals a prompt.
        features: tensors, or lists of tensors, `[1, ...]`.

    Returns:
        the model's output, with axes `[N, 1, M, ...]`.
    """
    count = len(prompts)

    def spread(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.expand(count, *x.shape[1:])
        return [spread(one) for one in x]

    inputs: dict[str, Any] = {name: spread(x) for name, x in features.items()}
    if prompts.points is not None and prompts.labels is not None:
        inputs |= {"input_points": prompts.points[:, None], "input_labels": prompts.labels[:, None]}
    if prompts.boxes is not None:
        inputs["input_boxes"] = prompts.boxes[:, None]
    if prompts.masks is not None:
        inputs["input_masks"] = prompts.masks[:, None]
    return model(**inputs, multimask_output=multimask)
