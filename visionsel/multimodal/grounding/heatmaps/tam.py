"""Token activation maps: what image tokens themselves say of a word, without what earlier words said of them.

Li et al. 2025, "Token Activation Map to Visually Explain Multimodal LLMs", ICCV 2025, arXiv:2506.23270. No
attention is looked at: the head of the model reads the last hidden states of the image tokens.

1. The activation of a token of the text at an image token is the logit of its id there, where above 0.
2. Earlier words light up where they are meant, and still do so under later ones. How much each interferes is
   the logit of the later word at its place, where above 0; words that are the same as the later one are left
   out. The mean of the earlier maps, weighed by that, is scaled to fit the map of the word (least squares)
   and subtracted.
3. What is left above 0 is smoothed by a rank Gaussian filter: the sorted values of a window are weighed by
   how far their rank is from the middle one, under a Gaussian as wide as the values of the window scatter
   (their standard deviation over their mean). Outliers thus count for little, edges stay.

That image tokens say words at all is nothing that a model is trained for: it comes with a language model that
was there before it saw images. The embedded model was not, and its maps point at nothing.

The authors' code has no licence, and nothing here is of it. Left open by what is published, as far as we
know: ranks count from the middle one, and windows that reach over the edge of a grid repeat its cells.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from visionsel.multimodal.grounding.heatmaps.rows import finished, image_views
from visionsel.multimodal.grounding.replay import Replay, places_of

__all__ = ["TAM", "rank_gaussian", "without_interference"]

CONTEXTS = ("after", "all", "answer")


@dataclass(frozen=True)
class TAM:
    """Logits of the answer's tokens at the image tokens, less the interference of the text before.

    It takes one forward, and of the head of the model only the rows of the tokens that occur.

    Args:
        context: the text that may interfere: `"after"`, that of the prompt behind the last image and earlier
            tokens of the answer; `"all"`, with that of the prompt before images too; `"answer"`, only earlier
            tokens of the answer.
        window: side of the rank Gaussian filter in image tokens, odd (3 in the paper); None: no filter.

    Raises:
        ValueError: for another context, or a window that is even or below 1.
    """

    context: str = "after"
    window: int | None = 3
    reference: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if self.context not in CONTEXTS:
            raise ValueError(f"context must be one of {', '.join(CONTEXTS)}, got {self.context!r}")
        if self.window is not None and (self.window < 1 or self.window % 2 == 0):
            raise ValueError(f"window must be an odd number of tokens or None, got {self.window}")

    def __call__(self, replay: Replay, reference: Replay | None = None) -> Tensor:
        """Read a prompt and its answers.

        Args:
            replay: them.
            reference: is not looked at.

        Returns:
            float32 `[B, T, n]`: for each new token its map over the image tokens. With a filter, tokens that
            are on no grid (newline tokens) have 0.

        Raises:
            ValueError: for a prompt without images.
            NotImplementedError: for a head of the model that is no matrix of floating point numbers.
        """
        if not replay.image.shape[1]:
            raise ValueError("the prompts have no tokens of images, so there is nothing to make a map of")
        head = _head(replay.model)
        hidden = replay.run(hidden=True).hidden
        assert hidden is not None
        places, ids, earlier = self._texts(replay)
        image = _at(hidden, replay.image)
        words = _at(hidden, places)
        rows, bias = head(ids.to(hidden.device), image.dtype)
        maps = _activation(rows, image, bias[..., None])  # [B, K, n]
        maps = maps.masked_fill((replay.image < 0).to(maps.device)[:, None], 0)
        new = replay.tokens.shape[1]
        scores = _activation(rows[:, -new:], words, bias[:, -new:, None])  # [B, T, K]
        maps = without_interference(maps, scores * earlier.to(scores))
        return finished(replay, maps if self.window is None else _filtered(replay, maps, self.window))

    def _texts(self, replay: Replay) -> tuple[Tensor, Tensor, Tensor]:
        """What is said: places and ids `[B, K]`, of which the last `T` are new, and what interferes.

        The last is bool `[B, T, K]`: words before each new token that are not the same.
        """
        scope = replay.scope
        assert scope is not None
        text = torch.zeros_like(scope.real) if self.context == "answer" else scope.text(self.context)
        prompt = places_of(text)
        places = torch.cat((prompt, (replay.rows + 1).to(prompt.device)), 1)
        ids = replay.sequences.gather(1, places.clamp(min=0).to(replay.sequences.device)).to(places.device)
        new = replay.tokens.shape[1]
        before = (places[:, None] < places[:, -new:, None]) & (places >= 0)[:, None]
        return places, ids, before & (ids[:, None] != ids[:, -new:, None])


def without_interference(maps: Tensor, scores: Tensor) -> Tensor:
    """Maps of words less what earlier words have of them.

    Args:
        maps: `[..., K, n]`, nothing negative: the activations of all words; the last `T` are looked at.
        scores: `[..., T, K]`, nothing negative: how much each word interferes; 0 for those that do not.

    Returns:
        `[..., T, n]`, nothing negative.
    """
    own = maps[..., -scores.shape[-2] :, :]
    total = scores.sum(-1, keepdim=True)
    others = torch.where(total > 0, scores / total.masked_fill(total <= 0, 1), 0) @ maps
    size = others.square().sum(-1, keepdim=True)
    scale = (own * others).sum(-1, keepdim=True) / size.masked_fill(size <= 0, 1)
    return (own - scale * others).clamp(min=0)


def rank_gaussian(maps: Tensor, window: int = 3) -> Tensor:
    """The rank Gaussian filter; windows at the edge repeat the cells there.

    Args:
        maps: `[..., h, w]`, nothing negative.
        window: side of the windows, odd.
    """
    height, width = maps.shape[-2:]
    wide = pad(maps.reshape(-1, 1, height, width), [window // 2] * 4, mode="replicate")
    cells = wide.unfold(2, window, 1).unfold(3, window, 1).flatten(-2).sort(-1).values
    mean = cells.mean(-1, keepdim=True)
    scatter = cells.std(-1, correction=0, keepdim=True) / mean.masked_fill(mean <= 0, 1)
    away = torch.arange(window**2, device=maps.device).to(maps) - window**2 // 2
    # windows without scatter hold one value, whatever its weights
    weights = torch.exp(-away.square() / (2 * scatter.square()).clamp(min=torch.finfo(maps.dtype).tiny))
    return ((weights * cells).sum(-1) / weights.sum(-1)).view_as(maps)


def _filtered(replay: Replay, maps: Tensor, window: int) -> Tensor:
    """Maps `[B, T, n]`, each grid by itself; 0 for tokens that are on no grid."""
    smooth = torch.zeros_like(maps)
    for sample, views in enumerate(image_views(replay)):
        for view in views:
            index = view.to(maps.device)
            smooth[sample][:, index] = rank_gaussian(maps[sample][:, index], window)
    return smooth


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    """Hidden states `[B, k, C]` at places `[B, k]`, at least float32; those of -1 are any."""
    places = places.clamp(min=0).to(hidden.device)
    found = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[2]))
    return found.to(torch.promote_types(hidden.dtype, torch.float32))


def _activation(rows: Tensor, hidden: Tensor, bias: Tensor) -> Tensor:
    """Logits above 0, `[B, words, places]`."""
    return (rows @ hidden.transpose(1, 2) + bias).clamp(min=0)


def _head(model: Any) -> Any:
    """The head of a model as a function of ids `[B, k]` and a dtype: their rows `[B, k, C]`, biases `[B, k]`.

    Raises:
        NotImplementedError: for one that is no matrix of floating point numbers.
    """
    layer = cast(Any, model).get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise NotImplementedError(
            f"the head of {type(model).__name__} is a {type(layer).__name__} without a matrix of floating "
            "point numbers, as of a quantised model; load it with an unquantised head"
        )
    bias = getattr(layer, "bias", None)

    def rows(ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        here = ids.to(weight.device)
        found = weight.detach()[here].to(ids.device, dtype)
        return found, found.new_zeros(ids.shape) if bias is None else bias.detach()[here].to(found)

    return rows
