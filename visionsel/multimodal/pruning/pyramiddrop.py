"""PyramidDrop: the deeper the layer, the fewer the image tokens.

Xing et al. 2024, "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
Reduction", arXiv:2410.17247.

What differs from the release: the tokens kept keep their positions, where the release numbers them anew; a
share of the tokens is rounded, where the release cuts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from visionsel.multimodal.pruning.checks import check_keep, check_layers, counts, top, valid_or_all
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens

__all__ = ["PyramidDrop", "select"]


@dataclass(frozen=True)
class PyramidDrop(Pruner):
    """Drops tokens at several layers, by the attention of the last prompt token.

    This is the attention of the layer that the tokens would enter: made for the purpose, with the
    projections of that layer, from the hidden states that arrive.

    Args:
        layers: before which decoder layers (the defaults are the paper's for 32).
        keep: for each stage the ratio of the ORIGINAL tokens, or their number, that goes on.

    Raises:
        ValueError: for a value out of range, layers that do not rise, or a `keep` that does.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import PyramidDrop
        >>> with PyramidDrop(layers=(1, 2, 3), keep=(0.5, 0.25, 0.125))(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().visual_tokens  # of each decoder layer
        (64.0, 32.0, 16.0, 8.0)
    """

    layers: tuple[int, ...] = (8, 16, 24)
    keep: tuple[float | int, ...] = (0.5, 0.25, 0.125)

    def __post_init__(self) -> None:
        pairs = isinstance(self.layers, Sequence) and isinstance(self.keep, Sequence)
        if not pairs or not self.layers or len(self.layers) != len(self.keep):
            raise ValueError(
                f"keep needs one value for each of the layers, at least one: got keep={self.keep} and "
                f"layers={self.layers}"
            )
        for keep in self.keep:
            check_keep(keep)
        for earlier, later in zip(self.keep, self.keep[1:], strict=False):
            if type(earlier) is type(later) and later > earlier:
                raise ValueError(f"keep counts original tokens and cannot grow, got {self.keep}")
        check_layers(self.layers, max(self.layers) + 1)

    def stages(self, layers: int) -> list[Stage]:
        """See `Pruner`."""
        return [
            Stage(layer, partial(self._select, keep), reads="own")
            for layer, keep in zip(check_layers(self.layers, layers), self.keep, strict=True)
        ]

    def _select(self, keep: float | int, tokens: VisualTokens) -> Tensor:
        original = torch.arange(int(tokens.total.max()), device=tokens.total.device) < tokens.total[:, None]
        return top(_scores(tokens.attention()), counts(keep, original), tokens.valid)


def select(attention: Tensor, keep: float | int, valid: Tensor | None = None) -> Tensor:
    """One stage: the tokens with the highest attention, averaged over heads.

    Args:
        attention: `[B, heads, N]`, the row of the last instruction token.
        keep: ratio (of these tokens) or number of tokens.
        valid: bool `[B, N]`, True at tokens; None: all.

    Returns:
        bool `[B, N]`; ties go to the lower index.

    Raises:
        ValueError: for NaN at a valid token.
    """
    scores = _scores(attention)
    valid = valid_or_all(valid, scores)
    return top(scores, counts(keep, valid), valid)


def _scores(attention: Tensor) -> Tensor:
    return attention.to(torch.promote_types(attention.dtype, torch.float32)).mean(1)
