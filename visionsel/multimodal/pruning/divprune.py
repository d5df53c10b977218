"""DivPrune: the tokens that differ most from one another, whatever the question.

Alvar et al. 2025, "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
arXiv:2503.02175. Written from the formulas: a greedy solution of the max-min diversity problem with the
cosine distance.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visionsel.multimodal.pruning.checks import check_keep, counts, require_finite, valid_or_all
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens

__all__ = ["DivPrune", "select"]


@dataclass(frozen=True)
class DivPrune(Pruner):
    """Keeps a diverse set of tokens at the input of the decoder.

    Args:
        keep: ratio or number of tokens (the default is the release's).

    Raises:
        ValueError: for a value out of range.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import DivPrune
        >>> with DivPrune(keep=16)(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().equivalent_tokens
        16.0
    """

    keep: float | int = 0.098

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def stages(self, layers: int) -> list[Stage]:
        """See `Pruner`."""
        return [Stage(0, self._select)]

    def _select(self, tokens: VisualTokens) -> Tensor:
        return select(tokens.features, self.keep, tokens.valid)


def select(features: Tensor, keep: float | int, valid: Tensor | None = None) -> Tensor:
    """Tokens chosen one by one, each the farthest from those chosen before.

    The distance is one minus the cosine. The first token is the one whose nearest neighbour is farthest;
    each later one has the largest distance to the nearest of those chosen. Distances that differ by
    rounding only (16 units of the last place at 1) count as equal, so that equal tokens are taken in their
    order on every machine.

    Args:
        features: `[B, N, C]`.
        keep: ratio or number of tokens.
        valid: bool `[B, N]`, True at tokens; None: all.

    Returns:
        bool `[B, N]`; ties go to the lower index.

    Raises:
        ValueError: for NaN at a valid token.

    Examples:
        >>> import torch
        >>> from visionsel.multimodal.pruning import divprune
        >>> features = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
        >>> divprune.select(features, keep=2)  # of the two that are alike, one stays
        tensor([[ True, False,  True]])
    """
    valid = valid_or_all(valid, features)
    require_finite("features", features, valid)
    number = counts(keep, valid)
    kept = torch.zeros_like(valid)
    if not valid.any():
        return kept
    unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    unit = unit.masked_fill(~valid[..., None], 0.0)
    distance = 1 - unit @ unit.transpose(1, 2)
    tolerance = 16 * torch.finfo(distance.dtype).eps
    itself = torch.eye(valid.shape[1], dtype=torch.bool, device=valid.device)
    nearest = distance.masked_fill(itself | ~valid[:, None], math.inf).amin(2)
    sample = torch.arange(valid.shape[0], device=valid.device)
    for step in range(int(number.max())):
        open_ = nearest.masked_fill(kept | ~valid, -math.inf)
        farthest = open_.amax(1, keepdim=True)
        chosen = (open_ >= farthest - tolerance).byte().argmax(1)  # the first of those
        kept[sample, chosen] |= step < number
        to_chosen = distance[sample, chosen]
        nearest = to_chosen if step == 0 else torch.minimum(nearest, to_chosen)
    return kept
