"""Random pruning: the baseline that a method has to beat."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from visionsel.multimodal.pruning.checks import check_keep, check_layer, counts, top, valid_or_all
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens

__all__ = ["RandomPrune", "select"]


@dataclass(frozen=True)
class RandomPrune(Pruner):
    """Keeps tokens at random, the same ones whenever the seed is the same.

    A token's luck depends on the seed and on its number among the image tokens of its sample only, so that
    padding, the rest of the batch and the tokens after it do not change it.

    Args:
        keep: ratio or number of tokens.
        layer: before which decoder layer; 0 is the input.
        seed: of `numpy.random.default_rng`.

    Raises:
        ValueError: for a value out of range.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import RandomPrune
        >>> with RandomPrune(keep=0.25)(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().visual_tokens  # of each decoder layer
        (16.0, 16.0, 16.0, 16.0)
    """

    keep: float | int
    layer: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.layer < 0:
            raise ValueError(f"layer must be 0 or more, got {self.layer}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")

    def stages(self, layers: int) -> list[Stage]:
        """See `Pruner`."""
        return [Stage(check_layer(self.layer, layers), self._select)]

    def _select(self, tokens: VisualTokens) -> Tensor:
        return select(tokens.index, self.keep, self.seed, tokens.valid)


def select(index: Tensor, keep: float | int, seed: int = 0, valid: Tensor | None = None) -> Tensor:
    """The tokens with the highest random numbers.

    Args:
        index: int64 `[B, N]`: which random number is a token's, its number among the image tokens of its
            sample.
        keep: ratio or number of tokens.
        seed: of the random numbers, which are the same for every sample.
        valid: bool `[B, N]`, True at tokens; None: all.

    Returns:
        bool `[B, N]`.
    """
    valid = valid_or_all(valid, index)
    index = index.masked_fill(~valid, 0)
    length = int(index.max()) + 1 if index.numel() else 0
    # drawn one after another: a longer draw starts with the shorter one
    luck = torch.from_numpy(np.random.default_rng(seed).random(length)).float().to(index.device)
    return top(luck[index], counts(keep, valid), valid)
