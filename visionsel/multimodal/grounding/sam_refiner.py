"""The second half of F-LMM (Wu et al. 2025): a SAM makes a coarse mask of a word sharp.

Its prompts are the mask, the box around it and the word itself. The image encoder stays as it is; prompt
encoder and mask decoder are trained, as is what makes prompts of hidden states.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visionsel.multimodal.grounding.segmenters.canvas import Canvas

__all__ = ["SAMRefiner"]


class SAMRefiner(nn.Module):
    """Masks of words from coarse masks, boxes and hidden states.

    Args:
        sam: a `segment_anything` `Sam`, or a model built like it. Prompt encoder and mask decoder are copied;
            the image encoder is used as it stands, is not trained and not saved.
        layers: decoder layers of the language model.
        hidden: width of their states.

    Raises:
        TypeError: for another kind of segmenter.
    """

    def __init__(self, sam: nn.Module, layers: int, hidden: int) -> None:
        super().__init__()
        parts = ("image_encoder", "prompt_encoder", "mask_decoder", "preprocess")
        if missing := [part for part in parts if not hasattr(sam, part)]:
            raise TypeError(
                f"a refiner needs a Sam of segment_anything; {type(sam).__name__} has no {missing[0]}"
            )
        self._sam: tuple[Any] = (sam,)  # in a tuple: no part of this module
        encoder: Any = deepcopy(sam.prompt_encoder)
        decoder: Any = deepcopy(sam.mask_decoder)
        self.prompt_encoder = encoder.train().requires_grad_(True)
        self.mask_decoder = decoder.train().requires_grad_(True)
        self.text_layer_weights = nn.Parameter(torch.ones(layers))
        self.text_proj = nn.Linear(hidden, encoder.embed_dim)
        # what single masks from boxes, masks and text have no use for
        idle = [decoder.iou_prediction_head, *decoder.output_hypernetworks_mlps[1:]]
        idle += [encoder.no_mask_embed, encoder.not_a_point_embed, *encoder.point_embeddings[:2]]
        for module in idle:
            module.requires_grad_(False)

    @torch.no_grad()
    def encode(self, images: Sequence[Any]) -> tuple[Tensor, list[Canvas]]:
        """What the frozen image encoder makes of images, `[B, C, h, w]`, and their places on its square.

        Args:
            images: PIL images, or uint8 arrays `[H, W, 3]`. One that comes several times is encoded once.

        Raises:
            ValueError: for an array of another shape or type, or an image too thin for the square.
        """
        sam, device = self._sam[0].to(self.text_proj.weight.device).eval(), self.text_proj.weight.device
        side = sam.image_encoder.img_size
        first = {id(image): number for number, image in reversed(list(enumerate(images)))}
        same = [first[id(image)] for image in images]
        pixels = [_pixels(image) for image in images]
        low_res = tuple(sam.prompt_encoder.mask_input_size)
        canvases = [Canvas.of((p.shape[0], p.shape[1]), side, low_res, False) for p in pixels]
        found: dict[tuple[int, int], list[int]] = {}
        for number in sorted(set(same)):
            found.setdefault(canvases[number].inside, []).append(number)
        embeddings: dict[int, Tensor] = {}
        for numbers in found.values():
            batch = torch.stack([canvases[number].resize(pixels[number]) for number in numbers])
            encoded = sam.image_encoder(sam.preprocess(batch.to(device).float()))
            embeddings |= dict(zip(numbers, encoded, strict=True))
        return torch.stack([embeddings[number] for number in same]), canvases

    def forward(
        self, embeddings: Tensor, owners: Tensor, masks: Tensor, boxes: Tensor, text: Sequence[Tensor]
    ) -> Tensor:
        """A mask for each of N words, the single one of SAM.

        Args:
            embeddings: of the images, `[B, C, h, w]`.
            owners: the image of each word, int64 `[N]`.
            masks: logits of the coarse masks on the square, `[N, 4h, 4w]`.
            boxes: (x0, y0, x1, y1) on the square, `[N, 4]`.
            text: for each word its hidden states, `[tokens, layers, hidden]`.

        Returns:
            logits in low resolution, `[N, 4h, 4w]`.
        """
        out: dict[int, Tensor] = {}
        by_length: dict[int, list[int]] = {}
        for number, states in enumerate(text):  # SAM's transformer has no mask for padding
            by_length.setdefault(len(states), []).append(number)
        for numbers in by_length.values():
            part = torch.tensor(numbers, device=embeddings.device)
            states = torch.stack([text[number] for number in numbers]).to(embeddings)
            found = self._decode(embeddings[owners[part]], masks[part], boxes[part], states)
            out |= dict(zip(numbers, found, strict=True))
        return torch.stack([out[number] for number in range(len(text))])

    def _decode(self, source: Tensor, masks: Tensor, boxes: Tensor, states: Tensor) -> Tensor:
        """Words of equally many tokens, each with its image's embedding."""
        decoder: Any = self.mask_decoder
        encoder: Any = self.prompt_encoder
        sparse, dense = encoder(points=None, boxes=boxes, masks=masks[:, None])
        mixed = (states * self.text_layer_weights.softmax(0)[:, None]).sum(2)
        said = self.text_proj(mixed)
        # as `MaskDecoder.predict_masks`, which repeats one image for all prompts
        outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([outputs.expand(len(source), -1, -1), sparse, said], 1)
        positions = encoder.get_dense_pe().expand(len(source), -1, -1, -1)
        tokens, seen = decoder.transformer(source + dense, positions, tokens)
        fine = decoder.output_upscaling(seen.transpose(1, 2).unflatten(2, source.shape[-2:]))
        kernel = decoder.output_hypernetworks_mlps[0](tokens[:, 1])
        return (kernel[:, None] @ fine.flatten(2)).unflatten(2, fine.shape[-2:])[:, 0]


def _pixels(image: Any) -> np.ndarray:
    """uint8 `[H, W, 3]`."""
    pixels = image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"an image is a PIL image or uint8 [H, W, 3]; got {pixels.dtype} {list(pixels.shape)}"
        )
    return pixels
