"""SparseVLM: the words of the question that are about the picture rate its tokens.

Zhang et al. 2024, "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference",
arXiv:2410.04417.

What differs from the release: tokens are dropped before the layer whose attention rates them, not after it
(its tables count the layers so); the tokens kept keep their positions, and a cluster takes that of its
centre; ties of density go to the lower index, in place of noise; where no word stands out, all rate. The
second version of the release, SparseVLM+, has tables of its own, corrects the attention for distance,
chooses heads and recycles nothing; of these only the tables and the missing recycling are here.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from visionsel.multimodal.pruning.checks import (
    check_keep,
    check_layers,
    count,
    counts,
    require_finite,
    top,
    valid_or_all,
)
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens

__all__ = ["TABLES", "SparseVLM", "recycle", "select", "text_raters"]

# version: {average number, of 576 tokens: how many stay at layers 2, 6 and 15 of 32}, rising
TABLES: dict[int, dict[int, tuple[int, ...]]] = {
    1: {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)},
    2: {64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118)},
}
TABLE_TOKENS = 576
STAGES = 3


@dataclass(frozen=True)
class SparseVLM(Pruner):
    """Drops tokens at several layers by the attention of rater words, and recycles some.

    Raters are chosen once, at the input of the decoder (see `text_raters`), among the text after the last
    image.

    Args:
        keep: the average number of tokens over the layers, or its ratio, for which the published tables
            hold how many stay at each stage: 192, 128, 96 and 64 of 576 tokens. Between these (and up to
            all) the shares are interpolated linearly, which is ours. Or, one for each stage, the ratio of
            the ORIGINAL tokens or their number. Recycled tokens come on top.
        layers: before which decoder layers.
        recycle: whether dropped tokens are recycled; None: as published, in version 1.
        version: 1 or 2, of the tables.

    Raises:
        ValueError: for a value out of range, layers that do not rise, or a `keep` of another length.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import SparseVLM
        >>> with SparseVLM(keep=(0.5, 0.25), layers=(1, 2), recycle=False)(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().visual_tokens  # of each decoder layer
        (64.0, 32.0, 16.0, 16.0)
    """

    keep: float | int | tuple[float | int, ...] = 192
    layers: tuple[int, ...] = (2, 6, 15)
    recycle: bool | None = None
    version: int = 1

    def __post_init__(self) -> None:
        if self.version not in TABLES:
            raise ValueError(f"version must be one of {sorted(TABLES)}, got {self.version!r}")
        values = tuple(self.keep) if isinstance(self.keep, tuple | list) else (self.keep,) * STAGES
        for keep in values:
            check_keep(keep)
        if not self.layers or len(self.layers) != len(values):
            raise ValueError(
                f"layers needs {len(values)} values, one for each of keep={self.keep}; got {self.layers}"
            )
        check_layers(self.layers, max(self.layers) + 1, first=1)

    def stages(self, layers: int) -> list[Stage]:
        """See `Pruner`."""
        found = [Stage(0, self._choose_raters)]
        for stage, layer in enumerate(check_layers(self.layers, layers, first=1)):
            found.append(Stage(layer, partial(self._select, stage), reads="own"))
        return found

    def _choose_raters(self, tokens: VisualTokens) -> Tensor:
        text, text_valid = tokens.text_features()
        tokens.memory["raters"] = text_raters(tokens.features, text, tokens.valid, text_valid)
        return tokens.valid

    def _select(self, stage: int, tokens: VisualTokens) -> Tensor | tuple[Tensor, Tensor]:
        attention, _ = tokens.text_attention()
        scores = _relevance(attention, tokens.memory["raters"], tokens.valid)
        number = [self._number(stage, total) for total in tokens.total.tolist()]
        kept = top(scores, torch.tensor(number, device=scores.device), tokens.valid)
        recycles = self.version == 1 if self.recycle is None else self.recycle
        return recycle(tokens.features, scores, kept, tokens.valid) if recycles else kept

    def _number(self, stage: int, total: int) -> int:
        """How many of `total` original tokens stay at a stage."""
        if isinstance(self.keep, tuple | list):
            return count(self.keep[stage], total)
        if total == 0:
            return 0
        asked = self.keep if isinstance(self.keep, float) else min(self.keep / total, 1.0)
        table = TABLES[self.version]
        known = [0.0, *(number / TABLE_TOKENS for number in table), 1.0]
        shares = [0.0, *(row[stage] / TABLE_TOKENS for row in table.values()), 1.0]
        return count(float(np.interp(asked, known, shares)), total)


def text_raters(
    image: Tensor, text: Tensor, valid: Tensor | None = None, text_valid: Tensor | None = None
) -> Tensor:
    """The text tokens that are about the picture (section 3.2 of the paper).

    Each image token spreads a weight of one over the text tokens by a softmax of inner products; text
    tokens that get more than the average are raters. Where none does (one word, or all alike), all are.

    Args:
        image: `[B, N, C]` image tokens at the input of the decoder.
        text: `[B, T, C]` text tokens there.
        valid: bool `[B, N]`, True at tokens; None: all.
        text_valid: bool `[B, T]`; None: all.

    Returns:
        bool `[B, T]`.

    Raises:
        ValueError: for NaN at a valid token, or a sample with image tokens and no text.
    """
    valid, text_valid = valid_or_all(valid, image), valid_or_all(text_valid, text)
    require_finite("image", image, valid)
    require_finite("text", text, text_valid)
    silent = valid.any(1) & ~text_valid.any(1)
    if bool(silent.any()):
        raise ValueError(
            f"sample {int(silent.nonzero()[0])} has no text after its last image to rate the tokens; put the "
            "question after the image"
        )
    wide = torch.promote_types(image.dtype, torch.float32)
    logits = image.to(wide).masked_fill(~valid[..., None], 0.0) @ text.to(wide).masked_fill(
        ~text_valid[..., None], 0.0
    ).transpose(1, 2)
    logits = logits.masked_fill(~text_valid[:, None], torch.finfo(wide).min)
    weights = logits.softmax(2).masked_fill(~valid[..., None], 0.0)
    weight = weights.sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
    mean = weight.masked_fill(~text_valid, 0.0).sum(1) / text_valid.sum(1).clamp(min=1)
    raters = (weight > mean[:, None]) & text_valid
    return torch.where(raters.any(1, keepdim=True), raters, text_valid)


def select(attention: Tensor, raters: Tensor, keep: float | int, valid: Tensor | None = None) -> Tensor:
    """One stage: the tokens with the highest attention, averaged over heads and raters.

    Args:
        attention: `[B, heads, T, N]`, rows of text tokens.
        raters: bool `[B, T]`: which of them count.
        keep: ratio (of these tokens) or number of tokens.
        valid: bool `[B, N]`, True at tokens; None: all.

    Returns:
        bool `[B, N]`; ties go to the lower index.

    Raises:
        ValueError: for NaN at a valid token, or a sample without raters.
    """
    valid = valid_or_all(valid, attention[:, 0].transpose(1, 2))
    return top(_relevance(attention, raters, valid), counts(keep, valid), valid)


def _relevance(attention: Tensor, raters: Tensor, valid: Tensor) -> Tensor:
    """`[B, N]`: the mean over heads and raters."""
    mean = attention.to(torch.promote_types(attention.dtype, torch.float32)).mean(1)
    require_finite("attention", mean.transpose(1, 2), valid)
    silent = valid.any(1) & ~raters.any(1)
    if bool(silent.any()):
        raise ValueError(
            f"raters has none in sample {int(silent.nonzero()[0])}; at least one text token must rate"
        )
    return mean.masked_fill(~raters[..., None], 0.0).sum(1) / raters.sum(1, keepdim=True).clamp(min=1)


def recycle(
    features: Tensor, scores: Tensor, kept: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Turns the better part of the dropped tokens into cluster tokens (the paper's token recycling).

    Of `P` dropped tokens, the `int(0.3 * P) + 1` with the highest scores, `M`, are grouped into `M // 10 +
    1` clusters by density peaks: the density of a token is the exponential of minus the mean squared
    distance (over `sqrt(C)`) to as many nearest tokens as there are clusters, itself included; the centres
    have the highest product of density and distance to the nearest denser token (the largest of all
    distances for the densest); every token joins the nearest centre. A cluster becomes its mean, at the
    centre.

    Args:
        features: `[B, N, C]`.
        scores: `[B, N]`.
        kept: bool `[B, N]`: tokens that stay anyway.
        valid: bool `[B, N]`, True at tokens; None: all.

    Returns:
        bool `[B, N]`, the kept ones and the centres, and `features` with the means at the centres.

    Raises:
        ValueError: for NaN at a valid token.
    """
    valid = valid_or_all(valid, features)
    require_finite("features", features, valid)
    dropped = valid & ~kept
    sizes = [int(0.3 * p) + 1 if p else 0 for p in dropped.sum(1).tolist()]
    if not any(sizes):
        return kept & valid, features
    size = torch.tensor(sizes, device=kept.device)
    number = torch.where(size > 0, size // 10 + 1, 0)

    # the candidates of each sample, `[B, M, ...]`, packed to the left in the order of the prompt
    candidates = top(scores, size, dropped)
    order = (~candidates).byte().argsort(dim=1, stable=True)[:, : max(sizes)]
    real = candidates.gather(1, order)
    index = order[..., None].expand(-1, -1, features.shape[2])
    x = features.gather(1, index).to(torch.promote_types(features.dtype, torch.float32))
    x = x.masked_fill(~real[..., None], 0.0)

    # differences, not products: the distance of equal tokens is exactly 0
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(x.shape[2])
    distance = distance.masked_fill(~(real[:, :, None] & real[:, None]), math.inf)
    place = torch.arange(x.shape[1], device=x.device)
    among_nearest = place < number[:, None, None]
    nearest = distance.sort(dim=2).values.masked_fill(~among_nearest, 0.0)
    density = (-nearest.square().sum(2) / number.clamp(min=1)[:, None]).exp().masked_fill(~real, -1.0)
    denser = density[:, None] > density[:, :, None]
    denser |= (density[:, None] == density[:, :, None]) & (place < place[:, None])
    farthest = distance.masked_fill(distance.isinf(), 0.0).amax((1, 2))
    separation = torch.where(denser, distance, farthest[:, None, None]).amin(2)
    centre = top((separation * density).masked_fill(~real, 0.0), number, real)

    to_centres = distance.masked_fill(~centre[:, None], math.inf)
    joined = torch.where(centre, place, to_centres.argmin(2))
    members = ((joined[:, None] == place[:, None]) & real[:, None]).to(x.dtype)
    mean = members @ x / members.sum(2).clamp(min=1)[..., None]
    merged = torch.where(centre[..., None], mean.to(features.dtype), features.gather(1, index))
    mask = (kept & valid) | torch.zeros_like(valid).scatter(1, order, centre)
    return mask, features.scatter(1, index, merged)
