"""AGLA: what the model says to the parts of the image that the question is about counts too (An et al. 2024).

Source: arXiv 2406.12718 and its released code. There, the second view decodes on the cache of the main one
from the second token on, which makes it the main view: `fidelity="code"`. Answers of one word do not show it.
Two equal views sharpen to temperature `1 / (1 + alpha)`, so compare with that, and with greedy decoding.

    blip = BlipForImageTextRetrieval.from_pretrained(...)
    matcher = BlipMatcher(blip, AutoProcessor.from_pretrained(...))
    with AGLA(view=matching_view(model, processor, matcher))(model):
        out = model.generate(**inputs)

The matchers and `matching_view` are in `visionsel.multimodal.decoding.matching`; here is what they rest on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.functional import gaussian_blur

from visionsel.multimodal.decoding.two_view import TwoView, View, Views, agree, check_strengths
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.session import Session

__all__ = ["AGLA", "image_relevance", "masked", "pixel_mask", "relevant"]


@dataclass(frozen=True)
class AGLA(Intervention):
    """Adds the logits of an image whose irrelevant parts are masked: `z + alpha z'`.

    Args:
        alpha: how strongly; 0: everything is as without AGLA.
        beta: tokens less probable than `beta` times the most probable one are out; 0: all are in.
        view: of the inputs of `generate()`, with the image masked; `matching_view` makes one. There is no
            default: what is relevant says another model, which reads picture and question.
        fidelity: `"paper"`, or `"code"`: the second view counts for the first token, and is the main one
            after.

    Raises:
        ValueError: for a value out of range, or, when the context is entered, without a view.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.embedded import load_clip
        >>> from visionsel.multimodal import AGLA
        >>> from visionsel.multimodal.decoding import ClipMatcher, matching_view
        >>> clip, preprocess, tokenizer = load_clip()
        >>> view = matching_view(model, processor, ClipMatcher(clip, tokenizer))
        >>> with AGLA(view=view)(model):
        ...     answer = model.generate(**inputs)
    """

    alpha: float = 2.0
    beta: float = 0.5
    view: View | None = None
    fidelity: str = "paper"

    def __post_init__(self) -> None:
        if self.fidelity not in ("paper", "code"):
            raise ValueError(f'fidelity must be "paper" or "code", got {self.fidelity!r}')
        check_strengths(self.alpha, self.beta)

    @contextmanager
    def attach(self, session: Session) -> Iterator[Views]:
        """See `Intervention`; yields the second view's side."""
        if self.view is None:
            raise ValueError(
                "AGLA needs a view with the image masked by its relevance to the question, which another "
                "model knows: pass view=matching_view(model, processor, matcher), with a BlipMatcher or a "
                "ClipMatcher of visionsel.multimodal.decoding"
            )
        once = self.fidelity == "code"
        with TwoView(self.view, agree(self.alpha), self.beta, once).attach(session) as views:
            yield views


@torch.inference_mode(False)  # it takes gradients, whatever the caller does
def image_relevance(
    model: nn.Module, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, layer: int = 6
) -> tuple[Tensor, Tensor]:
    """How much each patch of an image speaks for its match with a text, by GradCAM of a BLIP model.

    Cross-attention of the text's tokens to the patches, times its gradient for the score of a match where
    that is positive, averaged over heads and over the tokens between the first and the last.

    Args:
        model: a `BlipForImageTextRetrieval`; its parameters and their gradients are left alone.
        pixel_values: `[B, 3, H, W]`.
        input_ids, attention_mask: `[B, T]`, padded on the right.
        layer: of the text encoder.

    Returns:
        relevance `[B, h, w]` of the patches; match `[B]`: the cosine of image and text, from -1 to 1.
    """
    blip: Any = model
    seen: list[Tensor] = []
    attention = blip.text_encoder.encoder.layer[layer].crossattention.self
    handle = attention.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    given = {"input_ids": input_ids.clone(), "attention_mask": attention_mask.clone()}
    try:
        with torch.enable_grad():  # the pixels carry the gradient, whatever the parameters do
            pixels = pixel_values.detach().clone().requires_grad_()
            score = blip(pixel_values=pixels, **given, use_itm_head=True).itm_score[:, 1].sum()
            weights = seen[0]
            (slope,) = torch.autograd.grad(score, weights)
    finally:
        handle.remove()
    with torch.no_grad():
        match = blip(pixel_values=pixels.detach(), **given, use_itm_head=False).itm_score.diagonal()
    side = blip.config.vision_config.patch_size
    grid = tuple(length // side for length in pixel_values.shape[-2:])
    cam = (weights.detach() * slope.clamp(min=0)).mean(1)[..., 1:]  # without the class token of the image
    place, length = torch.arange(input_ids.shape[1], device=cam.device), attention_mask.sum(1, keepdim=True)
    words = ((place > 0) & (place < length - 1)).to(cam)
    relevance = (cam * words[..., None]).sum(1) / words.sum(1, keepdim=True).clamp(min=1)
    return relevance.unflatten(1, grid), match


def relevant(relevance: Tensor, match: float) -> Tensor:
    """The adaptive mask: the better the match, the fewer pixels stay.

    Args:
        relevance: `[H, W]` of the pixels.
        match: of image and text.

    Returns:
        bool `[H, W]`, True where the pixel stays: those at least as relevant as the one of rank
        `int(H W min(1 - match / 2, 1 - 1e-5))`, counted from 0.
    """
    ranked = relevance.flatten().sort(descending=True).values
    rank = int(len(ranked) * min(1 - match / 2, 1 - 1e-5))
    return relevance >= ranked[min(rank, len(ranked) - 1)]


def masked(picture: Any, relevance: Tensor, match: float) -> Any:
    """A picture that is black but for its relevant parts.

    Args:
        picture: of PIL, or `[C, H, W]`.
        relevance: `[h, w]` of the patches; it is resized and blurred as in the released code (LAVIS).
        match: of image and text.

    Returns:
        what `picture` is: a PIL image, or a tensor.
    """
    if not isinstance(picture, Tensor):
        from torchvision.transforms.functional import pil_to_tensor, to_pil_image

        return to_pil_image(masked(pil_to_tensor(picture.convert("RGB")), relevance, match))
    height, width = picture.shape[-2:]
    return picture * pixel_mask(relevance, match, height, width).to(picture.device)


def pixel_mask(relevance: Tensor, match: float, height: int, width: int) -> Tensor:
    """Which pixels of a picture stay.

    Args:
        relevance: `[h, w]` of the patches, which cover all of the picture.
        match: of image and text.
        height, width: of the picture.

    Returns:
        bool `[height, width]`.
    """
    wide = functional.interpolate(
        relevance[None, None].double(), (height, width), mode="bicubic", align_corners=False
    )
    sigma = 0.02 * max(height, width)
    reach = min(int(4 * sigma + 0.5), height - 1, width - 1)
    if reach:
        wide = gaussian_blur(wide, [2 * reach + 1] * 2, [sigma] * 2)
    return relevant(wide[0, 0], match)
