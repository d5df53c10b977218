"""Seeing and changing what attention does, under any kernel.

The models of transformers look their attention kernel up by a name in the configuration. `tapped` puts a name
of its own there, for one model, whose function passes every call on to the kernel that was there before;
chosen modules' calls go to a function of ours on the way. Rows of interest are computed again from queries
and keys: nothing needs the eager kernel, and no [N, N] matrix is made.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

__all__ = ["AttentionCall", "attention_logits", "attention_rows", "explicit_attention", "tapped"]

_NUMBERS = itertools.count()
_BASES: dict[str, str | None] = {}  # for each name of ours, what stood in the configuration before it
Output = tuple[Tensor, Tensor | None]


@dataclass
class AttentionCall:
    """One call of an attention kernel.

    Attributes:
        module: that calls.
        query: `[B, heads, q, head_dim]`, positions applied.
        key, value: `[B, kv_heads, k, head_dim]`.
        mask: as the kernel gets it: None, bool or additive `[B or 1, 1, q, k]`, or `[B, k]` for flash
            kernels.
        arguments: the others, by name.
        kernel: what would have been called.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    arguments: dict[str, Any]
    kernel: Callable[..., Output] = field(repr=False)

    @property
    def scale(self) -> float:
        """What logits are multiplied with."""
        scale = self.arguments.get("scaling")
        return self.query.shape[-1] ** -0.5 if scale is None else float(scale)

    def run(self) -> Output:
        """What the kernel gives: output `[B, q, heads, head_dim]` and, where it has them, weights."""
        return self.kernel(self.module, self.query, self.key, self.value, self.mask, **self.arguments)


@contextmanager
def tapped(
    modules: Mapping[nn.Module, Callable[[AttentionCall], Output]], configs: list[Any]
) -> Iterator[None]:
    """Send the attention calls of some modules through functions.

    Args:
        modules: for each module its function; it gives what the kernel would give, usually by `call.run()`.
        configs: the configurations in which these modules, and whatever makes their masks, look up the
            kernel.

    Raises:
        NotImplementedError: for kernels whose masks are not tensors.
    """
    unique = {id(config): config for config in configs}
    entered: list[tuple[Any, str]] = []
    try:
        for config in unique.values():
            base = config._attn_implementation or "eager"
            if "flex" in base or base.startswith("paged"):
                raise NotImplementedError(
                    f"attention {base!r} keeps its masks in a form that cannot be read; use "
                    'model.set_attn_implementation("sdpa")'
                )
            name = f"visionsel{next(_NUMBERS)}:{base}"
            _BASES[name] = config._attn_implementation
            entered.append((config, name))
            AttentionInterface.register(name, _dispatcher(modules, name))
            AttentionMaskInterface.register(name, _mask_function(name))
            config._attn_implementation = name
        yield
    finally:
        for config, name in entered:
            before = _BASES.pop(name)
            if config._attn_implementation == name:
                config._attn_implementation = before
            for later, under in list(_BASES.items()):  # of another model with the same configuration
                if under == name:
                    _BASES[later] = before
            for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
                table._global_mapping.pop(name, None)
                table._local_mapping.pop(name, None)  # where another library may have wrapped it


def _dispatcher(
    modules: Mapping[nn.Module, Callable[[AttentionCall], Output]], name: str
) -> Callable[..., Output]:
    """The kernel under its new name."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        dropout: float = 0.0,
        **arguments: Any,
    ) -> Output:
        def kernel(module: nn.Module, *tensors: Tensor | None, **arguments: Any) -> Output:
            # looked up now, so that other libraries' wrappers stay in force; "eager" is not in the table
            base = _BASES[name] or "eager"
            eager = sys.modules[type(module).__module__].__dict__.get("eager_attention_forward")
            function = ALL_ATTENTION_FUNCTIONS.get(base, eager)
            assert function is not None, f"{type(module).__name__} has no eager attention"
            config: Any = module.config
            tapped = config._attn_implementation
            # flash kernels are loaded by the name in the configuration
            config._attn_implementation_internal = base
            try:
                return function(module, *tensors, **arguments)
            finally:
                config._attn_implementation_internal = tapped

        call = AttentionCall(
            module, query, key, value, attention_mask, {"dropout": dropout, **arguments}, kernel
        )
        function = modules.get(module)
        return call.run() if function is None else function(call)

    return attend


def _mask_function(name: str) -> Callable[..., Any]:
    """Masks as the kernel expects them."""

    def mask(*args: Any, **arguments: Any) -> Any:
        return ALL_MASK_ATTENTION_FUNCTIONS[_BASES[name] or "eager"](*args, **arguments)

    return mask


def attention_rows(call: AttentionCall, rows: Tensor | None = None) -> Tensor:
    """Attention of chosen queries, computed again.

    Args:
        call: of a kernel.
        rows: int64 `[B, t]` places of the queries in this call; None: all.

    Returns:
        `[B, heads, t, k]`, float32 (float64 where the model is); rows that see nothing are 0.

    Raises:
        NotImplementedError: for a mask in a form that is not known.
    """
    return attention_logits(call, rows).softmax(-1).nan_to_num(0.0)


def explicit_attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """What the kernel would give, by an explicit softmax, and its weights.

    Args:
        call: of a kernel.

    Returns:
        `[B, q, heads, head_dim]` as kernels have it, and `[B, heads, q, k]`, see `attention_rows`.

    Raises:
        NotImplementedError: for a mask in a form that is not known.
    """
    weights = attention_rows(call)
    value = call.value.to(weights.dtype)
    output = weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
    return output.transpose(1, 2).to(call.value.dtype), weights


def attention_logits(call: AttentionCall, rows: Tensor | None = None) -> Tensor:
    """What the softmax of `attention_rows` is over: scaled, capped, -inf where a query does not see.

    Args:
        call: of a kernel.
        rows: int64 `[B, t]` places of the queries in this call; None: all.

    Returns:
        `[B, heads, t, k]`, float32 (float64 where the model is).

    Raises:
        NotImplementedError: for a mask in a form that is not known.
    """
    query, key = call.query, call.key
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k = query.shape[2], key.shape[2]
    if rows is None:
        rows = torch.arange(q, device=query.device).expand(len(query), -1)
    else:
        query = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    groups = query.shape[1] // key.shape[1]
    query = query.to(wide).unflatten(1, (key.shape[1], groups))
    logits = (query @ key.to(wide).transpose(-1, -2)[:, :, None]).flatten(1, 2) * call.scale
    if (cap := call.arguments.get("softcap")) is not None:
        logits = cap * torch.tanh(logits / cap)
    mask = call.mask
    if mask is not None and mask.ndim == 4:
        mask = mask[..., :k].expand(len(query), -1, -1, -1)
        mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, k))
        if mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, -torch.inf)
        else:
            logits = logits + mask.to(wide)
            logits = logits.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)
    elif mask is None or mask.ndim == 2:
        causal = call.arguments.get("is_causal")
        causal = getattr(call.module, "is_causal", True) if causal is None else causal
        place = torch.arange(k, device=logits.device)
        if causal and q > 1:
            last = rows + (k - q)
            hidden = place > last[..., None]
            if (window := call.arguments.get("sliding_window")) is not None:
                hidden = hidden | (place <= last[..., None] - window)
            logits = logits.masked_fill(hidden[:, None], -torch.inf)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :k].bool(), -torch.inf)
    else:
        raise NotImplementedError(f"a mask with {mask.ndim} axes; expected none, 2 or 4")
    return logits
