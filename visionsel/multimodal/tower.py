"""What the vision tower attended to while it read the images of a prompt, by patch and by token.

A method asks for a layer of the tower with `Session.observe_tower`; queries and keys of that layer then come
with the scope of each prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from visionsel.multimodal.scope import PromptScope

__all__ = ["TowerCrop", "pooled", "tower_crops"]


@dataclass(frozen=True)
class TowerCrop:
    """What one crop (or frame, or image) looked at in a layer of the vision tower.

    Attributes:
        query, key: `[heads, length, head_dim]`, the class token, if there is one, at first.
        scale: of the logits.
        skip: 1 where there is a class token, else 0.
        modality: `"image"` or `"video"`.
        number: which crop of the tower's call it is, from 0.
    """

    query: Tensor
    key: Tensor
    scale: float
    skip: int
    modality: str = "image"
    number: int = 0

    @property
    def patches(self) -> int:
        """How many patches it has."""
        return self.query.shape[1] - self.skip

    def rows(self, index: Tensor) -> Tensor:
        """Attention `[heads, t, patches]` of patches `index` `[t]` as queries, a softmax over all keys."""
        return self._attend(self.query[:, index + self.skip])

    def received(self, chunk: int = 256) -> Tensor:
        """`[heads, patches]`: what a patch gets, the mean over the queries (all patches)."""
        total = self.key.new_zeros(
            self.key.shape[0], self.patches, dtype=torch.promote_types(self.key.dtype, torch.float32)
        )
        for part in torch.arange(self.patches, device=self.key.device).split(chunk):
            total += self.rows(part).sum(1)
        return total / self.patches

    def class_row(self) -> Tensor:
        """Attention `[heads, patches]` of the class token."""
        return self._attend(self.query[:, :1])[:, 0]

    def _attend(self, query: Tensor) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        logits = query.to(wide) @ self.key.to(wide).transpose(-1, -2) * self.scale
        return logits.softmax(-1)[..., self.skip :]


def tower_crops(scope: PromptScope, layer: int, modality: str = "image") -> list[TowerCrop]:
    """What the crops of a whole batch looked at, in the order in which the tower saw them.

    Args:
        scope: of the prompt.
        layer: of the tower, one that is observed.
        modality: `"image"` or `"video"`.

    Raises:
        RuntimeError: when the tower did not run.
    """
    encoded = scope.encoded.get(modality)
    calls = encoded.layers.get(layer, ()) if encoded is not None else ()
    if not calls:
        raise RuntimeError(
            "nothing is known of what the vision tower attended to: it did not run (precomputed "
            "mm_encoder_outputs?) or did not call its attention kernel; pass the pixel values"
        )
    skip = int(scope.family.has_cls)
    pairs = [
        (query, key, scale)
        for queries, keys, scale in calls
        for query, key in zip(queries, keys, strict=True)
    ]
    return [
        TowerCrop(query, key, scale, skip, modality, number)
        for number, (query, key, scale) in enumerate(pairs)
    ]


def pooled(
    scope: PromptScope, layer: int, values: Callable[[TowerCrop], Tensor], modality: str = "image"
) -> Tensor:
    """Something of each patch, in the mean over the patches of each token.

    Args:
        scope: of the prompt.
        layer: of the tower, one that is observed.
        values: from a crop to `[..., patches]`.
        modality: `"image"` or `"video"`.

    Returns:
        `[tokens, ...]` in the order that `TokenLayout.source` counts.
    """
    flat = torch.cat([values(crop).movedim(-1, 0) for crop in tower_crops(scope, layer, modality)])
    return scope.family.pool(scope.model, flat, scope.encoded[modality])
