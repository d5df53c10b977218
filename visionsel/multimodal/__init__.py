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

from visionsel.multimodal.intervention import Intervention, Stack
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
    "DART",
    "PRUNERS",
    "CDPruner",
    "DivPrune",
    "ExplainPrune",
    "FastV",
    "HoloV",
    "Intervention",
    "PoolPrune",
    "PromptDistill",
    "PruMerge",
    "PyramidDrop",
    "RandomPrune",
    "SparseVLM",
    "Stack",
    "TimmTower",
    "TimmTowerConfig",
    "UniformPrune",
    "VFlowOpt",
    "VisPruner",
    "VisionZip",
    "Yopo",
]
