"""The frame that the hierarchical backbones share: stem, stages, norm, pooled classifier, and timm's
contract.

A family file says what a stem, a block and a downsampling are; everything that timm and its downstream
packages ask of a model (features, intermediates, pruning, checkpointing, classifier handling) is here once.

Maps are NCHW between stages; inside a stage they may be NHWC.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, get_device_dtype
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

__all__: list[str] = []


class Stage(nn.Module):
    """Downsampling, then blocks: `[B, C, H, W]` -> `[B, C', H', W']`.

    Args:
        blocks: the stage's blocks.
        downsample: NCHW to NCHW; the first stage usually has none.
        channels_last: run the blocks on `[B, H, W, C]`.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], downsample: nn.Module | None = None, channels_last: bool = False
    ) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.channels_last:
            # a stem may leave its map NCHW in memory, and every sum of the stage would then mix two layouts
            x = x.permute(0, 2, 3, 1).contiguous()
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        return x


class Pyramid(nn.Module):
    """`stem -> stages -> norm -> head` with everything that timm asks of a model.

    Args:
        stem: image to the first map, reduction `reductions[0]`.
        stages: one `Stage` a level.
        norm: the final norm on NCHW maps.
        widths: channels after each stage.
        num_features: channels after the norm, where it changes their number; None means the last width.
        reductions: input pixels per output pixel after each stage.
        num_classes: 0 removes the classifier.
        in_chans: channels of the image.
        global_pool: "avg", "max", "avgmax", "catavgmax" or "" (none).
        drop_rate: dropout before the classifier.
        device, dtype: of the classifier; the modules given keep theirs.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        norm: nn.Module,
        *,
        widths: Sequence[int],
        reductions: Sequence[int],
        num_features: int | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.embed_dim = list(widths)
        self.num_features = widths[-1] if num_features is None else num_features
        self.grad_checkpointing = False
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": f"stages.{i}"}
            for i, (width, reduction) in enumerate(zip(widths, reductions, strict=True))
        ]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.head = ClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            device=device,
            dtype=dtype,
        )
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that take no weight decay beyond biases and norms."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups by depth, for layer-wise learning-rate decay."""
        if coarse:
            blocks: list[tuple[str, tuple[int, ...] | None]] = [(r"^stages\.(\d+)", None)]
        else:
            blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": [*blocks, (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in backward instead of keeping them."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier layer."""
        return self.head.fc

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, reset_other: bool = False
    ) -> None:
        """Put in a fresh classifier; `num_classes=0` removes it, `global_pool=""` also the pooling."""
        self.num_classes = num_classes
        self.head.reset(
            num_classes,
            pool_type=global_pool,
            in_features=self.num_features,
            **get_device_dtype(self),
        )
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs before the next downsampling.

        Args:
            x: `[B, in_chans, H, W]`.
            indices: the last n stages if an int, all if None, those named if a list.
            norm: apply the final norm to the last stage's output.
            stop_early: do not run the stages after the last one wanted.
            output_fmt: "NCHW" only.
            intermediates_only: leave out the final features.

        Returns:
            The list of maps, or `(final features, maps)`.

        Raises:
            ValueError: for another output format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        intermediates: list[Tensor] = []
        x = self.stem(x)
        stages = self.stages[: max_index + 1] if stop_early and not torch.jit.is_scripting() else self.stages
        index = 0
        for index, stage in enumerate(stages):
            x = stage(x)
            if index in take_indices:
                intermediates.append(self.norm(x) if norm and index == last else x)
        if intermediates_only:
            return intermediates
        if index == last:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that the given intermediates do not need; returns the indices kept."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        prune_norm = prune_norm or prune_end
        if prune_norm:
            self.norm = nn.Identity()
        self.stages = self.stages[: max_index + 1]
        # the classifier goes with the channels that it reads
        prune_head = prune_head or (prune_norm and self.num_features != self.embed_dim[max_index])
        if prune_norm:
            self.num_features = self.head_hidden_size = self.embed_dim[max_index]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """`[B, in_chans, H, W]` -> normed maps `[B, num_features, H', W']`."""
        x = self.stem(x)
        x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps -> logits, or pooled features with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_chans, H, W]` -> logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))


def unwrap_state_dict(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict inside an authors' checkpoint: bare, or under `model`, `state_dict`, their EMA forms.

    Prefixes `module.` and `_orig_mod.` (left by DataParallel and torch.compile) are removed.
    """
    state = checkpoint
    while True:
        inner = next(
            (
                state[k]
                for k in ("state_dict_ema", "model_ema", "state_dict", "model")
                if isinstance(state.get(k), dict)
            ),
            None,
        )
        if inner is None:
            break
        state = inner
    for prefix in ("module.", "_orig_mod."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def check_state_dict(state_dict: dict[str, Tensor], model: nn.Module, hint: str = "") -> None:
    """Check that a filtered checkpoint has the entries of the model, the classifier aside.

    Strict loading says this too, but timm does not load strictly with another number of classes.

    Raises:
        ValueError: naming the first entries that are missing or unexpected.
    """
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state_dict and not key.startswith("head.")]
    unexpected = [key for key in state_dict if key not in wanted and not key.startswith("head.")]
    if missing or unexpected:
        raise ValueError(
            f"not a checkpoint of this variant: {len(missing)} entries are missing, as {missing[:3]}, "
            f"and {len(unexpected)} unexpected, as {unexpected[:3]}{hint}"
        )
