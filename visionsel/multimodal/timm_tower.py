"""Any timm backbone as the vision tower of a LLaVA: a map of one of its stages becomes the image tokens.

transformers has a wrapper for timm models, but it hands out maps `[B, C, h, w]`, and LLaVA projects tokens
`[B, N, C]`. The adapter between them is a channel norm, a linear layer and learnt positions.
"""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

import visionsel.models  # noqa: F401  (registers the names)

__all__ = ["TimmTower", "TimmTowerConfig"]


class TimmTowerConfig(PreTrainedConfig):
    """What `TimmTower` is built from.

    Args:
        architecture: a timm name, ours too.
        model_args: further arguments of the backbone.
        stage: index of the feature map, counted as timm's `forward_intermediates` does.
        hidden_size: channels of a token.
        image_size: pixels a side.
        patch_size: pixels a side of a token: the reduction of the stage.
    """

    model_type = "visionsel_timm_tower"

    def __init__(
        self,
        architecture: str = "selectformer_nano",
        model_args: dict[str, Any] | None = None,
        stage: int = 1,
        hidden_size: int = 128,
        image_size: int = 64,
        patch_size: int = 8,
        **kwargs: Any,
    ) -> None:
        self.architecture = architecture
        self.model_args = dict(model_args or {})
        self.stage = stage
        self.hidden_size = hidden_size
        self.image_size = image_size
        self.patch_size = patch_size
        super().__init__(**kwargs)


class TimmTower(PreTrainedModel):
    """A timm backbone up to one of its stages, with an adapter from its map to tokens.

    Raises:
        ValueError: when the stage's map does not have one position for each patch of the image.
    """

    config_class = TimmTowerConfig
    base_model_prefix = "tower"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012  (transformers declares it so)
    _supports_sdpa = True  # attention inside the backbone is the backbone's
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: TimmTowerConfig) -> None:
        super().__init__(config)
        backbone: Any = timm.create_model(config.architecture, num_classes=0, **config.model_args)
        info = backbone.feature_info[config.stage]
        if info["reduction"] != config.patch_size or config.image_size % config.patch_size:
            raise ValueError(
                f"stage {config.stage} of {config.architecture} has one position for {info['reduction']} x "
                f"{info['reduction']} pixels, not for a patch of {config.patch_size} of an image of "
                f"{config.image_size}; set patch_size to {info['reduction']}, or choose another stage"
            )
        backbone.prune_intermediate_layers([config.stage], prune_norm=True, prune_head=True)
        self.backbone = backbone
        self.norm = nn.LayerNorm(info["num_chs"])
        self.proj = nn.Linear(info["num_chs"], config.hidden_size)
        cells = config.image_size // config.patch_size
        self.position = nn.Parameter(torch.zeros(1, cells * cells, config.hidden_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The adapter's; the backbone initialises itself."""
        if module is self:
            nn.init.normal_(self.position, std=0.02)
        elif module is self.proj:
            nn.init.trunc_normal_(self.proj.weight, std=0.02)
            nn.init.zeros_(self.proj.bias)
        init_buffers: Any = getattr(module, "init_non_persistent_buffers", None)
        if init_buffers is not None:
            init_buffers()

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """`[B, 3, H, W]` -> tokens `[B, N, C]`, rows first; the pooled output is their mean."""
        backbone: Any = self.backbone
        (features,) = backbone.forward_intermediates(
            pixel_values, indices=[self.config.stage], stop_early=True, intermediates_only=True
        )
        tokens = self.proj(self.norm(features.flatten(2).transpose(1, 2))) + self.position
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=tokens.mean(1), hidden_states=(tokens,)
        )


AutoConfig.register(TimmTowerConfig.model_type, TimmTowerConfig, exist_ok=True)
AutoModel.register(TimmTowerConfig, TimmTower, exist_ok=True)
