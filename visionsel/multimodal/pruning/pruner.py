"""The base of the pruners: at which layers a method looks, at what, and which tokens it keeps.

A pruner is a frozen dataclass with `stages`; a stage has a decoder layer and a function from `VisualTokens`
to a mask. Samples are laid out from the left and padded on the right there, image tokens only, whatever the
prompt looks like, so that a method sees batched tensors and nothing of padding, text or beams.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visionsel.multimodal.dropping import Arrival, Dropper, Point
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.pruning.checks import require_finite
from visionsel.multimodal.pruning.report import Pruned
from visionsel.multimodal.pruning.visual_tokens import TowerCrop, VisualTokens
from visionsel.multimodal.session import Session

__all__ = ["Pruner", "Stage", "TowerCrop", "VisualTokens"]

Selection = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Stage:
    """One place where a pruner drops tokens.

    Attributes:
        layer: before which decoder layer; 0 is the input.
        select: from the tokens that arrive to bool `[B, N]`, True where they stay, or to such a mask and
            features `[B, N, C]` that replace those of the kept tokens.
        reads: `"previous"`: queries and keys of the layer before, as it ran; `"own"`: those that this layer
            would make of what arrives, computed for the purpose; None: neither.
        tower: whether `select` reads attention or keys of the vision tower.
        tower_layer: of which of its layers; None: the one whose output the model uses.
        truncate_earlier: the layers before this one forget the dropped tokens too, once the prompt is read.
    """

    layer: int
    select: Callable[[VisualTokens], Selection]
    reads: str | None = None
    tower: bool = False
    tower_layer: int | None = None
    truncate_earlier: bool = False


@dataclass(frozen=True)
class Pruner(Intervention):
    """Base of the pruners; a subclass has fields and `stages`."""

    @abstractmethod
    def stages(self, layers: int) -> list[Stage]:
        """Where tokens are dropped, for a decoder with this many layers.

        Raises:
            ValueError: for a layer that does not exist.
        """

    @contextmanager
    def attach(self, session: Session) -> Iterator[Pruned]:
        """See `Intervention`; yields what `Pruned` tells."""
        memory: dict[str, Any] = {}
        points: list[Point] = []
        for stage in self.stages(len(session.layers)):
            if stage.reads not in (None, "previous", "own"):
                raise ValueError(f'reads must be None, "previous" or "own", got {stage.reads!r}')
            tower = session.observe_tower(stage.tower_layer) if stage.tower else None
            if stage.reads is not None:
                session.tap_decoder()
            select = _selector(stage, tower, memory, first=not points)
            points.append(Point(stage.layer, select, stage.reads == "previous", stage.truncate_earlier))
        with Dropper.drop(session, points) as dropper:
            pruned = Pruned(session, dropper)
            try:
                yield pruned
            finally:
                pruned.finish()


def _selector(
    stage: Stage, tower: int | None, memory: dict[str, Any], first: bool
) -> Callable[[Arrival], tuple[Tensor, Tensor]]:
    """From a method's view of the tokens to the decoder's."""

    def select(arrival: Arrival) -> tuple[Tensor, Tensor]:
        if first:
            memory.clear()
        if not bool(arrival.visual.any()):
            return arrival.visual, arrival.hidden
        tokens = VisualTokens(arrival, stage.reads, tower, memory)
        selection = stage.select(tokens)
        mask, features = selection if isinstance(selection, tuple) else (selection, None)
        _check(mask, features, tokens, stage)
        keep = torch.zeros_like(arrival.visual).scatter(1, tokens.places, mask & tokens.valid)
        hidden = arrival.hidden
        if features is not None:
            hidden = hidden.clone()
            rows, columns = mask.nonzero(as_tuple=True)
            hidden[rows, tokens.places[rows, columns]] = features[rows, columns].to(hidden.dtype)
        return keep, hidden

    return select


def _check(mask: Tensor, features: Tensor | None, tokens: VisualTokens, stage: Stage) -> None:
    """What a method returned must be a choice among its tokens."""
    if mask.dtype != torch.bool or mask.shape != tokens.valid.shape:
        raise ValueError(
            f"a selection is bool {list(tokens.valid.shape)}, got {mask.dtype} {list(mask.shape)} for layer "
            f"{stage.layer}"
        )
    if bool((mask & ~tokens.valid).any()):
        raise ValueError(
            f"the selection for layer {stage.layer} keeps tokens that do not exist (valid is False)"
        )
    if bool((tokens.valid.any(1) & ~mask.any(1)).any()):
        raise ValueError(
            f"the selection for layer {stage.layer} keeps no token of a sample; keep at least one"
        )
    if features is not None:
        if features.shape != tokens.features.shape:
            raise ValueError(f"features must be {list(tokens.features.shape)}, got {list(features.shape)}")
        require_finite("merged features", features, mask)
