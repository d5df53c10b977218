"""VFlowOpt: one importance map from the vision tower, tokens dropped in stages by it, the dropped recycled.

Yang et al. 2025, "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided
Optimization", arXiv:2508.05211. The map is what the global patches of the tower attend to, plus the entropy
of the patches (`vflowopt_map.py`). Before the decoder the least important tokens are merged, one for each
block of the grid (`vflowopt_recycle.py`); at two decoder layers more of them go. How many go where was found
by a search on a few samples (`vflowopt_search.py`).

What differs from the release: the entropy is that of the picture's grey levels, not of normalised values (it
is off in all settings published); where no patch is global, the one that receives most attention is; all
images of a sample share one budget, as the tiles of an image do; a `keep` of everything recycles nothing.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from visionsel.multimodal.pruning.checks import check_keep, check_layer, count, top
from visionsel.multimodal.pruning.pruner import Pruner, Stage, TowerCrop, VisualTokens
from visionsel.multimodal.pruning.vflowopt_map import crop_entropy, importance, patch_entropy, relevance
from visionsel.multimodal.pruning.vflowopt_recycle import (
    check_block,
    layout_blocks,
    merge,
    recycle,
    whole_tokens,
)
from visionsel.multimodal.pruning.vflowopt_schedule import LAYERS, PUBLISHED, Schedule, mean_keep, scheduled

__all__ = ["PUBLISHED", "Schedule", "VFlowOpt", "importance", "patch_entropy", "recycle"]


@dataclass(frozen=True)
class VFlowOpt(Pruner):
    """Recycles at the input, then drops at later layers by the same map.

    `keep` is a budget, and fills in what is None: at 0.5, 0.25 and 0.1 what was published for
    LLaVA-OneVision-7B (`PUBLISHED`), else what lies between, with `vision_keep` solved from the budget. It is
    not read where all four are given. The number of tokens is not exact: merged tokens may be a few more than
    were set aside for them.

    Args:
        keep: tokens of a decoder layer, averaged over the layers: a ratio, or a number for each sample.
        vision_keep: ratio of a sample's tokens that enters the decoder.
        layers: before which decoder layers the later stages are: numbers, or floats as fractions of the
            depth.
        stage_keep: for each of `layers` the ratio, of the tokens that arrive, that stays.
        threshold: a patch is global that receives more than this times the mean attention.
        block: side of the blocks that recycle, in tokens; any number from 1 up.
        alpha: weight of the entropy.
        mean: of the channels, as the processor subtracted it; read for the entropy only. Default: SigLIP's.
        std: of the channels, by which the processor divided.
        tower_layer: layer of the vision tower whose attention is read; None: the one whose output is used.

    Raises:
        ValueError: for a value out of range; on entry for layers that the decoder does not have.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import VFlowOpt
        >>> with VFlowOpt(keep=0.5, block=2)(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().equivalent_tokens < 40  # of 64; what is merged varies
        True
    """

    keep: float | int = 0.25
    vision_keep: float | None = None
    layers: tuple[float, ...] = LAYERS
    stage_keep: tuple[float, ...] | None = None
    threshold: float | None = None
    block: float | None = None
    alpha: float = 0.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    tower_layer: int | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for ratio in (self.vision_keep, *(self.stage_keep or ())):
            if ratio is not None and not 0 < ratio <= 1:
                raise ValueError(f"vision_keep and stage_keep are ratios in (0, 1], got {ratio}")
        ratios = len(LAYERS) if self.stage_keep is None else len(self.stage_keep)
        if len(self.layers) != ratios:
            raise ValueError(
                f"{len(self.layers)} layers {self.layers}, but {ratios} ratios; give stage_keep one a layer"
            )
        if self.threshold is not None and not self.threshold >= 0:
            raise ValueError(f"threshold must be 0 or more, got {self.threshold}")
        if self.block is not None:
            check_block(self.block)
        if not abs(self.alpha) < float("inf"):
            raise ValueError(f"alpha must be a finite number, got {self.alpha}")

    def starts(self, depth: int) -> tuple[int, ...]:
        """The numbers of `layers` in a decoder of `depth` layers."""
        numbers = [round(layer * depth) if isinstance(layer, float) else layer for layer in self.layers]
        starts = tuple(check_layer(number, depth, first=1) for number in numbers)
        if any(later <= earlier for earlier, later in pairwise(starts)):
            raise ValueError(f"layers must rise, but {self.layers} of {depth} are {starts}")
        return starts

    def schedule(self, depth: int, tokens: int = 0) -> Schedule:
        """What is done in a decoder of `depth` layers; to a sample of `tokens` where `keep` is a number.

        Raises:
            ValueError: where `stage_keep` leaves less than the budget, whatever enters the decoder.
        """
        keep = self.keep if isinstance(self.keep, float) else min(1.0, self.keep / max(tokens, 1))
        default = scheduled(keep)
        stage_keep = default.stage_keep if self.stage_keep is None else self.stage_keep
        vision_keep = self.vision_keep
        if vision_keep is None:
            most = mean_keep(1.0, stage_keep, self.starts(depth), depth)
            if keep > most + 1e-9:
                raise ValueError(
                    f"stage_keep {stage_keep} at layers {self.layers} leaves at most {most:.3f} of them, "
                    f"less than keep {keep:.3f}: raise the one or lower the other"
                )
            published = keep in PUBLISHED and self.layers == LAYERS and self.stage_keep is None
            vision_keep = default.vision_keep if published else min(1.0, keep / most)
        threshold = default.threshold if self.threshold is None else self.threshold
        block = default.block if self.block is None else self.block
        return Schedule(vision_keep, stage_keep, threshold, block)

    def stages(self, layers: int) -> list[Stage]:
        """See `Pruner`."""
        if isinstance(self.keep, float):
            self.schedule(layers)
        first = Stage(0, partial(self._first, depth=layers), tower=True, tower_layer=self.tower_layer)
        starts = enumerate(self.starts(layers))
        return [first, *(Stage(start, partial(self._later, layers, number)) for number, start in starts)]

    def _first(self, tokens: VisualTokens, depth: int) -> tuple[Tensor, Tensor]:
        """Recycle, and remember the map."""
        valid, totals = tokens.valid, tokens.total.tolist()
        plans = [self.schedule(depth, total) for total in totals]
        maps = {threshold: self._map(tokens, threshold) for threshold in {plan.threshold for plan in plans}}
        scores = torch.stack([maps[plan.threshold][sample] for sample, plan in enumerate(plans)])
        every = scores.new_zeros(len(totals), max(totals))
        every[valid.nonzero()[:, 0], tokens.index[valid]] = scores[valid]
        tokens.memory["importance"] = every

        whole = [
            whole_tokens(count(plan.vision_keep, n), n, plan.block)
            for plan, n in zip(plans, valid.sum(1).tolist(), strict=True)
        ]
        blocks = torch.full(every.shape, -1)
        for row, layouts, plan in zip(blocks, tokens.layouts, plans, strict=True):
            own = layout_blocks(layouts, plan.block)
            row[: len(own)] = own
        blocks = blocks.to(scores.device).gather(1, tokens.index)
        return merge(tokens.features, scores, tokens.total.new_tensor(whole), blocks, valid)

    def _later(self, depth: int, stage: int, tokens: VisualTokens) -> Tensor:
        """Drop what is least important of what is left."""
        number = []
        for left, total in zip(tokens.valid.sum(1).tolist(), tokens.total.tolist(), strict=True):
            ratio = self.schedule(depth, total).stage_keep[stage]
            number.append(max(min(1, left), left - round(left * (1 - ratio))))
        scores = tokens.memory["importance"].gather(1, tokens.index)
        return top(scores, tokens.total.new_tensor(number), tokens.valid)

    def _map(self, tokens: VisualTokens, threshold: float) -> Tensor:
        """`[B, N]`: the importance of each token; 1 for newline tokens."""
        entropy: dict[tuple[str, int], Tensor] = {}
        if self.alpha != 0:
            for modality, encoded in tokens.encoded.items():
                crops = tokens.tower_crops(modality)
                sizes = [crop.patches for crop in crops]
                values = crop_entropy(tokens.model, encoded, sizes, self.mean, self.std)
                entropy |= {(modality, number): value for number, value in enumerate(values)}

        def value(crop: TowerCrop) -> Tensor:
            score = relevance(crop, threshold)
            if self.alpha != 0:
                score = score + self.alpha * entropy[crop.modality, crop.number].to(score).softmax(0)
            return score

        return tokens.pool_tower(value).masked_fill(tokens.newline, 1.0)
