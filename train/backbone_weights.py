"""First weights of a timm backbone: where they come from, and how its features_only form names them.

Classification, detection and segmentation read files of weights here: releases of timm and of authors,
checkpoints of these programs, and the small classifiers of the package.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import timm
from torch import Tensor, nn

import visionsel  # noqa: F401  (registers the models with timm)
from train.cli import below, brief, read_checkpoint
from visionsel.embedded.classifier import load_classifier
from visionsel.models.pyramid import unwrap_state_dict

__all__ = [
    "ENCODER",
    "BackboneWeights",
    "build_backbone",
    "counterparts",
    "flat",
    "read_backbone_weights",
    "undecayed",
]

ENCODER = "smp.encoder.model."
"""Where the networks of `train.segmentation` have their backbone."""


@dataclass(frozen=True)
class BackboneWeights:
    """What a file holds for a timm model.

    Attributes:
        source: the file.
        entries: by the names of the model, or of its authors where timm knows them.
        classes: rows of the classifier; None where there is none under a usual name.
        class_names: of these rows, where the file says them.
        pixels: `mean` and `std` of the images that they were trained on, where the file says them.
        features_only: the entries are those of the features_only form: no classifier, no last norm.
    """

    source: str
    entries: dict[str, Tensor]
    classes: int | None = None
    class_names: list[str] | None = None
    pixels: dict[str, tuple[float, ...]] = field(default_factory=dict)
    features_only: bool = False


def read_backbone_weights(source: str, model: str) -> BackboneWeights:
    """The weights of a timm model in a file.

    Args:
        source: a release, a state dict (safetensors too), a checkpoint of `train.classification` or of
            `train.shapes_classifier` (without its dense head), or one of `train.segmentation`, of which the
            encoder is taken; or "embedded:NAME", a classifier of `visionsel.embedded.load_classifier`.
        model: its timm name, which says what its classifier is called.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file that is cut off, has no weights, or is of another program.
    """
    if source.startswith("embedded:"):
        net: Any = load_classifier(source.removeprefix("embedded:"))
        return _of_classifier(source, net.state_dict(), net.pretrained_cfg["label_names"], net.pretrained_cfg)
    state = read_checkpoint(source)
    trained = state.get("hyper_parameters")
    if trained is None:
        entries = unwrap_state_dict(state)
        if not any(isinstance(value, Tensor) for value in entries.values()):
            raise ValueError(f"{source} holds no weights; expected a state dict of {model}, or one in it")
        return BackboneWeights(source, entries, _classifier_rows(model, entries))
    entries = below("net.", state.get("state_dict", {}))
    if encoder := below(ENCODER, entries):
        return BackboneWeights(source, encoder, features_only=True)
    if not {"class_names", "preprocessing"} <= set(trained):
        raise ValueError(
            f"{source} is a checkpoint of another program: expected one of train.classification, a release "
            f"or a state dict of {model}"
        )
    return _of_classifier(source, entries, trained["class_names"], trained["preprocessing"])


def _of_classifier(
    source: str, entries: dict[str, Tensor], names: Iterable[str], preprocessing: Mapping[str, Any]
) -> BackboneWeights:
    names = list(names)
    # what train.shapes_classifier adds for its dense targets
    entries = {key: value for key, value in entries.items() if not key.startswith("auxiliary.")}
    pixels = {key: tuple(preprocessing[key]) for key in ("mean", "std") if key in preprocessing}
    return BackboneWeights(source, entries, len(names), names, pixels)


def _classifier_rows(model: str, entries: dict[str, Tensor]) -> int | None:
    """Rows of the classifier in a state dict, under the model's name for it or a usual one."""
    config = timm.get_pretrained_cfg(model) if ":" not in model else None
    own = getattr(config, "classifier", None) or ()
    for module in (*((own,) if isinstance(own, str) else own), "head.fc", "head", "fc", "classifier"):
        weight = entries.get(f"{module}.weight")
        if weight is not None and weight.ndim > 1:
            return len(weight)
    return None


def build_backbone(
    name: str,
    arguments: dict[str, Any],
    weights: BackboneWeights | None = None,
    pretrained: bool = False,
    *,
    num_classes: int | None = None,
    overlay: dict[str, Any] | None = None,
    given: str = "model_args",
) -> nn.Module:
    """A timm model with its classifier and its first weights.

    Args:
        name: of timm.
        arguments: of the model.
        weights: to start from.
        pretrained: start from the released weights.
        num_classes: of the classifier, which starts afresh where the weights have another number; default
            that of the weights, so that none of them is left out.
        overlay: of timm's pretrained configuration; it goes over what the weights say.
        given: what `arguments` are called where the user gives them.

    Raises:
        ValueError: naming the model and the weights that do not fit.
    """
    told = f"{name} with {given} {arguments}"
    if weights is not None or pretrained:
        told += f" and the weights of {weights.source if weights else 'the release'}"
    held: dict[str, Any] = {}
    if weights is not None:
        if weights.features_only:
            raise ValueError(
                f"{told}: they are an encoder of train.segmentation, without the last norm and a classifier; "
                "expected a checkpoint of train.classification, a release or a state dict"
            )
        classes = weights.classes
        if num_classes is None:
            num_classes = classes = classes or 0
        # without a classifier they have no classes: timm then starts one afresh
        held = {"state_dict": weights.entries, "num_classes": classes or 0, **weights.pixels}
    try:
        net: Any = timm.create_model(
            name,
            pretrained=pretrained or weights is not None,
            num_classes=num_classes,
            pretrained_cfg_overlay=held | (overlay or {}),
            **arguments,
        )
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{told}: {brief(error)}") from error
    net.pretrained_cfg.pop("state_dict", None)
    return net


def flat(name: str) -> str:
    """A name in a timm model without what its features_only forms change: dots, and the name of a wrapper."""
    return name.removeprefix("model.").removeprefix("body.").replace(".", "_")


def counterparts(names: Iterable[str], whole: Iterable[str]) -> dict[str, str]:
    """The name in the whole timm model of each entry of its features_only form.

    Raises:
        ValueError: naming an entry that the whole model has not.
    """
    known = {flat(name): name for name in whole}
    names = list(names)
    if lost := [name for name in names if flat(name) not in known]:
        raise ValueError(f"the backbone has {lost[0]}, which the whole model has not")
    return {name: known[flat(name)] for name in names}


def undecayed(whole: nn.Module) -> set[str]:
    """Names of the parameters that a timm model exempts from weight decay, beside biases and norms."""
    exempt: Any = getattr(whole, "no_weight_decay", set)
    patterns = exempt()
    return {
        name for name, _ in whole.named_parameters() if any(fnmatch(name, pattern) for pattern in patterns)
    }
