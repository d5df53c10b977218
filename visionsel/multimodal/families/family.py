"""What visionsel must know of a family of vision-language models: the base of the files in this folder.

A family file says where the decoder is, which tokens stand for images, how these tokens lie on a grid, and
how what the vision tower attends to maps to them. Everything else is the same for all families.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Encoded", "Family", "TokenLayout", "View"]

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class View:
    """One picture that the vision tower saw, as a grid of tokens: the whole image, its tiles, a frame.

    Attributes:
        kind: `"image"`, `"thumbnail"` (the whole image beside its tiles), `"tile"`, `"tiles"` (all tiles in
            one grid) or `"frame"`.
        index: int64 `[h, w]`: the number of the token among those of its image.
        source: int64 `[h, w]`: the row of the token in what `Family.pool` returns for the whole call.
        box: x0, y0, x1, y1 of the grid in pixels of the original image; it may reach over the border where
            the processor padded. None unless `Family.layouts` was given the processor and the sizes.
    """

    kind: str
    index: Tensor
    source: Tensor
    box: Box | None = None


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of one image or video come from.

    Attributes:
        n: how many tokens stand for it in the prompt.
        views: its grids; every token is in at most one.
    """

    n: int
    views: tuple[View, ...]

    def source(self) -> Tensor:
        """int64 `[n]`: the row of each token in the pooled outputs; -1 for newline tokens."""
        source = torch.full((self.n,), -1)
        for view in self.views:
            source[view.index.flatten()] = view.source.flatten()
        return source


@dataclass(frozen=True)
class Encoded:
    """One call of the vision tower by the model.

    Attributes:
        modality: `"image"` or `"video"`.
        arguments: of `get_image_features` or `get_video_features`, by name.
        features: what entered the projector, `[pictures, tokens, C]`; None where the family has no
            `projector`.
        layers: for each observed layer of the tower, the calls of its attention: queries and keys
            `[crops or 1, heads, length, head_dim]` as the kernel got them, with the scale.
    """

    modality: str
    arguments: Mapping[str, Any]
    layers: Mapping[int, Sequence[tuple[Tensor, Tensor, float]]]
    features: Tensor | None = None


class Family:
    """The common case; a family file overrides what differs.

    Attributes:
        name: in messages.
        model_types: values of `config.model_type` of the whole model.
        has_cls: the sequence of the vision tower starts with a class token.
        one_layout_an_image: without processor and sizes too, `layouts` has one entry for each image; False
            where the model gets pictures and is not told which of them make up an image.
    """

    name: str
    model_types: tuple[str, ...]
    has_cls: bool = False
    one_layout_an_image: bool = True

    def decoder(self, model: nn.Module) -> nn.Module:
        """The language model below the head: it has `layers`, `norm` and `config`."""
        return model.model.language_model  # type: ignore[union-attr, return-value]

    def token_ids(self, model: nn.Module) -> dict[str, int]:
        """The token ids that stand for `"image"` and, where the family has it, `"video"`."""
        config: Any = model.config
        ids = {"image": config.image_token_id}
        if getattr(config, "video_token_id", None) is not None:
            ids["video"] = config.video_token_id
        return ids

    def tower_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The layers of the vision tower, first to last."""
        raise NotImplementedError

    def tower_attention(self, layer: nn.Module) -> nn.Module:
        """The module of a tower layer that calls the attention kernel."""
        return layer.self_attn  # type: ignore[return-value]

    def feature_layer(self, model: nn.Module) -> int:
        """The number (from 0) of the tower layer whose attention says what its features look at."""
        return len(self.tower_layers(model)) - 1

    def pool(self, model: nn.Module, values: Tensor, encoded: Encoded) -> Tensor:
        """Averages over patches to one value for each token that leaves the projector.

        Args:
            model: of this family.
            values: `[patches of the whole call, ...]`, crop after crop, class tokens left out, in the order
                in which the tower has them.
            encoded: the call.

        Returns:
            `[tokens, ...]`, in the order that `View.source` counts.
        """
        return values

    def projector(self, model: nn.Module) -> nn.Module | None:
        """The module that makes tokens one by one, in the order of `pool`; None if there is none."""
        return None

    def layouts(
        self,
        model: nn.Module,
        encoded: Encoded,
        processor: Any = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[TokenLayout]:
        """The layout of each image (or video) of the call, in the order of the placeholders.

        Args:
            model: of this family.
            encoded: the call.
            processor: the processor or image processor that made the pixels; needed for `View.box`.
            sizes: height and width of the original images; needed for `View.box`.
        """
        raise NotImplementedError
