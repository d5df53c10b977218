"""What an answer looks at: attention of generated tokens, on the pixels of the image, and the masks of it."""

from visionsel.multimodal.grounding.grid import TokenGrid
from visionsel.multimodal.grounding.grounder import Grounder
from visionsel.multimodal.grounding.mask_head import MaskHead, MaskHeadConfig
from visionsel.multimodal.grounding.recorder import AttentionRecorder
from visionsel.multimodal.grounding.replay import Replay, Replayed
from visionsel.multimodal.grounding.results import Grounding, Word
from visionsel.multimodal.grounding.roi_head import RoIHead
from visionsel.multimodal.grounding.roi_regions import propose_regions, requery
from visionsel.multimodal.grounding.segmenters import Masks, Segmenter, build_segmenter
from visionsel.multimodal.grounding.sentence_attention import SentenceAttentionBlock, SentenceAttentionNet

__all__ = [
    "AttentionRecorder",
    "Grounder",
    "Grounding",
    "MaskHead",
    "MaskHeadConfig",
    "Masks",
    "Replay",
    "Replayed",
    "RoIHead",
    "Segmenter",
    "SentenceAttentionBlock",
    "SentenceAttentionNet",
    "TokenGrid",
    "Word",
    "build_segmenter",
    "propose_regions",
    "requery",
]
