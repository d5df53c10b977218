"""What a tiny LLaVA computes without an intervention, read by plain hooks, and what a pruner makes of it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.multimodal import tiny


@dataclass
class Signals:
    """Of a batch of one image a sample.

    Attributes:
        tower: for each layer of the vision tower queries and keys `[B, heads, 1 + N, head_dim]`.
        features: what enters the projector, `[B, N, C]`.
        hidden: what enters each decoder layer, `[B, L, C]`.
        keys: of each decoder layer, positions applied, `[B, kv_heads, L, head_dim]`.
        image, text: bool `[B, L]`: image tokens, and text after them.
    """

    tower: list[tuple[Tensor, Tensor]]
    features: Tensor
    hidden: list[Tensor]
    keys: list[Tensor]
    image: Tensor
    text: Tensor

    def at_image(self, x: Tensor) -> Tensor:
        """`[B, N, ...]` of `[B, L, ...]`."""
        return torch.stack([row[mask] for row, mask in zip(x, self.image, strict=True)])


def signals(model: Any, inputs: dict[str, Any]) -> Signals:
    """One forward of the model as it is."""
    seen: list[list[Tensor]] = []
    handles = []
    for layer in model.model.vision_tower.encoder.layers:
        mine: list[Tensor] = []
        seen.append(mine)
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            handles.append(projection.register_forward_hook(lambda m, i, out, mine=mine: mine.append(out)))
    projected: list[Tensor] = []
    projector = model.model.multi_modal_projector
    handles.append(projector.register_forward_pre_hook(lambda m, args: projected.append(args[0])))
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, use_cache=True)
    for handle in handles:
        handle.remove()
    heads = model.config.vision_config.num_attention_heads
    tower = [tuple(x.unflatten(2, (heads, -1)).transpose(1, 2) for x in pair) for pair in seen]
    image = inputs["input_ids"] == tiny.IMAGE
    place = torch.arange(image.shape[1])
    last = (image * place).amax(1, keepdim=True)
    keys = [layer.keys for layer in out.past_key_values.layers]
    return Signals(tower, projected[0], list(out.hidden_states), keys, image, place.expand_as(image) > last)


def prune(model: Any, inputs: dict[str, Any], pruner: Any) -> tuple[Tensor, list[Tensor]]:
    """Which image tokens stay, bool `[B, N]`, and for each sample the image tokens `[kept, C]` that go on."""
    with torch.no_grad(), pruner(model) as pruned:
        entered: list[Tensor] = []
        layer = pruner.stages(tiny.LAYERS)[0].layer
        norm = model.model.language_model.layers[layer].input_layernorm
        handle = norm.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        model(**inputs)
        handle.remove()
    [(_, kept)] = pruned.kept
    image = inputs["input_ids"] == tiny.IMAGE
    mask = torch.stack([row[here] for row, here in zip(kept, image, strict=True)])
    features = []
    for hidden, row, here in zip(entered[0], kept, image, strict=True):
        alive = hidden[len(hidden) - int(row.sum()) :]  # rows are padded on the left
        features.append(alive[here[row]])
    return mask, features
