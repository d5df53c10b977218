"""One interface to SAM, SAM 2 and SAM 3 as tools for prompts: `Segmenter`."""

import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from visionsel.multimodal.grounding.segmenters.canvas import Canvas
from visionsel.multimodal.grounding.segmenters.masks import Masks
from visionsel.multimodal.grounding.segmenters.prompts import Prompts, check_prompts, to_tensor

__all__ = ["Features", "Segmenter"]

Features = tuple[Tensor, ...]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Segmenter(ABC):
    """A promptable segmentation model, set on one image at a time.

        segmenter = build_segmenter("embedded").set_image(image)
        masks = segmenter.predict(boxes=[[10, 12, 40, 50]])
        masks.best()                                    # bool [1, H, W]

    The model is used as it stands: evaluation mode is for the time of a call only, and no parameter changes.

    Args:
        model: with parameters in float32.
        dtype: of autocast in the image encoder, a torch dtype or its name; `"auto"`: bfloat16 on CUDA,
            float32 elsewhere. Prompts are always decoded in float32, and results are float32.
        cache: how many images stay encoded (of 1024 pixels a side: 4 MB each for SAM, 16 MB for SAM 2);
            the one used longest ago goes first.
        chunk: how many prompts the decoder sees at a time; 16 take about 2 GB with SAM's own sizes.

    Raises:
        TypeError, ValueError: for a value that cannot be.
    """

    backend: ClassVar[str]  # name of the kind of model, for messages and to tell masks apart
    stretch: ClassVar[bool]  # images are stretched over the square, not padded to it

    def __init__(
        self, model: nn.Module, *, dtype: str | torch.dtype = "auto", cache: int = 8, chunk: int = 16
    ) -> None:
        self.model: Any = model
        self.dtype = _read_dtype(dtype)
        if cache < 0:
            raise ValueError(f"cache is a number of images, 0 or more, got {cache}")
        if chunk < 1:
            raise ValueError(f"chunk is a number of prompts, 1 or more, got {chunk}")
        self.cache, self.chunk = cache, chunk
        halved = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
        if halved:
            raise ValueError(
                f"the model has parameters in {halved.pop()}, in which SAM's prompt encoder fails; load it "
                "in float32, and pass the precision of the image encoder as dtype="
            )
        self._images: OrderedDict[tuple[Any, ...], Features] = OrderedDict()
        self._features: Features | None = None
        self._canvas: Canvas | None = None

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(iter(self.model.parameters())).device

    @property
    def canvas(self) -> Canvas:
        """The place of the image that was set.

        Raises:
            RuntimeError: before `set_image`.
        """
        if self._canvas is None:
            raise RuntimeError("no image yet; call set_image(image) first")
        return self._canvas

    def set_image(self, image: Image.Image | np.ndarray) -> Self:
        """Encode an image, or find it in the cache; prompts are about it from now on.

        Args:
            image: PIL, of any 8-bit mode, or uint8 `[H, W, 3]`, RGB.

        Returns:
            self.

        Raises:
            TypeError: for another kind of image.
            ValueError: for a wrong shape, or an image too thin for the model's square.
        """
        pixels = _read_image(image)
        side, low_res = self._sizes()
        canvas = Canvas.of((pixels.shape[0], pixels.shape[1]), side, low_res, self.stretch)
        dtype = self._encoder_dtype()
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=16).digest()
        key = (digest, pixels.shape, self.device, dtype)
        features = self._images.pop(key, None)
        if features is None:
            inside = canvas.resize(pixels)[None].to(self.device)
            autocast = torch.autocast(self.device.type, _half(dtype), enabled=dtype != torch.float32)
            with torch.no_grad(), _evaluating(self.model), autocast:
                encoded = self._encode(inside, canvas)
            features = tuple(x.float() for x in encoded)
        if self.cache:
            self._images[key] = features
            while len(self._images) > self.cache:
                self._images.popitem(last=False)
        self._features, self._canvas = features, canvas
        return self

    def predict(
        self,
        points: Any = None,
        labels: Any = None,
        boxes: Any = None,
        mask_input: Any = None,
        multimask: bool = True,
    ) -> Masks:
        """Masks for N prompts about the image. At least one of points, boxes and mask_input is needed.

        Args:
            points: `[N, P, 2]`, (x, y) in pixels of the image; pixel i is at i, and the far edge is inside.
            labels: `[N, P]` for points: 1 inside the object, 0 outside it, -1 no point (fills up rows).
            boxes: `[N, 4]`, (x0, y0, x1, y1) in pixels of the image.
            mask_input: `[N, h, w]`, logits of an earlier answer of this model about the image
                (`Masks.low_res[:, m]`) or from `mask_prompt`; or such `Masks`, of which the best are taken.
                Give points or boxes too: SAMs are trained on masks beside points, and a mask alone says
                little to them (IoU 0.10 for the small SAM, given the true mask; 0.94 with a point).
            multimask: three proposals a prompt, for prompts that may mean a part or the whole; else one.

        Returns:
            the `Masks`, on the model's device.

        Raises:
            RuntimeError: before `set_image`.
            TypeError: for what is no array of numbers.
            ValueError: for wrong shapes or numbers of prompts, NaN, places outside the image, unknown labels,
                prompts with outside points only, and masks of another model or image.
        """
        canvas = self.canvas
        assert self._features is not None
        if isinstance(mask_input, Masks):
            if mask_input.backend != self.backend or mask_input.canvas != canvas:
                raise ValueError(
                    f"these masks are of {mask_input.backend}, for an image of {mask_input.canvas.image}; "
                    f"this is {self.backend} on one of {canvas.image}: pass mask_prompt(masks.only_best()"
                    ".logits()[:, 0]) for another model, and only masks of the same image"
                )
            mask_input = mask_input.only_best().low_res[:, 0]
        prompts = check_prompts(points, labels, boxes, mask_input, canvas)
        features = tuple(x.to(self.device) for x in self._features)
        answers = []
        off = torch.autocast(self.device.type, enabled=False)
        with torch.no_grad(), _evaluating(self.model), off:
            for part in prompts.split(self.chunk, self.device):
                answers.append(self._decode(features, part, multimask))
        low_res, iou, scores = zip(*answers, strict=True)
        score = None if scores[0] is None else torch.cat(scores)
        return Masks(torch.cat(low_res), torch.cat(iou), score, canvas, self.backend)

    def mask_prompt(self, prior: Any) -> Tensor:
        """A heatmap as this model's `mask_input`.

        Args:
            prior: `[H, W]` or `[N, H, W]` in pixels of the image, logits: above 0 inside, below 0 outside.
                For a heatmap in [0, 1], `torch.logit(heatmap, eps=1e-3)`.

        Returns:
            float32 `[N, h, w]`, N 1 for `[H, W]`.

        Raises:
            RuntimeError: before `set_image`.
            TypeError: for what is no array of numbers.
            ValueError: for a size that is not the image's, NaN or infinity.
        """
        canvas = self.canvas
        height, width = canvas.image
        shape = f"[{height}, {width}] or [N, {height}, {width}]"
        if not isinstance(prior, Tensor):
            prior = np.asarray(prior)
        logits = to_tensor(prior[None] if prior.ndim == 2 else prior, "prior", torch.float32, shape, 3)
        if logits.shape[1:] != canvas.image or not len(logits):
            raise ValueError(f"prior has shape {list(prior.shape)}; expected {shape}, the image's size")
        if not logits.isfinite().all():
            raise ValueError("prior holds NaN or infinity; clamp it to finite logits, such as +-10")
        return canvas.shrink(logits.to(self.device))

    def forget(self) -> None:
        """Drop all encoded images; for a model whose weights have changed."""
        self._images.clear()
        self._features = self._canvas = None

    @abstractmethod
    def _sizes(self) -> tuple[int, tuple[int, int]]:
        """Pixels a side of the square, and height and width of low-resolution logits."""

    @abstractmethod
    def _encode(self, pixels: Tensor, canvas: Canvas) -> Features:
        """Features `[1, ...]` of uint8 pixels `[1, 3, h, w]` at their size on the square."""

    @abstractmethod
    def _decode(
        self, features: Features, prompts: Prompts, multimask: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits `[N, M, h, w]`, predicted IoUs `[N, M]` and object scores `[N]`, if there are any."""

    def _encoder_dtype(self) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def _read_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None is auto."""
    if dtype == "auto":
        return None
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r}; expected 'auto' or one of {', '.join(DTYPES)}")
    return found


def _half(dtype: torch.dtype) -> torch.dtype:
    """A dtype that autocast takes also where it is off."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


def _read_image(image: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 `[H, W, 3]`."""
    if isinstance(image, Image.Image):
        if image.mode[0] in "IF":
            raise TypeError(f"an image of mode {image.mode} has more than 8 bits; scale it to RGB first")
        image = np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray):
        raise TypeError(
            f"the image is a {type(image).__name__}; expected a PIL image or a uint8 array [H, W, 3]"
        )
    if image.dtype != np.uint8:
        raise TypeError(f"the image is of {image.dtype}; expected uint8 from 0 to 255")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"the image has shape {list(image.shape)}; expected [H, W, 3], one at a time")
    return image


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: no dropout, no other masks than at inference."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
