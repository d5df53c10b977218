"""What single layers and heads attend to in an image while a word is written."""

from typing import Any

import torch
from PIL import Image

from demos.models import MAX_NEW_TOKENS, Models
from visionsel.multimodal.grounding import AttentionRecorder, TokenGrid
from visionsel.multimodal.grounding.words import token_spans, tokens_between
from visionsel.multimodal.prompts import chat_inputs, user_turn
from visionsel.viz import overlay_heatmap

__all__ = ["draw_head_maps"]

SIDE = 256  # pixels of the longer side of a picture


@torch.inference_mode()
def draw_head_maps(
    models: Models, image: Image.Image, question: str, span: tuple[int, int], layer: int | None
) -> list[tuple[Image.Image, str]]:
    """Pictures with captions: of each head of a layer, or of the mean of the heads of each layer.

    Args:
        models: the model answers again, greedily, and so says the same.
        image: RGB.
        question: that was asked.
        span: of the word in the answer, in characters.
        layer: None: all layers.
    """
    inputs = chat_inputs(models.processor, [[user_turn(question)]], [[image]])
    inputs = inputs.to(models.model.device, models.model.dtype)
    layers = None if layer is None else [layer]
    with AttentionRecorder(models.model, layers=layers, columns="image") as recorder:
        tokens = models.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :].tolist()
    _, spans = token_spans(models.processor.tokenizer, new)
    own = list(tokens_between(spans, span))
    if not own:
        raise ValueError("the model gave another answer this time; ask again")
    grid = TokenGrid.from_inputs(models.model, models.processor, inputs, (image.height, image.width))
    start = int(grid.start or 0)
    rows = recorder.attentions[:, 0, :, own, start : start + grid.n].float().cpu().mean(2)
    maps = rows.mean(1) if layer is None else rows[0]
    kind = "layer" if layer is None else f"layer {layer}, head"
    small = _small(image)
    return [(_draw(small, grid, one), f"{kind} {number}") for number, one in enumerate(maps)]


def _draw(image: Image.Image, grid: Any, values: torch.Tensor) -> Image.Image:
    heatmap = grid.rasterize(values)
    sized = torch.nn.functional.interpolate(heatmap[None, None], (image.height, image.width), mode="nearest")
    return overlay_heatmap(image, sized[0, 0].numpy(), legend=False)


def _small(image: Image.Image) -> Image.Image:
    factor = SIDE / max(image.size)
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))
