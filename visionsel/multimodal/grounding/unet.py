"""A U-Net of 3 x 3 convolutions with group norm (Ronneberger et al. 2015), for maps of any size."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d, pad

__all__ = ["UNet"]


class UNet(nn.Module):
    """Channels double from stage to stage, sides halve by max pooling, and both come back.

    The way up enlarges bilinearly, a 1 x 1 convolution halves the channels, and convolutions read it beside
    what the stage had on the way down. Each convolution has no bias and is followed by a group norm and ReLU.

    Args:
        channels: of the input.
        base: channels of the first stage and of the output. 64 in F-LMM (Wu et al. 2025).
        stages: at least 2; 4 in F-LMM. Maps are padded to a multiple of `2 ** (stages - 1)`.
        convolutions: of a stage, on each of the two ways; 2 in F-LMM.
        groups: of the norms; 1 in F-LMM.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self, channels: int, base: int = 64, stages: int = 4, convolutions: int = 2, groups: int = 1
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("channels", channels, 1),
            ("base", base, 1),
            ("stages", stages, 2),
            ("convolutions", convolutions, 1),
            ("groups", groups, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number from {least} up, got {value!r}")
        if base % groups:
            raise ValueError(f"groups {groups} does not divide base {base}")
        widths = [base * 2**stage for stage in range(stages)]
        self.channels, self.multiple = channels, 2 ** (stages - 1)
        self.down = nn.ModuleList(
            _stage([inner] + [outer] * convolutions, groups)
            for inner, outer in zip([channels, *widths[:-1]], widths, strict=True)
        )
        self.up = nn.ModuleList(_Up(width, convolutions, groups) for width in widths[:-1])

    def forward(self, maps: Tensor) -> Tensor:
        """`[N, channels, h, w]` -> `[N, base, h, w]`.

        Raises:
            ValueError: for another number of channels.
        """
        if maps.ndim != 4 or maps.shape[1] != self.channels:
            raise ValueError(f"maps must be [N, {self.channels}, h, w], got {list(maps.shape)}")
        height, width = maps.shape[2:]
        out = pad(maps, (0, -width % self.multiple, 0, -height % self.multiple))
        seen: list[Tensor] = []
        for number, stage in enumerate(self.down):
            out = stage(max_pool2d(out, 2) if number else out)
            seen.append(out)
        for stage, skipped in zip(reversed(self.up), reversed(seen[:-1]), strict=True):
            out = stage(out, skipped)
        return out[..., :height, :width]


class _Up(nn.Module):
    """One stage of the way up: from `2 * width` channels to `width`, at twice the side."""

    def __init__(self, width: int, convolutions: int, groups: int) -> None:
        super().__init__()
        self.enlarge = _block(2 * width, width, 1, groups)
        self.merge = _stage([2 * width] + [width] * convolutions, groups)

    def forward(self, below: Tensor, skipped: Tensor) -> Tensor:
        """The finer map of both."""
        above = self.enlarge(interpolate(below, scale_factor=2, mode="bilinear", align_corners=False))
        return self.merge(torch.cat([skipped, above], 1))


def _stage(widths: Sequence[int], groups: int) -> nn.Sequential:
    return nn.Sequential(*(_block(a, b, 3, groups) for a, b in pairwise(widths)))


def _block(inner: int, outer: int, kernel: int, groups: int) -> nn.Sequential:
    convolution = nn.Conv2d(inner, outer, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(groups, outer), nn.ReLU())
