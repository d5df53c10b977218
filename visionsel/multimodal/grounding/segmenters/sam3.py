"""The tracker of SAM 3 (Carion et al. 2025) for images, of transformers: it takes points, boxes and masks.

`Sam3Model`, which finds what a noun phrase names, is another model and takes no points.
"""

from torch import Tensor

from visionsel.multimodal.grounding.segmenters import hf_call
from visionsel.multimodal.grounding.segmenters.canvas import Canvas
from visionsel.multimodal.grounding.segmenters.prompts import Prompts
from visionsel.multimodal.grounding.segmenters.segmenter import Features, Segmenter

__all__ = ["Sam3Segmenter"]

NORMAL = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # of its image processor; SAM and SAM 2 take ImageNet's


class Sam3Segmenter(Segmenter):
    """A `Sam3TrackerModel` of transformers. See `Segmenter`, and for `multimask=False` `Sam2Segmenter`."""

    backend, stretch = "SAM 3 tracker", True

    def _sizes(self) -> tuple[int, tuple[int, int]]:
        encoder = self.model.prompt_encoder
        return encoder.input_image_size, tuple(encoder.mask_input_size)

    def _encode(self, pixels: Tensor, canvas: Canvas) -> Features:
        return tuple(self.model.get_image_embeddings(hf_call.normalize(pixels, canvas, *NORMAL)))

    def _decode(
        self, features: Features, prompts: Prompts, multimask: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        output = hf_call.decode(self.model, prompts, multimask, image_embeddings=features)
        return output.pred_masks[:, 0], output.iou_scores[:, 0], output.object_score_logits[:, 0, 0]
