"""What the operators are compared with: the methods as their authors compute them, restated plainly.

Each takes our layer, for its parameters, and the layer's input; neighborhood attention, whose targets are of
the operator alone, takes tensors. A comparison therefore has one set of weights on both sides. Restated from
the papers; halo attention is not here, since timm's `HaloAttn` is the formulation that is in use.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.layers import BilevelRoutingAttention, FocalModulation, NeighborhoodAttention
from visionsel.layers.lepe_attention import AttentionLePE
from visionsel.ops.plans import keep_plans

__all__ = [
    "bilevel_routing",
    "bilevel_routing_dense",
    "bilevel_routing_nchw",
    "focal_modulation",
    "full_attention",
    "neighborhood_by_gather",
    "neighborhood_by_unfold",
    "neighborhood_dense",
    "neighborhood_layer",
]


def positions(length: int, kernel_size: int, dilation: int) -> list[list[int]]:
    """The neighbors of every position along one axis: Hassani et al. 2023, eq. 1.

    A position sees those of its remainder modulo the dilation; near the ends the window is moved, not cut.
    """
    windows = []
    for position in range(length):
        own = range(position % dilation, length, dilation)
        first = min(max(position // dilation - kernel_size // 2, 0), len(own) - kernel_size)
        windows.append(list(own[first : first + kernel_size]))
    return windows


@keep_plans
def neighbors(
    height: int, width: int, kernel_size: int, dilation: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pixels that each pixel attends to, and their places in a flat bias table; `[H * W, K * K]` both."""
    places = []
    for length in (height, width):
        key = torch.tensor(positions(length, kernel_size, dilation), device=device)
        query = torch.arange(length, device=device)[:, None]
        places.append((key, (key - query) // dilation + kernel_size - 1))
    (rows, down), (columns, right) = places
    pixels = rows[:, None, :, None] * width + columns[None, :, None, :]
    table = down[:, None, :, None] * (2 * kernel_size - 1) + right[None, :, None, :]
    return pixels.view(height * width, -1), table.view(height * width, -1)


def neighborhood_by_gather(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, dilation: int = 1, rel_pos_bias: Tensor | None = None
) -> Tensor:
    """Neighborhood attention by gathering the neighbors of every query; `[B, H, W, heads, head_dim]`."""
    batch, height, width, heads, head_dim = q.shape
    pixels, table = neighbors(height, width, kernel_size, dilation, q.device)
    keys, values = (x.flatten(1, 2)[:, pixels] for x in (k, v))  # [B, H * W, K * K, heads, head_dim]
    logits = torch.einsum("bqnd,bqknd->bqnk", q.flatten(1, 2) * head_dim**-0.5, keys)
    if rel_pos_bias is not None:
        logits = logits + rel_pos_bias.flatten(1)[:, table].transpose(0, 1)
    out = torch.einsum("bqnk,bqknd->bqnd", logits.softmax(-1), values)
    return out.view(batch, height, width, heads, head_dim)


def neighborhood_by_unfold(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, dilation: int = 1, rel_pos_bias: Tensor | None = None
) -> Tensor:
    """Neighborhood attention by unfolding: windows that lie in the map, those at its edges used repeatedly.

    Raises:
        ValueError: if the dilation does not divide the map.
    """
    batch, height, width, heads, head_dim = q.shape
    if height % dilation or width % dilation:
        raise ValueError(f"dilation {dilation} does not divide the map of {height} x {width}")
    h, w = height // dilation, width // dilation

    def grids(x: Tensor) -> Tensor:  # each remainder modulo the dilation is a map of its own
        x = x.reshape(batch, h, dilation, w, dilation, heads, head_dim).permute(0, 2, 4, 1, 3, 5, 6)
        return x.reshape(-1, h, w, heads, head_dim)

    pixels, table = neighbors(h, w, kernel_size, 1, q.device)
    rows = pixels[:, 0].view(h, w)[:, :1] // w
    columns = pixels[:, 0].view(h, w)[:1] % w

    def windows(x: Tensor) -> Tensor:  # [grids, h, w, heads, head_dim, K * K]
        x = grids(x).unfold(1, kernel_size, 1).unfold(2, kernel_size, 1)
        return x[:, rows, columns].flatten(-2)

    logits = torch.einsum("bhwnd,bhwndk->bhwnk", grids(q) * head_dim**-0.5, windows(k))
    if rel_pos_bias is not None:
        logits = logits + rel_pos_bias.flatten(1)[:, table].transpose(0, 1).view(h, w, heads, -1)
    out = torch.einsum("bhwnk,bhwndk->bhwnd", logits.softmax(-1), windows(v))
    out = out.view(batch, dilation, dilation, h, w, heads, head_dim).permute(0, 3, 1, 4, 2, 5, 6)
    return out.reshape(batch, height, width, heads, head_dim)


def neighborhood_dense(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, dilation: int = 1, rel_pos_bias: Tensor | None = None
) -> Tensor:
    """Neighborhood attention as full attention with a mask; one without bias is made once."""
    batch, height, width, heads, head_dim = q.shape
    if rel_pos_bias is None:
        (mask,) = zero_mask(height, width, kernel_size, dilation, q.dtype, q.device)
    else:
        mask = dense_mask(height, width, kernel_size, dilation, rel_pos_bias)
    query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.unsqueeze(0))
    return out.transpose(1, 2).reshape(batch, height, width, heads, head_dim)


def dense_mask(height: int, width: int, kernel_size: int, dilation: int, bias: Tensor) -> Tensor:
    """The bias where a key is a neighbor, elsewhere -inf: `[heads, H * W, H * W]`."""
    pixels, table = neighbors(height, width, kernel_size, dilation, bias.device)
    values = bias.flatten(1)[:, table]
    mask = bias.new_full((bias.shape[0], height * width, height * width), -float("inf"))
    return mask.scatter(2, pixels.expand_as(values), values)


@keep_plans
def zero_mask(
    height: int, width: int, kernel_size: int, dilation: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor]:
    side = 2 * kernel_size - 1
    bias = torch.zeros(1, side, side, dtype=dtype, device=device)
    return (dense_mask(height, width, kernel_size, dilation, bias),)


def neighborhood_layer(layer: NeighborhoodAttention, x: Tensor) -> Tensor:
    """The layer with its projections, by gathering; `[B, H, W, dim]` in and out."""
    height, width = x.shape[1:3]
    kernel_size, dilation = layer.kernel_size[0], layer.dilation[0]
    least = kernel_size * dilation
    if height < least or width < least:
        x = F.pad(x, (0, 0, 0, max(least - width, 0), 0, max(least - height, 0)))
    q, k, v = layer.qkv(x).unflatten(3, (3, layer.num_heads, -1)).unbind(3)
    out = neighborhood_by_gather(q, k, v, kernel_size, dilation, layer.rpb)
    return layer.proj(out[:, :height, :width].flatten(3))


def bilevel_routing(layer: BilevelRoutingAttention, x: Tensor) -> Tensor:
    """Bi-level routing attention as released: tokens of the routed windows gathered one by one.

    Zhu et al. 2023, eq. 3-7; `[B, H, W, dim]` in and out. The windows are cut before the projection, keys and
    values of the routed windows are gathered with an index that is expanded over tokens and channels.
    """
    height, width = x.shape[1:3]
    n, heads, dim, qk_dim = layer.num_windows, layer.num_heads, layer.dim, layer.qk_dim
    if height % n or width % n:
        x = F.pad(x, (0, 0, 0, -width % n, 0, -height % n))
    batch, rows, columns, _ = x.shape
    h, w = rows // n, columns // n
    windows = x.reshape(batch, n, h, n, w, dim).transpose(2, 3).reshape(batch, n * n, h, w, dim)
    query, kv = layer.qkv(windows).split([qk_dim, qk_dim + dim], dim=-1)

    value_map = kv[..., qk_dim:].reshape(batch, n, n, h, w, dim).permute(0, 5, 1, 3, 2, 4)
    local = layer.lepe(value_map.reshape(batch, dim, rows, columns)).permute(0, 2, 3, 1)

    index = routed(mean(query, (2, 3)), mean(kv[..., :qk_dim], (2, 3)), layer)
    tokens = kv.flatten(2, 3)
    index = index[..., None, None].expand(-1, -1, -1, *tokens.shape[2:])
    chosen = torch.gather(tokens.unsqueeze(1).expand(-1, n * n, -1, -1, -1), 2, index)
    key, value = chosen.flatten(2, 3).flatten(0, 1).split([qk_dim, dim], dim=-1)
    query = query.flatten(2, 3).flatten(0, 1).unflatten(2, (heads, -1)).transpose(1, 2)
    key = key.unflatten(2, (heads, -1)).permute(0, 2, 3, 1)
    value = value.unflatten(2, (heads, -1)).transpose(1, 2)
    out = ((query * layer.scale) @ key).softmax(-1) @ value  # [B * windows, heads, tokens, head_dim]

    out = out.view(batch, n, n, heads, h, w, dim // heads).permute(0, 1, 4, 2, 5, 3, 6)
    out = layer.wo(out.reshape(batch, rows, columns, dim) + local)
    return out[:, :height, :width]


def bilevel_routing_nchw(layer: BilevelRoutingAttention, x: Tensor) -> Tensor:
    """Bi-level routing attention as refactored: maps `[B, dim, H, W]`, gathered once for each head.

    Raises:
        ValueError: if the windows do not divide the map; the refactored code pads in another way.
    """
    batch, dim, height, width = x.shape
    n, heads, qk_dim = layer.num_windows, layer.num_heads, layer.qk_dim
    if height % n or width % n:
        raise ValueError(f"{n} windows a side do not divide the map of {height} x {width}")
    h, w = height // n, width // n
    qkv = F.conv2d(x, layer.qkv.weight[:, :, None, None], layer.qkv.bias)
    query, key, value = qkv.split([qk_dim, qk_dim, dim], dim=1)

    def means(x: Tensor) -> Tensor:
        return mean(x.reshape(batch, -1, n, h, n, w), (3, 5)).flatten(2).transpose(1, 2)

    def regions(x: Tensor) -> Tensor:  # [B, heads, windows, tokens, head_dim]
        x = x.reshape(batch, heads, -1, n, h, n, w).permute(0, 1, 3, 5, 4, 6, 2)
        return x.reshape(batch, heads, n * n, h * w, -1)

    index = routed(means(query), means(key), layer)[:, None, :, :, None, None]

    def gathered(x: Tensor) -> Tensor:
        x = regions(x)
        places = index.expand(-1, heads, -1, -1, *x.shape[3:])
        return torch.gather(x.unsqueeze(2).expand(-1, -1, n * n, -1, -1, -1), 3, places).flatten(3, 4)

    logits = (regions(query) * layer.scale) @ gathered(key).transpose(3, 4)
    out = logits.softmax(-1) @ gathered(value)
    out = out.view(batch, heads, n, n, h, w, -1).permute(0, 1, 6, 2, 4, 3, 5)
    out = out.reshape(batch, dim, height, width) + layer.lepe(value)
    return F.conv2d(out, layer.wo.weight[:, :, None, None], layer.wo.bias)


def bilevel_routing_dense(layer: BilevelRoutingAttention, x: Tensor) -> Tensor:
    """Bi-level routing attention as full attention with a mask; `[B, H, W, dim]` in and out.

    Raises:
        ValueError: if the windows do not divide the map.
    """
    batch, height, width, dim = x.shape
    n, qk_dim = layer.num_windows, layer.qk_dim
    if height % n or width % n:
        raise ValueError(f"{n} windows a side do not divide the map of {height} x {width}")
    query, key, value = layer.qkv(x).split([qk_dim, qk_dim, dim], dim=-1)
    cut = (batch, n, height // n, n, width // n, qk_dim)
    query_means, key_means = (mean(x.reshape(cut), (2, 4)).flatten(1, 2) for x in (query, key))
    allowed = torch.zeros(batch, n * n, n * n, dtype=torch.bool, device=x.device)
    allowed = allowed.scatter(2, routed(query_means, key_means, layer), True)
    row, column = (torch.arange(side, device=x.device) // (side // n) for side in (height, width))
    window = (row[:, None] * n + column).flatten()
    mask = allowed[:, window][:, :, window].unsqueeze(1)
    local = layer.lepe(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    heads = (layer.num_heads, -1)
    query, key, value = (x.flatten(1, 2).unflatten(2, heads).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=layer.scale)
    return layer.wo(out.transpose(1, 2).reshape(batch, height, width, dim) + local)


def mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The mean without gradient; of half precision in float32, where rounding would decide the routing."""
    return x.detach().mean(axes, dtype=torch.promote_types(x.dtype, torch.float32))


def routed(query_means: Tensor, key_means: Tensor, layer: BilevelRoutingAttention) -> Tensor:
    """The windows `[B, windows, topk]` that each window attends to: eq. 4 and 5."""
    return ((query_means * layer.scale) @ key_means.transpose(1, 2)).topk(layer.topk, -1).indices


def full_attention(layer: AttentionLePE, x: Tensor) -> Tensor:
    """BiFormer's last stage: all tokens attend to all, with the logits in memory; `[B, H, W, dim]`."""
    batch, height, width, dim = x.shape
    qkv = layer.qkv(x.flatten(1, 2)).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    out = ((query * layer.scale) @ key.transpose(2, 3)).softmax(-1) @ value
    out = out.transpose(1, 2).reshape(batch, height, width, dim)
    local = layer.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return layer.proj(out + local)


def focal_modulation(layer: FocalModulation, x: Tensor) -> Tensor:
    """Focal modulation with its projections (Yang et al. 2022, eq. 4-7): NCHW between linear layers, NHWC."""
    projected = layer.f(x).permute(0, 3, 1, 2).contiguous()
    query, context, gates = projected.split([layer.dim, layer.dim, layer.focal_level + 1], dim=1)
    gathered = torch.zeros((), dtype=x.dtype, device=x.device)
    for level, convolution in enumerate(layer.focal_layers):
        context = convolution(context)
        gathered = gathered + context * gates[:, level : level + 1]
    overall = F.gelu(context.mean((2, 3), keepdim=True))
    gathered = gathered + overall * gates[:, layer.focal_level :]
    if layer.normalize_modulator:
        gathered = gathered / (layer.focal_level + 1)
    out = (query * layer.h(gathered)).permute(0, 2, 3, 1).contiguous()
    return layer.proj(layer.ln(out))
