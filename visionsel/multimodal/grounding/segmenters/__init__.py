"""Segmenters for prompts: points, boxes and masks in, masks out, the same for SAM, SAM 2 and SAM 3."""

from visionsel.multimodal.grounding.segmenters.build import build_segmenter
from visionsel.multimodal.grounding.segmenters.canvas import Canvas
from visionsel.multimodal.grounding.segmenters.hf_sam import HFSamSegmenter
from visionsel.multimodal.grounding.segmenters.masks import Masks
from visionsel.multimodal.grounding.segmenters.sam import SamSegmenter
from visionsel.multimodal.grounding.segmenters.sam2 import Sam2Segmenter
from visionsel.multimodal.grounding.segmenters.sam3 import Sam3Segmenter
from visionsel.multimodal.grounding.segmenters.segmenter import Segmenter

__all__ = [
    "Canvas",
    "HFSamSegmenter",
    "Masks",
    "Sam2Segmenter",
    "Sam3Segmenter",
    "SamSegmenter",
    "Segmenter",
    "build_segmenter",
]
