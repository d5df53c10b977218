"""From the arguments of a detector to its network, its first weights and its parameter groups."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast, get_args

from torch import nn

from train.backbone_weights import build_backbone, flat, read_backbone_weights
from train.classifier_net import check_name
from train.cli import below, read_checkpoint
from train.detection_detr import DETRS, Detr, build_detr, find_body
from train.detection_models import Source, build_torchvision
from train.recipe import check, check_optimization

__all__ = [
    "Built",
    "Detectors",
    "backbone_of",
    "build_detector",
    "check_recipe",
    "load_start",
    "parameter_groups",
    "settle",
]

Detectors = Literal["mask_rcnn", "faster_rcnn", "retinanet", "rt_detr", "rt_detr_v2", "d_fine"]

# parts of the names of layers whose size is the number of classes
_CLASS_LAYERS = ("box_predictor.", "mask_fcn_logits.", "cls_logits.", "class_embed", "enc_score_head.")


class Built(NamedTuple):
    """A network, and what is known of its backbone's parameters.

    Attributes:
        net: the detector.
        depths: layer of each parameter of the backbone, counted from the image, by its flattened name.
        stages: the same, stage by stage: 0 is the stem.
        undecayed: flattened names of the parameters that take no weight decay beside biases and norms.
        mean, std: of the pixels.
    """

    net: nn.Module
    depths: dict[str, int]
    stages: dict[str, int]
    undecayed: set[str]
    mean: list[float]
    std: list[float]


def check_recipe(given: Mapping[str, Any]) -> None:
    """Refuse arguments of `Detector` that are out of range.

    Raises:
        ValueError: naming the argument.
    """
    check_optimization(given)
    for name in ("weight_decay", "warmup_steps", "frozen_stages", "pictures", "sampling_ratio"):
        check(given[name] >= 0, f"{name} must be at least 0, got {given[name]}")
    for name in ("pyramid_channels", "box_channels", "mask_channels", "mask_layers", "batch_size", "size"):
        check(given[name] >= 1, f"{name} must be at least 1, got {given[name]}")
    for name in ("backbone_lr", "layer_decay", "lr_factor"):
        check(0 < given[name] <= 1, f"{name} must be above 0 and at most 1, got {given[name]}")
    detector = given["detector"]
    check(
        detector in get_args(Detectors),
        f"unknown detector {detector!r}; choose one of {', '.join(get_args(Detectors))}",
    )
    check(not (given["pretrained"] and given["checkpoint"]), "give either pretrained or checkpoint, not both")
    if detector in DETRS:
        for name in ("output_norms", "group_norm", "anchor_scales"):
            check(not given[name], f"{name} belongs to torchvision's detectors; leave it out for {detector}")


def build_detector(given: Mapping[str, Any]) -> Built:
    """The network that arguments of `Detector` mean, with the weights that they name.

    Raises:
        ValueError: for a backbone, weights or arguments that do not fit.
    """
    detector: Detectors = given["detector"]
    name, arguments = given["backbone"], dict(given["backbone_args"] or {})
    check_name(name)
    weights = None if given["checkpoint"] is None else read_backbone_weights(given["checkpoint"], name)
    whole = build_backbone(name, arguments, weights, given["pretrained"], given="backbone_args")
    finest = given["least_stride"] or (4 if detector.endswith("rcnn") else 8)
    source = Source(name, arguments, whole, finest)
    common: dict[str, Any] = {
        "size": given["size"],
        "mean": list(given["mean"] or source.mean),
        "std": list(given["std"] or source.std),
        "batch_norm": given["batch_norm"],
        "arguments": dict(given["detector_args"] or {}),
    }
    net: nn.Module
    if detector in DETRS:
        net = build_detr(cast(Any, detector), source, given["categories"], **common)
    else:
        names = "max_size pyramid_channels box_channels mask_channels mask_layers anchor_scales anchor_ratios"
        names += " output_norms group_norm sampling_ratio"
        own = {key: given[key] for key in names.split()}
        net = build_torchvision(cast(Any, detector), source, len(given["categories"]), **common, **own)
    if given["grad_checkpointing"]:
        cast(Any, backbone_of(net)).set_grad_checkpointing(True)
    built = Built(
        net,
        source.depths(),
        source.depths(coarse=True),
        source.undecayed(),
        common["mean"],
        common["std"],
    )
    stages = max(built.stages.values())
    frozen = given["frozen_stages"]
    check(frozen <= stages, f"frozen_stages must be at most {stages}, got {frozen}")
    for key, parameter in backbone_of(net).named_parameters():
        if frozen and built.stages[flat(key)] <= frozen:
            parameter.requires_grad = False
    return built


def backbone_of(net: nn.Module) -> nn.Module:
    """timm's feature extractor in a detector."""
    return find_body(net) if isinstance(net, Detr) else cast(Any, net.backbone).body


def settle(body: nn.Module, batch_norm: str) -> None:
    """Put into eval mode what does not train in a backbone: frozen modules, and batch norms with "eval"."""
    for module in body.modules():
        parameters = list(module.parameters())
        fixed = parameters and not any(parameter.requires_grad for parameter in parameters)
        if fixed or (batch_norm == "eval" and isinstance(module, nn.modules.batchnorm._BatchNorm)):
            module.eval()


def parameter_groups(built: Built, given: Mapping[str, Any], lr: float) -> list[dict[str, Any]]:
    """Parameters by their rate and weight decay.

    Args:
        built: the network.
        given: `weight_decay`, `backbone_lr` and `layer_decay`; see `Detector`.
        lr: of the layers after the backbone.
    """
    inside = {id(p): flat(name) for name, p in backbone_of(built.net).named_parameters()}
    deepest = max(built.depths[name] for name in inside.values())
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in built.net.parameters():
        if not parameter.requires_grad:
            continue
        name = inside.get(id(parameter))
        rate, decay = lr, given["weight_decay"] if parameter.ndim > 1 else 0.0
        if name is not None:
            rate *= given["backbone_lr"] * given["layer_decay"] ** (deepest + 1 - built.depths[name])
            decay = 0.0 if name in built.undecayed else decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def load_start(net: nn.Module, path: str) -> list[str]:
    """Load a checkpoint of this program; layers of the classes that have another size keep their own weights.

    Returns:
        The names of the entries that were not loaded.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a checkpoint of another detector.
    """
    state = below("net.", read_checkpoint(path).get("state_dict", {}))
    own = net.state_dict()
    other = [key for key in own if key not in state or own[key].shape != state[key].shape]
    strange = [key for key in other if not any(part in key for part in _CLASS_LAYERS)]
    if strange or not state.keys() <= own.keys():
        lost = next(iter(strange or state.keys() - own.keys()))
        raise ValueError(f"{path} is not a checkpoint of this detector and backbone: {lost} differs")
    net.load_state_dict({**own, **{key: value for key, value in state.items() if key not in other}})
    return other
