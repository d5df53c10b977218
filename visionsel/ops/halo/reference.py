"""Blocked local attention with halos, written as the paper says it (Vaswani et al. 2021, section 2.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    halo_size: int,
    stride: int,
    rel_pos_height: Tensor | None,
    rel_pos_width: Tensor | None,
    scale: float,
) -> Tensor:
    """See `halo_attention`; `stride` is the side of k's map divided by that of q's."""
    height, width = k.shape[1:3]
    window = block_size + 2 * halo_size
    side = block_size // stride  # of a block of queries
    rows, columns = height // block_size, width // block_size

    def windows(x: Tensor) -> Tensor:  # [B, rows, columns, heads, head_dim, window, window]
        x = F.pad(x, (0, 0, 0, 0, halo_size, halo_size, halo_size, halo_size))
        return x.unfold(1, window, block_size).unfold(2, window, block_size)

    # b batch, r c block row and column, y x query in the block, i j key in the window, h head, d head_dim
    query = q.unflatten(2, (columns, side)).unflatten(1, (rows, side))
    logits = torch.einsum("brycxhd,brchdij->brchyxij", query, windows(k)) * scale
    if rel_pos_height is not None and rel_pos_width is not None:
        offset = (
            torch.arange(window, device=q.device) - torch.arange(side, device=q.device)[:, None] + window - 1
        )
        logits = logits + torch.einsum("brycxhd,yid->brchyxi", query, rel_pos_height[offset]).unsqueeze(-1)
        logits = logits + torch.einsum("brycxhd,xjd->brchyxj", query, rel_pos_width[offset]).unsqueeze(-2)
    weights = logits.flatten(-2).softmax(-1).unflatten(-1, (window, window))
    out = torch.einsum("brchyxij,brchdij->brycxhd", weights, windows(v))
    return out.flatten(3, 4).flatten(1, 2)
