"""Maps over image tokens, one for each token of an answer: one file a method.

A method is a frozen dataclass of its hyperparameters. It reads a `Replay` and gives float32 `[B, T, n]`:
for each new token its map over the image tokens, in the order of `Replay.image`; none of it negative, 0 for
tokens that are padding and columns that a sample does not have. A method with a `reference`, a prompt, also
wants a replay of the same images under that prompt.
"""

from typing import Any

from visionsel.multimodal.grounding.heatmaps.head_selector import HeadSelector
from visionsel.multimodal.grounding.heatmaps.localization_heads import LocalizationHeads
from visionsel.multimodal.grounding.heatmaps.mean import Mean
from visionsel.multimodal.grounding.heatmaps.relative import Relative
from visionsel.multimodal.grounding.heatmaps.tam import TAM
from visionsel.multimodal.grounding.heatmaps.v_max import VMax
from visionsel.multimodal.grounding.heatmaps.vl_sam import VLSAM

__all__ = ["HEATMAPS", "TAM", "VLSAM", "HeadSelector", "LocalizationHeads", "Mean", "Relative", "VMax"]

HEATMAPS: list[type[Any]] = [VLSAM, LocalizationHeads, VMax, Mean, Relative, TAM]
