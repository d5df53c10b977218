"""VAR: attention that image tokens waste on sinks goes to the image tokens that show something.

Kang et al. 2025, "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025,
arXiv:2503.03321; release seilk/VisAttnSink. A few image tokens draw attention whatever is asked, as the first
token of a text does; a few dimensions of their hidden states are huge, the same ones as in the language model
before it saw images. In heads that look at the rest of the image too, that attention is handed on to it.

What differs from the release with `fidelity="paper"`, the default; `"code"` does as the release does:

- `p` is the part of the sinks' attention that moves; the release moves `1 - p` (40 % at 0.6).
- `rho` is the least part of a head's attention to the image that must go to other tokens than sinks; the
  release lets the sinks have at most `rho` (the same at 0.5 only).
- the last layer is left alone; the release means to, but edits it.
- a token is a sink from `tau` on; the release asks for more than `tau`.
- generated tokens may become sinks, and take part in what moves; in the release only those of the prompt.
- the sink dimensions are those of the language model at hand; the release has those of the 7B model always.

The release edits the weights of the eager kernel and one sample at a time. Here any kernel runs, and the
output of the rows that change is corrected (`visionsel.multimodal.modulation.rows`). Where paper is silent
we follow the release: where an image has no sink among its tokens, nothing moves.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.modulation.heads import check_layers
from visionsel.multimodal.modulation.rows import Edited, RowEditor, Rows
from visionsel.multimodal.session import Session
from visionsel.multimodal.sinks import SINK_DIMS, discover_sink_dims, massiveness, published_sink_dims

__all__ = ["VAR", "Redistributed", "redistribute", "select"]


class Redistributed(Edited):
    """What `VAR` tells about its work.

    Attributes:
        layers: in which it acts.
        sink_dims: the dimensions of the hidden states that tell sinks.
    """

    def __init__(self, editor: RowEditor, layers: Sequence[int], sink_dims: tuple[int, ...]) -> None:
        super().__init__(editor, layers)
        self.sink_dims = sink_dims

    @property
    def sinks(self) -> dict[int, Tensor]:
        """For each layer bool `[B, n]`: the sinks among the tokens of the last prompt and what followed.

        None are told of tokens that a pruner dropped before the layer.
        """
        prompt = self._editor.prompt
        return {} if prompt is None else dict(prompt.marks)


@dataclass(frozen=True)
class VAR(Intervention):
    """Moves attention from sinks to the other image tokens, in heads that look at the image.

    It acts on the rows of the text after the last image and of what is generated.

    Args:
        p: part of the attention of the sinks that moves.
        rho: a head is image-centric when at least this part of its attention to the image goes to tokens
            that are no sinks; the paper takes 0.5 against hallucination, 0.8 for general questions, 0.9 for
            questions about details.
        tau: a token is a sink when a sink dimension is at least `tau` times its root mean square. It cannot
            exceed the square root of the width: choose it lower for narrow models.
        min_image_attention: heads whose attention to the image is less in sum are left alone.
        sink_dims: dimensions of the hidden states; None: the published ones of the language model, or else
            what `discover_sink_dims` finds.
        layers: decoder layers; None: all but the first two and the last.
        fidelity: `"paper"` or `"code"`, where they differ (see above).

    Raises:
        ValueError: for a value out of range.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import VAR
        >>> with VAR(p=0.6, tau=5.0)(model) as var:
        ...     answer = model.generate(**inputs)
        >>> var.layers
        (2,)
    """

    p: float = 0.6
    rho: float = 0.5
    tau: float = 20.0
    min_image_attention: float = 0.2
    sink_dims: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    fidelity: str = "paper"

    def __post_init__(self) -> None:
        for name in ("p", "rho", "min_image_attention"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not self.tau > 0:
            raise ValueError(f"tau must be more than 0, got {self.tau}")
        if self.fidelity not in ("paper", "code"):
            raise ValueError(f'fidelity must be "paper" or "code", got {self.fidelity!r}')
        for name in ("sink_dims", "layers"):  # lists are taken too, but an intervention can be hashed
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))
        if self.sink_dims == ():
            raise ValueError("sink_dims is empty; name dimensions of the hidden states, or None to find them")

    @property
    def moved(self) -> float:
        """The part of the attention of the sinks that moves."""
        return self.p if self.fidelity == "paper" else 1 - self.p

    @contextmanager
    def attach(self, session: Session) -> Iterator[Redistributed]:
        """See `Intervention`; yields what `Redistributed` tells."""
        number = len(session.layers)
        default = range(2, number - 1 if self.fidelity == "paper" else number)
        layers = list(default) if self.layers is None else check_layers(self.layers, session)
        dims = self._dims(session)
        editor = RowEditor(
            session,
            self,
            self._edit,
            "text",
            mark=lambda hidden: self._sinks(hidden, dims),
            mark_generated=self.fidelity == "paper",
        )
        with ExitStack() as stack:
            if self.moved > 0:
                stack.enter_context(editor.edited(layers))
            yield Redistributed(editor, layers, dims)

    def _dims(self, session: Session) -> tuple[int, ...]:
        config = session.decoder.config
        dims = self.sink_dims
        if dims is None and self.fidelity == "code":
            dims = SINK_DIMS["llama-2-7b"]
        if dims is None:
            dims = published_sink_dims(config)
        if dims is None:
            with session.beside():
                return discover_sink_dims(session.model)
        if min(dims) < 0 or max(dims) >= config.hidden_size:
            raise ValueError(
                f"sink_dims {dims} do not exist: the hidden states have dimensions 0 to "
                f"{config.hidden_size - 1}; discover_sink_dims(model) finds those of a model"
            )
        return dims

    def _sinks(self, hidden: Tensor, dims: tuple[int, ...]) -> Tensor:
        values = massiveness(hidden, dims)
        return values >= self.tau if self.fidelity == "paper" else values > self.tau

    def _edit(self, rows: Rows) -> tuple[Tensor, Tensor]:
        rho = self.rho if self.fidelity == "paper" else 1 - self.rho
        attention = rows.attention
        heads = select(attention, rows.visual, rows.marked, rho, self.min_image_attention)
        return redistribute(attention, rows.visual, rows.marked, self.moved), heads


def select(
    attention: Tensor, visual: Tensor, sinks: Tensor, rho: float = 0.5, min_image_attention: float = 0.2
) -> Tensor:
    """The rows of image-centric heads.

    Args:
        attention: `[B, heads, t, k]`, rows sum to 1.
        visual: bool `[B, k]`: image tokens.
        sinks: bool `[B, k]`: sinks of all kinds.
        rho: least part of the attention to the image that goes to tokens which are no sinks.
        min_image_attention: least attention to the image.

    Returns:
        bool `[B, heads, t]`.
    """
    total = _sum(attention, visual)
    seeing = _sum(attention, visual & ~sinks)
    wasted = (visual & sinks).any(-1)[:, None, None]
    # a row that gives the rest of the image nothing has no proportions to hand on by
    return wasted & (total >= min_image_attention) & (seeing >= rho * total) & (seeing > 0)


def redistribute(attention: Tensor, visual: Tensor, sinks: Tensor, p: float = 0.6) -> Tensor:
    """Rows in which a part of the attention of the sinks goes to the other image tokens, in proportion.

    Args:
        attention: `[B, heads, t, k]`.
        visual: bool `[B, k]`: image tokens.
        sinks: bool `[B, k]`: sinks of all kinds, in text and image.
        p: the part that moves.

    Returns:
        `[B, heads, t, k]` with the same sums; rows without attention to other image tokens as they were.
    """
    others = visual & ~sinks
    seeing = _sum(attention, others)[..., None]
    budget = p * _sum(attention, sinks)[..., None]
    gain = budget / seeing.masked_fill(seeing == 0, 1)
    here = others[:, None, None]
    edited = torch.where(sinks[:, None, None], attention * (1 - p), attention)
    edited = torch.where(here, attention + attention * gain, edited)
    return torch.where(seeing > 0, edited, attention)


def _sum(attention: Tensor, keys: Tensor) -> Tensor:
    return attention.masked_fill(~keys[:, None, None], 0).sum(-1)
