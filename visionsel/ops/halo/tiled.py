"""Halo attention in plain PyTorch for any device: windows and relative rows are gathered by index.

Written in the subset that TorchScript compiles, so that scripted layers call `tiled` directly. Axes are
merged by way of one flat row, and blocks are cut and joined by index: then torch.export asks nothing of the
sizes, and a program exported on many blocks serves one. On the CPU many blocks are taken some at a time
(`visionsel.ops.halo.chunked`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.ops.chunks import serves
from visionsel.ops.compilation import is_exporting
from visionsel.ops.halo import chunked
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


def _in_batch(index: Tensor, batch: int, length: int) -> Tensor:
    """Rows `[N]` of a sample -> those of each of the `batch` samples of so many, `[batch * N]`."""
    return (torch.arange(batch, device=index.device)[:, None] * length + index).flatten()


def _pixels(x: Tensor) -> Tensor:
    """`[B, H, W, heads, head_dim]` -> `[B * H * W, heads * head_dim]`, of which whole rows are gathered."""
    batch, height, width, heads, head_dim = x.shape
    return x.contiguous().flatten().view(batch * height * width, heads * head_dim)


def _relative_factors(query: Tensor, height_rows: Tensor, width_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of relative position by rows of the window and by columns; those of a key are their sum.

    Args:
        query: `[N, side, side, heads, head_dim]`.
        height_rows, width_rows: table rows of every query and key coordinate, `[side, window, head_dim]`.

    Returns:
        Two `[N, heads, side, side, window]`.
    """
    count, side, _, heads, head_dim = query.shape
    window = height_rows.shape[1]
    by_row = query.transpose(0, 1).reshape(side, count * side * heads, head_dim)
    by_column = query.permute(2, 0, 1, 3, 4).reshape(side, count * side * heads, head_dim)
    vertical = torch.bmm(by_row, height_rows.transpose(1, 2)).view(side, count, side, heads, window)
    horizontal = torch.bmm(by_column, width_rows.transpose(1, 2)).view(side, count, side, heads, window)
    return vertical.permute(1, 3, 0, 2, 4), horizontal.permute(1, 3, 2, 0, 4)


def _spread(window: int, like: Tensor) -> Tensor:
    """`[2 * window, window * window]`, zeros and ones: factors times this are the logits of every key.

    On the CPU that product takes half the time of an addition with broadcasting, which there goes in runs of
    one row of the window.
    """
    one = torch.eye(window, dtype=like.dtype, device=like.device)
    return torch.cat([one.repeat_interleave(window, 1), one.repeat(1, window)])


def _relative_logits(vertical: Tensor, horizontal: Tensor) -> Tensor:
    """The factors' sums for every key, `[N, heads, side * side, window * window]`."""
    count, heads, side, _, window = vertical.shape
    if vertical.is_cuda:
        # laid out in the order of the sum while they are small
        vertical = vertical.clone(memory_format=torch.contiguous_format)
        horizontal = horizontal.clone(memory_format=torch.contiguous_format)
        logits = vertical.unsqueeze(-1) + horizontal.unsqueeze(-2)
    else:
        logits = torch.cat([vertical, horizontal], -1) @ _spread(window, vertical)
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

    edge = [0, 0, 0, 0, halo_size, halo_size, halo_size, halo_size]  # zeros around the map
    key, value = _pixels(F.pad(k, edge)), _pixels(F.pad(v, edge))
    keys = _in_batch(keys, batch, (height + 2 * halo_size) * (width + 2 * halo_size))
    count, length = batch * blocks, side * side
    query = _pixels(q).index_select(0, _in_batch(queries, batch, blocks * length))
    query = query.view(count, side, side, heads, head_dim)
    places = _in_batch(places, batch, blocks * length)

    gradient = q.requires_grad or k.requires_grad or v.requires_grad
    factors: tuple[Tensor, Tensor] | None = None
    bias_gradient = False
    if rel_pos_height is not None and rel_pos_width is not None:
        height_rows = rel_pos_height.index_select(0, offsets).view(side, window, head_dim)
        width_rows = rel_pos_width.index_select(0, offsets).view(side, window, head_dim)
        factors = _relative_factors(query, height_rows, width_rows)
        bias_gradient = factors[0].requires_grad
    query = query.view(count, length, heads, head_dim)

    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves out the branch in this form only)
        if serves(q, count * heads * length * window * window):
            both, spread = None, None
            if factors is not None:
                both = torch.cat(factors, -1).flatten(2, 3)
                spread = _spread(window, both)
            out = chunked.attend(query, key, value, keys.view(count, -1), both, spread, scale)
            out = out.reshape(count * length, heads * value_dim).index_select(0, places)
            return out.view(batch, rows * side, columns * side, heads, value_dim)

    bias: Tensor | None = None
    if factors is not None:
        bias = _relative_logits(factors[0], factors[1])
        factors = None
    # The fused kernel saves memory, except where the gradient of every logit is needed for the tables;
    # on the CPU it is also the slower one in training and in half precision.
    if q.is_cuda:
        fused = not (torch.is_grad_enabled() and bias_gradient)
    else:
        fused = not (torch.is_grad_enabled() and (gradient or bias_gradient))
        fused = fused and (q.dtype == torch.float32 or q.dtype == torch.float64)
    query = query.transpose(1, 2)
    key = key.index_select(0, keys).view(count, window * window, heads, head_dim).transpose(1, 2)
    value = value.index_select(0, keys).view(count, window * window, heads, value_dim).transpose(1, 2)
    # from here on no large tensor lives longer than it is needed
    if fused:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    else:
        query, key, value = _merge(query), _merge(key).transpose(1, 2), _merge(value)
        if bias is None:
            logits = torch.bmm(query, key) * scale
        else:
            logits = torch.baddbmm(bias.flatten(0, 1), query, key, alpha=scale)
        bias = None
        logits = logits.softmax(-1)
        out = torch.bmm(logits, value).view(count, heads, length, value_dim)
    out = out.transpose(1, 2)
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript reads both sides of an "and")
        if is_exporting():
            # the layout of the fused kernel, which spares a copy, is not that of its translation to ONNX
            out = out.clone(memory_format=torch.contiguous_format)
    out = out.contiguous().flatten().view(count * length, heads * value_dim).index_select(0, places)
    out = out.flatten().view(batch, blocks * length * heads * value_dim)
    return out.view(batch, rows * side, columns * side, heads, value_dim)
