"""Segmentation networks of segmentation_models_pytorch over any timm backbone, ours too.

What is added to them: images of any size, weights of released classifiers and of runs of
`train.classification`, mmsegmentation's auxiliary head, layer-wise learning rates, sliding windows.
"""

import math
from collections.abc import Sequence
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from train.backbone_weights import ENCODER, build_backbone, counterparts, read_backbone_weights, undecayed
from train.cli import brief

__all__ = ["DECODERS", "SegmentationNet", "load_encoder", "resized", "slide"]

DECODERS = sorted(set(smp.MODEL_ARCHITECTURES_MAPPING) - {"dpt"})  # dpt is for plain transformers


class SegmentationNet(nn.Module):
    """An encoder, a decoder and, for training, an auxiliary head: `[B, 3, H, W]` to logits of that size.

    Args:
        decoder: one of `DECODERS`.
        encoder: a timm name with `features_only`, whose maps have strides that double from 2 or 4.
        classes: of the logits.
        encoder_args: arguments of the timm model.
        decoder_args: arguments of the decoder, such as `{decoder_channels: 512}` of UPerNet.
        auxiliary_channels: of the head on the last but one map, a 3 x 3 convolution and a classifier with
            dropout 0.1 (mmsegmentation's FCNHead); 0 builds none.

    Raises:
        ValueError: for an unknown decoder, or arguments that do not fit.
    """

    def __init__(
        self,
        decoder: str,
        encoder: str,
        classes: int,
        encoder_args: dict[str, Any],
        decoder_args: dict[str, Any],
        auxiliary_channels: int = 0,
    ) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise ValueError(f"unknown decoder {decoder!r}; choose one of {', '.join(DECODERS)}")
        try:
            whole = _on_meta(encoder, **encoder_args)
            strides = [level["reduction"] for level in whole.feature_info]
            self.smp = smp.create_model(
                decoder,
                f"tu-{encoder}",
                encoder_weights=None,
                classes=classes,
                encoder_depth=int(math.log2(strides[-1])),
                **decoder_args,
                **encoder_args,
            )
        except (
            AssertionError,
            AttributeError,
            LookupError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"{decoder} over {encoder} with model_args {encoder_args} and decoder_args {decoder_args}: "
                f"{brief(error)}"
            ) from error
        self.auxiliary: nn.Module | None = None
        if auxiliary_channels:
            width = self.smp.encoder.out_channels[-2]
            self.auxiliary = nn.Sequential(
                nn.Conv2d(width, auxiliary_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(auxiliary_channels),
                nn.ReLU(),
                nn.Dropout2d(0.1),
                nn.Conv2d(auxiliary_channels, classes, 1),
            )
        self._order(whole)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits `[B, classes, H, W]`, and in training those of the auxiliary head, if there is one.

        The image is padded with 0, its mean, at the right and bottom to a multiple of the largest stride.
        """
        height, width = images.shape[-2:]
        step = self.smp.encoder.output_stride
        images = pad(images, (0, -width % step, 0, -height % step))
        maps = self.smp.encoder(images)
        auxiliary = None
        if self.training and self.auxiliary is not None:
            auxiliary = resized(self.auxiliary(maps[-2]), images.shape[-2:])[..., :height, :width]
        logits = self.smp.segmentation_head(self.smp.decoder(maps))
        return resized(logits, images.shape[-2:])[..., :height, :width], auxiliary

    def _order(self, whole: Any) -> None:
        """Remember the depth of each parameter of the encoder, and which take no weight decay."""
        depths = group_parameters(whole, whole.group_matcher(coarse=False), reverse=True)
        names = counterparts((name for name, _ in self.smp.encoder.model.named_parameters()), depths)
        kept = undecayed(whole)
        self._depth = {ENCODER + name: depths[old] for name, old in names.items()}
        self._undecayed = {ENCODER + name for name, old in names.items() if old in kept}

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, beside biases and norms: what the backbone names."""
        return self._undecayed

    def group_matcher(self, coarse: bool = False) -> Any:
        """The layer of a parameter: those of the backbone, then one with the decoder and the heads."""
        return lambda name: (float(self._depth.get(name, math.inf)),)


def resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits `[B, classes, H, W]` at another size."""
    if logits.shape[-2:] == tuple(size):
        return logits
    return interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def _on_meta(name: str, **arguments: Any) -> Any:
    """A timm model without storage; a few models cannot be built so, and get it."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, **arguments)
    except (NotImplementedError, RuntimeError):
        return timm.create_model(name, **arguments)


def load_encoder(
    net: SegmentationNet, encoder: str, arguments: dict[str, Any], pretrained: bool, checkpoint: str | None
) -> None:
    """Start the encoder from released weights or from a file.

    Args:
        net: whose encoder is filled.
        encoder: its timm name.
        arguments: of the timm model. The depthwise kernels of a FocalNet with larger `focal_windows` than its
            release get zeros around the released ones, as the authors do.
        pretrained: download the release that the name means.
        checkpoint: a file, or a classifier of the package; see `read_backbone_weights`.

    Raises:
        ValueError: when the weights do not fit; nothing is loaded in part.
    """
    whole_args = {key: value for key, value in arguments.items() if key != "focal_windows"}
    weights = None if checkpoint is None else read_backbone_weights(checkpoint, encoder)
    body = net.smp.encoder.model
    try:
        if weights is not None and weights.features_only:
            entries = weights.entries
        else:
            whole = build_backbone(encoder, whole_args, weights, pretrained).state_dict()
            wanted = body.state_dict()
            names = counterparts(wanted, whole)
            entries = {name: _grown(name, whole[old], wanted[name]) for name, old in names.items()}
        body.load_state_dict(entries)
    except RuntimeError as error:
        source = checkpoint or "the release"
        raise ValueError(
            f"{encoder} with model_args {arguments} and the weights of {source}: {brief(error)}"
        ) from error


def _grown(name: str, weight: Tensor, wanted: Tensor) -> Tensor:
    """A depthwise kernel of a focal level with zeros around it, where a larger one is wanted."""
    more = (wanted.shape[-1] - weight.shape[-1]) // 2 if weight.ndim == 4 and wanted.ndim == 4 else 0
    return pad(weight, (more,) * 4) if more > 0 and "focal_layers" in name else weight


def slide(net: nn.Module, images: Tensor, window: int, stride: int) -> Tensor:
    """Logits `[B, classes, H, W]` as the mean over windows that overlap, as in mmsegmentation.

    Args:
        net: gives logits of its input's size first.
        images: `[B, 3, H, W]`.
        window: pixels a side of a window; a smaller image is one window.
        stride: pixels from a window to the next; the last ones end with the image.
    """
    height, width = images.shape[-2:]
    total = count = None
    for top in _starts(height, window, stride):
        for left in _starts(width, window, stride):
            box = (..., slice(top, top + window), slice(left, left + window))
            logits = net(images[box])[0].float()
            if total is None or count is None:
                total = logits.new_zeros(len(images), logits.shape[1], height, width)
                count = logits.new_zeros(height, width)
            total[box] += logits
            count[box] += 1
    assert total is not None
    assert count is not None
    return total / count


def _starts(size: int, window: int, stride: int) -> list[int]:
    steps = max(0, -(-(size - window) // stride)) + 1
    return [max(0, min(step * stride, size - window)) for step in range(steps)]
