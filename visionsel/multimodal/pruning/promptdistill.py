"""PromptDistill: at intermediate layers, keep the tokens whose keys match the query of the last prompt token.

After Jin et al. 2025, "PromptDistill: Query-based Selective Token Retention in Intermediate Layers for
Efficient Large Language Model Inference" (arXiv:2503.23274), which shortens long texts; written from its
rule. What differs: only image tokens are dropped, the text stays whole; and the averages at both ends of the
tokens are over the neighbours that are there.
"""

from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from visionsel.multimodal.pruning.checks import (
    check_keep,
    check_layers,
    count,
    counts,
    require_finite,
    top,
    valid_or_all,
)
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens

__all__ = ["PromptDistill", "relevance", "select"]


@dataclass(frozen=True)
class PromptDistill(Pruner):
    """Retention by raw query-key products, at one or several layers (Jin et al. 2025).

    At each of `layers`, once the layer has run, its own query of the last prompt token meets its own keys of
    the image tokens; those that lose are gone from the next layer on. `truncate` takes them out of the cache
    of the layers before as well: more memory is saved, and what is generated can no longer read them there.

    Args:
        layers: the decoder layers that choose; a number or several, rising. Default: what the authors use for
            Llama-3.1-8B with its 32 layers.
        keep: what each of them keeps of the sample's original image tokens, as a ratio or a number; one for
            each layer. The authors keep 1024 tokens of long texts; 0.25 is ours.
        pool: width of the averages over neighbouring tokens; 1 for none.
        truncate: whether earlier layers forget the dropped tokens after the prompt.

    Raises:
        ValueError: for values out of range; on entry for layers without a next one.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import PromptDistill
        >>> with PromptDistill(layers=1, keep=0.25)(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().visual_tokens  # of each decoder layer
        (64.0, 64.0, 16.0, 16.0)
    """

    layers: int | tuple[int, ...] = 13
    keep: float | int | tuple[float | int, ...] = 0.25
    pool: int = 5
    truncate: bool = False

    def __post_init__(self) -> None:
        layers, keeps = self._layers, self._keeps
        if len(layers) != len(keeps) or not layers:
            raise ValueError(
                f"keep needs one value for each layer: got keep={self.keep} and layers={self.layers}"
            )
        for keep in keeps:
            check_keep(keep)
        for earlier, later in pairwise(keeps):
            if type(earlier) is type(later) and later > earlier:
                raise ValueError(f"keep counts original tokens and cannot grow, got {self.keep}")
        check_layers(layers, max(layers) + 1)
        _check_pool(self.pool)

    @property
    def _layers(self) -> tuple[int, ...]:
        return (self.layers,) if isinstance(self.layers, int) else tuple(self.layers)

    @property
    def _keeps(self) -> tuple[float | int, ...]:
        return (self.keep,) if isinstance(self.keep, float | int) else tuple(self.keep)

    def stages(self, layers: int) -> list[Stage]:
        """See `Pruner`; tokens go before the layer behind the one that is read."""
        chosen = check_layers(self._layers, layers - 1)
        return [
            Stage(layer + 1, partial(self._select, keep=keep), "previous", truncate_earlier=self.truncate)
            for layer, keep in zip(chosen, self._keeps, strict=True)
        ]

    def _select(self, tokens: VisualTokens, keep: float | int) -> Tensor:
        number = tokens.total.new_tensor([count(keep, total) for total in tokens.total.tolist()])
        scores = relevance(tokens.queries(), tokens.keys())
        return top(_pooled(scores, self.pool, tokens.valid), number, tokens.valid)


def select(scores: Tensor, keep: float | int, pool: int = 5, valid: Tensor | None = None) -> Tensor:
    """Keep the tokens with the highest scores, each averaged over its neighbours.

    Args:
        scores: `[B, N]`, in the order of the tokens.
        keep: a ratio or a number of tokens.
        pool: width of the averages, odd; neighbours beyond the ends, or not valid, do not count.
        valid: bool `[B, N]`; None: all.

    Returns:
        bool `[B, N]`; ties go to the lower index.

    Raises:
        ValueError: for an even width, or NaN at a valid token.
    """
    _check_pool(pool)
    valid = valid_or_all(valid, scores)
    return top(_pooled(scores, pool, valid), counts(keep, valid), valid)


def relevance(queries: Tensor, keys: Tensor) -> Tensor:
    """The product of the last prompt token's query with each key, over sqrt(head_dim), without a softmax.

    Args:
        queries: `[B, heads, 1, head_dim]`.
        keys: `[B, kv_heads, N, head_dim]`; each serves `heads / kv_heads` queries.

    Returns:
        `[B, N]`, the mean over heads; float32 (float64 stays).
    """
    wide = torch.promote_types(queries.dtype, torch.float32)
    heads, kv_heads = queries.shape[1], keys.shape[1]
    # the mean over the queries of a key commutes with the product
    query = queries.to(wide).unflatten(1, (kv_heads, heads // kv_heads)).mean(2)
    return (keys.to(wide) * query).sum(-1).mean(1) / queries.shape[-1] ** 0.5


def _check_pool(pool: int) -> None:
    if isinstance(pool, bool) or not isinstance(pool, int) or pool < 1 or pool % 2 == 0:
        raise ValueError(f"pool must be an odd number of tokens from 1 up, got {pool!r}")


def _pooled(scores: Tensor, pool: int, valid: Tensor) -> Tensor:
    """Averages over the valid tokens among `pool` neighbours."""
    require_finite("scores", scores, valid)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~valid, 0)
    both = torch.stack((wide, valid.to(wide.dtype)), 1)
    padded = F.pad(both, (pool // 2, pool // 2))
    # term by term, so that windows over the same tokens have the same average to the last bit
    total, number = reduce(torch.add, (padded[..., i : i + both.shape[2]] for i in range(pool))).unbind(1)
    return total / number.masked_fill(~valid, 1)
