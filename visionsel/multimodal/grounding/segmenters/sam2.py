"""SAM 2 and 2.1 for images, of transformers (Ravi et al. 2024)."""

from torch import Tensor

from visionsel.multimodal.grounding.segmenters import hf_call
from visionsel.multimodal.grounding.segmenters.canvas import Canvas
from visionsel.multimodal.grounding.segmenters.prompts import Prompts
from visionsel.multimodal.grounding.segmenters.segmenter import Features, Segmenter

__all__ = ["Sam2Segmenter"]


class Sam2Segmenter(Segmenter):
    """A `Sam2Model` of transformers. See `Segmenter`.

    With `multimask=False` an unstable mask is replaced by the best of three, as the model does by itself
    (`dynamic_multimask_via_stability` of its configuration).
    """

    backend, stretch = "SAM 2", True

    def _sizes(self) -> tuple[int, tuple[int, int]]:
        encoder = self.model.prompt_encoder
        return encoder.input_image_size, tuple(encoder.mask_input_size)

    def _encode(self, pixels: Tensor, canvas: Canvas) -> Features:
        return tuple(self.model.get_image_embeddings(hf_call.normalize(pixels, canvas, *hf_call.IMAGENET)))

    def _decode(
        self, features: Features, prompts: Prompts, multimask: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        output = hf_call.decode(self.model, prompts, multimask, image_embeddings=features)
        return output.pred_masks[:, 0], output.iou_scores[:, 0], output.object_score_logits[:, 0, 0]
