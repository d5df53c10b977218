"""Changing what attention heads say and where they look: one file a method."""

from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.modulation.act import ACT
from visionsel.multimodal.modulation.grounding_heads import GroundingHeads
from visionsel.multimodal.modulation.head_importance import HeadImportance, head_importance
from visionsel.multimodal.modulation.pai import PAI
from visionsel.multimodal.modulation.paint import Paint
from visionsel.multimodal.modulation.var import VAR
from visionsel.multimodal.modulation.vhr import VHR
from visionsel.multimodal.sinks import discover_sink_dims

__all__ = [
    "ACT",
    "MODULATORS",
    "PAI",
    "VAR",
    "VHR",
    "GroundingHeads",
    "HeadImportance",
    "Paint",
    "discover_sink_dims",
    "head_importance",
]

MODULATORS: list[type[Intervention]] = [
    VHR,
    VAR,
    ACT,
    PAI,
    Paint,
    GroundingHeads,
]
