"""Scaling what single attention heads say, before the output projection mixes them.

The projection of a decoder layer gets the outputs of its heads side by side, `[B, T, heads * head_dim]`. A
hook before it multiplies chosen ones, under any attention kernel, in the prompt and in decoding alike.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.multimodal.session import Session

__all__ = ["check_layers", "head_hook", "head_shape", "output_projection", "scaled_heads"]

_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")


def output_projection(layer: nn.Module) -> nn.Module:
    """The module of a decoder layer that mixes the outputs of its heads.

    Raises:
        NotImplementedError: when it has none of the names that are known.
    """
    attention: Any = layer.self_attn
    for name in _NAMES:
        module = getattr(attention, name, None)
        if isinstance(module, nn.Module):
            return module
    raise NotImplementedError(
        f"{type(attention).__name__} has no output projection among {', '.join(_NAMES)}: its heads cannot be "
        "told apart"
    )


def head_shape(session: Session) -> tuple[int, int]:
    """How many layers the decoder has, and how many query heads a layer."""
    return len(session.layers), int(session.decoder.config.num_attention_heads)


def check_layers(layers: Iterable[int], session: Session) -> list[int]:
    """Numbers of existing decoder layers, in order.

    Raises:
        ValueError: for a layer that does not exist or comes twice, or for none.
    """
    chosen, number = list(layers), len(session.layers)
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) for layer in chosen)
    if not whole or len(set(chosen)) < len(chosen) or not all(0 <= layer < number for layer in chosen):
        raise ValueError(
            f"layers {chosen} are not different layers of this decoder: choose among 0 to {number - 1}"
        )
    if not chosen:
        raise ValueError(f"no layers are given: choose among 0 to {number - 1}, or leave them out")
    return sorted(chosen)


@contextmanager
def head_hook(
    session: Session, layer: int, function: Callable[[Tensor], Tensor | None], first: bool = False
) -> Iterator[None]:
    """Multiply the outputs of the heads of a layer while a context is open.

    Args:
        session: of the model.
        layer: number of the decoder layer.
        function: from outputs `[B, T, heads, head_dim]` to factors that broadcast to them; None leaves them.
        first: before all that are not, whenever these come: what measures outputs that others scale.
    """
    heads = head_shape(session)[1]

    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        outputs = args[0].unflatten(-1, (heads, -1))
        factors = function(outputs)
        if factors is None:
            return None
        return ((outputs * factors.to(outputs)).flatten(-2), *args[1:])

    handle = output_projection(session.layers[layer]).register_forward_pre_hook(hook, prepend=first)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def scaled_heads(
    session: Session, heads: Mapping[int, Sequence[int]], strength: float
) -> Iterator[dict[int, Tensor]]:
    """Multiply the outputs of chosen heads by one number.

    Args:
        session: of the model.
        heads: for each layer its heads.
        strength: the number.

    Yields:
        for each layer bool `[heads]`: the chosen ones.

    Raises:
        ValueError: for layers or heads that do not exist.
    """
    number = head_shape(session)[1]
    masks: dict[int, Tensor] = {}
    for layer in check_layers(heads, session):
        chosen = list(heads[layer])
        if len(set(chosen)) < len(chosen) or not all(
            isinstance(head, int) and 0 <= head < number for head in chosen
        ):
            raise ValueError(
                f"heads {chosen} are not different heads of layer {layer}: choose among 0 to {number - 1}"
            )
        masks[layer] = torch.zeros(number, dtype=torch.bool)
        masks[layer][chosen] = True
    with ExitStack() as stack:
        for layer, mask in masks.items():
            factors = torch.ones(number, 1, dtype=torch.float64).masked_fill(mask[:, None], strength)
            stack.enter_context(head_hook(session, layer, partial(_constant, factors)))
        yield masks


def _constant(factors: Tensor, outputs: Tensor) -> Tensor:
    return factors
