"""The network of the classification program: any timm model, its start, and how it is spread over devices."""

import re
from collections.abc import Sequence
from typing import Any

import timm
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from train.backbone_weights import build_backbone, read_backbone_weights
from train.cli import brief
from train.image_data import read_class_names
from train.recipe import near

__all__ = ["build_classifier", "check_name", "shard"]


def build_classifier(
    name: str,
    class_names: Sequence[str],
    preprocessing: dict[str, Any],
    arguments: dict[str, Any] | None = None,
    pretrained: bool = False,
    checkpoint: str | None = None,
    checkpoint_classes: str | None = None,
    same_classes: bool = False,
) -> nn.Module:
    """A timm model with a classifier of these classes, known to take the image size.

    Args:
        name: of timm, with a tag if a release is meant.
        class_names: in the order of the labels.
        preprocessing: in the words of timm's pretrained configurations.
        arguments: of the model.
        pretrained: start from the released weights.
        checkpoint: start from a file, or from a classifier of the package; see `read_backbone_weights`.
        checkpoint_classes: names of the classes that the weights were trained on, see `read_class_names`; the
            classifier keeps the rows of our classes. None: a classifier of another number of classes is
            left out and starts afresh.
        same_classes: refuse weights of other classes.

    Raises:
        ValueError: naming the model (with names that are near), arguments, image size or checkpoint that does
            not fit.
    """
    check_name(name)
    arguments = arguments or {}
    classes = len(class_names)
    weights = None if checkpoint is None else read_backbone_weights(checkpoint, name)
    trained = None if weights is None else weights.classes
    overlay = {key: value for key, value in preprocessing.items() if value is not None}
    rows = read_class_names(checkpoint_classes) if checkpoint_classes else None
    if rows is not None:
        if not (pretrained or checkpoint):
            raise ValueError("checkpoint_classes name those of a checkpoint: give checkpoint or pretrained")
        if trained not in (None, len(rows)):
            raise ValueError(
                f"{checkpoint} has {trained} classes, checkpoint_classes "
                f"{checkpoint_classes} names {len(rows)}"
            )
        overlay["num_classes"] = trained = len(rows)
    if same_classes:
        own = None if weights is None else weights.class_names
        trained = trained or getattr(timm.get_pretrained_cfg(name), "num_classes", classes)
        if trained != classes or own not in (None, list(class_names)):
            told = f", {own[:3]} ..." if own else ""
            raise ValueError(
                f"{checkpoint or name} was trained on {trained} classes{told}, not on those of the data, "
                f"{classes}"
            )
    net = build_backbone(
        name,
        arguments,
        weights,
        pretrained,
        num_classes=classes if rows is None else len(rows),
        overlay=overlay,
    )
    if rows is not None:
        _keep_rows(net, class_names, rows)
    _check_image_size(net, name, preprocessing["input_size"], classes)
    return net


def check_name(name: str) -> None:
    """Refuse a model or a release that timm does not know.

    Raises:
        ValueError: with names that are near.
    """
    architecture, _, tag = name.partition(".")
    if ":" not in name and not timm.is_model(architecture):
        raise ValueError(f"unknown model {name!r}{near(architecture, timm.list_models())}")
    if ":" not in name and tag and name not in timm.list_models(f"{architecture}.*", include_tags=True):
        releases = [n for n in timm.list_models(f"{architecture}.*", include_tags=True) if "." in n]
        raise ValueError(f"unknown release {name!r}; {architecture} has {', '.join(releases) or 'none'}")


def _check_image_size(net: nn.Module, name: str, input_size: Sequence[int], classes: int) -> None:
    channels, height, width = input_size
    try:
        with torch.no_grad():
            logits = net.eval()(torch.zeros(1, channels, height, width))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} does not take images of {height} x {width}: {brief(error)}") from error
    if logits.shape != (1, classes):
        raise ValueError(
            f"{name} gives {tuple(logits.shape)} for an image, not (1, {classes}); is it a classifier?"
        )
    net.train()


def _keep_rows(net: Any, class_names: Sequence[str], rows: Sequence[str]) -> None:
    """Replace the classifier of `rows` by one of `class_names` with the same weights for the same names."""
    old = net.get_classifier()
    if not isinstance(old, nn.Linear | nn.Conv2d):
        raise ValueError(
            f"the classifier is a {type(old).__name__}, whose rows checkpoint_classes cannot take"
        )
    number = {name: row for row, name in enumerate(rows)}
    known = [label for label, name in enumerate(class_names) if name in number]
    if not known:
        raise ValueError(f"checkpoint_classes name none of ours, such as {class_names[0]}")
    net.reset_classifier(len(class_names))
    new: Any = net.get_classifier()
    source = [number[class_names[label]] for label in known]
    with torch.no_grad():
        new.weight[known] = old.weight[source]
        if old.bias is not None:
            new.bias[known] = old.bias[source]
    fresh = [name for name in class_names if name not in number]
    if fresh:
        rank_zero_info(
            f"{len(fresh)} classes are new to the classifier and start afresh: {', '.join(fresh[:5])}"
        )


def shard(net: nn.Module, mesh: Any) -> None:
    """Shard parameters, gradients and the optimizer's state over the devices of a mesh (FSDP2), in place.

    Every block is gathered when it is its turn; models without `blocks` are gathered as a whole.

    Args:
        net: a timm model.
        mesh: of Lightning's `ModelParallelStrategy`.

    Raises:
        ValueError: when the mesh is meant for tensor parallelism too.
    """
    from torch.distributed.fsdp import fully_shard

    if mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "these models are sharded by FSDP2 alone: set trainer.strategy.tensor_parallel_size to 1 and "
            "data_parallel_size to the number of devices"
        )
    along = mesh["data_parallel"]
    for name, module in list(net.named_modules()):
        if re.search(r"(^|\.)blocks\.\d+$", name):
            fully_shard(module, mesh=along)
    fully_shard(net, mesh=along)
