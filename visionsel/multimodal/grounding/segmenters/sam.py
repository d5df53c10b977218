"""SAM by `segment_anything`'s own modules (Kirillov et al. 2023), also the small one that ships.

Equal to `SamPredictor`, which takes one prompt at a time.
"""

from torch import Tensor

from visionsel.multimodal.grounding.segmenters.canvas import Canvas
from visionsel.multimodal.grounding.segmenters.prompts import Prompts
from visionsel.multimodal.grounding.segmenters.segmenter import Features, Segmenter

__all__ = ["SamSegmenter"]


class SamSegmenter(Segmenter):
    """A `segment_anything` `Sam`, or a model built like it. See `Segmenter`."""

    backend, stretch = "SAM (segment_anything)", False

    def _sizes(self) -> tuple[int, tuple[int, int]]:
        return self.model.image_encoder.img_size, tuple(self.model.prompt_encoder.mask_input_size)

    def _encode(self, pixels: Tensor, canvas: Canvas) -> Features:
        return (self.model.image_encoder(self.model.preprocess(pixels)),)

    def _decode(
        self, features: Features, prompts: Prompts, multimask: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        points = None if prompts.points is None else (prompts.points, prompts.labels)
        masks = None if prompts.masks is None else prompts.masks[:, None]
        encoder = self.model.prompt_encoder
        sparse, dense = encoder(points=points, boxes=prompts.boxes, masks=masks)
        low_res, iou = self.model.mask_decoder(
            image_embeddings=features[0],
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        return low_res, iou, None
