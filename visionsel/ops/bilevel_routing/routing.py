"""Region-level routing: which windows each window attends to (Zhu et al. 2023, eq. 3-5)."""

import torch
from torch import Tensor

from visionsel.ops.checks import has_autocast

__all__ = ["times_routed", "top_windows", "window_means"]


def window_means(x: Tensor, num_windows: tuple[int, int]) -> Tensor:
    """Mean of each window of a map, all heads side by side.

    Args:
        x: `[B, H, W, heads, head_dim]`; H and W divide into windows.
        num_windows: windows per column and per row.

    Returns:
        `[B, nh * nw, heads * head_dim]`, windows row-major; float32 for half-precision maps.
    """
    batch, height, width, heads, head_dim = x.shape
    nh, nw = num_windows
    # in half precision, means of many tokens collide and the top-k would be decided by rounding
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.flatten(3).reshape(batch, nh, height // nh, nw, width // nw, heads * head_dim)
    # along one axis at a time, which on the CPU is ten times as fast as along two
    x = x.sum(4, dtype=dtype).sum(2) / ((height // nh) * (width // nw))
    return x.reshape(batch, nh * nw, heads * head_dim)


def top_windows(query_means: Tensor, key_means: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """The `topk` windows whose keys agree best with each window's queries.

    Args:
        query_means: `[B, windows, channels]`.
        key_means: `[B, windows, channels]`.
        topk: windows to choose.
        scale: factor on the routing logits; it changes their softmax, not the choice.

    Returns:
        index `[B, windows, topk]`, int64, best first, and the routing logits chosen, of the same shape.
    """
    if torch.jit.is_scripting():
        logits = (query_means * scale) @ key_means.transpose(1, 2)
    else:
        device = query_means.device.type
        if has_autocast(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                logits = (query_means * scale) @ key_means.transpose(1, 2)
        else:
            logits = (query_means * scale) @ key_means.transpose(1, 2)
    chosen, index = logits.topk(topk, dim=-1)
    return index, chosen


def times_routed(index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Routing `[B, windows, topk]` -> how often each window attends to each, `[B, windows, windows]`."""
    batch, windows, _ = index.shape
    times = torch.zeros(batch, windows, windows, dtype=dtype, device=index.device)
    return times.scatter_add(2, index, torch.ones_like(index, dtype=dtype))
