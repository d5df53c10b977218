"""What a mask head is made for, and its sizes."""

from dataclasses import dataclass
from typing import Any

__all__ = ["MaskHeadConfig", "describe_model"]

DESCRIBE = "Please give me a description of the image."


@dataclass(frozen=True, kw_only=True)
class MaskHeadConfig:
    """What a `MaskHead` is made for, and its sizes; the defaults are those of F-LMM.

    Attributes:
        layers, heads: of the decoder of the language model.
        hidden: width of its states.
        views: 2 for families that show an image whole and in tiles (LLaVA-NeXT, InternVL, ...): the maps of
            both grids are channels; else 1.
        row: `"token"`: the rows of attention are those of a word's own tokens (F-LMM); `"predict"`: those
            that predict them.
        merge: `"mean"` (F-LMM) or `"max"` over the tokens of a word.
        base, stages, convolutions, groups: of the `UNet`.
        min_side: grids with shorter sides are enlarged until the longer side has this many cells.
        refer_prompt: how referring expressions are asked for, see `refer_replay`.
    """

    layers: int
    heads: int
    hidden: int
    views: int = 1
    row: str = "token"
    merge: str = "mean"
    base: int = 64
    stages: int = 4
    convolutions: int = 2
    groups: int = 1
    min_side: int = 64
    refer_prompt: str = DESCRIBE

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "hidden", "min_side"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1 up, got {value!r}")
        for name, allowed in (("views", (1, 2)), ("row", ("token", "predict")), ("merge", ("mean", "max"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be {allowed[0]!r} or {allowed[1]!r}, got {getattr(self, name)!r}"
                )


def describe_model(model: Any, views: int = 1) -> dict[str, int]:
    """`layers`, `heads`, `hidden` and `views` of a model, for `MaskHeadConfig`."""
    config = model.config.get_text_config()
    return {
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "hidden": config.hidden_size,
        "views": views,
    }
