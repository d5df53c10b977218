"""Qwen3-VL (2025): as Qwen2-VL, with features of earlier tower layers added in the first decoder layers.

The prompt says the time before each step of a video, so that the tokens of a video stand in several runs.
"""

from visionsel.multimodal.families.qwen2_vl import Qwen2VL

__all__ = ["Qwen3VL"]


class Qwen3VL(Qwen2VL):
    """Its tower and its grids are as those of Qwen2-VL."""

    name = "Qwen3-VL"
    model_types = ("qwen3_vl",)
