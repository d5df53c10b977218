"""ACT: attention that later tokens draw without cause goes back to the others.

Yu et al. 2024, "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without
Training through Attention Calibration", ICML 2024, arXiv:2406.15765; release GATECH-EIC/ACT. In a head, a
token is a sink when the queries that see it pay it more than `threshold` on average. The first sink of a head
helps and is kept. The attention of the others is multiplied by `beta`, and what that frees goes to the tokens
that are none, in proportion to their attention.

It is a method for language models that read texts; on a vision-language model it treats text and images
alike. The release names heads for each language model, which it found by trying each on held-out questions;
there are none for vision-language models, so all heads are the default, and `heads` takes yours.

What differs from the release: padding counts for nothing, and who sees a token is read from the mask, since
images may see all of themselves. Sinks are found when the prompt is read, and hold for what is generated
after it; there the release takes a single row for a whole map, and sets its first weight to 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from visionsel.multimodal.attention import AttentionCall, attention_logits
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.modulation.heads import check_layers, head_shape
from visionsel.multimodal.modulation.rows import CHUNK, Edited, RowEditor, Rows
from visionsel.multimodal.session import Session

__all__ = ["ACT", "Calibrated", "calibrate", "sinks_of"]

Heads = Mapping[int, Sequence[int]]


class Calibrated(Edited):
    """What `ACT` tells about its work.

    Attributes:
        layers: in which it acts.
    """

    @property
    def sinks(self) -> dict[int, Tensor]:
        """For each layer bool `[B, heads, L]`: tokens of the last prompt whose attention is cut, by head."""
        prompt = self._editor.prompt
        return {} if prompt is None else dict(prompt.marks)


@dataclass(frozen=True)
class ACT(Intervention):
    """Cuts the attention of all sinks but the first, in every row of chosen heads.

    Args:
        beta: what is left of their attention; 1 changes nothing.
        threshold: mean attention from which on a token is a sink.
        heads: for each layer the heads to calibrate; None: all heads of `layers`.
        layers: decoder layers, where `heads` is None; None: all but the first two and the last.

    Raises:
        ValueError: for a value out of range, or both `heads` and `layers`.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import ACT
        >>> with ACT(beta=0.4)(model) as act:
        ...     answer = model.generate(**inputs)
        >>> act.layers
        (2,)
    """

    beta: float = 0.4
    threshold: float = 0.1
    heads: Heads | tuple[tuple[int, tuple[int, ...]], ...] | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("beta", "threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.heads is not None and self.layers is not None:
            raise ValueError("heads names its layers already; give heads or layers")
        if self.layers is not None:  # lists and dicts are taken too, but an intervention can be hashed
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.heads is not None:
            heads = sorted((layer, tuple(chosen)) for layer, chosen in dict(self.heads).items())
            object.__setattr__(self, "heads", tuple(heads))

    @contextmanager
    def attach(self, session: Session) -> Iterator[Calibrated]:
        """See `Intervention`; yields what `Calibrated` tells."""
        number, count = head_shape(session)
        named: dict[int, Sequence[int]]
        if self.heads is not None:
            named = dict(self.heads)
            layers = check_layers(named, session)
            for layer, chosen in named.items():
                if not chosen or not all(isinstance(head, int) and 0 <= head < count for head in chosen):
                    raise ValueError(
                        f"heads {list(chosen)} of layer {layer} do not exist: choose among 0 to {count - 1}"
                    )
        else:
            every = range(2, number - 1)
            layers = list(every) if self.layers is None else check_layers(self.layers, session)
            named = dict.fromkeys(layers, range(count))
        numbers = {session.layers[layer].self_attn: chosen for layer, chosen in named.items()}

        def measure(call: AttentionCall, prompt: Tensor) -> Tensor:
            chosen = torch.zeros(count, dtype=torch.bool, device=prompt.device)
            chosen[list(numbers[call.module])] = True
            return sinks_of(call, prompt, self.threshold) & chosen[:, None]

        editor = RowEditor(session, self, self._edit, "all", measure=measure)
        with ExitStack() as stack:
            if self.beta < 1:
                stack.enter_context(editor.edited(layers))
            yield Calibrated(editor, layers)

    def _edit(self, rows: Rows) -> tuple[Tensor, Tensor]:
        edited = calibrate(rows.attention, rows.marked, self.beta)
        return edited, (rows.marked[:, :, None] & (rows.attention > 0)).any(-1)


def sinks_of(call: AttentionCall, prompt: Tensor, threshold: float = 0.1) -> Tensor:
    """The sinks of each head but its first one.

    Args:
        call: of the attention over a prompt.
        prompt: bool `[B, k]`: its tokens, which are queries and keys; False for padding.
        threshold: mean attention from which on a token is a sink.

    Returns:
        bool `[B, heads, k]`.
    """
    total = seen = torch.zeros((), device=prompt.device)
    for part in torch.arange(prompt.shape[1], device=prompt.device).split(CHUNK):
        logits = attention_logits(call, part.expand(len(prompt), -1))
        rows = prompt[:, None, part, None]
        total = total + logits.softmax(-1).nan_to_num(0.0).masked_fill(~rows, 0).sum(2)
        seen = seen + (torch.isfinite(logits) & rows).sum(2)
    sinks = (total > threshold * seen) & prompt[:, None]
    return sinks & (sinks.cumsum(-1) > 1)


def calibrate(attention: Tensor, sinks: Tensor, beta: float = 0.4) -> Tensor:
    """Rows in which sinks keep a part of their attention and the others share the rest in proportion.

    Args:
        attention: `[B, heads, t, k]`.
        sinks: bool `[B, heads, k]`.
        beta: what sinks keep.

    Returns:
        `[B, heads, t, k]` with the same sums; rows that see nothing but sinks as they were.
    """
    sinks = sinks[:, :, None]
    others = attention.masked_fill(sinks, 0).sum(-1, keepdim=True)
    freed = (1 - beta) * attention.masked_fill(~sinks, 0).sum(-1, keepdim=True)
    gain = freed / others.masked_fill(others == 0, 1)
    edited = torch.where(sinks, attention * beta, attention + attention * gain)
    return torch.where(others > 0, edited, attention)
