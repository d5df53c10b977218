"""BiFormer: vision transformer with bi-level routing attention (Zhu et al. 2023,
https://arxiv.org/abs/2303.08810).

From the authors' code, https://github.com/rayleizhu/BiFormer (MIT): `models/biformer.py`, `biformer_stl.py`
and `biformer_stl_nchw.py`.

- The first three stages route between 7 x 7 windows, whatever the map's size; the last attends everywhere,
  with 8 heads at every width. Detection in the paper takes `num_windows=16`, segmentation 8.
- Every variant pads maps that do not divide into windows; the authors' Swin-Tiny-Layout ("STL") models do not
  and refuse such sizes.
- The authors train small with `drop_path_rate=0.15`; 0.1 is their training script's default.
- The authors' links to the weights are reported dead (their issue 53). A file that you have loads with
  `create_model("biformer_small", pretrained=True, pretrained_cfg_overlay=dict(file=PATH))`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from visionsel.layers.bilevel_routing_attention import BilevelRoutingAttention
from visionsel.layers.lepe_attention import AttentionLePE
from visionsel.models.pyramid import Pyramid, Stage, check_state_dict, unwrap_state_dict

__all__ = ["BiFormer"]


class BiFormerBlock(nn.Module):
    """Convolutional position embedding, attention and MLP on NHWC maps, each added to its input.

    Args:
        dim: channels.
        attention: the attention layer.
        mlp_ratio: hidden over input channels of the MLP.
        pos_embed: add a depthwise 3 x 3 convolution of the map first.
        drop_path: stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp_ratio: float = 3.0,
        pos_embed: bool = True,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.has_pos_embed = pos_embed
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if pos_embed else nn.Identity()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` -> `[B, H, W, C]`."""
        if self.has_pos_embed:
            x = x + self.pos_embed(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BiFormer(Pyramid):
    """BiFormer.

    Args:
        in_chans: channels of the image.
        num_classes: 0 removes the classifier.
        global_pool: see `Pyramid`.
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        head_dim: channels of a head in the routed stages.
        mlp_ratio: hidden over input channels of the MLPs.
        num_windows: windows per side, one number or one a stage.
        topks: routed windows of each stage; -1 is full attention with `AttentionLePE`.
        swin_layout: the macro-design of Swin-T: a patch embedding for a stem, merging of 2 x 2 patches for
            downsampling, no convolutional position embedding.
        refactored: the numerics of the authors' refactored NCHW code: padding after the projection and not
            counted in window means, lepe of the values in the last stage.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        backend: of the routed attention.
        device, dtype: of the parameters.

    Raises:
        ValueError: if the settings of the stages do not match in number, or do not fit each other.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        num_windows: int | Sequence[int] = 7,
        topks: Sequence[int] = (1, 4, 16, -1),
        swin_layout: bool = False,
        refactored: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        windows = [num_windows] * len(depths) if isinstance(num_windows, int) else list(num_windows)
        if not len(embed_dims) == len(depths) == len(windows) == len(topks):
            raise ValueError(
                "embed_dims, depths, num_windows and topks need one number a stage, got "
                f"{len(embed_dims)}, {len(depths)}, {len(windows)} and {len(topks)}"
            )
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def attention(stage: int) -> nn.Module:
            dim = embed_dims[stage]
            if topks[stage] == -1:
                return AttentionLePE(dim, lepe_of_value=refactored, **dd)
            return BilevelRoutingAttention(
                dim,
                num_heads=dim // head_dim,
                num_windows=windows[stage],
                topk=topks[stage],
                pad_projected=refactored,
                backend=backend,
                **dd,
            )

        stages = []
        for i, dim in enumerate(embed_dims):
            blocks = [
                BiFormerBlock(dim, attention(i), mlp_ratio, not swin_layout, drop_paths[i][j], **dd)
                for j in range(depths[i])
            ]
            downsample = None
            if i > 0 and swin_layout:
                downsample = nn.Sequential(
                    nn.BatchNorm2d(embed_dims[i - 1], **dd),
                    nn.Conv2d(embed_dims[i - 1], dim, 2, stride=2, **dd),
                )
            elif i > 0:
                downsample = nn.Sequential(
                    nn.Conv2d(embed_dims[i - 1], dim, 3, stride=2, padding=1, **dd), nn.BatchNorm2d(dim, **dd)
                )
            stages.append(Stage(blocks, downsample, channels_last=True))

        dim = embed_dims[0]
        if swin_layout:
            stem = nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4, **dd), nn.BatchNorm2d(dim, **dd))
        else:
            stem = nn.Sequential(
                nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
                nn.BatchNorm2d(dim // 2, **dd),
                nn.GELU(),
                nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
                nn.BatchNorm2d(dim, **dd),
            )
        super().__init__(
            stem,
            stages,
            nn.BatchNorm2d(embed_dims[-1], **dd),
            widths=embed_dims,
            reductions=[4 * 2**i for i in range(len(embed_dims))],
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self.refactored = refactored
        self.apply(init_weights)


def init_weights(module: nn.Module) -> None:
    """The authors' initialization; convolutions keep PyTorch's."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    return {
        # reported dead in March 2026: https://github.com/rayleizhu/BiFormer/issues/53
        "url": f"https://api.onedrive.com/v1.0/shares/{file}/root/content",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/rayleizhu/BiFormer",
        "paper_ids": "arXiv:2303.08810",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "biformer_tiny.in1k": _cfg("s!AkBbczdRlZvChHEOoGkgwgQzEDlM"),
        "biformer_small.in1k": _cfg("s!AkBbczdRlZvChHDyM-x9KWRBZ832"),
        "biformer_base.in1k": _cfg("s!AkBbczdRlZvChHI_XPhoadjaNxtO"),
        "biformer_stl.in1k": _cfg("s!AkBbczdRlZvChSf-m7ujkvx9lIQ1"),
        # trained again with the refactored code; its numerics come with the tag
        "biformer_stl.nchw_in1k": _cfg("s!AkBbczdRlZvChWYrKbWbMgqd2Ai0"),
    }
)


# authors' names -> ours; each leaves our own names as they are
RENAMED = (
    (re.compile(r"^downsample_layers\.0\."), "stem."),
    (re.compile(r"^downsample_layers\.(\d+)\."), r"stages.\1.downsample."),
    (re.compile(r"^stages\.(\d+)\.(\d+)\."), r"stages.\1.blocks.\2."),
    (re.compile(r"\.attn\.(qkv\.qkv|qkv_linear)\."), ".attn.qkv."),
    (re.compile(r"\.attn\.output_linear\."), ".attn.wo."),
    (re.compile(r"\.mlp\.0\."), ".mlp.fc1."),
    (re.compile(r"\.mlp\.[23]\."), ".mlp.fc2."),
    (re.compile(r"^head\.(weight|bias)$"), r"head.fc.\1"),
)
LINEAR = re.compile(r"\.(qkv|wo|proj|fc1|fc2)\.weight$")


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' state dict, bare or nested, or our own -> ours.

    Raises:
        ValueError: if the entries are not those of this variant, or the weights were trained with the other
            numerics (see `refactored`).
    """
    state_dict = unwrap_state_dict(state_dict)
    authors = "downsample_layers.0.0.weight" in state_dict
    refactored = any(".attn.qkv_linear." in key for key in state_dict)
    if authors and refactored != getattr(model, "refactored", refactored):
        tag, other = ("nchw_in1k", "in1k") if refactored else ("in1k", "nchw_in1k")
        raise ValueError(
            f"these weights were trained with the numerics of biformer_stl.{tag}, the model has those of "
            f"biformer_stl.{other}; create biformer_stl.{tag} for them"
        )
    out = {}
    for key, value in state_dict.items():
        for pattern, name in RENAMED:
            key = pattern.sub(name, key)
        # the refactored code's 1 x 1 convolutions are our linear layers
        out[key] = value.flatten(1) if LINEAR.search(key) and value.ndim == 4 else value
    check_state_dict(out, model)
    return out


def _create_biformer(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if cfg.tag == "nchw_in1k":
        kwargs.setdefault("refactored", True)
    from_link = pretrained and not (cfg.file or cfg.state_dict or cfg.hf_hub_id or cfg.source)
    if from_link:
        # the links all end in "content", the name under which the files would overwrite each other
        root = Path(kwargs.get("cache_dir") or Path(torch.hub.get_dir()) / "checkpoints")
        kwargs["cache_dir"] = root / f"{variant}.{cfg.tag}"
    try:
        return build_model_with_cfg(
            BiFormer,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
            **kwargs,
        )
    except URLError as error:
        raise RuntimeError(
            f"the authors' link to {variant}.{cfg.tag} does not answer ({error}); their links were reported "
            "dead in 2026. Load a file that you have with pretrained_cfg_overlay=dict(file=PATH)."
        ) from error


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-T: 13.1M parameters, 2.2 GFLOPs, 81.4 top-1."""
    args = {"depths": (2, 2, 8, 2), "embed_dims": (64, 128, 256, 512)}
    return _create_biformer("biformer_tiny", pretrained, **{**args, **kwargs})


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-S: 25.5M parameters, 4.5 GFLOPs, 83.8 top-1."""
    args = {"depths": (4, 4, 18, 4), "embed_dims": (64, 128, 256, 512)}
    return _create_biformer("biformer_small", pretrained, **{**args, **kwargs})


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-B: 56.8M parameters, 9.8 GFLOPs, 84.3 top-1."""
    args = {"depths": (4, 4, 18, 4), "embed_dims": (96, 192, 384, 768)}
    return _create_biformer("biformer_base", pretrained, **{**args, **kwargs})


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """BiFormer-STL, in the layout of Swin-T: 28.4M parameters, 4.6 GFLOPs, 82.7 top-1 (both releases)."""
    args = {"depths": (2, 2, 6, 2), "embed_dims": (96, 192, 384, 768), "mlp_ratio": 4.0, "swin_layout": True}
    return _create_biformer("biformer_stl", pretrained, **{**args, **kwargs})
