"""PAI: each token that is written pays more attention to the image.

Liu et al. 2024, "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in
LVLMs", arXiv:2407.21771; release LALBJ/PAI. The attention logits of the token that the next one is predicted
from are raised at the image tokens by `alpha` times their absolute value, before the softmax, in all heads of
all layers but the first two.

The other half of PAI, its contrast with the prompt without the image, is a matter of decoding:
`visionsel.multimodal.decoding.PAIGuidance`. The release changes the weights of the eager kernel, in a span
that holds the image; here any kernel runs, the output is corrected (`visionsel.multimodal.modulation.rows`),
and the tokens of all images are raised, whatever stands between them.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor

from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.modulation.heads import check_layers
from visionsel.multimodal.modulation.margins import raised
from visionsel.multimodal.modulation.rows import Edited, RowEditor, Rows
from visionsel.multimodal.session import Session

__all__ = ["PAI", "amplify"]


@dataclass(frozen=True)
class PAI(Intervention):
    """Raises the attention of the last token to the image, in the prompt and at each step.

    Args:
        alpha: how much; the release takes 0.2 for LLaVA-1.5. 0 changes nothing.
        layers: decoder layers; None: all but the first two, the release's for LLaVA-1.5.

    Raises:
        ValueError: for a value out of range.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import PAI
        >>> with PAI(alpha=0.2)(model) as pai:
        ...     answer = model.generate(**inputs)
        >>> pai.layers
        (2, 3)
    """

    alpha: float = 0.2
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be a number from 0 up, got {self.alpha}; 0 changes nothing")
        if self.layers is not None:  # lists are taken too, but an intervention can be hashed
            object.__setattr__(self, "layers", tuple(self.layers))

    @contextmanager
    def attach(self, session: Session) -> Iterator[Edited]:
        """See `Intervention`; yields what `Edited` tells."""
        default = range(2, len(session.layers))
        layers = list(default) if self.layers is None else check_layers(self.layers, session)
        editor = RowEditor(session, self, self._edit, "last")
        with ExitStack() as stack:
            if self.alpha > 0:
                stack.enter_context(editor.edited(layers))
            yield Edited(editor, layers)

    def _edit(self, rows: Rows) -> tuple[Tensor, Tensor]:
        edited = amplify(rows.logits, rows.visual, self.alpha).softmax(-1).nan_to_num(0.0)
        return edited, rows.visual.any(-1)[:, None, None].expand(edited.shape[:-1])


def amplify(logits: Tensor, visual: Tensor, alpha: float = 0.2) -> Tensor:
    """Logits that are higher at image tokens.

    Args:
        logits: `[B, heads, t, k]` before the softmax, -inf where a query does not see.
        visual: bool `[B, k]`: image tokens.
        alpha: of their absolute value, how much is added.

    Returns:
        `[B, heads, t, k]`.
    """
    return raised(logits, alpha * visual.to(logits.dtype))
