"""ExplainPrune: a small net foresees which image tokens an answer will rest on, from attention of one layer.

After Lei et al. 2025, arXiv:2506.01097: explanations of answers show that many image tokens can be dropped at
the input of the decoder, and a light convolutional net learns to map first-layer attention to explanations.
How their net looks and what it is trained with is not published, so maps, net and loss here are our own: this
is after the paper, and does not reproduce it.

- Targets: `visionsel.multimodal.pruning.relevance`, normalised to sum 1.
- Maps: what the text after the image attends to each image token in the first decoder layer, mean and maximum
  over that text, for each head. They cost the queries and keys of one layer over the whole prompt; then all
  layers run on what is left.
- Net (`explainprune_net`): convolutions over each grid of tokens, of any size; tokens on no grid, such as
  newlines, are grids of one.

`train.explainprune` trains a net for the small model that ships with visionsel. For another model: fit a
`RelevancePredictor` on `first_layer_maps` to `relevance`, by `relevance_loss`, and `save` it.
"""

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from visionsel.multimodal.pruning.checks import check_keep, counts, top, valid_or_all
from visionsel.multimodal.pruning.explainprune_net import RelevancePredictor
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens

__all__ = ["ExplainPrune", "first_layer_maps", "select"]


@dataclass(frozen=True)
class ExplainPrune(Pruner):
    """Keeps the tokens whose relevance a trained net foresees to be highest, at the input of the decoder.

    Args:
        keep: ratio or number of tokens.
        predictor: a `RelevancePredictor` trained for the model, or a folder that its `save` wrote.

    Raises:
        ValueError: for a value out of range, and without a predictor; at entry, for a predictor whose files
            are broken; at the first prompt, for one of a model with another number of heads.
        FileNotFoundError: at entry, when the folder lacks a file.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.embedded import load_predictor
        >>> from visionsel.multimodal import ExplainPrune
        >>> with ExplainPrune(keep=0.25, predictor=load_predictor())(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().visual_tokens  # of each decoder layer
        (16.0, 16.0, 16.0, 16.0)
    """

    keep: float | int = 0.5
    predictor: "str | Path | RelevancePredictor | None" = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.predictor is None:
            raise ValueError(
                "ExplainPrune needs predictor=, a RelevancePredictor trained for the model or a folder that "
                "holds one; train.explainprune trains one for the model that ships with visionsel"
            )

    @classmethod
    def load(cls, folder: str | Path, keep: float | int = 0.5) -> Self:
        """With the net of a folder, read once, now."""
        return cls(keep, RelevancePredictor.load(folder))

    def stages(self, layers: int) -> list[Stage]:
        """See `Pruner`."""
        assert self.predictor is not None
        given = self.predictor
        predictor = given if isinstance(given, RelevancePredictor) else RelevancePredictor.load(given)
        net = copy.deepcopy(predictor)  # follows the model to its device; the given one stays where it is

        def choose(tokens: VisualTokens) -> Tensor:
            with torch.no_grad():
                maps, grids, valid = _maps(tokens)
                logits = net.to(maps.device)(maps, grids, valid)
            return select(logits, self.keep, tokens.valid)

        return [Stage(0, choose, reads="own")]


def select(relevance: Tensor, keep: float | int, valid: Tensor | None = None) -> Tensor:
    """The tokens with the highest relevance.

    Args:
        relevance: `[B, N]`, foreseen or measured; any scale.
        keep: ratio or number of tokens.
        valid: bool `[B, N]`, True at tokens; None: all.

    Returns:
        bool `[B, N]`; ties go to the lower index.

    Raises:
        ValueError: for NaN at a valid token.
    """
    valid = valid_or_all(valid, relevance)
    return top(relevance, counts(keep, valid), valid)


def first_layer_maps(
    model: nn.Module, inputs: Mapping[str, Any]
) -> tuple[Tensor, list[list[Tensor]], Tensor]:
    """What `ExplainPrune` shows its net of prompts. The model runs up to its first decoder layer only.

    Args:
        model: a supported vision-language model.
        inputs: of prompts with images, as the processor makes them.

    Returns:
        maps `[B, 2 * heads, N]`, grids and `valid`, as `RelevancePredictor` takes them.

    Raises:
        ValueError: for prompts without images.
    """
    found: list[tuple[Tensor, list[list[Tensor]], Tensor]] = []
    base: Any = model.model
    with torch.no_grad(), suppress(_SeenError), _Look(found)(model):
        base(**inputs, use_cache=False)
    if not found:
        raise ValueError(
            "no image tokens in these prompts; pass input_ids with images and their pixel values"
        )
    return found[0]


@dataclass(frozen=True)
class _Look(Pruner):
    """Reads the maps, and ends the forward."""

    found: list[tuple[Tensor, list[list[Tensor]], Tensor]]

    def stages(self, layers: int) -> list[Stage]:
        return [Stage(0, self._look, reads="own")]

    def _look(self, tokens: VisualTokens) -> Tensor:
        self.found.append(_maps(tokens))
        raise _SeenError


class _SeenError(Exception):
    """The first layer was seen; the rest of the forward is not wanted."""


def _maps(tokens: VisualTokens) -> tuple[Tensor, list[list[Tensor]], Tensor]:
    """Mean and maximum over the text of what it attends to each token; grids of tokens; which there are."""
    rows, text = tokens.text_attention()
    number = text.sum(1).clamp(min=1)[:, None, None].to(rows.dtype)
    maps = torch.cat([rows.sum(2) / number, rows.amax(2)], 1)  # rows of no text are 0
    grids = []
    for layouts in tokens.layouts:
        first, row = 0, []
        for layout in layouts:
            row += [first + view.index for view in layout.views]
            first += layout.n
        grids.append(row)
    return maps, grids, tokens.valid
