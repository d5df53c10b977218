"""Bi-level routing attention as stated: gather the routed windows, attend (Zhu et al. 2023, eq. 6-7)."""

import torch
from torch import Tensor

__all__ = ["reference"]


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_windows: tuple[int, int],
    scale: float,
    index: Tensor,
    weight: Tensor | None,
) -> Tensor:
    """Attend from every window to the windows that `index` `[B, windows, topk]` names."""
    batch, height, width, heads, _ = query.shape
    nh, nw = num_windows
    query, key, value = (to_windows(x, num_windows) for x in (query, key, value))
    row = torch.arange(batch, device=index.device)[:, None, None]
    key = key[row, index]  # [B, windows, topk, tokens, heads, head_dim]
    value = value[row, index]
    if weight is not None:
        weight = weight.to(key.dtype)[..., None, None, None]
        key, value = key * weight, value * weight
    key, value = key.flatten(2, 3), value.flatten(2, 3)
    logits = torch.einsum("bwqhd,bwkhd->bwhqk", query * scale, key)
    out = torch.einsum("bwhqk,bwkhd->bwqhd", logits.softmax(-1), value)
    out = out.reshape(batch, nh, nw, height // nh, width // nw, heads, out.shape[-1])
    return out.transpose(2, 3).reshape(batch, height, width, heads, out.shape[-1])


def to_windows(x: Tensor, num_windows: tuple[int, int]) -> Tensor:
    """`[B, H, W, heads, head_dim]` -> `[B, windows, tokens, heads, head_dim]`."""
    batch, height, width, heads, head_dim = x.shape
    nh, nw = num_windows
    h, w = height // nh, width // nw
    x = x.reshape(batch, nh, h, nw, w, heads, head_dim)
    return x.transpose(2, 3).reshape(batch, nh * nw, h * w, heads, head_dim)
