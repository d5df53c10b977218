"""The parts of an image that a question is about, found by a model that matches images with texts.

    clip, _, tokenizer = load_clip()
    view = matching_view(model, processor, ClipMatcher(clip, tokenizer))
    with AGLA(view=view)(model):
        out = model.generate(**inputs)

A matcher is a function of a picture (PIL) and a text, which gives the relevance `[h, w]` of the parts of all
of the picture and how well the two match, from -1 to 1. `BlipMatcher` is that of AGLA (An et al. 2024): what
cross-attention of BLIP looks at for its decision. `ClipMatcher` is another method, for any CLIP of open_clip:
it has no cross-attention, so what counts is the gradient of the cosine of image and text. Cosines of CLIP
are lower than those of BLIP, so that more of the image stays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from visionsel.multimodal.decoding.agla import image_relevance, masked, pixel_mask
from visionsel.multimodal.decoding.views import RandomTransform, from_patches, mask_of, samples_of, to_patches
from visionsel.multimodal.families import find_family
from visionsel.multimodal.prompts import questions

__all__ = ["BlipMatcher", "ClipMatcher", "MatchingView", "matching_view"]

Matcher = Callable[[Image.Image, str], tuple[Tensor, float]]
_FINE = 7  # cells a side that a map should have: those of a ResNet-50 for 224 pixels


@dataclass(frozen=True)
class BlipMatcher:
    """GradCAM of BLIP's cross-attention, see `image_relevance`; the match is the cosine of its two sides.

    Args:
        model: a `BlipForImageTextRetrieval`, such as of Salesforce/blip-itm-large-coco, the authors'.
        processor: its `BlipProcessor`.
        layer: of the text encoder; default the authors'.
    """

    model: nn.Module
    processor: Any
    layer: int = 6

    @torch.inference_mode(False)
    def __call__(self, picture: Image.Image, text: str) -> tuple[Tensor, float]:
        """Relevance `[h, w]` and match."""
        blip: Any = self.model
        given = self.processor(images=picture, text=text, truncation=True, return_tensors="pt")
        names = ("pixel_values", "input_ids", "attention_mask")
        pixels, ids, mask = (given[name].to(blip.device) for name in names)
        relevance, match = image_relevance(blip, pixels.to(blip.dtype), ids, mask, self.layer)
        return relevance[0].cpu(), float(match[0])


@dataclass(frozen=True)
class ClipMatcher:
    """The gradient of the cosine of image and text by an open_clip model, times what it is the gradient of.

    Of the tokens or the map `x` of a layer, relevance is the positive part of the sum over channels of `x`
    times the gradient (HiResCAM; Draelos and Carin 2020, arXiv:2011.08891). The picture is resized to the
    model's size whatever its own preprocessing would do, so that no part of it is cut off.

    Args:
        model: of open_clip: with a vision transformer of its own, a ResNet, or a tower of timm, ours too.
        tokenizer: its, such as `open_clip.get_tokenizer(name)`.
        layer: block or stage of the tower, from 0. None: the last block, or the deepest stage whose map has
            at least 7 cells a side. Of a block it is the tokens as its attention reads them, behind the norm:
            before it, a gradient times its token is 0 throughout, for the norm takes off their length.
    """

    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    layer: int | None = None

    @torch.inference_mode(False)
    def __call__(self, picture: Image.Image, text: str) -> tuple[Tensor, float]:
        """Relevance `[h, w]` and match.

        Raises:
            NotImplementedError: for a tower of another kind.
            ValueError: for a layer that does not exist.
        """
        clip: Any = self.model
        parameter = next(clip.parameters())
        wide = torch.promote_types(parameter.dtype, torch.float32)
        seen: list[Tensor] = []
        layers = _layers(clip.visual)
        hooks = [one.register_forward_hook(lambda *call: seen.append(call[2])) for one in layers]
        try:
            with torch.enable_grad():
                pixels = self._pixels(picture).to(parameter).requires_grad_()
                image = F.normalize(clip.encode_image(pixels).to(wide), dim=-1)
                with torch.no_grad():
                    ids = self.tokenizer([text]).to(parameter.device)
                    words = F.normalize(clip.encode_text(ids).to(wide), dim=-1)
                match = (image * words).sum()
                chosen = seen[self._choose(clip.visual, seen)]
                (slope,) = torch.autograd.grad(match, chosen)
        finally:
            for hook in hooks:
                hook.remove()
        product = _map(clip.visual, (chosen * slope).detach())
        return product.to(wide).sum(-1).clamp(min=0).cpu(), float(match.detach())

    def _pixels(self, picture: Image.Image) -> Tensor:
        """`[1, 3, H, W]`."""
        import open_clip

        known = open_clip.get_model_preprocess_cfg(self.model)
        size = known["size"] if not isinstance(known["size"], int) else (known["size"],) * 2
        mean, std = (torch.tensor(known[name])[:, None, None] for name in ("mean", "std"))
        resized = picture.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)
        return ((pil_to_tensor(resized) / 255 - mean) / std)[None]

    def _choose(self, visual: Any, seen: Sequence[Tensor]) -> int:
        number = len(seen)
        if self.layer is not None:
            if not 0 <= self.layer < number:
                raise ValueError(f"layer {self.layer} does not exist: the tower has 0 to {number - 1}")
            return self.layer
        if seen[-1].ndim == 3:
            return number - 1
        sides = [min(_map(visual, one).shape[:2]) for one in seen]
        return max((place for place in range(number) if sides[place] >= _FINE), default=0)


def _layers(visual: Any) -> list[nn.Module]:
    """Blocks or stages of an image tower of open_clip, first to last."""
    if hasattr(visual, "trunk"):
        blocks = getattr(visual.trunk, "blocks", None) or []
        if blocks and all(hasattr(one, "norm1") for one in blocks):
            return [one.norm1 for one in blocks]
        info = getattr(visual.trunk, "feature_info", None) or []
        modules = [visual.trunk.get_submodule(one["module"]) for one in info if one.get("module")]
        if modules:
            return modules
    elif hasattr(visual, "transformer"):
        return [one.ln_1 for one in visual.transformer.resblocks]
    elif hasattr(visual, "layer4"):
        return [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
    raise NotImplementedError(
        f"ClipMatcher does not know the layers of the image tower {type(visual).__name__}; write a function "
        "of picture and text that gives relevance [h, w] and match"
    )


def _map(visual: Any, values: Tensor) -> Tensor:
    """What a layer gave for one picture, as `[h, w, C]`."""
    trunk = getattr(visual, "trunk", None)
    if values.ndim == 4:
        channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        return values[0] if channels_last else values[0].permute(1, 2, 0)
    grid = getattr(visual, "grid_size", None) or getattr(
        getattr(trunk, "patch_embed", None), "grid_size", None
    )
    if values.ndim != 3 or grid is None or values.shape[1] < prod(grid):
        raise NotImplementedError(
            f"a layer of {type(trunk or visual).__name__} gives {list(values.shape)}, which is no map of the "
            "picture; choose another layer"
        )
    return values[0, -prod(grid) :].unflatten(0, tuple(grid))  # class and register tokens come first


@dataclass(frozen=True)
class MatchingView:
    """The image with all but the parts that matter to the question black; see `matching_view`."""

    matcher: Matcher
    processor: Any
    token: int
    pixels: RandomTransform
    images: Sequence[Sequence[Image.Image]] | None = None
    texts: Sequence[str] | None = None

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The same inputs with other pixels.

        Raises:
            NotImplementedError: for videos, or pixels that are no whole pictures.
            ValueError: for images or texts that are not those of the inputs.
        """
        if inputs.get("pixel_values_videos") is not None or inputs.get("pixel_values") is None:
            raise NotImplementedError("matching_view masks images: pass pixel_values, and no videos")
        ids = inputs["input_ids"]
        texts = self.texts
        if texts is None:
            texts = questions(self.processor, ids, mask_of(inputs), [self.token])
        for name, given in (("texts", texts), ("images", self.images)):
            if given is not None and len(given) != len(ids):
                raise ValueError(f"{name} must be one for each of {len(ids)} samples, got {len(given)}")
        if self.images is not None:
            return inputs | self._anew(inputs, self.images, texts)
        return inputs | {"pixel_values": self._in_place(inputs, texts)}

    def _anew(
        self, inputs: dict[str, Any], images: Sequence[Sequence[Image.Image]], texts: Sequence[str]
    ) -> dict[str, Tensor]:
        """The masked pictures, read by the model's own processor."""
        local = [
            [masked(picture.convert("RGB"), *self.matcher(picture, text)) for picture in pictures]
            for pictures, text in zip(images, texts, strict=True)
        ]
        made = self.processor.image_processor(images=local, return_tensors="pt")
        pixels, before = made["pixel_values"], inputs["pixel_values"]
        if pixels.shape != before.shape:
            raise ValueError(
                f"the images make pixel values {list(pixels.shape)}, the inputs have {list(before.shape)}; "
                "pass images=[[picture, ...], ...], those of the inputs, sample by sample"
            )
        return {"pixel_values": pixels.to(before)}

    def _in_place(self, inputs: dict[str, Any], texts: Sequence[str]) -> Tensor:
        """The pixels, black where they do not matter."""
        pixels: Tensor = inputs["pixel_values"]
        flat = pixels.ndim == 2
        if not flat and (pixels.ndim != 4 or len(pixels) != len(texts)):
            raise NotImplementedError(
                f"pixel values {list(pixels.shape)} of {len(texts)} samples are tiles, or several images a "
                "sample; pass matching_view(..., images=[[picture, ...], ...])"
            )
        owners = samples_of(inputs, "pixel_values", self.token, self.pixels.patch)
        if not flat:
            parts = [self._masked(one[None], texts[owner]) for one, owner in zip(pixels, owners, strict=True)]
            return torch.cat(parts)
        assert self.pixels.patch is not None
        grids, parts = inputs["image_grid_thw"].cpu(), []
        for part, grid, owner in zip(pixels.split(grids.prod(1).tolist()), grids, owners, strict=True):
            picture = from_patches(part, grid, self.pixels.patch)
            parts.append(to_patches(self._masked(picture, texts[owner]), grid, self.pixels.patch))
        return torch.cat(parts)

    def _masked(self, pixels: Tensor, text: str) -> Tensor:
        """Frames `[n, 3, H, W]` of one picture, all alike."""
        mean, std = (torch.tensor(one)[:, None, None] for one in (self.pixels.mean, self.pixels.std))
        colours = (pixels[0].float().cpu() * std + mean).clamp(0, 1)
        picture = to_pil_image((colours * 255).round().to(torch.uint8))
        keep = pixel_mask(*self.matcher(picture, text), *pixels.shape[-2:])
        return torch.where(keep.to(pixels.device), pixels, (-mean / std).to(pixels))


def matching_view(
    model: nn.Module,
    processor: Any,
    matcher: Matcher,
    images: Sequence[Sequence[Image.Image]] | None = None,
    texts: Sequence[str] | None = None,
) -> MatchingView:
    """The view of AGLA: the image with all but the parts that matter to the question black.

    Args:
        model, processor: the vision-language model's.
        matcher: a `BlipMatcher`, a `ClipMatcher`, or another function of picture and text.
        images: the pictures of each sample. None: they are taken from the pixel values, which are masked
            themselves. That is where a processor makes one picture of each image, at its size (LLaVA, Qwen,
            PaliGemma, Gemma without crops, InternVL with one tile); for tiles the pictures are needed.
        texts: the question of each sample. None: what its prompt says after its last image.
    """
    token = find_family(model).token_ids(model)["image"]
    return MatchingView(
        matcher, processor, token, RandomTransform.of(model, processor=processor), images, texts
    )
