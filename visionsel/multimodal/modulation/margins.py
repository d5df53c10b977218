"""Raising the attention logits of chosen keys: the knob that PAI and PAINT share."""

import torch
from torch import Tensor

__all__ = ["raised"]


def raised(logits: Tensor, margin: Tensor) -> Tensor:
    """Logits that are higher by a part of their absolute value: `s + margin |s|` (Liu et al. 2024).

    The absolute value makes negative logits rise too.

    Args:
        logits: `[B, heads, t, k]` before the softmax, -inf where a query does not see.
        margin: `[B, k]` or `[B, heads, k]`: for each key, by which part; 0 leaves it as it is.

    Returns:
        `[B, heads, t, k]`; what a query does not see stays hidden.
    """
    margin = margin[:, None] if margin.ndim == 2 else margin
    margin = margin[:, :, None].to(logits)
    return torch.where((margin != 0) & torch.isfinite(logits), logits + margin * logits.abs(), logits)
