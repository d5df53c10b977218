"""DETRs of transformers over a timm backbone: RT-DETR, RT-DETR v2 and D-FINE.

They are called as torchvision's detectors are (see `train.detection_models`). Images become squares of one
size, as in RT-DETR (Zhao et al. 2024); boxes are relative to the image, so that its shape does not matter.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.ops import box_convert

from train.cli import brief
from train.detection_models import BatchNorm, Source

__all__ = ["DETRS", "Detr", "build_detr"]

DETRS = ("rt_detr", "rt_detr_v2", "d_fine")


class Detr(nn.Module):
    """A model of transformers behind the interface of torchvision's detectors.

    Args:
        model: one whose classes are scored by a sigmoid, `logits` `[B, queries, classes]`, and whose
            `pred_boxes` `[B, queries, 4]` are (centre x, centre y, width, height) in parts of the image.
        size: pixels a side that the model sees.
        mean, std: of the pixels.
        detections: the most for one image; 100 are what COCO counts.
    """

    def __init__(
        self, model: nn.Module, size: int, mean: Sequence[float], std: Sequence[float], detections: int = 100
    ) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.detections = detections
        self.mean = tuple(mean)
        self.std = tuple(std)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses that add up to the model's in training, else detections; see the module's docstring."""
        square = (self.size, self.size)
        pixels = torch.cat(
            [
                interpolate(i[None], square, mode="bilinear", antialias=True, align_corners=False)
                for i in images
            ]
        )
        pixels = (pixels - _channels(self.mean, pixels)) / _channels(self.std, pixels)
        if not self.training:
            return self._detections(self.model(pixel_values=pixels), images)
        assert targets is not None
        labels = [
            {
                "class_labels": target["labels"] - 1,
                "boxes": box_convert(target["boxes"] / _scale(image), "xyxy", "cxcywh"),
            }
            for image, target in zip(images, targets, strict=True)
        ]
        losses = dict(self.model(pixel_values=pixels, labels=labels).loss_dict)
        if not any(len(label["boxes"]) for label in labels):
            # nothing to denoise: some parameters took no part, for which several devices would wait
            name = next(iter(losses))
            losses[name] = losses[name] + 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        return losses

    def _detections(self, output: Any, images: list[Tensor]) -> list[dict[str, Tensor]]:
        logits, boxes = output.logits.float(), output.pred_boxes.float()
        classes = logits.shape[2]
        scores, index = logits.sigmoid().flatten(1).topk(min(self.detections, logits[0].numel()))
        boxes = boxes.gather(1, (index // classes)[..., None].expand(-1, -1, 4))
        corners = box_convert(boxes, "cxcywh", "xyxy").clamp(0, 1)
        return [
            {"boxes": b * _scale(image), "labels": i % classes + 1, "scores": s}
            for b, i, s, image in zip(corners, index, scores, images, strict=True)
        ]


def build_detr(
    detector: Literal["rt_detr", "rt_detr_v2", "d_fine"],
    source: Source,
    categories: dict[int, str],
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_norm: BatchNorm,
    arguments: dict[str, Any],
) -> Detr:
    """A DETR with a backbone by its timm name.

    Args:
        detector: transformers' name of the architecture.
        source: of the backbone; its maps are those that the encoder reads.
        categories: of the classes, by id.
        size: pixels a side that the model sees.
        mean, std: of the pixels.
        batch_norm: of the backbone; "frozen" is the architectures' own choice.
        arguments: of transformers' configuration.

    Raises:
        ImportError: without the extra "multimodal".
        ValueError: for arguments of the backbone, or of the configuration that it does not take.
    """
    try:
        from transformers import AutoConfig, AutoModelForObjectDetection, TimmBackboneConfig
    except ImportError as error:
        raise ImportError(
            f'{detector} comes from transformers: pip install "visionsel[multimodal]"'
        ) from error
    if source.args:
        raise ValueError(
            f"transformers builds a backbone by its timm name alone, so {detector} takes no backbone_args; "
            f"got {source.args}"
        )
    levels = len(source.strides)
    width = arguments.get("encoder_hidden_dim", 256)
    settings: dict[str, Any] = {
        "backbone_config": cast(Any, TimmBackboneConfig)(backbone=source.name, out_indices=source.indices),
        "encoder_in_channels": source.channels,
        "feat_strides": source.strides,
        "encode_proj_layers": [levels - 1],
        "decoder_in_channels": [width] * levels,
        "num_feature_levels": levels,
        "decoder_n_levels": levels,
        "freeze_backbone_batch_norms": batch_norm == "frozen",
        "id2label": dict(enumerate(categories.values())),
        "label2id": {name: index for index, name in enumerate(categories.values())},
        **arguments,
    }
    if detector == "rt_detr":
        del settings["decoder_n_levels"]
    config = AutoConfig.for_model(detector)
    unknown = [name for name in arguments if not hasattr(config, name)]
    if unknown:
        raise ValueError(f"the configuration of {detector} has no {', '.join(unknown)}")
    try:
        model = AutoModelForObjectDetection.from_config(AutoConfig.for_model(detector, **settings))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{detector} with detector_args {arguments}: {brief(error)}") from error
    net = Detr(model, size, mean, std)
    source.load(find_body(net))
    return net


def find_body(net: Detr) -> nn.Module:
    """timm's feature extractor inside."""
    from transformers import TimmBackbone

    return next(module for module in net.modules() if isinstance(module, TimmBackbone))._backbone


def _channels(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


def _scale(image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    return torch.tensor([width, height, width, height], dtype=torch.float32, device=image.device)
