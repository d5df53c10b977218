"""Bi-level routing attention with one row a region.

The keys of one window and head are stored as one contiguous row, so that gathering a window is one copy of
that row and its backward one addition, instead of an element-wise gather and scatter. The gathered rows are
already in the layout that batched matrix products want.

Where windows are small and many of them are routed, as in the third stage of BiFormer, nothing is gathered:
attention to all keys under a mask is some times more arithmetic, but in large products.

On the CPU many windows are taken some at a time (`visionsel.ops.bilevel_routing.chunked`).

Everything here is in the TorchScript subset, since scripted layers call it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.ops.bilevel_routing import chunked
from visionsel.ops.bilevel_routing.routing import times_routed, top_windows, window_means
from visionsel.ops.chunks import serves

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
    batch, height, width, heads, head_dim = query.shape
    nh, nw = num_windows
    mask: Tensor | None = None
    if index is not None and weight is None and masking_pays(query, nh * nw, index.shape[2]):
        mask = routing_mask(index, num_windows, query, key)
        index = None
    if index is None:
        out = attend(
            query.flatten(1, 2).transpose(1, 2),
            key.flatten(1, 2).transpose(1, 2),
            value.flatten(1, 2).transpose(1, 2),
            scale,
            mask,
        )
        return out.transpose(1, 2).reshape(batch, height, width, heads, value.shape[4])
    topk = index.shape[2]
    regions = torch.arange(batch * heads, device=index.device).view(batch, heads, 1, 1) * (nh * nw)
    row = index.unsqueeze(1) + regions
    keys, values = region_rows(key, nh, nw), region_rows(value, nh, nw)
    queries = per_region(region_rows(query, nh, nw), query, nh, nw, 1)
    if not torch.jit.is_scripting():
        tokens, routed = queries.shape[2], row.numel() * keys.shape[1] // head_dim
        if weight is None and serves(query, (tokens + head_dim) * routed):
            out = chunked.attend(queries.flatten(0, 1), keys, values, row.flatten(0, 2), scale)
            return to_map(out, value, height, width, nh, nw)
    keys = per_region(keys.index_select(0, row.flatten()), key, nh, nw, topk)
    values = per_region(values.index_select(0, row.flatten()), value, nh, nw, topk)
    if weight is not None:
        weight = weight.to(key.dtype).repeat_interleave(keys.shape[2] // topk, dim=2)
        weight = weight.unsqueeze(1).expand(-1, heads, -1, -1).flatten(1, 2).unsqueeze(3)
        keys = keys * weight
        values = values * weight
    return to_map(attend(queries, keys, values, scale), value, height, width, nh, nw)


def masking_pays(query: Tensor, windows: int, topk: int) -> bool:
    """Whether attention to all keys under a mask is faster than gathering those that are routed.

    Gathering costs by the window, arithmetic by the token. On the CPU a mask was the faster one, forward and
    backward, where at least a fifth of the windows are routed and a window has up to 16 tokens.
    """
    if query.device.type != "cpu" or windows > 5 * topk:
        return False
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves out the branch in this form only)
        if torch.compiler.is_compiling():
            return True  # one graph holds for every size of the map
    return query.shape[1] * query.shape[2] <= 16 * windows


def routing_mask(index: Tensor, num_windows: tuple[int, int], query: Tensor, key: Tensor) -> Tensor:
    """Routing `[B, windows, topk]` -> what is added to the logits of two maps, `[B, 1, queries, keys]`.

    The logarithm of how often a window is routed: 0 once, -inf never.
    """
    nh, nw = num_windows
    batch, windows, _ = index.shape
    # half precision would round the logarithms
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    mask = times_routed(index, dtype).log().to(query.dtype).view(batch, windows, nh, 1, nw, 1)
    # first for every key, then rows of keys for every query, so that long runs are copied
    kept_h, kept_w = key.shape[1] // nh, key.shape[2] // nw
    mask = mask.expand(-1, -1, -1, kept_h, -1, kept_w).reshape(batch, nh, 1, nw, 1, nh * kept_h * nw * kept_w)
    side_h, side_w = query.shape[1] // nh, query.shape[2] // nw
    mask = mask.expand(-1, -1, side_h, -1, side_w, -1)
    return mask.reshape(batch, 1, nh * side_h * nw * side_w, nh * kept_h * nw * kept_w)


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


def to_map(out: Tensor, value: Tensor, height: int, width: int, nh: int, nw: int) -> Tensor:
    """Results of all windows, samples and heads first -> `[B, H, W, heads, value_dim]`."""
    batch, heads, value_dim = value.shape[0], value.shape[3], value.shape[4]
    out = out.view(batch, heads, nh, nw, height // nh, width // nw, value_dim)
    return out.permute(0, 2, 4, 3, 5, 1, 6).reshape(batch, height, width, heads, value_dim)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention on `[B, N, tokens, head_dim]`; a mask is added to the logits."""
    # on the CPU the fused kernel is the slower one in half precision
    if query.device.type != "cpu" or query.dtype == torch.float32 or query.dtype == torch.float64:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    logits = (query * scale) @ key.transpose(2, 3)
    if mask is not None:
        logits = logits + mask
    return logits.softmax(-1) @ value


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
