"""Bi-level routing attention with one row a region.

The keys of one window and head are stored as one contiguous row, so that gathering a window is one copy of
that row and its backward one addition, instead of an element-wise gather and scatter. The gathered rows are
already in the layout that batched matrix products want.

Everything here is in the TorchScript subset, since scripted layers call it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.ops.bilevel_routing.routing import top_windows, window_means

__all__ = ["scriptable_attention", "tiled"]


def tiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_windows: tuple[int, int],
    scale: float,
    index: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """Attend from every window to those that `index` `[B, windows, topk]` names; None means all windows."""
    batch, height, width, heads, _ = query.shape
    if index is None:
        out = attend(
            query.flatten(1, 2).transpose(1, 2),
            key.flatten(1, 2).transpose(1, 2),
            value.flatten(1, 2).transpose(1, 2),
            scale,
        )
        return out.transpose(1, 2).reshape(batch, height, width, heads, value.shape[4])
    nh, nw = num_windows
    topk = index.shape[2]
    regions = torch.arange(batch * heads, device=index.device).view(batch, heads, 1, 1) * (nh * nw)
    row = (index.unsqueeze(1) + regions).flatten()
    query = per_region(region_rows(query, nh, nw), query, nh, nw, 1)
    key = per_region(region_rows(key, nh, nw).index_select(0, row), key, nh, nw, topk)
    value = per_region(region_rows(value, nh, nw).index_select(0, row), value, nh, nw, topk)
    if weight is not None:
        weight = weight.to(key.dtype).repeat_interleave(key.shape[2] // topk, dim=2)
        weight = weight.unsqueeze(1).expand(-1, heads, -1, -1).flatten(1, 2).unsqueeze(3)
        key = key * weight
        value = value * weight
    out = attend(query, key, value, scale)
    out = out.view(batch, heads, nh, nw, height // nh, width // nw, value.shape[3])
    return out.permute(0, 2, 4, 3, 5, 1, 6).reshape(batch, height, width, heads, value.shape[3])


def region_rows(x: Tensor, nh: int, nw: int) -> Tensor:
    """`[B, H, W, heads, head_dim]` -> `[B * heads * windows, tokens * head_dim]`."""
    batch, height, width, heads, head_dim = x.shape
    x = x.reshape(batch, nh, height // nh, nw, width // nw, heads, head_dim).permute(0, 5, 1, 3, 2, 4, 6)
    return x.reshape(batch * heads * nh * nw, (height // nh) * (width // nw) * head_dim)


def per_region(rows: Tensor, x: Tensor, nh: int, nw: int, regions: int) -> Tensor:
    """Rows of the map x, `regions` for each of its own -> `[B, heads * windows, regions * tokens, head_dim]`.

    Heads and windows share an axis, since CUDA kernels bound each batch axis by 65535; and no size is left to
    inference, which costs a compiler with symbolic sizes many seconds.
    """
    batch, height, width, heads, head_dim = x.shape
    return rows.view(batch, heads * nh * nw, regions * (height // nh) * (width // nw), head_dim)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Softmax attention on `[B, N, tokens, head_dim]`."""
    training = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not torch.jit.is_scripting() and torch.jit.is_tracing():
        training = False  # a trace is checked and run without gradients
    # on CPU the fused kernel is slower than matrix products in backward and in bfloat16
    fused = query.device.type != "cpu" or (not training and query.dtype in (torch.float32, torch.float64))
    if fused:
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    attention = ((query * scale) @ key.transpose(2, 3)).softmax(-1)
    return attention @ value


def scriptable_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_windows: tuple[int, int],
    topk: int,
    scale: float,
    index: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """What `bilevel_routing_attention` computes, without its checks, for scripted layers."""
    nh, nw = num_windows
    if index is None and topk not in (-1, nh * nw):
        means = window_means(query.detach(), num_windows), window_means(key.detach(), num_windows)
        index = top_windows(means[0], means[1], topk, scale)[0]
    return tiled(query, key, value, num_windows, scale, index, weight)
