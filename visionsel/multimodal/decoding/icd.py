"""ICD: take off what the model would say when told to be confused (Wang et al. 2024).

Source: arXiv 2403.18715, Instruction Contrastive Decoding, and its released code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from visionsel.multimodal.decoding.two_view import TwoView, View, Views, check_strengths, contrast
from visionsel.multimodal.decoding.views import Disturbance
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.session import Session

__all__ = ["ICD"]


@dataclass(frozen=True)
class ICD(Intervention):
    """Contrasts the prompt with itself after a disturbing instruction: `(1 + alpha) z - alpha z'`.

    Args:
        alpha: how strongly; 0: everything is as without ICD.
        beta: tokens less probable than `beta` times the most probable one are out; 0: all are in.
        view: of the inputs of `generate()`, such as `Disturbance.of(processor.tokenizer)`; None: this one
            with the tokenizer that lies beside the model's weights.

    Raises:
        ValueError: for a value out of range, or, with `view=None`, a model whose tokenizer is not found.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import ICD
        >>> from visionsel.multimodal.decoding import Disturbance
        >>> with ICD(view=Disturbance.of(processor.tokenizer, "is there a ring?"))(model):
        ...     answer = model.generate(**inputs)
    """

    alpha: float = 1.0
    beta: float = 0.1
    view: View | None = None

    def __post_init__(self) -> None:
        check_strengths(self.alpha, self.beta)

    @contextmanager
    def attach(self, session: Session) -> Iterator[Views]:
        """See `Intervention`; yields the second view's side."""
        view = Disturbance.beside(session.model) if self.view is None else self.view
        with TwoView(view, contrast(self.alpha), self.beta).attach(session) as views:
            yield views
