"""NAT and DiNAT: hierarchical transformers of neighborhood attention.

Papers: Neighborhood Attention Transformer (Hassani et al. 2023, arXiv:2204.07143), Dilated Neighborhood
    Attention Transformer (Hassani & Shi 2022, arXiv:2209.15001).
Source: github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT), classification/nat.py and dinat.py.

What differs from the source: a downsampling opens a stage here, there it closes the one before; drop path is
    0 unless asked for, the authors' training value is in each function's docstring; attention dropout, 0 in
    every release, is left out.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d, LayerScale, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from torch import Tensor, nn

from visionsel.layers.neighborhood_attention import NeighborhoodAttention
from visionsel.models.pyramid import Pyramid, Stage, check_state_dict, unwrap_state_dict

__all__ = ["NAT"]


class ConvTokenizer(nn.Module):
    """Two 3x3 convolutions of stride 2, nothing between them, and a norm; NCHW, reduction 4."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class ConvDownsampler(nn.Module):
    """3x3 convolution of stride 2 to twice the channels, and a norm; NCHW."""

    def __init__(
        self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = LayerNorm2d(2 * dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class NATBlock(nn.Module):
    """Neighborhood attention and MLP, each on a norm and added to its input; NHWC."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = NeighborhoodAttention(
            dim, num_heads, kernel_size, dilation, qkv_bias, proj_drop=proj_drop, backend=backend, **dd
        )
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class NAT(Pyramid):
    """NAT, and with dilations DiNAT.

    Args:
        in_chans: channels of the image.
        num_classes: 0 removes the classifier.
        global_pool: see `Pyramid`.
        embed_dim: channels of the first stage, doubled in each later one.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        mlp_ratio: hidden over input channels of the MLPs.
        kernel_size: neighbors per side, odd.
        dilations: one number a block, nested by stage; None is 1 everywhere. Maps smaller than kernel_size x
            dilation are padded.
        qkv_bias: bias of the projections to queries, keys and values.
        layer_scale: initial layer scale, None for none.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after the attention's and in the MLPs' projections.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        backend: of the attention.

    Raises:
        ValueError: for dilations that are not nested as depths says.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dilations is None:
            dilations = [[1] * depth for depth in depths]
        if [len(stage) if isinstance(stage, Sequence) else stage for stage in dilations] != list(depths):
            raise ValueError(
                f"dilations must be one number a block, nested by stage for depths {list(depths)}; "
                f"got {dilations}"
            )
        widths = [embed_dim * 2**i for i in range(len(depths))]
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        block = partial(
            NATBlock,
            kernel_size=kernel_size,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            layer_scale=layer_scale,
            proj_drop=proj_drop_rate,
            backend=backend,
            **dd,
        )
        stages = []
        for i, (width, heads) in enumerate(zip(widths, num_heads, strict=True)):
            blocks = [
                block(dim=width, num_heads=heads, dilation=dilation, drop_path=rate)
                for dilation, rate in zip(dilations[i], rates[i], strict=True)
            ]
            downsample = ConvDownsampler(widths[i - 1], **dd) if i else None
            stages.append(Stage(blocks, downsample, channels_last=True))
        super().__init__(
            ConvTokenizer(in_chans, embed_dim, **dd),
            stages,
            LayerNorm2d(widths[-1], eps=1e-5, **dd),
            widths=widths,
            reductions=[4 * 2**i for i in range(len(depths))],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The relative position biases."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


HOST = "https://shi-labs.com/projects"


def _cfg(url: str, paper: str = "arXiv:2209.15001", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": f"{HOST}/{url}",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj.0",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "paper_ids": paper,
        **kwargs,
    }


_cfg_nat = partial(_cfg, paper="arXiv:2204.07143")
_cfg_384 = partial(_cfg, input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": _cfg_nat("nat/checkpoints/CLS/nat_mini.pth"),
        "nat_tiny.in1k": _cfg_nat("nat/checkpoints/CLS/nat_tiny.pth"),
        "nat_small.in1k": _cfg_nat("nat/checkpoints/CLS/nat_small.pth"),
        "nat_base.in1k": _cfg_nat("nat/checkpoints/CLS/nat_base.pth"),
        "dinat_mini.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_mini_in1k_224.pth"),
        "dinat_tiny.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_tiny_in1k_224.pth"),
        "dinat_small.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_small_in1k_224.pth"),
        "dinat_base.in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_base_in1k_224.pth"),
        "dinat_large.in22k_ft_in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_224.pth"),
        "dinat_large.in22k_ft_in1k_384": _cfg_384(
            "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384.pth"
        ),
        "dinat_large.in22k_ft_in1k_384_11x11": _cfg_384(
            "dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384_11x11.pth"
        ),
        "dinat_large.in22k": _cfg(
            "dinat/checkpoints/imagenet22k/dinat_large_in22k_224.pth", num_classes=21841
        ),
        # in22k with position biases interpolated to kernel 11
        "dinat_large.in22k_11x11": _cfg(
            "dinat/checkpoints/imagenet22k/dinat_large_in22k_224_11x11interp.pth", num_classes=21841
        ),
    }
)

RENAMED = (
    (re.compile(r"^patch_embed\."), "stem."),
    (re.compile(r"^levels\."), "stages."),
    (re.compile(r"\.gamma([12])$"), r".ls\1.gamma"),
    (re.compile(r"^head\.(weight|bias)$"), r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' state dict, bare or nested, or our own -> ours.

    Raises:
        ValueError: if the entries are not those of this variant, or belong to another kernel size.
    """
    wanted = model.state_dict()
    out = {}
    for key, value in unwrap_state_dict(state_dict).items():
        if re.match(r"norm[0-3]\.", key):
            continue  # output norms of the authors' backbones for dense prediction, which bring their own
        if found := re.match(r"levels\.(\d+)\.downsample\.(.+)", key):
            key = f"stages.{int(found[1]) + 1}.downsample.{found[2]}"
        for pattern, name in RENAMED:
            key = pattern.sub(name, key)
        if key.endswith(".rpb") and key in wanted and value.shape != wanted[key].shape:
            kernel, ours = (value.shape[-1] + 1) // 2, (wanted[key].shape[-1] + 1) // 2
            raise ValueError(
                f"{key} is {tuple(value.shape)}, that of kernel_size {kernel}, and the model wants "
                f"{tuple(wanted[key].shape)} for kernel_size {ours}; create the model with the checkpoint's "
                f"kernel size and variant"
            )
        out[key] = value
    check_state_dict(out, model)
    return out


def _create(variant: str, pretrained: bool, **kwargs: Any) -> NAT:
    return build_model_with_cfg(
        NAT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **kwargs,
    )


def _dilations(depths: Sequence[int], largest: Sequence[int]) -> list[list[int]]:
    """1 in every first block and the stage's largest in every second."""
    return [[d if j % 2 else 1 for j in range(depth)] for depth, d in zip(depths, largest, strict=True)]


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini, 81.8 % on ImageNet-1k; trained with drop_path_rate 0.2."""
    model_args = {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
    return _create("nat_mini", pretrained, **{**model_args, **kwargs})


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny, 83.2 % on ImageNet-1k; trained with drop_path_rate 0.2."""
    model_args = {"embed_dim": 64, "depths": (3, 4, 18, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3.0}
    return _create("nat_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small, 83.7 % on ImageNet-1k; trained with drop_path_rate 0.3."""
    model_args = {"embed_dim": 96, "depths": (3, 4, 18, 5), "num_heads": (3, 6, 12, 24), "mlp_ratio": 2.0}
    return _create("nat_small", pretrained, **{**model_args, "layer_scale": 1e-5, **kwargs})


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base, 84.3 % on ImageNet-1k; trained with drop_path_rate 0.5."""
    model_args = {"embed_dim": 128, "depths": (3, 4, 18, 5), "num_heads": (4, 8, 16, 32), "mlp_ratio": 2.0}
    return _create("nat_base", pretrained, **{**model_args, "layer_scale": 1e-5, **kwargs})


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Mini, 81.8 % on ImageNet-1k; trained with drop_path_rate 0.2."""
    model_args = {
        "embed_dim": 64,
        "depths": (3, 4, 6, 5),
        "num_heads": (2, 4, 8, 16),
        "mlp_ratio": 3.0,
        "dilations": _dilations((3, 4, 6, 5), (8, 4, 2, 1)),
    }
    return _create("dinat_mini", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Tiny, 82.7 % on ImageNet-1k; trained with drop_path_rate 0.2."""
    model_args = {
        "embed_dim": 64,
        "depths": (3, 4, 18, 5),
        "num_heads": (2, 4, 8, 16),
        "mlp_ratio": 3.0,
        "dilations": _dilations((3, 4, 18, 5), (8, 4, 2, 1)),
    }
    return _create("dinat_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Small, 83.8 % on ImageNet-1k; trained with drop_path_rate 0.3. No layer scale, unlike NAT."""
    model_args = {
        "embed_dim": 96,
        "depths": (3, 4, 18, 5),
        "num_heads": (3, 6, 12, 24),
        "mlp_ratio": 2.0,
        "dilations": _dilations((3, 4, 18, 5), (8, 4, 2, 1)),
    }
    return _create("dinat_small", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Base, 84.4 % on ImageNet-1k; trained with drop_path_rate 0.5."""
    model_args = {
        "embed_dim": 128,
        "depths": (3, 4, 18, 5),
        "num_heads": (4, 8, 16, 32),
        "mlp_ratio": 2.0,
        "layer_scale": 1e-5,
        "dilations": _dilations((3, 4, 18, 5), (8, 4, 2, 1)),
    }
    return _create("dinat_base", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large, pretrained on ImageNet-22k with drop_path_rate 0.2 and finetuned with 0.35.

    On ImageNet-1k 86.6 % (`in22k_ft_in1k`), 87.4 % (`in22k_ft_in1k_384`, which has larger dilations) and 87.5
    % (`in22k_ft_in1k_384_11x11`, which has kernel size 11 instead).
    """
    given = kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
    tag = resolve_pretrained_cfg("dinat_large", *given).tag
    largest = (13, 6, 3, 1) if tag == "in22k_ft_in1k_384" else (8, 4, 2, 1)
    model_args = {
        "embed_dim": 192,
        "depths": (3, 4, 18, 5),
        "num_heads": (6, 12, 24, 48),
        "mlp_ratio": 2.0,
        "kernel_size": 11 if tag in ("in22k_ft_in1k_384_11x11", "in22k_11x11") else 7,
        "dilations": _dilations((3, 4, 18, 5), largest),
    }
    return _create("dinat_large", pretrained, **{**model_args, **kwargs})
