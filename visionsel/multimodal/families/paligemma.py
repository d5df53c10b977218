"""PaliGemma (Beyer et al. 2024): the whole image stretched to a square, one token for each patch."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from visionsel.multimodal.families.family import Box, Encoded, Family, TokenLayout
from visionsel.multimodal.families.pictures import picture_layouts

__all__ = ["PaliGemma"]


class PaliGemma(Family):
    """PaliGemma and PaliGemma 2."""

    name = "PaliGemma"
    model_types = ("paligemma",)

    def tower_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return model.model.vision_tower.encoder.layers  # type: ignore[union-attr, return-value]

    def projector(self, model: nn.Module) -> nn.Module:
        return model.model.multi_modal_projector  # type: ignore[union-attr, return-value]

    def layouts(
        self,
        model: nn.Module,
        encoded: Encoded,
        processor: Any = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[TokenLayout]:
        """One layout for each image. See `Family.layouts`.

        Raises:
            ValueError: if the number of sizes is not that of the images.
        """
        images, _, height, width = encoded.arguments["pixel_values"].shape
        patch: int = model.config.vision_config.patch_size  # type: ignore[union-attr, assignment]
        grid = (height // patch, width // patch)
        boxes: list[Box | None] = [None] * images
        if processor is not None and sizes is not None:
            boxes = [(0.0, 0.0, float(w), float(h)) for h, w in sizes]
        return picture_layouts([[("image", box)] for box in boxes], images, grid)
