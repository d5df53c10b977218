"""Bi-level routing attention with its projections and local enhancement (Zhu et al. 2023, arXiv:2303.08810).

Names of parameters and options are those of the authors' `ops/bra_legacy.py`. Their `ops/bra_nchw.py`, which
treats sizes that do not divide into windows differently, is `pad_projected=True`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from visionsel.layers.convolution import Conv2d
from visionsel.ops.bilevel_routing import bilevel_routing_attention, top_windows, window_means
from visionsel.ops.bilevel_routing.tiled import scriptable_attention

__all__ = ["BilevelRoutingAttention"]


@register_notrace_module
class BilevelRoutingAttention(nn.Module):
    """Each window of the map attends to the windows that suit it best.

    Maps of any size are padded with zeros at the right and bottom: before the projection to a multiple of
    `num_windows`, where padding takes part as keys, values and in window means (the released models), or as
    `pad_projected` says.

    Args:
        dim: channels in and out.
        num_heads: attention heads; divides dim and qk_dim.
        num_windows: windows per side.
        topk: windows that each window attends to; -1 means all.
        qk_dim: channels of queries and keys; default dim.
        scale: factor on the logits of routing and attention; default qk_dim**-0.5 (not head_dim**-0.5).
        side_dwconv: kernel size of the depthwise convolution of the values that is added to the output
            (lepe); 0 for none. The authors' models use 5.
        kv_per_win: average-pool keys and values to this number per window side before attention; None keeps
            all.
        soft_routing: weigh the keys and values of the routed windows by the softmax of their routing logits.
        diff_routing: let gradients through the routing weights; needs `soft_routing`.
        param_routing: compare the window means through a linear layer; needs `diff_routing`.
        pad_projected: take windows of floor(size / num_windows) tokens, as many as needed, pad after the
            projection and leave padding out of the window means.
        backend: of the operator.
        device, dtype: of the parameters.

    Raises:
        ValueError: for sizes and options that do not fit each other.

    Examples:
        >>> import torch
        >>> from visionsel.layers import BilevelRoutingAttention
        >>> layer = BilevelRoutingAttention(dim=32, num_heads=2, num_windows=7, topk=4)
        >>> x = torch.randn(1, 20, 23, 32)
        >>> layer(x).shape, layer.routing(x).shape
        (torch.Size([1, 20, 23, 32]), torch.Size([1, 49, 4]))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_windows: int = 7,
        topk: int = 4,
        qk_dim: int | None = None,
        scale: float | None = None,
        side_dwconv: int = 5,
        kv_per_win: int | None = None,
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        pad_projected: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        qk_dim = dim if qk_dim is None else qk_dim
        if dim % num_heads != 0 or qk_dim % num_heads != 0:
            raise ValueError(f"num_heads {num_heads} must divide dim {dim} and qk_dim {qk_dim}")
        if num_windows < 1:
            raise ValueError(f"num_windows must be at least 1, got {num_windows}")
        if topk != -1 and not 1 <= topk <= num_windows**2:
            raise ValueError(
                f"topk must be -1 (all) or 1 to {num_windows**2} (num_windows squared), got {topk}"
            )
        if side_dwconv < 0 or (side_dwconv > 0 and side_dwconv % 2 == 0):
            raise ValueError(f"side_dwconv must be odd, or 0 for none; got {side_dwconv}")
        if kv_per_win is not None and kv_per_win < 1:
            raise ValueError(f"kv_per_win must be at least 1, or None to keep all keys; got {kv_per_win}")
        if diff_routing and not soft_routing:
            raise ValueError(
                "diff_routing needs soft_routing: a choice of windows has no gradient, its weights have"
            )
        if param_routing and not diff_routing:
            raise ValueError("param_routing needs diff_routing: its weights would get no gradient")
        if pad_projected and (soft_routing or kv_per_win is not None):
            raise ValueError("pad_projected goes with neither soft_routing nor kv_per_win")
        self.dim = dim
        self.qk_dim = qk_dim
        self.num_heads = num_heads
        self.num_windows = num_windows
        self.topk = topk
        self.scale = qk_dim**-0.5 if scale is None else scale
        self.kv_per_win = 0 if kv_per_win is None else kv_per_win  # 0 keeps all; TorchScript wants one type
        self.soft_routing = soft_routing
        self.diff_routing = diff_routing
        self.param_routing = param_routing
        self.pad_projected = pad_projected
        self.backend = backend
        self.qkv = nn.Linear(dim, 2 * qk_dim + dim, **dd)
        self.router = nn.Linear(qk_dim, qk_dim, **dd) if param_routing else nn.Identity()
        self.lepe = (
            Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim, **dd)
            if side_dwconv > 0
            else nn.Identity()
        )
        self.side_dwconv = side_dwconv
        self.wo = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, dim]` -> `[B, H, W, dim]`."""
        height, width = x.shape[1], x.shape[2]
        query, key, value, local, grid = self.project(x)
        index, weight = self.choose(query, key, grid, height, width)
        topk = self.routed(grid)
        if self.kv_per_win > 0:
            key, value = self.pool(key, grid), self.pool(value, grid)
        if torch.jit.is_scripting():
            out = scriptable_attention(query, key, value, grid, topk, self.scale, index, weight)
        else:
            out = bilevel_routing_attention(
                query, key, value, grid, topk, self.scale, self.backend, routing=index, routing_weight=weight
            )
        out = fit(out.flatten(3), height, width)
        if self.side_dwconv > 0:
            local = self.lepe(local.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            out = out + fit(local, height, width)
        return self.wo(out)

    @torch.jit.ignore
    def routing(self, x: Tensor) -> Tensor:
        """The windows `[B, windows, topk]`, row-major, that each window of `[B, H, W, dim]` attends to."""
        query, key, value, _, grid = self.project(x)
        index, _ = self.choose(query, key, grid, x.shape[1], x.shape[2])
        _, index = bilevel_routing_attention(
            query, key, value, grid, self.routed(grid), self.scale, return_routing=True, routing=index
        )
        return index

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, int]]:
        """Query, key and value with heads on the padded map, the values for lepe, and the window grid."""
        height, width, windows = x.shape[1], x.shape[2], self.num_windows
        if self.pad_projected:
            region_h, region_w = larger(height // windows, 1), larger(width // windows, 1)
            grid = ((height + region_h - 1) // region_h, (width + region_w - 1) // region_w)
        else:
            region_h, region_w = (height + windows - 1) // windows, (width + windows - 1) // windows
            grid = (windows, windows)
            x = fit(x, windows * region_h, windows * region_w)
        qkv = self.qkv(x)
        local = qkv[..., 2 * self.qk_dim :]
        if self.pad_projected:
            qkv = fit(qkv, grid[0] * region_h, grid[1] * region_w)
        query, key, value = qkv.split([self.qk_dim, self.qk_dim, self.dim], dim=-1)
        heads = (self.num_heads, -1)
        return query.unflatten(3, heads), key.unflatten(3, heads), value.unflatten(3, heads), local, grid

    def routed(self, grid: tuple[int, int]) -> int:
        """How many windows of a grid are routed; a tiny map may have fewer than `topk`."""
        windows = grid[0] * grid[1]
        if self.topk == -1:
            return windows
        return smaller(self.topk, windows) if self.pad_projected else self.topk

    def choose(
        self, query: Tensor, key: Tensor, grid: tuple[int, int], height: int, width: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Routed windows and their weights, each None where the operator's own routing is the layer's too."""
        index: Tensor | None = None
        weight: Tensor | None = None
        if self.soft_routing or self.pad_projected or self.kv_per_win > 0:
            query_means, key_means = window_means(query, grid), window_means(key, grid)
            if not self.diff_routing:
                query_means, key_means = query_means.detach(), key_means.detach()
            if self.param_routing:
                query_means = self.router(query_means.to(query.dtype))
                key_means = self.router(key_means.to(key.dtype))
            if self.pad_projected:
                # a mean over tokens and zeros -> over tokens; of queries it would scale whole rows of logits
                rows = filled(height, key.shape[1] // grid[0], grid[0], key_means)
                columns = filled(width, key.shape[2] // grid[1], grid[1], key_means)
                key_means = key_means / (rows.unsqueeze(1) * columns).view(-1, 1)
            index, logits = top_windows(query_means, key_means, self.routed(grid), self.scale)
            if self.soft_routing:
                weight = logits.softmax(-1)
        return index, weight

    def pool(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Average `[B, H, W, heads, head_dim]` inside windows down to `kv_per_win` tokens a side."""
        batch, height, width, heads, head_dim = x.shape
        nh, nw, kept = grid[0], grid[1], self.kv_per_win
        x = x.reshape(batch, nh, height // nh, nw, width // nw, heads * head_dim).permute(0, 1, 3, 5, 2, 4)
        x = F.adaptive_avg_pool2d(x.flatten(0, 2), kept).view(batch, nh, nw, heads * head_dim, kept, kept)
        return x.permute(0, 1, 4, 2, 5, 3).reshape(batch, nh * kept, nw * kept, heads, head_dim)


def fit(x: Tensor, height: int, width: int) -> Tensor:
    """Zero-pad or crop `[B, H, W, C]` at the bottom and right."""
    bottom, right = height - x.shape[1], width - x.shape[2]
    if torch.jit.is_scripting():
        needed = bottom != 0 or right != 0
    else:
        # A compiled graph shall hold for every size, so it always pads. It crops by padding too: whether a
        # slice is contiguous depends on the size, and would become a condition on it.
        needed = torch.compiler.is_compiling() or bottom != 0 or right != 0
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if needed else x


def filled(size: int, region: int, windows: int, like: Tensor) -> Tensor:
    """The share of each of `windows` regions along one side that is map, not padding."""
    start = torch.arange(windows, dtype=like.dtype, device=like.device) * region
    return (size - start).clamp(max=region) / region


def larger(a: int, b: int) -> int:
    if torch.jit.is_scripting():
        return max(a, b)
    else:  # keeps a symbolic size symbolic
        return torch.sym_max(a, b)  # type: ignore[return-value]


def smaller(a: int, b: int) -> int:
    if torch.jit.is_scripting():
        return min(a, b)
    else:
        return torch.sym_min(a, b)  # type: ignore[return-value]
