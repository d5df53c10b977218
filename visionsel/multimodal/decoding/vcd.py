"""VCD: take off what the model would say without seeing well (Leng et al. 2024, Visual Contrastive Decoding).

Source: arXiv 2311.16922. Its numbers are of sampling at temperature 1; the defaults are its README's. The
released scripts differ among themselves: POPE with beta 0.2, and alpha 0.5 where none is given.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from visionsel.multimodal.decoding.two_view import TwoView, View, Views, check_strengths, contrast
from visionsel.multimodal.decoding.views import DiffusionNoise
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.session import Session

__all__ = ["VCD"]


@dataclass(frozen=True)
class VCD(Intervention):
    """Contrasts the prompt with itself under a noised image: `(1 + alpha) z - alpha z'`.

    Args:
        alpha: how strongly; 0: everything is as without VCD.
        beta: tokens less probable than `beta` times the most probable one are out; 0: all are in.
        view: of the inputs of `generate()`; None: `DiffusionNoise(500)`.

    Raises:
        ValueError: for a value out of range.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import VCD
        >>> with VCD(alpha=1.0)(model):
        ...     answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        >>> processor.decode(answer, skip_special_tokens=True)
        'a large cyan heart and a large orange triangle and a large orange triangle on a plain background'
    """

    alpha: float = 1.0
    beta: float = 0.1
    view: View | None = None

    def __post_init__(self) -> None:
        check_strengths(self.alpha, self.beta)

    @contextmanager
    def attach(self, session: Session) -> Iterator[Views]:
        """See `Intervention`; yields the second view's side."""
        view = DiffusionNoise() if self.view is None else self.view
        with TwoView(view, contrast(self.alpha), self.beta).attach(session) as views:
            yield views
