"""VHR said plainly: one sample, no cache, images deleted from the prompt, attention as a matrix."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from tests.multimodal.oracle import MaskOracle, visual_tokens
from tests.multimodal.tiny import grow

PICTURES = (
    "pixel_values pixel_values_videos image_grid_thw video_grid_thw image_sizes pixel_attention_mask "
    "batch_num_images"
).split()
Heads = Mapping[int, Sequence[int]]
Kept = Mapping[int, Tensor] | None


def without_images(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The sample with its images, and the tokens that stand for them, deleted."""
    stays = ~visual_tokens(sample)[0]
    shape = sample["input_ids"].shape
    kept = {key: value for key, value in sample.items() if key not in PICTURES}
    return {key: value[:, stays] if value.shape == shape else value for key, value in kept.items()}


@contextmanager
def matrices(model: Any) -> Iterator[None]:
    """Attention of the decoder as a matrix, in the precision of the model."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
    ) -> tuple[Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = query @ key.transpose(2, 3) * more["scaling"]
        assert attention_mask is not None
        weights = (logits + attention_mask).softmax(-1)
        return (weights @ value).transpose(1, 2), None

    config = model.model.text_model.config if hasattr(model.model, "text_model") else None
    config = model.model.language_model.config if config is None else config
    before = config._attn_implementation
    AttentionInterface.register("materialised", attend)
    AttentionMaskInterface.register("materialised", eager_mask)
    config._attn_implementation = "materialised"
    try:
        yield
    finally:
        config._attn_implementation = before
        for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            table._global_mapping.pop("materialised")


def forward(
    model: Any, sample: Mapping[str, Any], heads: Heads, alpha: float, watched: int = -1, keep: Kept = None
) -> tuple[Tensor, Tensor | None]:
    """Logits of the last token, and what the heads of a layer say at it, `[heads, D]`.

    Args:
        model: to run.
        sample: its inputs.
        heads: for each layer those that are multiplied.
        alpha: by which number.
        watched: the layer to tell of, before it is multiplied.
        keep: for layers where image tokens go, those that stay (see `MaskOracle`).
    """
    decoder = getattr(model.model, "language_model", None) or model.model.text_model
    number, said = decoder.config.num_attention_heads, []

    def before(layer: int) -> Any:
        def hook(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            parts = list(args[0].chunk(number, -1))
            if layer == watched:
                said.append(torch.stack([part[0, -1] for part in parts]))
            for head in heads.get(layer, ()):
                parts[head] = parts[head] * alpha
            return (torch.cat(parts, -1),)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for layer, module in enumerate(decoder.layers):
            handle = module.self_attn.o_proj.register_forward_pre_hook(before(layer))
            stack.callback(handle.remove)
        if keep is not None:
            stack.enter_context(MaskOracle(model, keep))
        logits = model(**sample, use_cache=False).logits[0, -1]
    return logits, said[0] if said else None


def best_heads(with_image: Tensor, without_image: Tensor) -> list[int]:
    """Equations 4, 6 and 7 in numbers."""
    number = len(with_image)
    apart = [math.dist(a, b) for a, b in zip(with_image.tolist(), without_image.tolist(), strict=True)]
    loud = [sum(x * x for x in head) for head in without_image.tolist()]

    def bound(values: list[float]) -> float:
        mean = sum(values) / number
        return mean + math.sqrt(sum((value - mean) ** 2 for value in values) / (number - 1))

    limits = bound(apart), bound(loud)
    apart = [0.0 if a > limits[0] and b > limits[1] else a for a, b in zip(apart, loud, strict=True)]
    median = sorted(apart)[(number - 1) // 2]
    return [head for head, a in enumerate(apart) if a > median]


def found_heads(
    model: Any,
    sample: Mapping[str, Any],
    alpha: float,
    layers: Sequence[int],
    keep: Kept = None,
) -> dict[int, list[int]]:
    """Layer by layer, with the heads of earlier layers multiplied in both runs."""
    heads: dict[int, list[int]] = {}
    for layer in sorted(layers):
        _, seeing = forward(model, sample, heads, alpha, layer, keep)
        _, blind = forward(model, without_images(sample), heads, alpha, layer)
        assert seeing is not None
        assert blind is not None
        heads[layer] = best_heads(seeing, blind)
    return heads


def generate(
    model: Any, sample: Mapping[str, Any], heads: Heads, alpha: float, new: int, keep: Kept = None
) -> tuple[list[int], Tensor]:
    """Greedy tokens and logits `[new, vocabulary]`; the whole sequence runs for each token."""
    tokens, logits = [], []
    for _ in range(new):
        logits.append(forward(model, sample, heads, alpha, keep=keep)[0])
        tokens.append(int(logits[-1].argmax()))
        sample = grow(dict(sample), torch.tensor([[tokens[-1]]]))
    return tokens, torch.stack(logits)
