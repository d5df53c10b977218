"""Neighborhood attention by `torch.compile`.

On the CPU, without gradients, each query reads its neighbors where they lie: gathers, products and sums
become loops that store no window, only the logits. The backward of that form would add to memory in random
order, so with gradients, and on CUDA, where products of matrices are cheap, the tiles are compiled.
"""

import torch
from torch import Tensor

from visionsel.ops.checks import learns
from visionsel.ops.compilation import call_compiled, sizes_are_fixed
from visionsel.ops.neighborhood.reference import neighbors
from visionsel.ops.neighborhood.tiled import tiled
from visionsel.ops.neighborhood.traced import traced

__all__ = ["compiled"]


def compiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    rel_pos_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend from each position of `[B, H, W, heads, head_dim]` to its kernel of neighbors."""
    if not sizes_are_fixed(query):
        form = traced
    elif (
        query.device.type != "cpu"
        or learns(query, key, value, rel_pos_bias)
        or torch.is_autocast_enabled("cpu")
    ):
        form = tiled  # autocast would leave the other form, which has no product of matrices, in float32
    else:
        form = gathered
    return call_compiled(form, query, key, value, kernel_size, dilation, rel_pos_bias, scale)


def gathered(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    rel_pos_bias: Tensor | None,
    scale: float,
) -> Tensor:
    """The reference with products and sums of elements, which a compiler fuses with the gathers."""
    height, width = query.shape[1:3]
    rows, bias_rows = neighbors(height, kernel_size[0], dilation[0], query.device)
    columns, bias_columns = neighbors(width, kernel_size[1], dilation[1], query.device)
    rows, columns = rows[:, None, :, None], columns[:, None, :]
    key = key[:, rows, columns].flatten(3, 4).transpose(3, 4)  # [B, H, W, heads, Kh * Kw, head_dim]
    value = value[:, rows, columns].flatten(3, 4).transpose(3, 4)
    logits = ((query * scale).unsqueeze(4) * key).sum(5)
    if rel_pos_bias is not None:
        bias = rel_pos_bias[:, bias_rows[:, None, :, None], bias_columns[:, None, :]].flatten(3)
        logits = logits + bias.permute(1, 2, 0, 3).to(logits.dtype)
    return (logits.softmax(4).unsqueeze(5) * value).sum(4)
