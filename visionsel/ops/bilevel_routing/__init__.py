"""Bi-level routing attention of BiFormer (Zhu et al. 2023, arXiv:2303.08810).

The map is cut into windows; each window attends to the tokens of the `topk` windows whose mean key fits its
mean query best. The authors' local enhancement (lepe) is the layer's.
"""

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from visionsel.ops.bilevel_routing import flex, triton
from visionsel.ops.bilevel_routing.reference import reference
from visionsel.ops.bilevel_routing.routing import top_windows, window_means
from visionsel.ops.bilevel_routing.tiled import tiled
from visionsel.ops.checks import check_attention_maps, pair
from visionsel.ops.choice import Backend, compute
from visionsel.ops.compilation import call_compiled, why_not
from visionsel.ops.gpu import unmeasured

__all__ = ["bilevel_routing_attention", "top_windows", "window_means"]


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_windows: tuple[int, int],
    scale: float,
    index: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    if index is None:
        index = _all_windows(query, num_windows)
    return reference(query, key, value, num_windows, scale, index, weight)


BACKENDS = {
    "tiled": Backend(tiled),
    "reference": Backend(_reference),
    "triton": Backend(triton.triton, triton.why_not, unmeasured),
    "flex": Backend(flex.flex, flex.why_not),
    "compiled": Backend(partial(call_compiled, tiled), why_not),
}


def example_calls(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Calls that backends tell apart, as they receive them."""
    x = torch.zeros(1, 32, 32, 1, 32, device=device)
    leaf = x.clone().requires_grad_()
    index = torch.arange(4, device=device).expand(1, 16, 4)
    weight = torch.ones(1, 16, 4, device=device)
    return {
        "inference": (x, x, x, (4, 4), 1.0, index, None),
        "training": (leaf, leaf, leaf, (4, 4), 1.0, index, None),
        "inference with routing_weight": (x, x, x, (4, 4), 1.0, index, weight),
        "training with routing_weight": (leaf, leaf, leaf, (4, 4), 1.0, index, weight),
    }


@overload
def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_windows: int | tuple[int, int],
    topk: int,
    scale: float | None = ...,
    backend: str = ...,
    return_routing: Literal[False] = ...,
    *,
    routing: Tensor | None = ...,
    routing_weight: Tensor | None = ...,
) -> Tensor: ...


@overload
def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_windows: int | tuple[int, int],
    topk: int,
    scale: float | None = ...,
    backend: str = ...,
    *,
    return_routing: Literal[True],
    routing: Tensor | None = ...,
    routing_weight: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_windows: int | tuple[int, int],
    topk: int,
    scale: float | None = None,
    backend: str = "auto",
    return_routing: bool = False,
    *,
    routing: Tensor | None = None,
    routing_weight: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention from each window to the `topk` windows that suit it best.

    Routing compares window means over all heads together and carries no gradient; the same `scale` serves
    routing and attention. With all windows routed this is full attention.

    Args:
        q: `[B, H, W, heads, head_dim]`.
        k: the same shape, or a coarser map that divides into the same windows (keys pooled inside windows).
        v: `[B, H, W, heads, value_dim]`, the map of k.
        num_windows: windows per side, or (per column, per row).
        topk: windows that each window attends to; -1 means all.
        scale: factor on the logits; default head_dim**-0.5. BiFormer passes dim**-0.5.
        backend: "auto", or one by name: "tiled" (any device), "triton" (CUDA), "flex" and "compiled"
            (compile at each new shape), "reference" (the plainest code).
        return_routing: also return the routing.
        routing: `[B, nh * nw, topk]`, int64, the windows to attend to (row-major), in place of the routing
            that this function would compute; repeated windows count twice.
        routing_weight: `[B, nh * nw, topk]`, factors on the keys and values of the routed windows, in the
            order of `routing` (the authors' soft routing). It needs `routing`; gradients flow through it.

    Returns:
        `[B, H, W, heads, value_dim]`, or that and the index `[B, nh * nw, topk]`, int64, windows row-major;
        the order within a row has no meaning.

    Raises:
        ValueError: for maps that do not fit each other or do not divide into windows, `topk` beyond the
            windows, a `routing` of another shape or type, and unknown backends.
        NotImplementedError: if the backend asked for cannot serve the call, with the reason.

    Examples:
        >>> import torch
        >>> from visionsel import ops
        >>> q, k, v = torch.randn(3, 1, 14, 14, 2, 16)
        >>> out, index = ops.bilevel_routing_attention(q, k, v, num_windows=7, topk=4, return_routing=True)
        >>> out.shape, index.shape
        (torch.Size([1, 14, 14, 2, 16]), torch.Size([1, 49, 4]))
    """
    check_attention_maps(q, k, v)
    nh, nw = grid = pair(num_windows, "num_windows")
    for name, x in (("q", q), ("k", k)):
        height, width = x.shape[1:3]
        if height % nh != 0 or width % nw != 0:
            raise ValueError(
                f"num_windows {grid} does not divide {name}'s map of {height}x{width}; "
                f"pad it to {-(-height // nh) * nh}x{-(-width // nw) * nw} or choose a divisor of each side"
            )
    if topk != -1 and not 1 <= topk <= nh * nw:
        raise ValueError(f"topk must be -1 (all) or 1 to {nh * nw}, the number of windows; got {topk}")
    if routing is not None:
        _check_routing(routing, routing_weight, (q.shape[0], nh * nw, nh * nw if topk == -1 else topk))
    elif routing_weight is not None:
        raise ValueError("routing_weight weighs the windows that routing names; pass routing too")
    if scale is None:
        scale = q.shape[-1] ** -0.5

    if routing is None and topk not in (-1, nh * nw):
        query_means, key_means = (window_means(x.detach(), grid) for x in (q, k))
        routing, _ = top_windows(query_means, key_means, topk, scale)
    out = compute("bilevel_routing", BACKENDS, backend, q, k, v, grid, scale, routing, routing_weight)
    if not return_routing:
        return out
    return out, _all_windows(q, grid) if routing is None else routing


def _all_windows(query: Tensor, num_windows: tuple[int, int]) -> Tensor:
    """int64 `[B, windows, windows]`: each window attends to all."""
    count = num_windows[0] * num_windows[1]
    return torch.arange(count, device=query.device).expand(query.shape[0], count, -1)


def _check_routing(routing: Tensor, weight: Tensor | None, shape: tuple[int, int, int]) -> None:
    if routing.dtype != torch.int64 or routing.shape != shape:
        raise ValueError(
            f"routing must be int64 of shape {shape} ([B, windows, topk]), "
            f"got {routing.dtype} of shape {tuple(routing.shape)}"
        )
    if weight is not None and weight.shape != shape:
        raise ValueError(f"routing_weight must have routing's shape {shape}, got {tuple(weight.shape)}")
    # elsewhere looking at the values would wait for the device, or has nothing to look at
    if type(routing) is Tensor and routing.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in routing.aminmax())
        if low < 0 or high >= shape[1]:
            raise ValueError(f"routing names windows 0 to {shape[1] - 1}, got {low} to {high}")
