"""Halo attention in plain PyTorch for any device: windows and relative rows are gathered by index.

Written in the subset that TorchScript compiles, so that scripted layers call `tiled` directly. Axes are
merged by
way of one flat row, and blocks are cut and joined by index: then torch.export asks nothing of the sizes, and
a program exported on many blocks serves one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.ops.compilation import is_exporting
from visionsel.ops.plans import keep_plans, remainder


def _index(
    height: int, width: int, block_size: int, halo_size: int, stride: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What lies where.

    Returns:
        `[blocks * side * side]`: the pixel of every query of every block.
        `[blocks * window * window]`: the pixel of every key of every window, in the map padded by the halo.
        `[side * window]`: the row of the relative tables for every query and key coordinate.
        `[H / s * W / s]`: the place of every pixel of the result in the row of blocks.
    """
    window = block_size + 2 * halo_size
    side = block_size // stride
    rows, columns = height // block_size, width // block_size

    query = torch.arange(rows * columns * side * side, device=device)
    block = query // (side * side)
    y, x = block // columns * side + query // side % side, remainder(block, columns) * side + query % side
    queries = y * (columns * side) + x

    key = torch.arange(rows * columns * window * window, device=device)
    block = key // (window * window)
    y = block // columns * block_size + key // window % window
    x = remainder(block, columns) * block_size + key % window
    keys = y * (width + 2 * halo_size) + x

    pair = torch.arange(side * window, device=device)
    offsets = pair % window - pair // window + window - 1

    y, x = query // (columns * side), remainder(query, columns * side)
    places = ((y // side * columns + x // side) * side + y % side) * side + x % side
    return queries, keys, offsets, places


_kept_index = keep_plans(_index)


def _merge(x: Tensor) -> Tensor:
    """Copy `[N, heads, L, C]` to `[N * heads, L, C]`."""
    count, heads, length, channels = x.shape
    x = x.clone(memory_format=torch.contiguous_format).flatten()
    return x.view(count * heads, length * channels).view(count * heads, length, channels)


def _gather(x: Tensor, index: Tensor, batch: int, length: int) -> Tensor:
    """Rows `index` of each of the `batch` samples, `[batch * length, C]` -> `[batch * len(index), C]`."""
    # whole pixels are copied; the backward is one index_add
    index = torch.arange(batch, device=x.device)[:, None] * length + index
    return x.index_select(0, index.flatten())


def _windows(x: Tensor, keys: Tensor, halo_size: int, blocks: int, window: int) -> Tensor:
    """Map `[B, H, W, heads, head_dim]` -> windows `[N, heads, window * window, head_dim]`, zero outside."""
    x = F.pad(x, (0, 0, 0, 0, halo_size, halo_size, halo_size, halo_size))
    batch, height, width, heads, head_dim = x.shape
    x = x.flatten().view(batch * height * width, heads * head_dim)
    x = _gather(x, keys, batch, height * width)
    return x.view(batch * blocks, window * window, heads, head_dim).transpose(1, 2)


def _relative_logits(query: Tensor, height_rows: Tensor, width_rows: Tensor) -> Tensor:
    """Logits of relative position.

    Args:
        query: `[N, side, side, heads, head_dim]`.
        height_rows, width_rows: table rows of every query and key coordinate, `[side, window, head_dim]`.

    Returns:
        `[N, heads, side * side, window * window]`.
    """
    count, side, _, heads, head_dim = query.shape
    window = height_rows.shape[1]
    by_row = query.transpose(0, 1).reshape(side, count * side * heads, head_dim)
    by_column = query.permute(2, 0, 1, 3, 4).reshape(side, count * side * heads, head_dim)
    vertical = torch.bmm(by_row, height_rows.transpose(1, 2)).view(side, count, side, heads, window)
    horizontal = torch.bmm(by_column, width_rows.transpose(1, 2)).view(side, count, side, heads, window)
    vertical, horizontal = vertical.permute(1, 3, 0, 2, 4), horizontal.permute(1, 3, 2, 0, 4)
    if query.is_cuda:
        # laid out in the order of the sum while they are small
        vertical = vertical.clone(memory_format=torch.contiguous_format)
        horizontal = horizontal.clone(memory_format=torch.contiguous_format)
        logits = vertical.unsqueeze(-1) + horizontal.unsqueeze(-2)
    else:
        # The same sums as a product with ones and zeros: it takes half the time of an addition with
        # broadcasting, which the CPU does in runs of one row of the window.
        one = torch.eye(window, dtype=query.dtype, device=query.device)
        spread = torch.cat([one.repeat_interleave(window, 1), one.repeat(1, window)])
        logits = torch.cat([vertical, horizontal], -1) @ spread
    return logits.view(count, heads, side * side, window * window)


def tiled(
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
    batch, height, width, heads, head_dim = k.shape
    value_dim = v.shape[4]
    rows, columns = height // block_size, width // block_size
    blocks = rows * columns
    side = block_size // stride
    window = block_size + 2 * halo_size
    if torch.jit.is_scripting():
        queries, keys, offsets, places = _index(height, width, block_size, halo_size, stride, k.device)
    else:
        queries, keys, offsets, places = _kept_index(height, width, block_size, halo_size, stride, k.device)

    key = _windows(k, keys, halo_size, blocks, window)
    value = _windows(v, keys, halo_size, blocks, window)
    pixels = blocks * side * side
    query = q.contiguous().flatten().view(batch * pixels, heads * head_dim)
    query = _gather(query, queries, batch, pixels).view(batch * blocks, side, side, heads, head_dim)

    gradient = q.requires_grad or k.requires_grad or v.requires_grad
    bias: Tensor | None = None
    bias_gradient = False
    if rel_pos_height is not None and rel_pos_width is not None:
        height_rows = rel_pos_height.index_select(0, offsets).view(side, window, head_dim)
        width_rows = rel_pos_width.index_select(0, offsets).view(side, window, head_dim)
        bias = _relative_logits(query, height_rows, width_rows)
        bias_gradient = bias.requires_grad

    # The fused kernel saves memory, except where the gradient of every logit is needed for the tables;
    # on the CPU it is also the slower one in training and in half precision.
    if q.is_cuda:
        fused = not (torch.is_grad_enabled() and bias_gradient)
    else:
        fused = not (torch.is_grad_enabled() and (gradient or bias_gradient))
        fused = fused and (q.dtype == torch.float32 or q.dtype == torch.float64)
    query = query.view(batch * blocks, side * side, heads, head_dim).transpose(1, 2)
    if fused:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    else:
        query, key, value = _merge(query), _merge(key).transpose(1, 2), _merge(value)
        if bias is None:
            logits = torch.bmm(query, key) * scale
        else:
            bias = bias.view(batch * blocks * heads, side * side, window * window)
            logits = torch.baddbmm(bias, query, key, alpha=scale)
        # the largest tensors: none lives longer than it is needed
        bias = None
        logits = logits.softmax(-1)
        out = torch.bmm(logits, value)
        out = out.view(batch * blocks, heads, side * side, value_dim)
    out = out.transpose(1, 2)
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript reads both sides of an "and")
        if is_exporting():
            # the layout of the fused kernel, which spares a copy, is not that of its translation to ONNX
            out = out.clone(memory_format=torch.contiguous_format)
    out = out.contiguous().flatten().view(batch * pixels, heads * value_dim)
    out = _gather(out, places, batch, pixels).flatten().view(batch, pixels * heads * value_dim)
    return out.view(batch, rows * side, columns * side, heads, value_dim)
