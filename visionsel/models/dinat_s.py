"""DiNAT_s: the Swin architecture with neighborhood attention in place of window attention.

Paper: Dilated Neighborhood Attention Transformer (Hassani & Shi 2022, arXiv:2209.15001, section 4).
Source: github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT), classification/dinats.py.

What differs from the source: a downsampling opens a stage here, there it closes the one before; drop path
is 0 unless asked for, the authors' training value is in each function's docstring; attention dropout, 0 in
every release, is left out.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._builder import resolve_pretrained_cfg
from torch import Tensor, nn

from visionsel.layers.neighborhood_attention import NeighborhoodAttention
from visionsel.models.pyramid import Pyramid, Stage, check_state_dict, unwrap_state_dict

__all__ = ["DiNATs"]


class PatchEmbed(nn.Module):
    """4x4 patches to tokens, and a norm; NCHW. Images are padded at the right and bottom to whole patches."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4, device=device, dtype=dtype)
        self.norm = LayerNorm2d(dim, eps=1e-5, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2], x.shape[3]
        x = F.pad(x, [0, (width + 3) // 4 * 4 - width, 0, (height + 3) // 4 * 4 - height])
        return self.norm(self.proj(x))


class PatchMerging(nn.Module):
    """2x2 positions side by side, a norm, a projection to twice the channels; NCHW. Odd sides are padded."""

    def __init__(
        self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        batch, height, width, dim = x.shape
        rows, columns = (height + 1) // 2, (width + 1) // 2
        x = F.pad(x, [0, 0, 0, 2 * columns - width, 0, 2 * rows - height])
        x = x.reshape(batch, rows, 2, columns, 2, dim)
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # the lower neighbor before the right one, as in Swin
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


class DiNATsBlock(nn.Module):
    """Neighborhood attention and MLP, each on a norm and added to its input; NHWC."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
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
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DiNATs(Pyramid):
    """DiNAT_s.

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
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        qkv_bias: bool = True,
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
            DiNATsBlock,
            kernel_size=kernel_size,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
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
            downsample = PatchMerging(widths[i - 1], **dd) if i else None
            stages.append(Stage(blocks, downsample, channels_last=True))
        super().__init__(
            PatchEmbed(in_chans, embed_dim, **dd),
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


HOST = "https://shi-labs.com/projects/dinat/checkpoints"


def _cfg(url: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": f"{HOST}/{url}",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "paper_ids": "arXiv:2209.15001",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "dinat_s_tiny.in1k": _cfg("imagenet1k/dinat_s_tiny_in1k_224.pth"),
        "dinat_s_small.in1k": _cfg("imagenet1k/dinat_s_small_in1k_224.pth"),
        "dinat_s_base.in1k": _cfg("imagenet1k/dinat_s_base_in1k_224.pth"),
        "dinat_s_large.in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_224.pth"),
        "dinat_s_large.in22k_ft_in1k_384": _cfg(
            "imagenet1k/dinat_s_large_in1k_384.pth",
            input_size=(3, 384, 384),
            pool_size=(12, 12),
            crop_pct=1.0,
        ),
        "dinat_s_large.in22k": _cfg("imagenet22k/dinat_s_large_in22k_224.pth", num_classes=21841),
    }
)

RENAMED = (
    (re.compile(r"^patch_embed\."), "stem."),
    (re.compile(r"^layers\."), "stages."),
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
        if found := re.match(r"layers\.(\d+)\.downsample\.(.+)", key):
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


def _create(variant: str, pretrained: bool, **kwargs: Any) -> DiNATs:
    return build_model_with_cfg(
        DiNATs,
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
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """DiNAT_s-Tiny, 81.8 % on ImageNet-1k; trained with drop_path_rate 0.2."""
    model_args = {
        "embed_dim": 96,
        "depths": (2, 2, 6, 2),
        "num_heads": (3, 6, 12, 24),
        "dilations": _dilations((2, 2, 6, 2), (8, 4, 2, 1)),
    }
    return _create("dinat_s_tiny", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """DiNAT_s-Small, 83.5 % on ImageNet-1k; trained with drop_path_rate 0.3."""
    model_args = {
        "embed_dim": 96,
        "depths": (2, 2, 18, 2),
        "num_heads": (3, 6, 12, 24),
        "dilations": _dilations((2, 2, 18, 2), (8, 4, 2, 1)),
    }
    return _create("dinat_s_small", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """DiNAT_s-Base, 83.8 % on ImageNet-1k; trained with drop_path_rate 0.5."""
    model_args = {
        "embed_dim": 128,
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
        "dilations": _dilations((2, 2, 18, 2), (8, 4, 2, 1)),
    }
    return _create("dinat_s_base", pretrained, **{**model_args, **kwargs})


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> DiNATs:
    """DiNAT_s-Large, pretrained on ImageNet-22k with drop_path_rate 0.2 and finetuned with 0.35.

    On ImageNet-1k 86.5 % (`in22k_ft_in1k`) and 87.4 % (`in22k_ft_in1k_384`, which has larger dilations).
    """
    given = kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay")
    tag = resolve_pretrained_cfg("dinat_s_large", *given).tag
    largest = (13, 6, 3, 1) if tag == "in22k_ft_in1k_384" else (8, 4, 2, 1)
    model_args = {
        "embed_dim": 192,
        "depths": (2, 2, 18, 2),
        "num_heads": (6, 12, 24, 48),
        "dilations": _dilations((2, 2, 18, 2), largest),
    }
    return _create("dinat_s_large", pretrained, **{**model_args, **kwargs})
