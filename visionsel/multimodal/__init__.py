"""Tools for vision-language models of transformers.

    from visionsel.multimodal import FastV

    with FastV(keep=0.25)(model) as pruned:
        out = model.generate(**inputs)

Importing it registers `TimmTower` with transformers, so that models saved with one load by
`AutoModelForImageTextToText.from_pretrained`.

Raises:
    ImportError: without the extra "multimodal".
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        'visionsel.multimodal needs transformers: pip install "visionsel[multimodal]"'
    ) from error

from visionsel.multimodal import evaluation
from visionsel.multimodal.decoding import AGLA, GLC, ICD, M3ID, VCD, PAIGuidance, Ritual, TwoView
from visionsel.multimodal.grounding import (
    AttentionRecorder,
    Grounder,
    MaskHead,
    RoIHead,
    SentenceAttentionBlock,
    SentenceAttentionNet,
    TokenGrid,
    build_segmenter,
)
from visionsel.multimodal.intervention import Intervention, Stack
from visionsel.multimodal.modulation import (
    ACT,
    MODULATORS,
    PAI,
    VAR,
    VHR,
    GroundingHeads,
    HeadImportance,
    Paint,
    head_importance,
)
from visionsel.multimodal.pruning import (
    DART,
    PRUNERS,
    CDPruner,
    DivPrune,
    ExplainPrune,
    FastV,
    HoloV,
    PoolPrune,
    PromptDistill,
    PruMerge,
    PyramidDrop,
    RandomPrune,
    SparseVLM,
    UniformPrune,
    VFlowOpt,
    VisionZip,
    VisPruner,
    Yopo,
)
from visionsel.multimodal.timm_tower import TimmTower, TimmTowerConfig

__all__ = [
    "ACT",
    "AGLA",
    "DART",
    "GLC",
    "ICD",
    "M3ID",
    "MODULATORS",
    "PAI",
    "PRUNERS",
    "VAR",
    "VCD",
    "VHR",
    "AttentionRecorder",
    "CDPruner",
    "DivPrune",
    "ExplainPrune",
    "FastV",
    "Grounder",
    "GroundingHeads",
    "HeadImportance",
    "HoloV",
    "Intervention",
    "MaskHead",
    "PAIGuidance",
    "Paint",
    "PoolPrune",
    "PromptDistill",
    "PruMerge",
    "PyramidDrop",
    "RandomPrune",
    "Ritual",
    "RoIHead",
    "SentenceAttentionBlock",
    "SentenceAttentionNet",
    "SparseVLM",
    "Stack",
    "TimmTower",
    "TimmTowerConfig",
    "TokenGrid",
    "TwoView",
    "UniformPrune",
    "VFlowOpt",
    "VisPruner",
    "VisionZip",
    "Yopo",
    "build_segmenter",
    "evaluation",
    "head_importance",
]
