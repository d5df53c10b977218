"""Decoding with a second view of the prompt, or with another layer: one file a method."""

from visionsel.multimodal.decoding.agla import AGLA
from visionsel.multimodal.decoding.chosen import ChosenTransform
from visionsel.multimodal.decoding.glc import GLC
from visionsel.multimodal.decoding.icd import ICD
from visionsel.multimodal.decoding.m3id import M3ID
from visionsel.multimodal.decoding.matching import BlipMatcher, ClipMatcher, matching_view
from visionsel.multimodal.decoding.pai_guidance import PAIGuidance
from visionsel.multimodal.decoding.ritual import Ritual
from visionsel.multimodal.decoding.two_view import TwoView, agree, contrast, guidance
from visionsel.multimodal.decoding.vcd import VCD
from visionsel.multimodal.decoding.views import DiffusionNoise, Disturbance, RandomTransform, RemoveImages
from visionsel.multimodal.intervention import Intervention

__all__ = [
    "AGLA",
    "DECODERS",
    "GLC",
    "ICD",
    "M3ID",
    "VCD",
    "BlipMatcher",
    "ChosenTransform",
    "ClipMatcher",
    "DiffusionNoise",
    "Disturbance",
    "PAIGuidance",
    "RandomTransform",
    "RemoveImages",
    "Ritual",
    "TwoView",
    "agree",
    "contrast",
    "guidance",
    "matching_view",
]

DECODERS: list[type[Intervention]] = [VCD, ICD, M3ID, Ritual, AGLA, PAIGuidance, GLC]
