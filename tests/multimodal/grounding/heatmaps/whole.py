"""Whole attention matrices by eager attention, for methods that multiply them; one sample at a time."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tests.multimodal.grounding.heatmaps.eager import NEW, padded
from tests.multimodal.grounding.heatmaps.eager import case as eager_case
from tests.multimodal.tiny import IMAGE, grow, make_inputs, make_model
from visionsel.multimodal.attention import attention_rows
from visionsel.multimodal.grounding import Replay

WHOLE = ("llava", "qwen2_5_vl", "gemma3")
WINDOW = 18  # of Gemma's sliding layers: an image of 16 tokens is in it, not what is before
Sample = tuple[Tensor, Tensor, list[int]]


@lru_cache
def matrices(name: str) -> tuple[Any, list[Sample]]:
    """A replay of a left-padded batch; for each sample its matrices `[layers, heads, N, N]` without padding,
    what is seen in them, bool `[layers, N, N]`, and the places of its image tokens."""
    if name == "gemma3":
        model, inputs, tokens, weights = _sliding()
    else:
        one = eager_case(name)
        model, inputs, tokens, weights = one.model, one.inputs, one.tokens, one.weights
    samples = []
    for b, mask in enumerate(inputs["attention_mask"]):
        start = int((mask == 0).sum())
        ids = torch.cat((inputs["input_ids"][b], tokens[b]))[start:]
        place = torch.arange(len(ids))
        seen = (place <= place[:, None]).repeat(len(weights), 1, 1)
        if name == "gemma3":
            seen[::2] &= place[:, None] - place < WINDOW  # every second layer slides
            block = (ids == IMAGE).long()
            block = block * (1 + (block.diff(prepend=block[:1]) == 1).cumsum(0))
            seen |= (block[:, None] == block) & (block > 0)
        samples.append((weights[:, b, :, start:, start:], seen, (ids == IMAGE).nonzero()[:, 0].tolist()))
    assert start != int((inputs["attention_mask"][0] == 0).sum()), "one sample should be padded"
    return Replay(model, inputs, tokens), samples


def _sliding() -> tuple[Any, dict[str, Any], Tensor, Tensor]:
    """Images that see themselves both ways, in layers of which every second slides."""
    model = make_model("gemma3", "eager", torch.float32)
    model.config.text_config.sliding_window = WINDOW
    for layer in model.model.language_model.layers:
        if layer.self_attn.is_sliding:
            layer.self_attn.sliding_window = WINDOW
    inputs = make_inputs("gemma3", images=(2, 1), dtype=torch.float32)
    tokens = torch.randint(2, 90, (2, NEW), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = model(**grow(inputs, tokens), use_cache=False, output_attentions=True)
    return model, inputs, tokens, torch.stack(out.attentions)


def wanted(products: list[Tensor], samples: list[Sample], row: str) -> Tensor:
    """`[B, T, n]`: the rows of new tokens and the image columns of products `[N, N]`."""
    first = {"predict": -NEW - 1, "token": -NEW, "prompt": -NEW - 1}[row]
    step = int(row != "prompt")
    return padded(
        [
            [product[len(product) + first + step * t, columns] for t in range(NEW)]
            for product, (_, _, columns) in zip(products, samples, strict=True)
        ]
    )


def exactly(replay: Replay, number: int) -> Tensor:
    """`[layers, heads, N, N]` of the one sample of a replay, all at once from queries and keys."""
    seen: dict[int, Tensor] = {}
    taps = {
        layer: lambda call, layer=layer: seen.__setitem__(layer, attention_rows(call)[0])
        for layer in range(number)
    }
    replay.run(taps)
    return torch.stack([seen[layer] for layer in range(number)])
