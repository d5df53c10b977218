"""Heads that were chosen for one model: which model that is, and the files that ship."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import nn

from visionsel.multimodal.families import find_family

__all__ = ["ABOUT", "describe_model", "preset_file", "refuse_other_model", "written_out"]

ABOUT = ("type", "decoder", "layers", "heads", "width")
"""What tells models apart whose heads mean different things."""


def describe_model(model: nn.Module) -> dict[str, Any]:
    """The values of `ABOUT` for a model.

    Raises:
        ValueError: for a model of no supported family.
    """
    decoder: Any = cast(Any, find_family(model).decoder(model)).config
    values = (
        cast(Any, model).config.model_type,
        decoder.model_type,
        int(decoder.num_hidden_layers),
        int(decoder.num_attention_heads),
        int(decoder.hidden_size),
    )
    return dict(zip(ABOUT, values, strict=True))


def written_out(about: Mapping[str, Any]) -> str:
    """What `describe_model` gives, in words."""
    return "{type} with a {decoder} of {layers} layers, {heads} heads a layer, width {width}".format(**about)


def refuse_other_model(about: Mapping[str, Any], model: nn.Module, otherwise: str) -> None:
    """Refuse a model of another kind than heads were chosen for.

    Args:
        about: what `describe_model` gave then.
        model: that they shall be used on.
        otherwise: how to find its own.

    Raises:
        ValueError: for it.
    """
    here = describe_model(model)
    if dict(about) != here:
        raise ValueError(
            f"these heads are of another model: {written_out(about)}; this one is {written_out(here)}. Find "
            f"its own with {otherwise}"
        )


def preset_file(folder: Path, name: str, otherwise: str) -> Path:
    """The file of a preset.

    Args:
        folder: that has them, as JSON.
        name: of the preset.
        otherwise: how to find heads for another model.

    Raises:
        ValueError: for a name that there is not.
    """
    known = {path.stem: path for path in sorted(folder.glob("*.json"))}
    if name not in known:
        raise ValueError(
            f"no preset of heads is called {name!r}; there are {', '.join(known)}. For another model "
            f"find heads with {otherwise}, save and load them"
        )
    return known[name]
