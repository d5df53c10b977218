"""Weights of F-LMM's authors in a `MaskHead`.

Their U-Net is mmsegmentation's, whose names are public, in `mask_head.`; the SAM's trained parts are in
`sam.model.`, and beside them are `text_proj` and `text_layer_weights`. How they call the last convolution is
not said anywhere: it is known by its shape.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionsel.multimodal.grounding.mask_head import MaskHead

__all__ = ["flmm_names", "load_flmm_checkpoint"]


def flmm_names(head: MaskHead) -> dict[str, str]:
    """For each parameter and buffer of a head its name in the authors' checkpoint; all but the last layer."""
    return {key: _their_name(key) for key in head.state_dict() if not key.startswith("out.")}


def load_flmm_checkpoint(head: MaskHead, checkpoint: str | Path | Mapping[str, Any]) -> MaskHead:
    """Put the authors' weights into a head.

    Args:
        head: of the sizes of the checkpoint: for LLaVA-1.5-7B
            `MaskHead(MaskHeadConfig(**describe_model(model)), sam)` with SAM ViT-L.
        checkpoint: a file, or what it holds; weights may be under `state_dict`.

    Returns:
        the head.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file that is no checkpoint or holds more than tensors, and for weights that are
            unknown, missing or of another shape; the head is as it was then.
    """
    given = checkpoint if isinstance(checkpoint, Mapping) else _read(Path(checkpoint))
    state = given.get("state_dict", given)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("the checkpoint holds no weights by name")
    names, own = flmm_names(head), head.state_dict()
    last = [name for name in state if name.startswith("mask_head.") and name not in names.values()]
    for kind in ("weight", "bias"):
        found = [name for name in last if name.endswith(f".{kind}")]
        if len(found) == 1:
            names[f"out.{kind}"] = found[0]
    if unknown := sorted(set(state) - set(names.values())):
        raise ValueError(
            f"the checkpoint has {len(unknown)} weights that this head lacks, such as {unknown[0]}"
        )
    # what is not trained, SAM's random places, may have been left out
    trained = {key for key, _ in head.named_parameters()}
    missing = [names.get(key, f"mask_head's last {key}") for key in trained if names.get(key) not in state]
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} weights, such as {sorted(missing)[0]}")
    weights = {key: state[name] for key, name in names.items() if name in state}
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"{names[key]} is {list(value.shape)}, but this head has {list(own[key].shape)}; the "
                "checkpoint is for another language model, another number of grids or another SAM"
            )
    head.load_state_dict({**own, **weights})
    return head


def _their_name(key: str) -> str:
    """`unet.down.1.0.1.bias` -> `mask_head.encoder.1.1.convs.0.gn.bias`."""
    if key.startswith("refiner.text_"):
        return key.removeprefix("refiner.")
    if key.startswith("refiner."):
        return f"sam.model.{key.removeprefix('refiner.')}"
    _, way, stage, *rest, part, kind = key.split(".")
    layer = f"{'gn' if part == '1' else 'conv'}.{kind}"
    if way == "down":  # behind the pooling, where a stage has one
        return f"mask_head.encoder.{stage}.{min(int(stage), 1)}.convs.{rest[0]}.{layer}"
    if rest[0] == "enlarge":
        return f"mask_head.decoder.{stage}.upsample.interp_upsample.1.{layer}"
    return f"mask_head.decoder.{stage}.conv_block.convs.{rest[1]}.{layer}"


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is no file of weights, or is cut off: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__}, not weights by name")
    return found
