"""Bi-level routing attention by torch's flex_attention (Dong et al. 2024, arXiv:2412.05496).

flex_attention compiles one kernel from a mask, a change of the logits and the list of blocks that are not
masked as a whole. A block here is a window, and the list is the routing itself: a tensor, so that a new
routing is no new kernel, and keys and values are read where they are, not gathered. A window that is named
twice is visited once, with the logarithm of 2 added to its logits. Windows of fewer tokens than a block can
have are padded, and the padding is masked.

The mask holds the routing too, though the kernels need only the list: without torch.compile flex_attention
looks at nothing else.

Every new shape is compiled, which takes seconds. On the CPU torch has the forward kernel alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from visionsel.ops.bilevel_routing.routing import times_routed
from visionsel.ops.checks import in_autocast_dtype, learns
from visionsel.ops.compilation import call_compiled, sizes_are_fixed
from visionsel.ops.flexible import attention, ordered, refusal, refuse_uncompiled

__all__ = ["attend", "block_size", "flex", "routed_blocks", "why_not"]


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_windows: tuple[int, int],
    scale: float,
    index: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """Attend from every window to those that `index` `[B, windows, topk]` names; None means all windows.

    Inside torch.compile this joins the graph that is compiled; otherwise it is compiled here.

    Raises:
        RuntimeError: if torch.compile is switched off, or where a tracer other than it looks on.
    """
    query, key, value = in_autocast_dtype(query, key, value)
    if not torch.is_grad_enabled():  # on the CPU flex_attention refuses tensors that ask for a gradient
        query, key, value = query.detach(), key.detach(), value.detach()
    return call_compiled(fused, query, key, value, num_windows, scale, index)


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_windows: tuple[int, int],
    scale: float,
    index: Tensor | None,
    weight: Tensor | None,
) -> str | None:
    """Why flex_attention cannot serve a call; None if it can."""
    if weight is not None:
        return (
            "routing_weight gives the same keys and values another size in each window of queries, "
            "and flex_attention reads them where they are"
        )
    if not (sizes_are_fixed(query) and sizes_are_fixed(key)):
        return "its blocks are laid out for a map of fixed size, and torch.compile keeps this one's symbolic"
    return refusal(query, value, learns(query, key, value))


def fused(*call: Any) -> Tensor:
    """`attend`, but never uncompiled."""
    refuse_uncompiled()
    return attend(*call)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_windows: tuple[int, int],
    scale: float,
    index: Tensor | None,
) -> Tensor:
    """What is compiled."""
    batch, height, width, heads, _ = query.shape
    nh, nw = num_windows
    h, w = height // nh, width // nw
    if index is None:
        query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
        out = attention(query, key, value, scale, (64, 64))
        return out.transpose(1, 2).reshape(batch, height, width, heads, value.shape[3])
    keys = (key.shape[1] // nh) * (key.shape[2] // nw)
    blocks = block_size(h * w), block_size(keys)
    mask, score_mod = routed_blocks(index, blocks, keys)
    query = to_blocks(query, num_windows, blocks[0])
    key, value = to_blocks(key, num_windows, blocks[1]), to_blocks(value, num_windows, blocks[1])
    out = attention(query, key, value, scale, blocks, score_mod, mask)
    value_dim = value.shape[3]
    out = out.reshape(batch, heads, nh * nw, blocks[0], value_dim)[:, :, :, : h * w]
    out = out.reshape(batch, heads, nh, nw, h, w, value_dim).permute(0, 2, 4, 3, 5, 1, 6)
    return out.reshape(batch, height, width, heads, value_dim)


def block_size(tokens: int) -> int:
    """Tokens of the block that holds a window: a power of 2 from 16 to 64, or a multiple of 64."""
    for size in (16, 32, 64):
        if tokens <= size:
            return size
    return (tokens + 63) // 64 * 64


def to_blocks(x: Tensor, num_windows: tuple[int, int], block: int) -> Tensor:
    """`[B, H, W, heads, head_dim]` -> `[B, heads, windows * block, head_dim]`, windows padded with zeros."""
    batch, height, width, heads, head_dim = x.shape
    nh, nw = num_windows
    h, w = height // nh, width // nw
    x = x.reshape(batch, nh, h, nw, w, heads, head_dim).permute(0, 5, 1, 3, 2, 4, 6)
    x = x.reshape(batch, heads, nh * nw, h * w, head_dim)
    return F.pad(x, (0, 0, 0, block - h * w)).reshape(batch, heads, nh * nw * block, head_dim)


def routed_blocks(
    index: Tensor, blocks: tuple[int, int], keys: int
) -> tuple[BlockMask, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """The mask of a routing `[B, windows, topk]`, and the change of the logits that counts repeated windows.

    Args:
        index: windows named by each window.
        blocks: tokens of a block of queries and of one of keys.
        keys: tokens of a window of keys; the rest of its block is padding.
    """
    windows = index.shape[1]
    times, repeats, number, order = routing_tables(index)

    def mask_mod(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (times[b, query // blocks[0], key // blocks[1]] > 0) & (key % blocks[1] < keys)

    def score_mod(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + repeats[b, query // blocks[0], key // blocks[1]]

    masked = number, order
    whole: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    if keys == blocks[1]:  # nothing of a block is masked: the kernels need not look at the mask
        masked, whole = (torch.zeros_like(number), torch.zeros_like(order)), (number, order)
    lengths = windows * blocks[0], windows * blocks[1]
    mask = BlockMask.from_kv_blocks(
        masked[0],
        masked[1],
        whole[0],
        whole[1],
        BLOCK_SIZE=blocks,
        mask_mod=mask_mod,
        seq_lengths=lengths,
        compute_q_blocks=torch.is_grad_enabled(),  # the transposed lists are those of backward
    )
    return mask, score_mod


@torch.library.custom_op("visionsel::routing_tables", mutates_args=())
def routing_tables(index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernels read of a routing `[B, windows, topk]`.

    An operator of its own, since the compiler takes tables that it computes itself to be what they were
    before a scatter, or cannot read them.

    Returns:
        How often a window names another, and the logarithm of it, or 0, both `[B, windows, windows]`; the
        number `[B, 1, windows]` of the windows it names and, first, which ones `[B, 1, windows, windows]`,
        both int32.
    """
    times = times_routed(index)
    return times, times.clamp(min=1).log(), *ordered(times.unsqueeze(1) > 0)


@routing_tables.register_fake
def _(index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, windows, _ = index.shape
    times = torch.empty(batch, windows, windows, device=index.device)
    number = index.new_empty(batch, 1, windows, dtype=torch.int32)
    return (
        times,
        torch.empty_like(times),
        number,
        index.new_empty(batch, 1, windows, windows, dtype=torch.int32),
    )
