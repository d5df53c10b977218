"""The importance map of VFlowOpt: what the global patches attend to, and the entropy of the patches."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visionsel.multimodal.families import find_family
from visionsel.multimodal.families.family import Encoded
from visionsel.multimodal.pruning.checks import require_finite, top, valid_or_all
from visionsel.multimodal.pruning.pruner import TowerCrop

__all__ = ["crop_entropy", "importance", "patch_entropy", "relevance"]

LEVELS = 256


def importance(
    attention: Tensor, entropy: Tensor, threshold: float, alpha: float, valid: Tensor | None = None
) -> Tensor:
    """What the global patches attend to, in the mean, plus the weighted softmax of the entropy.

    Global patches receive more than `threshold` times the mean of what all receive, averaged over queries and
    heads. Where there is none, the patch that receives most is the only one (the first of several).

    Args:
        attention: `[B, heads, N, N]`, queries before keys.
        entropy: `[B, N]`.
        threshold: 0 or more.
        alpha: weight of the entropy.
        valid: bool `[B, N]`, True at patches; None: all.

    Returns:
        `[B, N]`, 0 where not valid; float32 (float64 stays).

    Raises:
        ValueError: for NaN at a valid patch.
    """
    wide = torch.promote_types(attention.dtype, torch.float32)
    valid = valid_or_all(valid, entropy)
    outside = ~(valid[:, :, None] & valid[:, None])
    mean = attention.to(wide).mean(1).masked_fill(outside, 0)
    require_finite("attention", mean.sum(1), valid)
    require_finite("entropy", entropy, valid)
    received = mean.sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
    chosen = _global_patches(received, threshold, valid)
    context = (mean * chosen[..., None]).sum(1) / chosen.sum(1, keepdim=True).clamp(min=1)
    share = entropy.to(wide).masked_fill(~valid, -torch.inf).softmax(1).masked_fill(~valid, 0)
    return context + alpha * share


def relevance(crop: TowerCrop, threshold: float, chunk: int = 256) -> Tensor:
    """The first part of `importance` for one crop, without its matrix of attention.

    Args:
        crop: with its queries and keys.
        threshold: see `importance`.
        chunk: rows of attention at a time.

    Returns:
        `[patches]`.
    """
    received = crop.received().mean(0)[None]
    every = torch.ones_like(received, dtype=torch.bool)
    chosen = _global_patches(received, threshold, every)[0].nonzero()[:, 0]
    total = torch.zeros_like(received[0])
    for part in chosen.split(chunk):
        total += crop.rows(part).mean(0).sum(0)
    return total / len(chosen)


def _global_patches(received: Tensor, threshold: float, valid: Tensor) -> Tensor:
    """bool `[B, N]` of the attention that each patch receives."""
    mean = received.masked_fill(~valid, 0).sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
    chosen = (received > threshold * mean) & valid
    most = top(received, valid.any(1).long(), valid)
    return torch.where(chosen.any(1, keepdim=True), chosen, most)


def patch_entropy(
    pixels: Tensor, patch: int | tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Entropy of the grey levels of each patch: `-sum p log2 p` over a histogram of 256 bins.

    The normalisation is undone first; grey is the mean of the channels, rounded to a level from 0 to 255.

    Args:
        pixels: `[B, channels, H, W]` as the model gets them, `(x / 255 - mean) / std`.
        patch: side of a patch, or height and width; a rest at the right and lower border is in no patch.
        mean: of each channel.
        std: of each channel.

    Returns:
        `[B, (H // patch) * (W // patch)]` in bits, row by row; float32 (float64 stays).

    Raises:
        ValueError: for means or deviations that do not fit the channels, pictures without a patch, or NaN.
    """
    height, width = (patch, patch) if isinstance(patch, int) else patch
    if not len(mean) == len(std) == pixels.shape[1]:
        raise ValueError(f"{len(mean)} means and {len(std)} deviations for {pixels.shape[1]} channels")
    rows, columns = pixels.shape[2] // height, pixels.shape[3] // width
    if rows * columns == 0:
        raise ValueError(f"no patch of {height} x {width} in {pixels.shape[2]} x {pixels.shape[3]} pixels")
    if bool(pixels.isnan().any()):
        raise ValueError("pixels have NaN: they have no entropy; look at the image processor")
    wide = torch.promote_types(pixels.dtype, torch.float32)
    centre, scale = (torch.tensor(x, dtype=wide, device=pixels.device)[:, None, None] for x in (mean, std))
    # grey values are whole or thirds: rounding, unlike cutting off, does not hang on the last bit
    grey = ((pixels.to(wide) * scale + centre) * (LEVELS - 1)).mean(1).round().clamp(0, LEVELS - 1).long()
    grey = grey[:, : rows * height, : columns * width]
    grey = grey.unflatten(2, (columns, width)).unflatten(1, (rows, height)).transpose(2, 3)
    levels = grey.flatten(3).flatten(1, 2)
    histogram = torch.zeros(*levels.shape[:2], LEVELS, dtype=wide, device=pixels.device)
    histogram.scatter_add_(2, levels, torch.ones_like(levels, dtype=wide))
    return torch.special.entr(histogram / (height * width)).sum(2) / math.log(2)


def crop_entropy(
    model: Any, encoded: Encoded, patches: Sequence[int], mean: Sequence[float], std: Sequence[float]
) -> list[Tensor]:
    """The entropy of the patches of each crop that the vision tower saw, in its order.

    Args:
        model: the whole model.
        encoded: the call of the tower.
        patches: how many patches each crop has.
        mean: of each channel, as the processor subtracted it.
        std: of each channel, by which it divided.

    Returns:
        `[patches]` for each crop.

    Raises:
        NotImplementedError: where the pixels of the call do not make these crops.
    """
    name = "pixel_values" if encoded.modality == "image" else f"pixel_values_{encoded.modality}s"
    pixels: Tensor = encoded.arguments[name]
    side = model.config.vision_config.patch_size
    height, width = (side, side) if isinstance(side, int) else side
    if pixels.ndim == 2:  # Qwen-VL: one patch a row, [channels, frames, height, width]
        flat = pixels.unflatten(1, (len(mean), -1, width))
        values = patch_entropy(flat, (flat.shape[2], width), mean, std)[:, 0]
        values = values[_tower_order(model, encoded, len(values)).to(values.device)]
    else:
        if pixels.ndim == 5:
            pixels = pixels.flatten(0, 1)
            if encoded.modality == "image":  # samples with fewer crops than others are filled up with zeros
                pixels = pixels[pixels.to(model.dtype).flatten(1).ne(0).any(1)]
        values = patch_entropy(pixels, (height, width), mean, std).flatten()
    if len(values) != sum(patches):
        raise NotImplementedError(
            f"the vision tower saw {sum(patches)} patches, but the pixel values make {len(values)}; use "
            "alpha=0, which leaves the entropy out"
        )
    return list(values.split(list(patches)))


def _tower_order(model: Any, encoded: Encoded, patches: int) -> Tensor:
    """int64 `[patches]`: which patch of the pixel values comes where in the tower.

    A tower with windows sorts the squares of patches that make a token, and its family undoes that for what
    it pools: the mean of the places of a token's patches says where its square was.
    """
    pooled = find_family(model).pool(model, torch.arange(patches, dtype=torch.float64), encoded)
    size = patches // len(pooled)
    square = torch.empty(len(pooled), dtype=torch.int64)
    square[(pooled / size).long()] = torch.arange(len(pooled))
    return (square[:, None] * size + torch.arange(size)).flatten()
