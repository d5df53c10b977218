"""Detectors over any timm backbone: torchvision's with a feature pyramid, and DETRs of transformers.

All are called alike, as torchvision's are: a list of images, float `[3, H, W]` from 0 to 1 and of any sizes,
and in training a list of targets; they return a dict of losses in training, else for each image a dict of
`boxes` (x0, y0, x1, y1) in its pixels, `labels` from 1, `scores` and, of Mask R-CNN, `masks` `[N, 1, H, W]`
from 0 to 1.

What differs from the papers' detectors in mmdetection: RPN and box head are trained by smooth L1, not L1, and
RoIAlign is shifted by half a pixel (its `aligned=False`).
"""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import timm
import torch
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from train.backbone_weights import counterparts, flat, undecayed
from train.cli import brief

__all__ = ["BatchNorm", "FeaturePyramid", "Source", "build_torchvision"]

BatchNorm = Literal["eval", "frozen", "train"]


class Source:
    """A timm model as a backbone: which maps it has, how deep each parameter lies, and its weights.

    Args:
        name: of timm.
        args: of the model.
        whole: the model with its weights, where there are any.
        least_stride: finest map that is wanted, in pixels of the image.

    Attributes:
        indices, strides, channels: of the last map of each stride from `least_stride` on.
        mean, std: of the pixels that the model expects.

    Raises:
        ValueError: for a model without such maps.
    """

    def __init__(self, name: str, args: dict[str, Any], whole: nn.Module, least_stride: int) -> None:
        self.name = name
        self.args = args
        self.whole = whole
        info: Any = whole.feature_info
        rows = getattr(info, "info", info)
        of_stride = {row["reduction"]: i for i, row in enumerate(rows)}
        chosen = {stride: i for stride, i in sorted(of_stride.items()) if stride >= least_stride}
        if not chosen:
            raise ValueError(f"{name} has maps of strides {sorted(of_stride)}, none from {least_stride} on")
        self.strides, self.indices = list(chosen), list(chosen.values())
        self.channels = [rows[i]["num_chs"] for i in self.indices]
        config: Any = whole.pretrained_cfg
        self.mean, self.std = list(config["mean"]), list(config["std"])

    def build(self, batch_norm: BatchNorm) -> nn.Module:
        """The backbone with the weights of the whole model: image to list of maps.

        Args:
            batch_norm: "frozen" makes its batch norms fixed functions; the other two are modes of training.

        Raises:
            ValueError: when timm cannot make it, or its maps are not NCHW.
        """
        try:
            body = timm.create_model(self.name, features_only=True, out_indices=self.indices, **self.args)
            with torch.no_grad():
                maps = body.eval()(torch.zeros(1, 3, 64, 96))
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.name} is no backbone for images of any size: {brief(error)}; models with fixed "
                "position embeddings are not"
            ) from error
        if [m.shape[1] for m in maps] != self.channels:
            # such as Swin's, which are NHWC unless asked for through forward_intermediates
            options: dict[str, Any] = {
                "features_only": True,
                "out_indices": self.indices,
                "feature_cls": "getter",
            }
            body = timm.create_model(self.name, **options, **self.args)
        self.load(body)
        return (freeze_batch_norm_2d(body) if batch_norm == "frozen" else body).train()

    def load(self, body: nn.Module) -> None:
        """Copy the weights of the whole model into its backbone, which names them almost alike."""
        weights = self.whole.state_dict()
        names = counterparts(body.state_dict(), weights)
        body.load_state_dict({name: weights[old] for name, old in names.items()})

    def depths(self, coarse: bool = False) -> dict[str, int]:
        """How deep a parameter lies by its flattened name: block by block, or `coarse`, stage by stage."""
        matcher: Any = self.whole.group_matcher
        layers = group_parameters(self.whole, matcher(coarse=coarse), reverse=True)
        return {flat(name): depth for name, depth in layers.items()}

    def undecayed(self) -> set[str]:
        """Flattened names of the parameters that the model exempts from weight decay."""
        return {flat(name) for name in undecayed(self.whole)}


class FeaturePyramid(nn.Module):
    """A timm backbone with a feature pyramid on top (Lin et al. 2017): images to named maps.

    Args:
        source: of the backbone.
        channels: of all maps of the pyramid.
        top: "pool" adds a level by skipping every other pixel of the last; "convolutions" adds two, made from
            the last map of the backbone.
        batch_norm: see `Source.build`.
        output_norms: a LayerNorm on each map of the backbone, as the authors of BiFormer and NAT have it.
        norm: of the pyramid's convolutions; default none.
    """

    def __init__(
        self,
        source: Source,
        channels: int,
        top: Literal["pool", "convolutions"],
        batch_norm: BatchNorm = "eval",
        output_norms: bool = False,
        norm: Any = None,
    ) -> None:
        super().__init__()
        self.body = source.build(batch_norm)
        self.norms = nn.ModuleList(LayerNorm2d(c) if output_norms else nn.Identity() for c in source.channels)
        extra = LastLevelMaxPool() if top == "pool" else LastLevelP6P7(source.channels[-1], channels)
        self.fpn = FeaturePyramidNetwork(source.channels, channels, extra, norm)
        self.out_channels = channels
        self.precision: torch.dtype | None = None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """`[B, 3, H, W]` -> maps `[B, channels, h, w]`, the finest first, float32.

        With `precision` this runs under autocast; what follows does not, for torchvision computes boxes in
        the precision of the maps, and in bfloat16 a coordinate of 1,000 is off by up to 4 pixels.
        """
        with torch.autocast(images.device.type, self.precision, enabled=self.precision is not None):
            maps = zip(self.norms, self.body(images), strict=True)
            pyramid = self.fpn({str(i): norm(m) for i, (norm, m) in enumerate(maps)})
        return {name: m.float() for name, m in pyramid.items()}


def build_torchvision(
    detector: Literal["mask_rcnn", "faster_rcnn", "retinanet"],
    source: Source,
    classes: int,
    *,
    size: int,
    max_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    pyramid_channels: int,
    box_channels: int,
    mask_channels: int,
    mask_layers: int,
    anchor_scales: Sequence[float] | None,
    anchor_ratios: Sequence[float],
    batch_norm: BatchNorm,
    output_norms: bool,
    group_norm: bool,
    sampling_ratio: int,
    arguments: dict[str, Any],
) -> nn.Module:
    """A detector of torchvision over a feature pyramid.

    Args:
        detector: its kind.
        source: of the backbone.
        classes: without the background.
        size, max_size: of images in evaluation: shortest side, and the most that the longest can be. In
            training images are taken as they come.
        mean, std: of the pixels.
        pyramid_channels, box_channels, mask_channels, mask_layers: widths of the pyramid and the heads.
        anchor_scales: sides of the anchors at each level, in its strides; default 8 (R-CNN), or 4, 5.04 and
            6.35 (RetinaNet).
        anchor_ratios: heights over widths.
        batch_norm, output_norms: see `FeaturePyramid`.
        group_norm: of 32 groups in pyramid and heads; else they have no norm.
        sampling_ratio: points a side of each bin of RoIAlign; 0 has as many as the bin has pixels.
        arguments: further ones of torchvision's class.

    Raises:
        ValueError: when torchvision does not take the arguments.
    """
    dense = detector == "retinanet"
    norm = partial(_group_norm, groups=32) if group_norm else None
    top: Literal["pool", "convolutions"] = "convolutions" if dense else "pool"
    pyramid = FeaturePyramid(source, pyramid_channels, top, batch_norm, output_norms, norm)
    strides = [*source.strides, *(source.strides[-1] * 2 ** (i + 1) for i in range(2 if dense else 1))]
    scales = anchor_scales or ([4 * 2 ** (i / 3) for i in range(3)] if dense else [8])
    anchors = AnchorGenerator(
        tuple(tuple(stride * scale for scale in scales) for stride in strides),
        (tuple(anchor_ratios),) * len(strides),
    )
    common: dict[str, Any] = {
        "min_size": size,
        "max_size": max_size,
        "image_mean": list(mean),
        "image_std": list(std),
        "_skip_resize": True,  # in training, where the data has been resized
    }
    known = inspect.signature({"mask_rcnn": MaskRCNN, "faster_rcnn": FasterRCNN}.get(detector, RetinaNet))
    if unknown := [name for name in arguments if name not in known.parameters]:
        raise ValueError(f"{detector} has no detector_args {', '.join(unknown)}")
    try:
        if dense:
            head = RetinaNetHead(pyramid_channels, len(scales) * len(anchor_ratios), classes, norm_layer=norm)
            options = {"detections_per_img": 100, **arguments}
            return _RetinaNet(pyramid, classes, anchor_generator=anchors, head=head, **common, **options)
        names = [str(i) for i in range(len(source.strides))]
        parts: dict[str, Any] = {
            "rpn_anchor_generator": anchors,
            "box_roi_pool": MultiScaleRoIAlign(names, 7, sampling_ratio),
            "box_head": TwoMLPHead(49 * pyramid_channels, box_channels),
            "box_predictor": FastRCNNPredictor(box_channels, classes + 1),
        }
        if detector == "faster_rcnn":
            return FasterRCNN(pyramid, **parts, **common, **arguments)
        masks = {
            "mask_roi_pool": MultiScaleRoIAlign(names, 14, sampling_ratio),
            "mask_head": MaskRCNNHeads(pyramid_channels, [mask_channels] * mask_layers, 1, norm_layer=norm),
            "mask_predictor": MaskRCNNPredictor(mask_channels, mask_channels, classes + 1),
        }
        return MaskRCNN(pyramid, **parts, **masks, **common, **arguments)
    except TypeError as error:
        raise ValueError(f"{detector} with detector_args {arguments}: {brief(error)}") from error


class _RetinaNet(RetinaNet):
    """RetinaNet with labels from 1, as the others have them; torchvision's count from 0."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        if targets is not None:
            targets = [{**target, "labels": target["labels"] - 1} for target in targets]
        found = super().forward(images, targets)
        return found if self.training else [{**one, "labels": one["labels"] + 1} for one in found]


def _group_norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups if channels % groups == 0 else 1, channels)
