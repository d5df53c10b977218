"""What an answer looks at: attention of generated tokens, on the pixels of the image, and the masks of it."""

from visionsel.multimodal.grounding.grid import TokenGrid
from visionsel.multimodal.grounding.grounder import Grounder
from visionsel.multimodal.grounding.recorder import AttentionRecorder
from visionsel.multimodal.grounding.replay import Replay, Replayed
from visionsel.multimodal.grounding.results import Grounding, Word

__all__ = ["AttentionRecorder", "Grounder", "Grounding", "Replay", "Replayed", "TokenGrid", "Word"]
