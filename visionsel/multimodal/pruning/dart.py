"""DART: keep the tokens that repeat a few pivots least.

After Wen et al. 2025, "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters
More" (EMNLP; arXiv:2502.11494), and the released rule for what the paper leaves open. What differs:

- Pivots follow one another by falling norm, those of the image first; the released order is that of a
  Python set.
- Similarity is that of the hidden states themselves; the released code first applies the decoder's last norm,
  whose weights stretch some channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.multimodal.pruning.checks import (
    check_keep,
    check_layer,
    counts,
    require_finite,
    top,
    valid_or_all,
)
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens

__all__ = ["DART", "select"]


@dataclass(frozen=True)
class DART(Pruner):
    """Least similar to pivots of image and text (Wen et al. 2025). Needs keys only, no attention.

    Args:
        keep: ratio or number of tokens. Up to one token a pivot fewer stay, see `select`.
        layer: tokens are dropped before this decoder layer; the keys are those of the layer before.
        pivots: how many image tokens (at least 1) and how many text tokens after the last image.

    Raises:
        ValueError: for values out of range; at entry for a layer that the decoder does not have.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import DART
        >>> with DART(keep=0.5, layer=1)(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().visual_tokens[-1] <= 32
        True
    """

    keep: float | int = 0.25
    layer: int = 2
    pivots: tuple[int, int] = (4, 4)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        _check(self.pivots)

    def stages(self, layers: int) -> list[Stage]:
        """See `Pruner`."""
        return [Stage(check_layer(self.layer, layers, first=1), self._select, reads="previous")]

    def _select(self, tokens: VisualTokens) -> Tensor:
        text_keys, text_valid = tokens.text_keys()
        text_features, _ = tokens.text_features()
        return select(
            tokens.keys(),
            tokens.features,
            text_keys,
            text_features,
            self.keep,
            self.pivots,
            tokens.valid,
            text_valid,
        )


def select(
    keys: Tensor,
    features: Tensor,
    text_keys: Tensor,
    text_features: Tensor,
    keep: float | int,
    pivots: tuple[int, int] = (4, 4),
    valid: Tensor | None = None,
    text_valid: Tensor | None = None,
) -> Tensor:
    """Keep the pivots of the image, and for each pivot the tokens that are least like it.

    Pivots are the tokens of image and text whose keys have the largest L1 norms. One after the other, image
    first, each adds the `(keep - image pivots) // pivots` tokens with the lowest cosine similarity to it,
    of those not kept yet. So up to one token a pivot fewer than `keep` stay; all do where `keep` asks for
    all.

    Args:
        keys: `[B, kv_heads, N, head_dim]` of the decoder.
        features: `[B, N, C]`: hidden states.
        text_keys: `[B, kv_heads, T, head_dim]`.
        text_features: `[B, T, C]`.
        keep: ratio or number of tokens.
        pivots: of the image and of the text; fewer where there are fewer tokens.
        valid: bool `[B, N]`: which tokens there are; default all.
        text_valid: bool `[B, T]`, likewise.

    Returns:
        bool `[B, N]`.

    Raises:
        ValueError: for values out of range, and for NaN.
    """
    _check(pivots)
    valid, text_valid = valid_or_all(valid, features), valid_or_all(text_valid, text_features)
    require_finite("features", features, valid)
    require_finite("text_features", text_features, text_valid)
    number = counts(keep, valid)
    of_image = number.clamp(max=pivots[0])
    of_text = text_valid.sum(1).clamp(max=pivots[1])
    share = (number - of_image) // (of_image + of_text).clamp(min=1)

    image_index, kept = _pivots("keys", keys, of_image, valid)
    text_index, _ = _pivots("text_keys", text_keys, of_text, text_valid)
    unit, text_unit = _unit(features, valid), _unit(text_features, text_valid)
    for vectors, index, present in ((unit, image_index, of_image), (text_unit, text_index, of_text)):
        for step in range(index.shape[1]):
            pivot = vectors.gather(1, index[:, step, None, None].expand(-1, -1, vectors.shape[-1]))
            similarity = (unit @ pivot.transpose(1, 2))[..., 0]
            # whole steps above the rounding errors: tokens that are alike are taken in their order
            steps = (similarity / (16 * torch.finfo(similarity.dtype).eps)).round()
            kept = kept | top(-steps, share * (step < present), valid & ~kept)
    return kept | (valid & (number >= valid.sum(1))[:, None])


def _pivots(name: str, keys: Tensor, number: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens with the largest keys: int64 `[B, P]` by falling norm, padded, and bool `[B, N]`."""
    norm = keys.abs().sum((1, 3), dtype=torch.promote_types(keys.dtype, torch.float32))
    require_finite(name, norm, valid)
    order = norm.masked_fill(~valid, -1).argsort(dim=1, descending=True, stable=True)
    return order[:, : int(number.amax())], top(norm, number, valid)


def _unit(features: Tensor, valid: Tensor) -> Tensor:
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(wide.masked_fill(~valid[..., None], 0), dim=-1)


def _check(pivots: tuple[int, int]) -> None:
    whole = len(pivots) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in pivots)
    if not whole or pivots[0] < 1 or pivots[1] < 0:
        raise ValueError(
            f"pivots must be two whole numbers, of the image from 1 and of the text from 0 up, got {pivots}"
        )
