"""What an answer looks at: attention of generated tokens, on the pixels of the image."""

from visionsel.multimodal.grounding.grid import TokenGrid
from visionsel.multimodal.grounding.recorder import AttentionRecorder
from visionsel.multimodal.grounding.replay import Replay, Replayed

__all__ = ["AttentionRecorder", "Replay", "Replayed", "TokenGrid"]
