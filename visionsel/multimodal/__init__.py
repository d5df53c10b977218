"""Tools for vision-language models of transformers.

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

from visionsel.multimodal.timm_tower import TimmTower, TimmTowerConfig

__all__ = ["TimmTower", "TimmTowerConfig"]
