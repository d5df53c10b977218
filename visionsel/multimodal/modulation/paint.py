"""PAINT: each token that is written pays more attention to the image tokens that inform.

Arif et al. 2025, "PAINT: Paying Attention to INformed Tokens to Mitigate Hallucination in Large Vision-
Language Model", arXiv:2501.12206 (version 1 is called "Fixing Imbalanced Attention to Mitigate In-Context
Hallucination of Large Vision-Language Model"); release hasanar1f/PAINT. Two sets of tokens are read off the
vision tower by what its class token attends to: *local* ones, the top of the first layer, show objects;
*summary* ones, the outliers of the penultimate layer, hold what the tower has gathered of the whole image. As
in PAI, the attention logits of the token that the next one is predicted from are raised by a part of their
absolute value, by `alpha` at local and by `beta` at summary tokens, in all layers but the first two.

What is specified, and what is not. The abstract of version 1 speaks of modulation that differs by head, by
how sensitive a head was measured to be to the image. Versions 2 and 3 do not, and the release, from the first
on, has the same margins in all heads: that is `fidelity="code"`, the default, and no table is needed.
`fidelity="paper"` is the claim of version 1. Neither how sensitivity is measured nor how it becomes a margin
is in the code or in what we could read; here a head's margins are scaled by its sensitivity relative to that
of the most sensitive head of its layer, so that none is above `alpha` and `beta`, and the table is yours:
`head_importance` measures one.

What differs from the release: samples have sets of their own in a batch, and so have the images and videos of
a sample (and tiles, where the model is not told of which image they are: InternVL, Gemma 3); the share of
local tokens is rounded, never to none. The release's spatial tokens, of which it takes none unless told to,
are left out. Its contrast with the prompt without the image is `PAIGuidance`.

A token that stands for several patches has their mean. Towers without a class token have what a patch gets
from all others instead, as in `VisPruner`; where they attend in windows (Qwen2.5-VL), from those of its
window. The authors tried neither.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.modulation.heads import check_layers, head_shape
from visionsel.multimodal.modulation.margins import raised
from visionsel.multimodal.modulation.rows import Edited, RowEditor, Rows
from visionsel.multimodal.scope import PromptScope
from visionsel.multimodal.session import Session
from visionsel.multimodal.tower import TowerCrop, pooled

__all__ = ["Paint", "Painted", "select"]

Table = Sequence[Sequence[float]]


class Painted(Edited):
    """What `Paint` tells about its work.

    Attributes:
        layers: in which it acts.
    """

    @property
    def local(self) -> Tensor | None:
        """bool `[B, L]`: the local tokens of the last prompt; None before the first, or without images."""
        return self._set(0)

    @property
    def summary(self) -> Tensor | None:
        """bool `[B, L]`: its summary tokens."""
        return self._set(1)

    def _set(self, number: int) -> Tensor | None:
        prompt = self._editor.prompt
        return None if prompt is None or prompt.chosen is None else prompt.chosen[:, number]


@dataclass(frozen=True)
class Paint(Intervention):
    """Raises the attention of the last token to local and summary tokens, in the prompt and at each step.

    Args:
        alpha: at local tokens; the paper's best for LLaVA-1.5, and the release's default. It is a cliff: the
            authors' captions collapse from 0.8 on.
        beta: at summary tokens; the paper's best for LLaVA-1.5 (the release's default is 0.3).
        share: of an image's tokens that are local, before those that are summary tokens too are taken out.
        layers: decoder layers; None: all but the first two, as released.
        heads: for `fidelity="paper"`, how sensitive each head is, `[layers][heads]` from 0 up: what
            `head_importance` gives, or a table of numbers.
        fidelity: `"code"`: the same margins in all heads; `"paper"`: scaled by `heads` (see above).
        local_layer, summary_layer: of the vision tower; None: the one whose output the model uses, which
            for LLaVA-1.5 is the penultimate.

    Raises:
        ValueError: for a value out of range, `heads` that are no table, or that do not go with `fidelity`.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import Paint
        >>> with Paint()(model) as paint:
        ...     answer = model.generate(**inputs)
        >>> paint.layers
        (2, 3)
    """

    alpha: float = 0.7
    beta: float = 0.4
    share: float = 0.25
    layers: tuple[int, ...] | None = None
    heads: Any = None
    fidelity: str = "code"
    local_layer: int | None = 0
    summary_layer: int | None = -2

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be a number from 0 up, got {getattr(self, name)}; 0 changes nothing"
                )
        _check_share(self.share)
        if self.fidelity not in ("code", "paper"):
            raise ValueError(f'fidelity must be "code" or "paper", got {self.fidelity!r}')
        if (self.fidelity == "paper") != (self.heads is not None):
            raise ValueError(
                'fidelity="paper" scales margins by the sensitivity of heads, and "code" has none: pass '
                'fidelity="paper" and heads=head_importance(model, processor, samples) together, or neither'
            )
        if self.layers is not None:  # lists are taken too, but an intervention can be hashed
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.heads is not None:
            object.__setattr__(self, "heads", _table(getattr(self.heads, "sensitivity", self.heads)))

    @contextmanager
    def attach(self, session: Session) -> Iterator[Painted]:
        """See `Intervention`; yields what `Painted` tells.

        Raises:
            NotImplementedError: for a vision tower whose attention cannot be read.
        """
        number, count = head_shape(session)
        layers = list(range(2, number)) if self.layers is None else check_layers(self.layers, session)
        if self.heads is not None and (len(self.heads), len(self.heads[0])) != (number, count):
            raise ValueError(
                f"heads has {len(self.heads)} layers of {len(self.heads[0])} heads, this decoder {number} of "
                f"{count}; measure it on this model"
            )
        with ExitStack() as stack:
            first = session.observe_tower(self.local_layer)
            last = session.observe_tower(self.summary_layer)

            def choose(scope: PromptScope) -> Tensor:
                return _sets(scope, first, last, self.share)

            editor = RowEditor(session, self, self._edit, "last", choose=choose)
            if self.alpha > 0 or self.beta > 0:
                stack.enter_context(editor.edited(layers))
            yield Painted(editor, layers)

    def _edit(self, rows: Rows) -> tuple[Tensor, Tensor]:
        assert rows.chosen is not None
        sets = rows.chosen.to(rows.logits.dtype)
        margin = (self.alpha * sets[:, 0] + self.beta * sets[:, 1])[:, None]
        if self.heads is not None:
            sensitivity = torch.tensor(self.heads[rows.layer], dtype=margin.dtype, device=margin.device)
            most = sensitivity.amax()
            margin = margin * (sensitivity / torch.where(most > 0, most, 1))[:, None]
        edited = raised(rows.logits, margin).softmax(-1).nan_to_num(0.0)
        return edited, (margin > 0).any(-1)[..., None].expand(edited.shape[:-1])


def select(
    local_attention: Tensor, summary_attention: Tensor, share: float = 0.25, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens of images that are raised.

    Args:
        local_attention: what the class token pays each token in the first layer of the vision tower,
            `[B, heads, N]`, of which heads are summed, or `[B, N]`, their sum.
        summary_attention: the same of the penultimate layer.
        share: of the tokens, the highest by `local_attention`: `max(1, round(share * N))`; ties go to the
            lower index.
        valid: bool `[B, N]`, True at tokens; None: all.

    Returns:
        local and summary tokens, bool `[B, N]` each. Summary tokens are above `Q3 + 1.5 (Q3 - Q1)` of
        `summary_attention`, with quartiles interpolated linearly; local ones are none of them.

    Raises:
        ValueError: for other shapes, NaN at a valid token, or a share out of range.
    """
    _check_share(share)
    local, summary = (
        _summed("local_attention", local_attention),
        _summed("summary_attention", summary_attention),
    )
    if local.shape != summary.shape:
        raise ValueError(
            "local_attention and summary_attention are of the same tokens, got "
            f"{list(local_attention.shape)} and {list(summary_attention.shape)}"
        )
    if valid is None:
        valid = torch.ones_like(local, dtype=torch.bool)
    elif valid.dtype != torch.bool or valid.shape != local.shape:
        raise ValueError(f"valid must be bool {list(local.shape)}, got {valid.dtype} {list(valid.shape)}")
    for name, scores in (("local_attention", local), ("summary_attention", summary)):
        if bool((scores.isnan() & valid).any()):
            raise ValueError(f"{name} has NaN: tokens cannot be ranked; look at the model's outputs")
    number = valid.sum(1)
    # a stable sort: of equal tokens the first comes first; invalid ones come last
    order = local.masked_fill(~valid, -math.inf).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, (~valid.gather(1, order)).byte().argsort(dim=1, stable=True))
    wanted = [max(1, round(share * n)) for n in number.tolist()]
    first = torch.arange(order.shape[1], device=order.device) < number.new_tensor(wanted)[:, None]
    top = torch.zeros_like(valid).scatter(1, order, first) & valid
    rising = summary.masked_fill(~valid, math.inf).sort(1).values
    low, high = (_quantile(rising, number, part) for part in (0.25, 0.75))
    outliers = (summary > high + 1.5 * (high - low)) & valid
    return top & ~outliers, outliers


def _quantile(rising: Tensor, number: Tensor, part: float) -> Tensor:
    """`[B, 1]`: between the two nearest of the first `number` `[B]` values of each row `[B, N]`."""
    place = (number - 1).clamp(min=0)[:, None].to(rising.dtype) * part
    below = place.floor().long()
    above = torch.minimum(below + 1, (number - 1).clamp(min=0)[:, None])
    start = rising.gather(1, below)
    return start + (rising.gather(1, above) - start) * (place - below)


def _summed(name: str, attention: Tensor) -> Tensor:
    """`[B, N]`, at least in float32."""
    if attention.ndim not in (2, 3) or not attention.shape[-1]:
        raise ValueError(f"{name} is [B, heads, N] or [B, N], got {list(attention.shape)}")
    wide = attention.to(torch.promote_types(attention.dtype, torch.float32))
    return wide.sum(1) if wide.ndim == 3 else wide


def _sets(scope: PromptScope, first: int, last: int, share: float) -> Tensor:
    """bool `[B, 2, L]`: local and summary tokens of each prompt."""
    pictures = {(one.modality, one.number): one for row in scope.pictures for one in row}
    scores = {
        modality: [pooled(scope, layer, _received, modality) for layer in (first, last)]
        for modality in {modality for modality, _ in pictures}
    }
    device = next(iter(scores.values()))[0].device
    sources = {key: one.layout.source().to(device) for key, one in pictures.items()}  # -1: no patch
    local_attention, summary_attention = (
        pad_sequence([scores[key[0]][n][source.clamp(min=0)] for key, source in sources.items()], True)
        for n in range(2)
    )
    valid = pad_sequence([source >= 0 for source in sources.values()], True)
    local, summary = select(local_attention, summary_attention, share, valid)
    sets = dict(zip(sources, torch.stack([local, summary], 1).to(scope.visual.device), strict=True))
    chosen = scope.visual.new_zeros(len(scope.visual), 2, scope.length)
    for row, ones in enumerate(scope.pictures):
        for one in ones:
            places = one.positions.to(chosen.device)
            chosen[row][:, places] = sets[one.modality, one.number][:, : one.layout.n]
    return chosen


def _received(crop: TowerCrop) -> Tensor:
    """`[patches]`: what the class token pays, or all patches together; over all heads.

    The sum, not the mean, over patches: windows of attention that are smaller would weigh more.
    """
    return (crop.class_row() if crop.skip else crop.received() * crop.patches).sum(0)


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share!r}")


def _table(rows: Any) -> tuple[tuple[float, ...], ...]:
    """Numbers from 0 up, of layers and heads, as tuples."""
    try:
        table = tuple(tuple(float(value) for value in row) for row in rows)
    except (TypeError, ValueError) as error:
        raise ValueError(f"heads must be a table of layers and heads, got {rows!r}") from error
    values = [value for row in table for value in row]
    whole = bool(values) and len({len(row) for row in table}) == 1
    if not whole or not all(0 <= value < math.inf for value in values):
        raise ValueError("heads must be a table of as many numbers from 0 up for each layer")
    return table
