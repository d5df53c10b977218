"""Attention sinks told by their hidden states: a few dimensions that are huge there, the same for all sinks.

Kang et al. 2025, "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025,
arXiv:2503.03321. A few image tokens draw attention whatever is asked, as the first token of a text does; the
dimensions that tell them are those of the language model before it saw images.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from visionsel.multimodal.families import find_family

__all__ = ["SINK_DIMS", "discover_sink_dims", "massiveness", "published_sink_dims"]

SINK_DIMS: Mapping[str, tuple[int, ...]] = {
    "llama-2-7b": (1415, 2533),
    "llama-2-13b": (2100, 4743),
}
"""Sink dimensions of language models, as published; fine-tuned ones (Vicuna 1.5, LLaVA-1.5) have them too."""


def massiveness(hidden: Tensor, sink_dims: Sequence[int], eps: float = 1e-6) -> Tensor:
    """How large the sink dimensions are beside the others: `max |x[d] / RMS(x)|`.

    Args:
        hidden: `[..., C]` as it enters a decoder layer, before its norm.
        sink_dims: the dimensions `d`.
        eps: is added to the mean square.

    Returns:
        `[...]`, float32 (float64 where the hidden states are).
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    scale = torch.rsqrt(hidden.square().mean(-1) + eps)
    return hidden[..., list(sink_dims)].abs().amax(-1) * scale


def published_sink_dims(config: Any) -> tuple[int, ...] | None:
    """The published dimensions of a language model, told by its shape."""
    if config.model_type != "llama" or config.vocab_size // 1000 != 32:
        return None
    if config.num_key_value_heads != config.num_attention_heads or config.max_position_embeddings < 4096:
        return None
    shapes = {(4096, 32): "llama-2-7b", (5120, 40): "llama-2-13b"}
    name = shapes.get((config.hidden_size, config.num_hidden_layers))
    return None if name is None else SINK_DIMS[name]


def discover_sink_dims(model: nn.Module, number: int = 2, token: int | None = None) -> tuple[int, ...]:
    """The dimensions in which the first token of a text is largest, in the middle layers.

    The first token is a sink in language models that have sinks, and its dimensions are those of the image
    tokens that are sinks (Kang et al. 2025). It sees nothing but itself: one forward of one token tells.

    Args:
        model: the whole model.
        number: how many dimensions.
        token: id of the first token; None: what starts a text for this model.

    Returns:
        the dimensions, rising.

    Raises:
        ValueError: for a model of no supported family, or one that does not say how a text starts.
    """
    decoder = cast(Any, find_family(model).decoder(model))
    if not 1 <= number <= decoder.config.hidden_size:
        raise ValueError(f"number must be in 1 to {decoder.config.hidden_size}, got {number}")
    token = decoder.config.bos_token_id if token is None else token
    if token is None:
        raise ValueError("the model does not say how a text starts; pass token=, the id of the first token")
    found: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        hidden = args[0][0, 0].detach()
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        found.append(hidden.abs() * torch.rsqrt(hidden.square().mean() + 1e-6))

    layers = list(decoder.layers)
    middle = layers[len(layers) // 4 : max(len(layers) * 3 // 4, len(layers) // 4 + 1)]
    with ExitStack() as stack:
        for layer in middle:
            stack.callback(layer.input_layernorm.register_forward_pre_hook(look).remove)
        ids = torch.tensor([[token]], device=next(model.parameters()).device)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    mean = torch.stack([one.to(found[0].device) for one in found]).mean(0)
    return tuple(sorted(mean.topk(number).indices.tolist()))
