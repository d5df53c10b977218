"""What layers look at, as maps: attention of a query, routed windows, focal modulators, feature colours."""

from typing import Any

import torch
from timm.models.focalnet import FocalModulation as TimmFocalModulation
from torch import Tensor, nn

from visionsel.layers.bilevel_routing_attention import BilevelRoutingAttention
from visionsel.layers.focal_modulation import FocalModulation
from visionsel.layers.neighborhood_attention import NeighborhoodAttention, crop_to, pad_to
from visionsel.ops import bilevel_routing_attention, neighborhood_attention

__all__ = ["OPERATORS", "attention", "feature_colors", "modulation", "routed_boxes", "spatial"]

OPERATORS = (BilevelRoutingAttention, NeighborhoodAttention, FocalModulation, TimmFocalModulation)
"""Layers that say by themselves where they look."""

Query = tuple[float, float]


def attention(layer: nn.Module, x: Tensor, query: Query) -> Tensor:
    """Attention weights of the query's position, the mean over heads.

    An output is a sum of values times weights, so that its gradient for the values is the weights: they come
    from the operator itself, whatever its backend.

    Args:
        layer: a `NeighborhoodAttention` or a `BilevelRoutingAttention`.
        x: its input, `[B, H, W, C]`.
        query: place in the map as shares of its height and width.

    Returns:
        `[B, H, W]`; they add up to 1, but for what falls on padding.
    """
    height, width = x.shape[1:3]
    row, column = place(query, height, width)
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone()
        if isinstance(layer, NeighborhoodAttention):
            kernel, dilation = layer.kernel_size, layer.dilation
            x = pad_to(x, kernel[0] * dilation[0], kernel[1] * dilation[1])
            qkv = layer.qkv(x).detach().unflatten(3, (3, layer.num_heads, layer.dim // layer.num_heads))
            q, k, v = qkv.unbind(3)
            v = v.clone().requires_grad_()
            out = neighborhood_attention(q, k, v, kernel, dilation, layer.rpb, layer.scale, layer.backend)
        else:
            assert isinstance(layer, BilevelRoutingAttention)
            q, k, v, _, grid = layer.project(x)
            q, k, v = q.detach(), k.detach(), v.detach().clone().requires_grad_()
            index, weight = layer.choose(q, k, grid, height, width)
            keys, values = (layer.pool(k, grid), layer.pool(v, grid)) if layer.kv_per_win > 0 else (k, v)
            out = bilevel_routing_attention(
                q,
                keys,
                values,
                grid,
                layer.routed(grid),
                layer.scale,
                layer.backend,
                routing=index,
                routing_weight=weight,
            )
        (weights,) = torch.autograd.grad(out[:, row, column, :, 0].sum(), v)
    return crop_to(weights, height, width)[..., 0].mean(3)


@torch.no_grad()
def routed_boxes(
    layer: BilevelRoutingAttention, x: Tensor, query: Query
) -> tuple[tuple[float, ...], list[list[tuple[float, ...]]]]:
    """The window of a query and those that it is routed to.

    Args:
        layer: of the operator.
        x: its input, `[B, H, W, C]`.
        query: place in the map as shares of its height and width.

    Returns:
        The query's window, and the routed ones of each sample, as `(x0, y0, x1, y1)` in shares of the map's
        width and height.
    """
    height, width = x.shape[1:3]
    padded, _, _, _, (rows, columns) = layer.project(x)
    high, wide = padded.shape[1] // rows, padded.shape[2] // columns
    row, column = place(query, height, width)

    def box(window: int) -> tuple[float, ...]:
        top, left = window // columns * high, window % columns * wide
        edges = left / width, top / height, (left + wide) / width, (top + high) / height
        return tuple(min(1.0, edge) for edge in edges)

    window = row // high * columns + column // wide
    routed = layer.routing(x)[:, window].sort(-1).values.tolist()
    boxes = [[box(index) for index in indices] for indices in routed]
    # a window may lie in the padding altogether
    return box(window), [[b for b in sample if b[0] < b[2] and b[1] < b[3]] for sample in boxes]


@torch.no_grad()
def modulation(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of the modulator at each position, and the gate of each focal level.

    Both are what the layer itself computes: heard from its projections `f` and `h` while it runs.

    Args:
        layer: a `FocalModulation`, ours or timm's.
        x: its input, `[B, H, W, C]`, or `[B, C, H, W]` for timm's.

    Returns:
        `[B, H, W]`, and `[B, levels + 1, H, W]` with the global level last.
    """
    focal: Any = layer
    projected: list[Tensor] = []
    modulators: list[Tensor] = []
    handles = [
        focal.f.register_forward_hook(lambda module, inputs, output: projected.append(output)),
        focal.h.register_forward_hook(lambda module, inputs, output: modulators.append(output)),
    ]
    try:
        focal(x)
    finally:
        for handle in handles:
            handle.remove()
    channels_first = projected[0] if isinstance(layer, TimmFocalModulation) else projected[0].movedim(-1, 1)
    return modulators[0].norm(dim=1), channels_first[:, 2 * focal.dim :]


def place(query: Query, height: int, width: int) -> tuple[int, int]:
    """Row and column of a query in a map."""
    return min(height - 1, int(query[0] * height)), min(width - 1, int(query[1] * width))


def spatial(output: Any, size: tuple[int, int]) -> Tensor:
    """What a layer gave, as `[B, C, H, W]`.

    Args:
        output: `[B, C, H, W]`, `[B, H, W, C]` or tokens `[B, N, C]`, with class and register tokens first; of
            a tuple the first.
        size: height and width of the image; its shape tells the layouts apart.

    Raises:
        ValueError: when it is none of these.
    """
    while isinstance(output, list | tuple) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        given = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"is no map but {given}")
    ratio = size[0] / size[1]
    if output.ndim == 4:
        first, last = (abs(output.shape[i] / output.shape[i + 1] - ratio) for i in (2, 1))
        return output if first <= last else output.permute(0, 3, 1, 2)
    for prefix in range(min(16, output.shape[1])):
        tokens = output.shape[1] - prefix
        height = round((tokens * ratio) ** 0.5)
        if height and tokens % height == 0 and abs(height / (tokens // height) - ratio) < 0.05 * ratio:
            grid = output[:, prefix:].unflatten(1, (height, tokens // height))
            return grid.permute(0, 3, 1, 2)
    raise ValueError(f"has {output.shape[1]} tokens, which fill no grid of an image of {size[0]} x {size[1]}")


def feature_colors(maps: Tensor) -> Tensor:
    """Features `[B, C, H, W]` as colours `[B, 3, H, W]` from 0 to 1: their first three principal components.

    The components are those of all positions of the batch together, each with the sign that makes its
    largest weight positive, stretched from its 1st to its 99th percentile. Less than three channels give
    their mean.
    """
    batch, channels, height, width = maps.shape
    positions = maps.detach().double().cpu().movedim(1, -1).reshape(-1, channels)
    if channels < 3:
        colors = positions.mean(1, keepdim=True).expand(-1, 3)
    else:
        centred = positions - positions.mean(0)
        _, vectors = torch.linalg.eigh(centred.T @ centred)
        first = vectors[:, -3:].flip(1)
        first = first * first.gather(0, first.abs().argmax(0, keepdim=True)).sign()
        colors = centred @ first
    low, high = torch.quantile(colors, torch.tensor([0.01, 0.99], dtype=colors.dtype), dim=0)
    colors = ((colors - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colors.reshape(batch, height, width, 3).movedim(-1, 1).float()
