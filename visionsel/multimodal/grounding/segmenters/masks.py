"""What a segmenter answers: logits in low resolution, enlarged when they are asked for."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from visionsel.multimodal.grounding.segmenters.canvas import FEW, Canvas

__all__ = ["Masks"]


@dataclass(frozen=True, eq=False)
class Masks:
    """M proposals for each of N prompts.

    Attributes:
        low_res: float32 logits `[N, M, h, w]` on the square of the model that gave them; the `mask_input` of
            its next prediction for the same image.
        iou: float32 `[N, M]`, the quality that the model predicts.
        object_score: float32 `[N]`, a logit: is there an object at all? None where the model does not say.
        canvas: the place of the image on the square.
        backend: the name of the kind of model.
    """

    low_res: Tensor
    iou: Tensor
    object_score: Tensor | None
    canvas: Canvas
    backend: str

    def __len__(self) -> int:
        return len(self.low_res)

    def logits(self) -> Tensor:
        """Float32 `[N, M, H, W]` in pixels of the image."""
        return self.canvas.enlarge(self.low_res.flatten(0, 1)).unflatten(0, self.iou.shape)

    def masks(self, threshold: float = 0.0) -> Tensor:
        """Bool `[N, M, H, W]`: logits above a threshold (default: 0, as in SAM)."""
        # no more than a few float maps at a time at the size of the image
        parts = [self.canvas.enlarge(part) > threshold for part in self.low_res.flatten(0, 1).split(FEW)]
        return torch.cat(parts).unflatten(0, self.iou.shape)

    def only_best(self) -> Self:
        """The proposal of each prompt with the highest predicted IoU, `[N, 1, ...]`; ties go to the first."""
        rows = torch.arange(len(self), device=self.iou.device)
        best = self.iou.argmax(1)
        return replace(self, low_res=self.low_res[rows, best][:, None], iou=self.iou[rows, best][:, None])

    def best(self, threshold: float = 0.0) -> Tensor:
        """Bool `[N, H, W]`: the mask of each prompt with the highest predicted IoU; no other is enlarged."""
        return self.only_best().masks(threshold)[:, 0]
