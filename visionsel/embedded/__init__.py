"""Small models trained on the shapes world, with their weights: everything runs with no download and no GPU.

They are trained by the recipes of `train/` and `configs/shapes/`, from random weights; `make embedded` trains
them again. Each folder of `weights/` has a card, `README.md`, that states data, recipe, seeds and measured
quality, and `visionsel evaluate embedded` measures it again. Their numbers validate methods and code; they do
not predict those of large models.
"""

from visionsel.embedded.classifier import load_classifier
from visionsel.embedded.clip import load_clip
from visionsel.embedded.explainprune import load_predictor
from visionsel.embedded.lvlm import load_lvlm
from visionsel.embedded.mask_head import load_mask_head
from visionsel.embedded.segmenter import load_segmenter

__all__ = [
    "load_classifier",
    "load_clip",
    "load_lvlm",
    "load_mask_head",
    "load_predictor",
    "load_segmenter",
]
