"""visionsel: vision and multimodal models that select what they look at.

Importing it registers the backbones with timm: `timm.create_model("biformer_tiny")`.
"""

from visionsel import models, ops
from visionsel.models.acceleration import accelerate

__version__ = "0.1.0"

__all__ = ["__version__", "accelerate", "models", "ops"]
