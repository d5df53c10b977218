"""Decoding with a second view of the prompt: one file a method."""

from visionsel.multimodal.decoding.agla import AGLA
from visionsel.multimodal.decoding.icd import ICD
from visionsel.multimodal.decoding.m3id import M3ID
from visionsel.multimodal.decoding.ritual import Ritual
from visionsel.multimodal.decoding.two_view import TwoView, agree, contrast, guidance
from visionsel.multimodal.decoding.vcd import VCD
from visionsel.multimodal.decoding.views import DiffusionNoise, Disturbance, RandomTransform, RemoveImages
from visionsel.multimodal.intervention import Intervention

__all__ = [
    "AGLA",
    "DECODERS",
    "ICD",
    "M3ID",
    "VCD",
    "DiffusionNoise",
    "Disturbance",
    "RandomTransform",
    "RemoveImages",
    "Ritual",
    "TwoView",
    "agree",
    "contrast",
    "guidance",
]

DECODERS: list[type[Intervention]] = [VCD, ICD, M3ID, Ritual, AGLA]
