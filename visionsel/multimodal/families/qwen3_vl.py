"""Qwen3-VL (2025): as Qwen2-VL, with features of earlier tower layers added in the first decoder layers.

The prompt says the time before each step of a video, so that the tokens of a video stand in several runs.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from visionsel.multimodal.families.family import Encoded, Family, TokenLayout
from visionsel.multimodal.families.qwen2_vl import grid_layouts, mean_over_squares

__all__ = ["Qwen3VL"]


class Qwen3VL(Family):
    """Qwen3-VL. Every layer of the tower attends within one image, or one pair of frames."""

    name = "Qwen3-VL"
    model_types = ("qwen3_vl",)

    def tower_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        return model.model.visual.blocks  # type: ignore[union-attr, return-value]

    def tower_attention(self, layer: nn.Module) -> nn.Module:
        return layer.attn  # type: ignore[return-value]

    def pool(self, model: nn.Module, values: Tensor, encoded: Encoded) -> Tensor:
        return mean_over_squares(model, values)

    def layouts(
        self,
        model: nn.Module,
        encoded: Encoded,
        processor: Any = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[TokenLayout]:
        return grid_layouts(model, encoded, processor, sizes)
