"""SAM and SAM-HQ of transformers (Kirillov et al. 2023; Ke et al. 2023)."""

from torch import Tensor

from visionsel.multimodal.grounding.segmenters import hf_call
from visionsel.multimodal.grounding.segmenters.canvas import Canvas
from visionsel.multimodal.grounding.segmenters.prompts import Prompts
from visionsel.multimodal.grounding.segmenters.segmenter import Features, Segmenter

__all__ = ["HFSamSegmenter"]


class HFSamSegmenter(Segmenter):
    """A `SamModel` or `SamHQModel` of transformers. See `Segmenter`."""

    backend, stretch = "SAM (transformers)", False

    def _sizes(self) -> tuple[int, tuple[int, int]]:
        encoder = self.model.prompt_encoder
        height, width = encoder.image_embedding_size
        return encoder.input_image_size, (4 * height, 4 * width)

    def _encode(self, pixels: Tensor, canvas: Canvas) -> Features:
        embedded = self.model.get_image_embeddings(hf_call.normalize(pixels, canvas, *hf_call.IMAGENET))
        if isinstance(embedded, Tensor):
            return (embedded,)
        last, between = embedded
        return last, between[0]  # of the first layer with global attention, the only one that SAM-HQ looks at

    def _decode(
        self, features: Features, prompts: Prompts, multimask: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        more = {"intermediate_embeddings": features[1:]} if len(features) > 1 else {}
        output = hf_call.decode(self.model, prompts, multimask, image_embeddings=features[0], **more)
        return output.pred_masks[:, 0], output.iou_scores[:, 0], None
