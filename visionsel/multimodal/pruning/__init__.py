"""Visual-token pruning: one file a method."""

from visionsel.multimodal.pruning.cdpruner import CDPruner
from visionsel.multimodal.pruning.dart import DART
from visionsel.multimodal.pruning.divprune import DivPrune
from visionsel.multimodal.pruning.explainprune import ExplainPrune
from visionsel.multimodal.pruning.fastv import FastV
from visionsel.multimodal.pruning.holov import HoloV
from visionsel.multimodal.pruning.pool import PoolPrune
from visionsel.multimodal.pruning.promptdistill import PromptDistill
from visionsel.multimodal.pruning.prumerge import PruMerge
from visionsel.multimodal.pruning.pruner import Pruner
from visionsel.multimodal.pruning.pyramiddrop import PyramidDrop
from visionsel.multimodal.pruning.random import RandomPrune
from visionsel.multimodal.pruning.sparsevlm import SparseVLM
from visionsel.multimodal.pruning.uniform import UniformPrune
from visionsel.multimodal.pruning.vflowopt import VFlowOpt
from visionsel.multimodal.pruning.visionzip import VisionZip
from visionsel.multimodal.pruning.vispruner import VisPruner
from visionsel.multimodal.pruning.yopo import Yopo

__all__ = [
    "DART",
    "PRUNERS",
    "CDPruner",
    "DivPrune",
    "ExplainPrune",
    "FastV",
    "HoloV",
    "PoolPrune",
    "PromptDistill",
    "PruMerge",
    "PyramidDrop",
    "RandomPrune",
    "SparseVLM",
    "UniformPrune",
    "VFlowOpt",
    "VisPruner",
    "VisionZip",
    "Yopo",
]

PRUNERS: list[type[Pruner]] = [
    RandomPrune,
    UniformPrune,
    PoolPrune,
    FastV,
    PyramidDrop,
    SparseVLM,
    DivPrune,
    VisionZip,
    VisPruner,
    PruMerge,
    DART,
    CDPruner,
    HoloV,
    VFlowOpt,
    ExplainPrune,
    Yopo,
    PromptDistill,
]
