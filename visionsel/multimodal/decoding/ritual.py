"""RITUAL: what the model says to a transformed image counts too (Woo et al. 2024).

Source: arXiv 2405.17821 and its released code, with the defaults for LLaVA-1.5: sampling at temperature 1.
Two equal views sharpen to temperature `1 / (1 + alpha)`, so compare with that, and with greedy decoding.
RITUAL+, where the model itself chooses the transform, is `plus=True`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from visionsel.multimodal.decoding.chosen import ChosenTransform
from visionsel.multimodal.decoding.two_view import TwoView, View, Views, agree, check_strengths
from visionsel.multimodal.decoding.views import RandomTransform
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.session import Session

__all__ = ["Ritual"]


@dataclass(frozen=True)
class Ritual(Intervention):
    """Adds the logits of a transformed image: `z + alpha z'`.

    Args:
        alpha: how strongly; 0: everything is as without RITUAL.
        beta: tokens less probable than `beta` times the most probable one are out; 0: all are in.
        view: of the inputs of `generate()`; None: `RandomTransform.of(model)`, from all six of the paper.
            Flips, rotations and colours change what is true of places, colours and letters: for such
            questions pass `RandomTransform.of(model, kinds=("blur", "crop"))`; and pass `processor=` to it
            where the pixels are not normalised as is usual for the family.
        plus: RITUAL+: the model is asked which transform suits the prompt, see `ChosenTransform`. The view is
            then `ChosenTransform.of(model, processor)` with the processor beside the model's weights; to give
            the processor, pass that as `view=` instead. One more generation of up to 12 tokens.

    Raises:
        ValueError: for a value out of range, or a view besides `plus`; or, with `plus`, a model whose
            processor is not found.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import Ritual
        >>> from visionsel.multimodal.decoding import RandomTransform
        >>> blurred = RandomTransform.of(model, kinds=("blur", "crop"))
        >>> with Ritual(view=blurred)(model):
        ...     answer = model.generate(**inputs)
    """

    alpha: float = 3.0
    beta: float = 0.1
    view: View | None = None
    plus: bool = False

    def __post_init__(self) -> None:
        if self.plus and self.view is not None:
            raise ValueError("plus=True makes a view of its own; pass plus=True or view=, not both")
        check_strengths(self.alpha, self.beta)

    @contextmanager
    def attach(self, session: Session) -> Iterator[Views]:
        """See `Intervention`; yields the second view's side."""
        view = self.view
        if view is None:
            model = session.model
            view = ChosenTransform.beside(model) if self.plus else RandomTransform.of(model)
        with TwoView(view, agree(self.alpha), self.beta).attach(session) as views:
            yield views
