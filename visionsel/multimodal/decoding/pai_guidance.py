"""PAI's other half: probabilities go on from what the text alone says, through what the image says.

Liu et al. 2024, "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in
LVLMs", arXiv:2407.21771; release LALBJ/PAI. A language model goes on with its own text whether it sees the
image or not ("text inertia"); guidance without a classifier takes off what it would say without. The first
half, attention raised at image tokens, is `PAI`; both are meant to be used together:

    with Stack(PAI(), PAIGuidance())(model):
        out = model.generate(**inputs)

As in the release, attention is raised in the main view only: the second one has no image to look at.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from visionsel.multimodal.decoding.two_view import TwoView, View, Views, check_beta, guidance
from visionsel.multimodal.decoding.views import RemoveImages
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.session import Session

__all__ = ["PAIGuidance"]


@dataclass(frozen=True)
class PAIGuidance(Intervention):
    """Contrasts the prompt with itself without images: `gamma p - (gamma - 1) p'`, in log-probabilities.

    Args:
        gamma: how far; 1: everything is as without guidance, whatever `beta` is. 1.1 is the README's for
            LLaVA-1.5; the script's own default is 2.
        beta: tokens less probable than `beta` times the most probable one are out (0.1 in the release); 0:
            all are in.
        view: of the inputs of `generate()`; None: the prompt without its images, `RemoveImages`.

    Raises:
        ValueError: for a value out of range.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import PAIGuidance
        >>> with PAIGuidance(gamma=1.1)(model):
        ...     answer = model.generate(**inputs)
    """

    gamma: float = 1.1
    beta: float = 0.1
    view: View | None = None

    def __post_init__(self) -> None:
        if not 0 < self.gamma < math.inf:
            raise ValueError(f"gamma must be a number above 0, got {self.gamma}; 1 changes nothing")
        check_beta(self.beta)

    @contextmanager
    def attach(self, session: Session) -> Iterator[Views]:
        """See `Intervention`; yields the second view's side."""
        view = RemoveImages.of(session.model) if self.view is None else self.view
        with TwoView(view, guidance(self.gamma), self.beta).attach(session) as views:
            yield views
