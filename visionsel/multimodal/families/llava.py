"""LLaVA-1.5 and ViP-LLaVA: one square picture, one token a patch."""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import nn

from visionsel.multimodal.families.canvas import Canvas
from visionsel.multimodal.families.family import Encoded, Family, TokenLayout, View
from visionsel.multimodal.timm_tower import TimmTowerConfig

__all__ = ["Llava"]

# vision towers by their model type: whether the sequence starts with a class token
CLASS_TOKEN = {"clip_vision_model": True, "siglip_vision_model": False, TimmTowerConfig.model_type: False}


class Llava(Family):
    """The family of a CLIP tower; `for_model` gives that of another tower."""

    name = "LLaVA"
    model_types: tuple[str, ...] = ("llava", "vipllava")
    has_cls = True

    def for_model(self, model: nn.Module) -> "Llava":
        """The family as this model has it: whether there is a class token depends on its tower.

        Raises:
            NotImplementedError: for a tower that is not known.
        """
        kind = _config(model).vision_config.model_type
        if kind not in CLASS_TOKEN:
            raise NotImplementedError(
                f"a {self.name} with a {kind} tower; towers can be {', '.join(CLASS_TOKEN)}"
            )
        family = copy(self)
        family.has_cls = CLASS_TOKEN[kind]
        return family

    def tower_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The layers of the CLIP or SigLIP tower.

        Raises:
            NotImplementedError: for a timm backbone, whose attention does not run through transformers.
        """
        config = _config(model).vision_config
        if config.model_type == TimmTowerConfig.model_type:
            raise NotImplementedError(
                f"the vision tower is {config.architecture} of timm, whose attention cannot be read; "
                "use a method that does not read attention or keys of the tower"
            )
        tower: Any = model.model.vision_tower  # type: ignore[union-attr]
        return getattr(tower, "vision_model", tower).encoder.layers  # versions differ in this level

    def feature_layer(self, model: nn.Module) -> int:
        """The layer whose output is projected; the last of them where there are several."""
        config = _config(model)
        # ViP-LLaVA's was plural in earlier versions
        name = "vision_feature_layer" if hasattr(config, "vision_feature_layer") else "vision_feature_layers"
        chosen = getattr(config, name)
        count = len(self.tower_layers(model))
        # hidden state 0 is what enters layer 0, hidden state i is the output of layer i - 1
        states = [i if i >= 0 else count + 1 + i for i in ([chosen] if isinstance(chosen, int) else chosen)]
        return max(0, max(states) - 1)

    def projector(self, model: nn.Module) -> nn.Module | None:
        """None where class tokens pass through it too."""
        if self.has_cls and getattr(_config(model), "vision_feature_select_strategy", "default") == "full":
            return None
        return model.model.multi_modal_projector  # type: ignore[union-attr, return-value]

    def layouts(
        self,
        model: nn.Module,
        encoded: Encoded,
        processor: Any = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[TokenLayout]:
        """One grid an image, behind its class token where that is kept (select strategy "full")."""
        pixels, patch = encoded.arguments["pixel_values"], _config(model).vision_config.patch_size
        height, width = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        index = torch.arange(height * width).view(height, width)
        before = self.kept_class_tokens(model, encoded)
        check_sizes(sizes, len(pixels))
        layouts = []
        for number in range(len(pixels)):
            box = None
            if processor is not None and sizes is not None:
                canvas = _canvas(processor, sizes[number], tuple(pixels.shape[-2:]))
                box = canvas.cropped(0, 0, height * patch, width * patch).box
            view = View("image", before + index, number * height * width + index, box)
            layouts.append(TokenLayout(before + height * width, (view,)))
        return layouts

    def kept_class_tokens(self, model: nn.Module, encoded: Encoded) -> int:
        """How many class tokens (0 or 1) are among the tokens of a picture.

        Raises:
            ValueError: when the model drops a patch for want of a class token.
        """
        strategy = encoded.arguments.get("vision_feature_select_strategy")
        strategy = strategy or getattr(_config(model), "vision_feature_select_strategy", "default")
        if strategy == "default" and not self.has_cls:
            raise ValueError(
                'vision_feature_select_strategy "default" drops the first patch of a tower without a class '
                'token; set it to "full"'
            )
        return int(strategy == "full" and self.has_cls)


def check_sizes(sizes: Sequence[Any] | None, number: int) -> None:
    """ValueError unless there is one size an image."""
    if sizes is not None and len(sizes) != number:
        raise ValueError(
            f"{len(sizes)} sizes for {number} images; pass (height, width) of each image of the batch"
        )


def _config(model: nn.Module) -> Any:
    return model.config


def _canvas(processor: Any, size: Sequence[int], crop: tuple[int, int]) -> Canvas:
    """What the image processor of LLaVA, CLIP or SigLIP makes of an image: pad, resize, crop the centre."""
    images = getattr(processor, "image_processor", processor)
    canvas = Canvas.of(size)
    if getattr(images, "do_pad", False) and hasattr(images, "pad_to_square"):
        canvas = canvas.squared()
    if images.do_resize:
        edge = images.size.get("shortest_edge")
        if edge:
            longer = int(edge * max(canvas.height, canvas.width) / min(canvas.height, canvas.width))
            tall = canvas.height > canvas.width
            canvas = canvas.resized(longer, edge) if tall else canvas.resized(edge, longer)
        else:
            canvas = canvas.resized(images.size["height"], images.size["width"])
    if getattr(images, "do_center_crop", False):
        height, width = images.crop_size["height"], images.crop_size["width"]
        canvas = canvas.cropped((canvas.height - height) // 2, (canvas.width - width) // 2, height, width)
    if (canvas.height, canvas.width) != crop:
        raise ValueError(
            f"the processor makes {canvas.height} x {canvas.width} pixels of an image of {size[0]} x "
            f"{size[1]}, but the tower got {crop[0]} x {crop[1]}; pass the processor that made them"
        )
    return canvas
