"""The image tokens of a batch as a pruner sees them."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.multimodal.attention import AttentionCall, attention_rows
from visionsel.multimodal.dropping import Arrival
from visionsel.multimodal.families.family import Encoded, TokenLayout
from visionsel.multimodal.tower import TowerCrop, pooled, tower_crops

__all__ = ["TowerCrop", "VisualTokens"]


class VisualTokens:
    """The image tokens of a batch at one decoder layer, as a method sees them.

    Attributes:
        features: `[B, N, C]` hidden states that enter the layer; at layer 0 what the projector made. Zero
            where not valid.
        valid: bool `[B, N]`.
        index: int64 `[B, N]`: the number of the token among all image tokens of its sample, in the order of
            the prompt; 0 where not valid.
        total: int64 `[B]`: image tokens of each sample before anything was dropped.
        layer: number of the decoder layer.
        memory: kept between the stages of a pruner while it reads one prompt.
    """

    def __init__(
        self, arrival: Arrival, reads: str | None, tower: int | None, memory: dict[str, Any]
    ) -> None:
        self._arrival, self._reads, self._tower = arrival, reads, tower
        self.layer, self.memory = arrival.layer, memory
        self.places, self.valid = _left(arrival.visual)
        self.features = arrival.hidden.gather(
            1, self.places[..., None].expand(-1, -1, arrival.hidden.shape[-1])
        ) * self.valid[..., None].to(arrival.hidden.dtype)
        visual = arrival.scope.visual.to(arrival.hidden.device)
        number = visual.cumsum(1) - 1
        columns = arrival.columns.gather(1, self.places)
        self.index = number.gather(1, columns).masked_fill(~self.valid, 0)
        self.total = visual.sum(1)

    @property
    def model(self) -> nn.Module:
        """The whole model."""
        return self._arrival.scope.model

    @property
    def input_ids(self) -> Tensor:
        """int64 `[B, L]`: the prompt."""
        return self._arrival.scope.input_ids

    @property
    def encoded(self) -> dict[str, Encoded]:
        """The calls of the vision tower by modality, with their pixel values."""
        return dict(self._arrival.scope.encoded)

    # the decoder

    @cached_property
    def _call(self) -> AttentionCall:
        if self._reads == "own":
            return self._arrival.own()
        call = self._arrival.previous
        if call is None:
            raise RuntimeError(
                f"the stage at layer {self.layer} did not ask for queries and keys (reads=...)"
            )
        return call

    @cached_property
    def _last(self) -> Tensor:
        """int64 `[B, 1]`: where the last prompt token is among the tokens that arrived."""
        prompt = self._arrival.scope.prompt.to(self._arrival.real.device)
        prompt = self._arrival.real & prompt.gather(1, self._arrival.columns)
        place = torch.arange(prompt.shape[1], device=prompt.device)
        return place.expand_as(prompt).masked_fill(~prompt, -1).amax(1, keepdim=True)

    def attention(self) -> Tensor:
        """`[B, heads, N]`: attention of the last prompt token, a softmax over all that it sees."""
        rows = attention_rows(self._call, self._last)[:, :, 0]
        return self._at_tokens(rows)

    def text_attention(self, which: str = "after") -> tuple[Tensor, Tensor]:
        """`[B, heads, T, N]` and bool `[B, T]`: attention of text tokens, all or after the last image."""
        places, valid = self._text(which)
        rows = attention_rows(self._call, places)
        index = self.places[:, None, None].expand(-1, rows.shape[1], rows.shape[2], -1)
        found = rows.gather(3, index) * self.valid[:, None, None].to(rows.dtype)
        return found * valid[:, None, :, None].to(rows.dtype), valid

    def keys(self) -> Tensor:
        """`[B, kv_heads, N, head_dim]`, positions applied."""
        return _gather_heads(self._call.key, self.places) * self.valid[:, None, :, None].to(
            self._call.key.dtype
        )

    def queries(self) -> Tensor:
        """`[B, heads, 1, head_dim]`: of the last prompt token, positions applied."""
        return _gather_heads(self._call.query, self._last)

    @property
    def scale(self) -> float:
        """What the decoder multiplies its logits with."""
        return self._call.scale

    def text_keys(self, which: str = "after") -> tuple[Tensor, Tensor]:
        """`[B, kv_heads, T, head_dim]` and bool `[B, T]`."""
        places, valid = self._text(which)
        return _gather_heads(self._call.key, places), valid

    def text_features(self, which: str = "after") -> tuple[Tensor, Tensor]:
        """`[B, T, C]` and bool `[B, T]`: hidden states of text tokens."""
        places, valid = self._text(which)
        return self._arrival.hidden.gather(
            1, places[..., None].expand(-1, -1, self.features.shape[-1])
        ), valid

    def text_ids(self, which: str = "after") -> tuple[Tensor, Tensor]:
        """int64 `[B, T]` and bool `[B, T]`: text tokens of the prompt."""
        places, valid = self._text(which)
        columns = self._arrival.columns.gather(1, places)
        return self.input_ids.to(columns.device).gather(1, columns), valid

    def _text(self, which: str) -> tuple[Tensor, Tensor]:
        text = self._arrival.scope.text(which).to(self._arrival.hidden.device)
        return _left(text.gather(1, self._arrival.columns) & self._arrival.real)

    def _at_tokens(self, rows: Tensor) -> Tensor:
        """From `[B, heads, m]` over all that arrived to `[B, heads, N]`."""
        index = self.places[:, None].expand(-1, rows.shape[1], -1)
        return rows.gather(2, index) * self.valid[:, None].to(rows.dtype)

    # the vision tower

    @property
    def layouts(self) -> list[list[TokenLayout]]:
        """For each sample the layouts of its images, in the order of the prompt."""
        return [[picture.layout for picture in row] for row in self._arrival.scope.pictures]

    @cached_property
    def _sources(self) -> list[tuple[str, Tensor]]:
        """For each sample int64 `[total]`: rows of the pooled tower outputs, by modality; -1 for newlines."""
        sources = []
        for row in self._arrival.scope.pictures:
            kinds = {picture.modality for picture in row}
            if len(kinds) > 1:
                raise NotImplementedError(
                    "images and videos in one sample; the tower's attention is read for one"
                )
            parts = [picture.layout.source() for picture in row]
            sources.append(
                (kinds.pop() if kinds else "image", torch.cat(parts) if parts else torch.zeros(0).long())
            )
        return sources

    @cached_property
    def newline(self) -> Tensor:
        """bool `[B, N]`: tokens that stand for no patch."""
        return self._spread(lambda modality: None)[1]

    def tower_crops(self, modality: str = "image") -> list[TowerCrop]:
        """What the crops of the whole batch looked at, in the order in which the tower saw them."""
        return tower_crops(self._arrival.scope, self._observed, modality)

    @property
    def _observed(self) -> int:
        """The layer of the vision tower that was asked for."""
        if self._tower is None:
            raise RuntimeError(
                f"the stage at layer {self.layer} did not ask for the vision tower (tower=True)"
            )
        return self._tower

    def pool_tower(self, values: Callable[[TowerCrop], Tensor]) -> Tensor:
        """Map something of each patch to the tokens.

        Args:
            values: from a crop to `[..., patches]`.

        Returns:
            `[B, ..., N]`: means over the patches of each token; 0 for newline tokens.
        """

        def of(modality: str) -> Tensor:
            return pooled(self._arrival.scope, self._observed, values, modality)

        return self._spread(of)[0].movedim(1, -1)

    def _spread(self, of: Callable[[str], Tensor | None]) -> tuple[Tensor, Tensor]:
        """Pooled rows at the tokens that are left: `[B, N, ...]`, and which tokens have none."""
        device = self.features.device
        pooled: dict[str, Tensor | None] = {}
        rows: list[Tensor | None] = []
        newline = torch.zeros_like(self.valid)
        for sample, (modality, source) in enumerate(self._sources):
            if modality not in pooled and len(source):
                pooled[modality] = of(modality)
            index = source.to(device)[self.index[sample]] if len(source) else self.index[sample]
            newline[sample] = (index < 0) & self.valid[sample]
            values = pooled.get(modality)
            if values is not None:
                here = (index >= 0) & self.valid[sample]
                shape = (-1,) + (1,) * (values.ndim - 1)
                rows.append(values[index.clamp(min=0)] * here.view(shape).to(values.dtype))
            else:
                rows.append(None)
        shape = next((row.shape for row in rows if row is not None), self.valid.shape[1:])
        like = next((row for row in rows if row is not None), torch.zeros(0, device=device))
        return torch.stack([like.new_zeros(shape) if row is None else row for row in rows]), newline

    def tower_attention(self) -> Tensor:
        """`[B, heads, N]`: what a token's patches get from the class token, or from all in the mean."""
        cls = self._arrival.scope.family.has_cls
        return self.pool_tower(lambda crop: crop.class_row() if cls else crop.received())

    def tower_keys(self) -> Tensor:
        """`[B, heads, N, head_dim]`: keys of the vision tower, the mean over each token's patches."""
        keys = self.pool_tower(lambda crop: crop.key[:, crop.skip :].transpose(1, 2))
        return keys.transpose(2, 3)

    def mergeable(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Features of the tower, for methods that merge them before the projector.

        Returns:
            `[B, N, C']`, what the projector got for each token, and a function from such features, changed or
            not, to features for the decoder `[B, N, C]`. Tokens that did not change keep what they have.
            Where the family has no projector that works on single tokens, the decoder's features and the
            identity.
        """
        scope = self._arrival.scope
        projector = scope.family.projector(self.model)
        features = {kind: encoded.features for kind, encoded in scope.encoded.items()}
        rows = {
            kind: 1 + max((int(s.max()) for k, s in self._sources if k == kind and len(s)), default=-1)
            for kind in features
        }
        fits = all(x is not None and x[..., 0].numel() >= rows[kind] for kind, x in features.items())
        if projector is None or not fits:
            return self.features, lambda merged: merged
        before = self._spread(lambda kind: features[kind].flatten(0, -2))[0]  # type: ignore[union-attr]

        def project(merged: Tensor) -> Tensor:
            changed = (merged != before).any(-1, keepdim=True)
            return torch.where(
                changed, projector(merged.to(before.dtype)).to(self.features.dtype), self.features
            )

        return before, project


def _left(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the True entries of each row, from the left, with which of them are there."""
    number = mask.sum(1)
    width = max(int(number.amax()), 1)
    places = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    return places, torch.arange(width, device=mask.device) < number[:, None]


def _gather_heads(x: Tensor, places: Tensor) -> Tensor:
    """`[B, heads, t, d]` of `[B, heads, m, d]`."""
    return x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
