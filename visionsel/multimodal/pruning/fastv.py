"""FastV: early layers of the decoder show which image tokens the rest will not look at.

Chen et al. 2024, "An Image is Worth 1/2 Tokens After Layer 2", arXiv:2403.06764.

What differs from the release: the attention is read from the layer as it ran, of the one row that is
needed; the tokens kept keep their positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from visionsel.multimodal.pruning.checks import check_keep, check_layer, counts, top, valid_or_all
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens

__all__ = ["FastV", "select"]


@dataclass(frozen=True)
class FastV(Pruner):
    """Keeps the tokens that the last prompt token attended to most in an early layer.

    Args:
        keep: ratio or number of tokens (the paper's `1 - R`, R = 50 %).
        layer: the paper's `K`: tokens are dropped before it, by the attention of the layer before.

    Raises:
        ValueError: for a value out of range.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import FastV
        >>> with FastV(keep=0.5, layer=1)(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().visual_tokens  # of each decoder layer
        (64.0, 32.0, 32.0, 32.0)
    """

    keep: float | int = 0.5
    layer: int = 2

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.layer < 1:
            raise ValueError(f"layer must be 1 or more, since the layer before is read; got {self.layer}")

    def stages(self, layers: int) -> list[Stage]:
        """See `Pruner`."""
        return [Stage(check_layer(self.layer, layers, first=1), self._select, reads="previous")]

    def _select(self, tokens: VisualTokens) -> Tensor:
        return select(tokens.attention(), self.keep, tokens.valid)


def select(attention: Tensor, keep: float | int, valid: Tensor | None = None) -> Tensor:
    """The tokens with the highest attention, averaged over heads.

    Args:
        attention: `[B, heads, N]`, the row of the last prompt token.
        keep: ratio or number of tokens.
        valid: bool `[B, N]`, True at tokens; None: all.

    Returns:
        bool `[B, N]`; ties go to the lower index.

    Raises:
        ValueError: for NaN at a valid token.

    Examples:
        >>> import torch
        >>> from visionsel.multimodal.pruning import fastv
        >>> fastv.select(torch.tensor([[[0.1, 0.4, 0.2, 0.3]]]), keep=0.5)
        tensor([[False,  True, False,  True]])
    """
    scores = attention.to(torch.promote_types(attention.dtype, torch.float32)).mean(1)
    valid = valid_or_all(valid, scores)
    return top(scores, counts(keep, valid), valid)
