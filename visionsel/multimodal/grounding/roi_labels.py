"""Targets for `RoIHead` without any boxes: what the model itself looks at while it answers, made clean.

Shi et al. 2025, SD-RPN, arXiv:2509.16944, section 3: the mean of a few heads that point tells what is
foreground, sinks left out; what is clearly outside and hardly looked at is background; the rest is not
learned from. Which heads point is found once for a model (`HeadSelector`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from visionsel.multimodal.grounding.heatmaps.rows import check_row, existing, image_rows, image_views
from visionsel.multimodal.grounding.heatmaps.sinks import SinkFilter, sink_columns
from visionsel.multimodal.grounding.heatmaps.spatial import blur
from visionsel.multimodal.grounding.replay import Replay

__all__ = ["IGNORED", "AttentionSinks", "answer_attention", "attention_labels", "pseudo_labels", "roi_loss"]

IGNORED = -1
Head = tuple[int, int]


@dataclass(frozen=True)
class AttentionSinks:
    """Image tokens that some heads of an early layer look at whatever is said: SD-RPN's rule.

    It is a filter as those of `heatmaps/sinks.py`, and can stand wherever one can.

    Args:
        heads: for each layer the heads that show the sinks, whose mean is taken; for Qwen2.5-VL-7B the
            release has `{8: (1, 13)}`.
        threshold: the attention, in the mean of the rows of the answer, from which on a token is a sink.
            1e-3 is the release's, for images of some 600 tokens and more, where it is less than an even
            share; choose it higher for fewer tokens.

    Raises:
        ValueError: for no heads, or a threshold out of (0, 1).
    """

    heads: Mapping[int, Sequence[int]] = field(default_factory=lambda: {8: (1, 13)})
    threshold: float = 1e-3

    def __post_init__(self) -> None:
        if not self.heads or not all(len(chosen) for chosen in self.heads.values()):
            raise ValueError(f"heads must name a layer and heads of it, got {dict(self.heads)}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be between 0 and 1, got {self.threshold}")

    def __call__(self, replay: Replay, layers: Sequence[int]) -> Tensor:
        """bool `[B, n]`; see `sink_columns`, whose layers are not looked at."""
        pairs = [(layer, head) for layer, chosen in self.heads.items() for head in chosen]
        found = answer_attention(replay, pairs) >= self.threshold
        return found & (replay.image >= 0).to(found.device)


def answer_attention(replay: Replay, heads: Sequence[Head], row: str = "predict") -> Tensor:
    """What some heads look at in the image while the model answers: their mean, over the answer's tokens.

    Args:
        replay: prompts and their answers.
        heads: pairs of layer and head.
        row: which rows: `"predict"`, those that predict the tokens; `"token"`, those of the tokens;
            `"prompt"`, the last one of the prompt alone.

    Returns:
        float32 `[B, n]`, in the order of `replay.image`.

    Raises:
        ValueError: for heads that do not exist, or a prompt without images.
    """
    check_row(row)
    pairs = sorted({(int(layer), int(head)) for layer, head in heads})
    if not pairs:
        raise ValueError("no heads are given; find those of a model with HeadSelector.fit")
    valid = replay.valid[:, :1] if row == "prompt" else replay.valid
    parts: list[Tensor] = []

    def see(layer: int, rows: Tensor) -> None:
        chosen = existing("heads", [head for where, head in pairs if where == layer], rows.shape[1])
        here = valid.to(rows)[:, None, :, None]
        mean = (rows[:, chosen] * here).sum(2) / here.sum(2).clamp(min=1)
        parts.append(mean.sum(1).to(replay.image.device))

    image_rows(replay, see, sorted({layer for layer, _ in pairs}), row)
    return torch.stack(parts).sum(0) / len(pairs)


def pseudo_labels(
    attention: Tensor,
    sinks: Tensor | None = None,
    foreground: float = 0.2,
    background: float = 0.1,
    largest: float = 0.5,
) -> Tensor:
    """Foreground, background and what is not known, of maps of attention.

    Args:
        attention: `[..., h, w]`, nothing negative.
        sinks: bool, of the same shape: cells whose attention says nothing; None: there are none.
        foreground: cells of at least this share of the map's maximum are foreground.
        background: cells of at most this share are background, unless they are in the box around the
            foreground as a 3 x 3 Gaussian (sigma 1) spreads it, so one cell wider on each side.
        largest: where that box takes at least this share of the map, nothing is known: attention is
            everywhere. The release's number.

    Returns:
        int64 `[..., h, w]`: 1, 0, or `IGNORED`.

    Raises:
        ValueError: for shapes that do not go together, or shares out of order.
    """
    if attention.ndim < 2 or (sinks is not None and sinks.shape != attention.shape):
        raise ValueError(
            f"attention must be [..., h, w] and sinks like it, got {list(attention.shape)} and "
            f"{None if sinks is None else list(sinks.shape)}"
        )
    if not 0 <= background < foreground <= 1 or not largest > 0:
        raise ValueError(
            "background must be at least 0 and below foreground, foreground at most 1, largest above 0; got "
            f"{background}, {foreground} and {largest}"
        )
    height, width = attention.shape[-2:]
    clean = attention if sinks is None else attention.masked_fill(sinks, 0)
    peak = clean.amax((-2, -1), keepdim=True)
    inside = (clean >= foreground * peak) & (clean > 0)
    spread = blur(inside.to(torch.float64), sigma=1.0, size=3) > 0
    rows, columns = spread.any(-1), spread.any(-2)
    box = _between(rows)[..., :, None] & _between(columns)[..., None, :]
    labels = torch.full_like(clean, IGNORED, dtype=torch.long)
    labels[(clean <= background * peak) & ~box] = 0
    labels[inside] = 1
    nothing = (peak <= 0) | (box.sum((-2, -1), keepdim=True) >= largest * height * width)
    return labels.masked_fill(nothing, IGNORED)


def attention_labels(
    replay: Replay,
    heads: Sequence[Head],
    sinks: str | SinkFilter | AttentionSinks | None = None,
    row: str = "predict",
    foreground: float = 0.2,
    background: float = 0.1,
    largest: float = 0.5,
) -> Tensor:
    """Targets for the image tokens of prompts, from the attention of their answers.

    Args:
        replay: prompts and their answers.
        heads: pairs of layer and head that point.
        sinks: which image tokens to leave out: `"hidden"` (huge hidden states), another name or filter of
            `heatmaps/sinks.py`, or `AttentionSinks`.
        row: see `answer_attention`.
        foreground, background, largest: see `pseudo_labels`.

    Returns:
        int64 `[B, n]` in the order of `replay.image`: 1, 0 or `IGNORED`. Grids that show a whole image have
        labels (of an image in tiles its thumbnail), others are ignored.

    Raises:
        ValueError: see `answer_attention` and `pseudo_labels`.
    """
    layers = sorted({int(layer) for layer, _ in heads})
    attention = answer_attention(replay, heads, row)
    columns = sink_columns(replay, sinks, layers)  # type: ignore[arg-type]
    labels = torch.full(attention.shape, IGNORED, device=attention.device)
    for number, views in enumerate(image_views(replay, whole=True)):
        for view in views:
            index = view.to(attention.device)
            cells = None if columns is None else columns[number, index]
            labels[number, index] = pseudo_labels(
                attention[number, index], cells, foreground, background, largest
            )
    return labels


def roi_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy over what is known; 0 with a gradient of 0 where nothing is.

    Args:
        logits: `[B, n]`, of `RoIHead`.
        labels: int64 `[B, n]`: 1, 0 or `IGNORED`.
    """
    known = labels.to(logits.device) != IGNORED
    if not known.any():
        return logits.sum() * 0
    return binary_cross_entropy_with_logits(logits[known], labels.to(logits.device)[known].to(logits))


def _between(active: Tensor) -> Tensor:
    """bool `[..., n]`: from the first to the last active place."""
    number = active.long()
    return (number.cumsum(-1) > 0) & (number.flip(-1).cumsum(-1).flip(-1) > 0)
