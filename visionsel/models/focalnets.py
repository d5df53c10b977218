"""The isotropic FocalNets: one map at a sixteenth of the image, twelve blocks of focal modulation.

Yang et al., "Focal Modulation Networks", NeurIPS 2022 (arXiv 2203.11926); numbers and names from the authors'
code (microsoft/FocalNet, MIT). timm has the hierarchical FocalNets (focalnet_tiny_srf, ...), which
`visionsel.accelerate` makes run on the operator used here.

What differs from the authors' code: dropout of the classifier and of the blocks are separate arguments. As
there, a side of the image that the patch does not divide loses its rest.
"""

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d, LayerScale, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionsel.layers.focal_modulation import FocalModulation
from visionsel.models.pyramid import Pyramid, Stage, check_state_dict, unwrap_state_dict

__all__ = ["IsotropicFocalNet"]


class PatchEmbed(nn.Module):
    """Normed patches without overlap: `[B, in_chans, H, W]` -> `[B, embed_dim, H // patch, W // patch]`."""

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        patch_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, **dd)
        self.norm = LayerNorm2d(embed_dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class FocalNetBlock(nn.Module):
    """Focal modulation and an MLP, each added to its input, on `[B, H, W, dim]`.

    Args:
        dim: channels.
        focal_window, focal_level: of `FocalModulation`.
        mlp_ratio: hidden over outer channels of the MLP.
        post_norm: norms after modulation and MLP instead of before.
        layer_scale: initial factor of each branch; None for no such parameter.
        proj_drop: dropout in modulation and MLP.
        drop_path: probability of dropping a branch in training.
        backend: of the modulation.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        focal_window: int = 3,
        focal_level: int = 3,
        mlp_ratio: float = 4.0,
        post_norm: bool = False,
        layer_scale: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.post_norm = post_norm
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.modulation = FocalModulation(
            dim, focal_window, focal_level, proj_drop=proj_drop, backend=backend, **dd
        )
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = x + self.drop_path1(self.ls1(self.norm1(self.modulation(x))))
            x = x + self.drop_path2(self.ls2(self.norm2(self.mlp(x))))
        else:
            x = x + self.drop_path1(self.ls1(self.modulation(self.norm1(x))))
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class IsotropicFocalNet(Pyramid):
    """A FocalNet of one resolution; for timm every block is a stage, so that each gives a feature.

    Args:
        in_chans: channels of the image.
        num_classes: 0 removes the classifier.
        global_pool: as in `Pyramid`.
        patch_size: side of a patch.
        embed_dim: channels.
        depth: blocks.
        focal_window: kernel size of the first level.
        focal_level: levels besides the global one; kernels 3, 5, 7 as published.
        mlp_ratio: hidden over outer channels of the MLPs.
        post_norm, layer_scale: of `FocalNetBlock`; the base model has both.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout in the blocks.
        drop_path_rate: of the last block, from 0 in the first; the authors' code has 0.1, their training 0.2.
        backend: of the modulations.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        focal_window: int = 3,
        focal_level: int = 3,
        mlp_ratio: float = 4.0,
        post_norm: bool = False,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, depth)
        stages = [
            Stage(
                [
                    FocalNetBlock(
                        embed_dim,
                        focal_window,
                        focal_level,
                        mlp_ratio,
                        post_norm=post_norm,
                        layer_scale=layer_scale,
                        proj_drop=proj_drop_rate,
                        drop_path=drop_path,
                        backend=backend,
                        **dd,
                    )
                ],
                channels_last=True,
            )
            for drop_path in drop_paths
        ]
        super().__init__(
            PatchEmbed(in_chans, embed_dim, patch_size, **dd),
            stages,
            LayerNorm2d(embed_dim, eps=1e-5, **dd),
            widths=[embed_dim] * depth,
            reductions=[patch_size] * depth,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self.apply(_init_weights)


def _init_weights(module: nn.Module) -> None:
    # convolutions keep torch's default, as in the authors' code
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _cfg(url: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (14, 14),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/microsoft/FocalNet",
        "paper_ids": "arXiv:2203.11926",
        **kwargs,
    }


# top-1 on ImageNet-1k as published: 74.1, 80.9, 82.4
default_cfgs = generate_default_cfgs(
    {
        "focalnet_tiny_iso_16.ms_in1k": _cfg(
            "https://github.com/microsoft/FocalNet/releases/download/v1.0.0/focalnet_tiny_iso_16.pth"
        ),
        "focalnet_small_iso_16.ms_in1k": _cfg(
            "https://github.com/microsoft/FocalNet/releases/download/v1.0.0/focalnet_small_iso_16.pth"
        ),
        "focalnet_base_iso_16.ms_in1k": _cfg(
            "https://github.com/microsoft/FocalNet/releases/download/v1.0.0/focalnet_base_iso_16.pth"
        ),
    }
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' state dict, bare or nested, or our own -> ours.

    Raises:
        ValueError: if the entries are not those of this variant.
    """
    state = unwrap_state_dict(state_dict)
    renamed = {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if head == "patch_embed":
            key = f"stem.{rest}"
        elif key.startswith("layers.0.blocks."):
            index, _, name = key.removeprefix("layers.0.blocks.").partition(".")
            if name in ("gamma_1", "gamma_2"):
                name = f"ls{name[-1]}.gamma"
            key = f"stages.{index}.blocks.0.{name}"
        elif key in ("head.weight", "head.bias"):
            key = f"head.fc.{rest}"
        renamed[key] = value
    check_state_dict(renamed, model)
    return renamed


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> IsotropicFocalNet:
    return build_model_with_cfg(
        IsotropicFocalNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(kwargs.get("depth", 12))), "feature_cls": "getter"},
        **kwargs,
    )


@register_model
def focalnet_tiny_iso_16(pretrained: bool = False, **kwargs: Any) -> IsotropicFocalNet:
    return _create("focalnet_tiny_iso_16", pretrained, **{"embed_dim": 192, **kwargs})


@register_model
def focalnet_small_iso_16(pretrained: bool = False, **kwargs: Any) -> IsotropicFocalNet:
    return _create("focalnet_small_iso_16", pretrained, **{"embed_dim": 384, **kwargs})


@register_model
def focalnet_base_iso_16(pretrained: bool = False, **kwargs: Any) -> IsotropicFocalNet:
    model_args = {"embed_dim": 768, "post_norm": True, "layer_scale": 1e-4}
    return _create("focalnet_base_iso_16", pretrained, **{**model_args, **kwargs})
