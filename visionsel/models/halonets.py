"""HaloNets H0 to H7: residual networks whose spatial layers are all halo attention.

Scaling Local Self-Attention for Parameter Efficient Visual Backbones, Vaswani et al. 2021, arXiv:2103.12731.
Neither code nor weights were released. The numbers of each model are those of the paper's table 1; what it
leaves open is as in timm's `halonet_h1`: batch norm and ReLU after projections and after the attention,
strided attention and a strided projection of the shortcut in the first block of stages 2 to 4, the last norm
of a block started at zero. What differs from timm's model:

- Stage 1 has 4 heads (timm: 8), as in the paper, and the first block of every stage projects its shortcut,
  also where widths agree. H1 then has 8.106 M parameters (timm: 8.100 M; paper 8.1 M). timm's network
  is `halonet_h1_256` with `num_heads=(8, 8, 8, 8)` and `project_always=False`; it loads timm's state dict.
- Where the values are wider than the stage (H5 to H7), queries and keys keep its width: only this gives the
  published numbers of parameters.
- Images of any size: each attention layer pads its map to whole blocks. The paper does not say what it does
  where blocks do not divide the map (H7 at 600 pixels).
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import BatchNormAct2d, ConvNormAct, DropPath, calculate_drop_path_rates
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionsel.layers.halo_attention import HaloAttention
from visionsel.models.pyramid import Pyramid, Stage, check_state_dict, unwrap_state_dict

__all__ = ["HaloNet"]


class HaloBlock(nn.Module):
    """Bottleneck block with halo attention for its spatial layer.

    Args:
        in_chans: channels in.
        dim: width of the stage: of the attention's input, queries and keys.
        dim_value: channels of the values.
        dim_out: channels out.
        stride: downsampling, in the attention.
        project: project the shortcut; needed where the block changes width or size.
        drop_path: stochastic depth.
        num_heads, block_size, halo_size, backend: of the attention.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        dim_value: int,
        dim_out: int,
        *,
        stride: int,
        project: bool,
        drop_path: float,
        num_heads: int,
        block_size: int,
        halo_size: int,
        backend: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        self.shortcut: nn.Module = nn.Identity()
        if project:
            self.shortcut = ConvNormAct(in_chans, dim_out, 1, stride=stride, apply_act=False, **dd)
        self.conv1 = ConvNormAct(in_chans, dim, 1, **dd)
        self.attn = HaloAttention(
            dim,
            dim_value,
            num_heads=num_heads,
            dim_head=dim // num_heads,
            block_size=block_size,
            halo_size=halo_size,
            stride=stride,
            backend=backend,
            **dd,
        )
        self.norm = BatchNormAct2d(dim_value, **dd)
        self.conv2 = ConvNormAct(dim_value, dim_out, 1, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_chans, H, W]` -> `[B, dim_out, ceil(H / stride), ceil(W / stride)]`."""
        out = self.conv2(self.norm(self.attn(self.conv1(x))))
        return self.act(self.drop_path(out) + self.shortcut(x))


class HaloNet(Pyramid):
    """HaloNet.

    Stage s (from 0) has width `64 * 2**s`.

    Args:
        in_chans: channels of the image.
        num_classes: 0 removes the classifier.
        global_pool: see `Pyramid`.
        block_size: side of the attention's blocks (b in the paper's table 1).
        halo_size: halo around them (h).
        value_ratio: channels of the values over the stage's width (rv).
        output_ratio: channels out of a block over the stage's width (rb).
        depths: blocks of each stage (3, 3, l3, 3).
        num_heads: attention heads of each stage.
        final_width: channels of the last 1 x 1 convolution (df); None for none.
        project_always: project the shortcut of every stage's first block; else only where it must be.
        zero_init_last: start the last norm of each block at zero, so that blocks begin as their shortcuts.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.
        backend: of the attention.
        device, dtype: of the parameters.

    Raises:
        ValueError: if `depths` and `num_heads` do not match in number, or the heads do not divide the widths.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        block_size: int = 8,
        halo_size: int = 3,
        value_ratio: float = 1.0,
        output_ratio: float = 1.0,
        depths: Sequence[int] = (3, 3, 10, 3),
        num_heads: Sequence[int] = (4, 8, 8, 8),
        final_width: int | None = None,
        project_always: bool = True,
        zero_init_last: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if len(depths) != len(num_heads):
            raise ValueError(
                f"depths and num_heads need one number a stage, got {len(depths)} and {len(num_heads)}"
            )
        stem = nn.Sequential(
            OrderedDict(
                conv=ConvNormAct(in_chans, 64, 7, stride=2, **dd),
                pool=nn.MaxPool2d(3, stride=2, padding=1),
            )
        )
        drop_paths: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages: list[nn.Module] = []
        widths: list[int] = []
        channels = 64
        for i, depth in enumerate(depths):
            dim = 64 * 2**i
            dim_out = int(dim * output_ratio)
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                block = HaloBlock(
                    channels,
                    dim,
                    int(dim * value_ratio),
                    dim_out,
                    stride=stride,
                    project=stride > 1 or channels != dim_out or (project_always and j == 0),
                    drop_path=drop_paths[i][j],
                    num_heads=num_heads[i],
                    block_size=block_size,
                    halo_size=halo_size,
                    backend=backend,
                    **dd,
                )
                blocks.append(block)
                channels = dim_out
            stages.append(Stage(blocks))
            widths.append(channels)
        norm = nn.Identity() if final_width is None else ConvNormAct(channels, final_width, 1, **dd)
        super().__init__(
            stem,
            stages,
            norm,
            widths=widths,
            reductions=[4 * 2**i for i in range(len(depths))],
            num_features=final_width,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self.init_weights(zero_init_last)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialise as timm's `halonet_h1`; the attention layers by their own rule."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, HaloBlock):
                module.attn.reset_parameters()
                if zero_init_last:
                    nn.init.zeros_(module.conv2.bn.weight)


TIMM_NAMES = {"conv1_1x1": "conv1", "self_attn": "attn", "post_attn": "norm", "conv3_1x1": "conv2"}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Our own state dict, bare or nested, or that of timm's `halonet_h1` -> ours.

    Raises:
        ValueError: if the entries are not those of this variant.
    """
    state = unwrap_state_dict(state_dict)
    if "stem.conv1.conv.weight" in state:
        renamed = {}
        for key, value in state.items():
            parts = key.split(".")
            if parts[0] == "stem":
                parts[1] = "conv"
            elif parts[0] == "stages":
                parts[2:4] = ["blocks", parts[2], TIMM_NAMES.get(parts[3], parts[3])]
            renamed[".".join(parts)] = value
        state = renamed
    hint = "; timm's halonet_h1 is halonet_h1_256 with num_heads=(8, 8, 8, 8) and project_always=False"
    check_state_dict(state, model, hint)
    return state


def _cfg(size: int, **kwargs: Any) -> dict[str, Any]:
    # Size as in the paper's table 1; the rest, of which the paper says nothing, as in timm's halonet_h1.
    return {
        "url": "",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2103.12731",
        "paper_name": "Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (-(-size // 32), -(-size // 32)),
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv.conv",
        "classifier": "head.fc",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "halonet_h0_256.untrained": _cfg(256),
        "halonet_h1_256.untrained": _cfg(256),
        "halonet_h2_256.untrained": _cfg(256),
        "halonet_h3_320.untrained": _cfg(320),
        "halonet_h4_384.untrained": _cfg(384),
        "halonet_h5_448.untrained": _cfg(448),
        "halonet_h6_512.untrained": _cfg(512),
        "halonet_h7_600.untrained": _cfg(600),
    }
)


def _create_halonet(variant: str, pretrained: bool, **kwargs: Any) -> HaloNet:
    return build_model_with_cfg(
        HaloNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **kwargs,
    )


@register_model
def halonet_h0_256(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H0: 5.5 M parameters."""
    args = {"block_size": 8, "halo_size": 3, "output_ratio": 0.5, "depths": (3, 3, 7, 3)}
    return _create_halonet("halonet_h0_256", pretrained, **{**args, **kwargs})


@register_model
def halonet_h1_256(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H1: 8.1 M parameters."""
    args = {"block_size": 8, "halo_size": 3, "depths": (3, 3, 10, 3)}
    return _create_halonet("halonet_h1_256", pretrained, **{**args, **kwargs})


@register_model
def halonet_h2_256(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H2: 9.4 M parameters."""
    args = {"block_size": 8, "halo_size": 3, "output_ratio": 1.25, "depths": (3, 3, 11, 3)}
    return _create_halonet("halonet_h2_256", pretrained, **{**args, **kwargs})


@register_model
def halonet_h3_320(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H3: 11.8 M parameters."""
    args = {
        "block_size": 10,
        "halo_size": 3,
        "output_ratio": 1.5,
        "depths": (3, 3, 12, 3),
        "final_width": 1024,
    }
    return _create_halonet("halonet_h3_320", pretrained, **{**args, **kwargs})


@register_model
def halonet_h4_384(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H4: 19.1 M parameters."""
    args = {
        "block_size": 12,
        "halo_size": 2,
        "output_ratio": 3.0,
        "depths": (3, 3, 12, 3),
        "final_width": 1280,
    }
    return _create_halonet("halonet_h4_384", pretrained, **{**args, **kwargs})


@register_model
def halonet_h5_448(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H5: 30.7 M parameters."""
    args = {
        "block_size": 14,
        "halo_size": 2,
        "value_ratio": 2.5,
        "output_ratio": 2.0,
        "depths": (3, 3, 23, 3),
        "final_width": 1536,
    }
    return _create_halonet("halonet_h5_448", pretrained, **{**args, **kwargs})


@register_model
def halonet_h6_512(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H6: 43.4 M parameters."""
    args = {
        "block_size": 8,
        "halo_size": 4,
        "value_ratio": 3.0,
        "output_ratio": 2.75,
        "depths": (3, 3, 24, 3),
        "final_width": 1536,
    }
    return _create_halonet("halonet_h6_512", pretrained, **{**args, **kwargs})


@register_model
def halonet_h7_600(pretrained: bool = False, **kwargs: Any) -> HaloNet:
    """HaloNet-H7: 67.4 M parameters."""
    args = {
        "block_size": 10,
        "halo_size": 3,
        "value_ratio": 4.0,
        "output_ratio": 3.5,
        "depths": (3, 3, 26, 3),
        "final_width": 2048,
    }
    return _create_halonet("halonet_h7_600", pretrained, **{**args, **kwargs})
