"""SelectFormer: one four-stage design in which every stage chooses how it selects what it looks at.

Our own, for comparing the mixers under equal conditions and for combining them: fine maps look at
neighborhoods, the coarse map at routed regions, the last at focal contexts. Nothing is published on it yet.

- stem: two 3x3 convolutions of stride 2, as in BiFormer (Zhu et al. 2023) and NAT (Hassani et al. 2023), with
  channel norms instead of batch norms, so that a sample's output never depends on its batch;
- block: `x + dwconv3x3(x)`, `x + mixer(norm(x))`, `x + mlp(norm(x))`: BiFormer's, with the mixer left open;
- mixers: "neighborhood" (kernel 7; every second block dilated, as in DiNAT, Hassani & Shi 2022), "bilevel"
  (7 x 7 windows), "halo" (blocks of 7, halo 3; Vaswani et al. 2021) and "focal" (3 levels from 3 x 3; Yang
  et al. 2022). Sizes are those of a 224 image; other sizes are padded inside the mixers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d, LayerScale, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionsel.layers import (
    BilevelRoutingAttention,
    FocalModulation,
    HaloAttention,
    NeighborhoodAttention,
)
from visionsel.models.pyramid import Pyramid, Stage, check_state_dict, unwrap_state_dict

__all__ = ["SelectFormer"]

MIXERS = ("neighborhood", "bilevel", "halo", "focal")


class HaloMixer(nn.Module):
    """Halo attention and an output projection on NHWC maps; the other mixers bring both along."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention = HaloAttention(
            dim,
            num_heads=num_heads,
            block_size=7,
            halo_size=3,
            qkv_bias=True,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` -> `[B, H, W, C]`."""
        x = self.attention(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(x)


class SelectFormerBlock(nn.Module):
    """Depthwise convolution, mixer and MLP, each added to its input; NHWC maps."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mixer = mixer
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` -> `[B, H, W, C]`."""
        x = x + self.position(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class SelectFormer(Pyramid):
    """Four stages, each with its own mixer.

    Args:
        in_chans: channels of the image.
        num_classes: 0 removes the classifier.
        global_pool: see `Pyramid`.
        embed_dims: channels of each stage; multiples of `head_dim`.
        depths: blocks of each stage.
        mixers: one of "neighborhood", "bilevel", "halo", "focal" for each stage.
        head_dim: channels of an attention head.
        mlp_ratio: hidden over input channels of the MLP.
        dilations: of the neighborhood mixers in every second block, one a stage; the largest that fit the
            maps of a 224 image with kernel 7, as in DiNAT.
        topks: routed windows of the bilevel mixers, one a stage; -1 is all (BiFormer's numbers).
        layer_scale: initial layer scale, None for none.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in the MLPs.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        backend: of all mixers.

    Raises:
        ValueError: for an unknown mixer, or arguments that do not have one entry a stage.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        mixers: Sequence[str] = ("neighborhood", "neighborhood", "bilevel", "focal"),
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        dilations: Sequence[int] = (8, 4, 2, 1),
        topks: Sequence[int] = (1, 4, 16, -1),
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        given = {
            "embed_dims": embed_dims,
            "depths": depths,
            "mixers": mixers,
            "dilations": dilations,
            "topks": topks,
        }
        for name, values in given.items():
            if isinstance(values, str) or len(values) != 4:
                raise ValueError(f"{name} needs four entries, one a stage, got {values!r}")
        for mixer in mixers:
            if mixer not in MIXERS:
                raise ValueError(f"unknown mixer {mixer!r}; choose from {', '.join(MIXERS)}")
        for dim in embed_dims:
            if dim % head_dim:
                raise ValueError(
                    f"embed_dims must be multiples of head_dim {head_dim}, got {tuple(embed_dims)}"
                )

        def make_mixer(stage: int, block: int) -> nn.Module:
            dim = embed_dims[stage]
            heads = dim // head_dim
            match mixers[stage]:
                case "neighborhood":
                    dilation = dilations[stage] if block % 2 else 1
                    return NeighborhoodAttention(dim, heads, 7, dilation, backend=backend, **dd)
                case "bilevel":
                    return BilevelRoutingAttention(dim, heads, 7, topks[stage], backend=backend, **dd)
                case "halo":
                    return HaloMixer(dim, heads, backend=backend, **dd)
                case _:
                    return FocalModulation(dim, focal_window=3, focal_level=3, backend=backend, **dd)

        def halving(channels: int, dim: int) -> list[nn.Module]:
            return [
                nn.Conv2d(channels, dim, 3, stride=2, padding=1, **dd),
                LayerNorm2d(dim, eps=1e-6, **dd),
            ]

        half = embed_dims[0] // 2
        stem = nn.Sequential(*halving(in_chans, half), nn.GELU(), *halving(half, embed_dims[0]))
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (dim, depth) in enumerate(zip(embed_dims, depths, strict=True)):
            downsample = nn.Sequential(*halving(embed_dims[i - 1], dim)) if i else None
            blocks = [
                SelectFormerBlock(
                    dim, make_mixer(i, j), mlp_ratio, layer_scale, proj_drop_rate, rates[i][j], **dd
                )
                for j in range(depth)
            ]
            stages.append(Stage(blocks, downsample, channels_last=True))
        super().__init__(
            stem,
            stages,
            LayerNorm2d(embed_dims[-1], eps=1e-6, **dd),
            widths=embed_dims,
            reductions=(4, 8, 16, 32),
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The relative position tables."""
        tables = ("rpb", "height_rel", "width_rel")
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in tables}


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "selectformer_nano": _cfg(),
        "selectformer_micro": _cfg(),
        "selectformer_tiny": _cfg(),
        "selectformer_pico": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    }
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Our own state dict, bare or nested.

    Raises:
        ValueError: if the entries are not those of this variant.
    """
    state = unwrap_state_dict(state_dict)
    check_state_dict(state, model)
    return state


def _create(variant: str, pretrained: bool, **kwargs: Any) -> SelectFormer:
    return build_model_with_cfg(
        SelectFormer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **kwargs,
    )


@register_model
def selectformer_nano(pretrained: bool = False, **kwargs: Any) -> SelectFormer:
    """SelectFormer-nano: 3.5 M parameters, 0.58 G multiply-adds at 224."""
    model_args = {"embed_dims": (32, 64, 128, 256), "depths": (2, 2, 8, 2), **kwargs}
    return _create("selectformer_nano", pretrained, **model_args)


@register_model
def selectformer_micro(pretrained: bool = False, **kwargs: Any) -> SelectFormer:
    """SelectFormer-micro, of BiFormer-T's size: 13.2 M parameters, 2.2 G multiply-adds at 224."""
    model_args = {"embed_dims": (64, 128, 256, 512), "depths": (2, 2, 8, 2), **kwargs}
    return _create("selectformer_micro", pretrained, **model_args)


@register_model
def selectformer_tiny(pretrained: bool = False, **kwargs: Any) -> SelectFormer:
    """SelectFormer-tiny, near BiFormer-S and NAT-T: 22.9 M parameters, 4.1 G multiply-adds at 224."""
    model_args = {"embed_dims": (64, 128, 256, 512), "depths": (3, 4, 18, 3), **kwargs}
    return _create("selectformer_tiny", pretrained, **model_args)


@register_model
def selectformer_pico(pretrained: bool = False, **kwargs: Any) -> SelectFormer:
    """SelectFormer-pico, for images of 64 pixels: the image tower of the small CLIP that visionsel ships."""
    model_args = {
        "embed_dims": (32, 64, 128, 128),
        "depths": (1, 2, 2, 1),
        # maps of 16, 8, 4 and 2 pixels: only the second is about the size of a neighborhood
        "mixers": ("focal", "neighborhood", "focal", "focal"),
        "dilations": (1, 1, 1, 1),
        **kwargs,
    }
    return _create("selectformer_pico", pretrained, **model_args)
