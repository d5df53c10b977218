"""M3ID: the longer the answer, the more counts what only the image says (Favero et al. 2024).

Source: arXiv 2403.14003. There is no code of the authors; this is the form that RITUAL's code has of it, with
its constants, where the correction applies at every token.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from visionsel.multimodal.decoding.two_view import TwoView, Views, check_beta
from visionsel.multimodal.decoding.views import RemoveImages
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.session import Session

__all__ = ["M3ID"]


@dataclass(frozen=True)
class M3ID(Intervention):
    """Contrasts the prompt with itself without images: `z + (1 - g) / g (z - z')`, `g = exp(-decay t)`.

    Token `t` counts from 0, so that the first one is chosen without correction.

    Args:
        decay: how fast the correction grows; 0: everything is as without M3ID.
        beta: tokens less probable than `beta` times the most probable one are out; 0: all are in.

    Raises:
        ValueError: for a value out of range.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import M3ID
        >>> with M3ID(decay=0.02)(model):
        ...     answer = model.generate(**inputs)
    """

    decay: float = 0.02
    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.decay < 0:
            raise ValueError(f"decay must be 0 or more, got {self.decay}")
        check_beta(self.beta)

    @contextmanager
    def attach(self, session: Session) -> Iterator[Views]:
        """See `Intervention`; yields the second view's side."""
        view = RemoveImages(tuple(session.family.token_ids(session.model).values()))
        with TwoView(view, self._combine if self.decay else None, self.beta).attach(session) as views:
            yield views

    def _combine(self, main: Tensor, other: Tensor, number: int) -> Tensor:
        weight = math.expm1(self.decay * number)
        # a forbidden token has -inf in z, and -inf times 0 is no number: never multiply (z - z')
        return (1 + weight) * main - weight * other
