"""Fast halo attention, focal modulation and linear layers in models that others built."""

import warnings
from itertools import accumulate, pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from timm.layers.halo_attn import HaloAttn, PosEmbedRel
from timm.models.focalnet import FocalModulation
from torch import Tensor, nn

import visionsel.layers as layers
import visionsel.ops.packed as packing
from visionsel.layers.convolution import Conv2d
from visionsel.layers.focal_modulation import plain_kernels, weights_suffice
from visionsel.models.pyramid import Stage
from visionsel.ops.focal_modulation import focal_modulation
from visionsel.ops.focal_modulation.tiled import tiled as tiled_focal
from visionsel.ops.halo import halo_attention
from visionsel.ops.halo.tiled import tiled as tiled_halo
from visionsel.ops.linear import linear, onednn_is_faster, taken_by_auto, unavailable, why_not

__all__ = ["accelerate"]


@register_notrace_module
class AcceleratedHaloAttn(HaloAttn):
    """timm's `HaloAttn`, computed by `visionsel.ops.halo_attention`; made by `accelerate`."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, dim, H, W]` -> `[B, dim_out, H / stride, W / stride]`."""
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves out the branch in this form only)
            if not weights_suffice(self.pos_embed, PosEmbedRel):
                return super().forward(x)
        height, width = x.shape[2:]
        if height % self.block_size != 0 or width % self.block_size != 0:
            raise ValueError(
                f"HaloAttn takes maps whose sides are multiples of block_size {self.block_size}, got "
                f"{height} x {width}; resize the image, or use visionsel.layers.HaloAttention, which pads"
            )
        contiguous = x.is_contiguous()
        # one change of layout here saves those of queries, keys and values
        x = x.contiguous(memory_format=torch.channels_last)
        query = self.q(x).permute(0, 2, 3, 1).unflatten(-1, [self.num_heads, self.dim_head_qk])
        kv = self.kv(x).permute(0, 2, 3, 1)
        kv = kv.unflatten(-1, [self.num_heads, self.dim_head_qk + self.dim_head_v])
        key, value = kv[..., : self.dim_head_qk], kv[..., self.dim_head_qk :]
        height_rel, width_rel = self.pos_embed.height_rel, self.pos_embed.width_rel
        if self.scale_pos_embed:
            height_rel, width_rel = height_rel * self.scale, width_rel * self.scale
        block, halo = self.block_size, self.halo_size
        if torch.jit.is_scripting():
            out = tiled_halo(
                query, key, value, block, halo, self.block_stride, height_rel, width_rel, self.scale
            )
        else:
            out = halo_attention(query, key, value, block, halo, height_rel, width_rel, scale=self.scale)
        out = self.pool(out.flatten(3).permute(0, 3, 1, 2))
        # the layout that the rest of the model is in
        return out.contiguous() if contiguous else out


@register_notrace_module
class AcceleratedFocalModulation(FocalModulation):
    """timm's `FocalModulation`, computed by `visionsel.ops.focal_modulation`; made by `accelerate`."""

    def forward(self, x: Tensor) -> Tensor:
        """`[B, dim, H, W]` -> `[B, dim, H, W]`."""
        if torch.jit.is_scripting():
            weights: list[Tensor] = []
            for level in self.focal_layers:
                weights.append(level[0].weight)  # type: ignore[index]
            query, context, gates = self.f(x).split(self.input_split, dim=1)
            out = tiled_focal(
                query.permute(0, 2, 3, 1),
                context.permute(0, 2, 3, 1),
                gates.permute(0, 2, 3, 1),
                weights,
                self.h.weight,
                self.h.bias,
                self.normalize_modulator,
            )
        else:
            kernels = plain_kernels(self.focal_layers, self.h)
            if kernels is None:
                return super().forward(x)
            query, context, gates = self._project(x.contiguous(memory_format=torch.channels_last))
            out = focal_modulation(
                query.permute(0, 2, 3, 1),
                context.permute(0, 2, 3, 1),
                gates.permute(0, 2, 3, 1),
                kernels,
                self.h.weight,
                self.h.bias,
                normalize=self.normalize_modulator,
            )
        out = self.proj_drop(self.proj(self.norm(out.permute(0, 3, 1, 2))))
        # the layout that the rest of the model is in
        return out.contiguous() if x.is_contiguous() else out

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, context and gates, NCHW."""
        if not any(weights_suffice(self.f, kind) for kind in (nn.Conv2d, AcceleratedPointwise)):
            return self.f(x).split(self.input_split, dim=1)
        # three projections into memory of their own: slices of one have gaps and would be copied
        if isinstance(self.f, AcceleratedPointwise):
            stops = [*accumulate(self.input_split, initial=0)]
            return tuple(pointwise(x, self.f, part) for part in pairwise(stops))
        weights = self.f.weight.split(self.input_split)
        biases = (None, None, None) if self.f.bias is None else self.f.bias.split(self.input_split)
        return tuple(F.conv2d(x, w, b) for w, b in zip(weights, biases, strict=True))


@register_notrace_module
class AcceleratedLinear(nn.Linear):
    """`nn.Linear`, computed by `visionsel.ops.linear`; made by `accelerate`.

    Where oneDNN cannot serve (another device or dtype, autocast, a compiler), it computes as `nn.Linear`.
    """

    always_onednn = False  # wherever it can serve, or only where it is found to be faster
    packed = False  # whether oneDNN's layout of the weight is kept

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        if torch.jit.is_scripting():
            out = F.linear(x, self.weight, self.bias)
        elif self.packed and packing.why_not(x, self.weight, self.bias) is None:
            out = packing.packed_linear(x, self.weight, self.bias)
        else:
            forced = self.always_onednn and why_not(x, self.weight, self.bias) is None
            out = linear(x, self.weight, self.bias, "onednn" if forced else "auto")
        return out


@register_notrace_module
class AcceleratedPointwise(nn.Conv2d):
    """A convolution of single pixels, computed by `visionsel.ops.linear`; made by `accelerate`.

    A map that does not lie channels-last in memory is convolved as `nn.Conv2d` does.
    """

    always_onednn = False  # as of AcceleratedLinear
    packed = False

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_channels, H, W]` -> `[B, out_channels, H, W]`."""
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        else:
            return pointwise(x, self)


def pointwise(x: Tensor, layer: AcceleratedPointwise, part: tuple[int, int] | None = None) -> Tensor:
    """`[B, in, H, W]` by a layer of single pixels, or by those of its outputs from one to before another."""
    weight, bias = layer.weight, layer.bias
    if part is not None:
        weight = weight[slice(*part)]
        bias = None if bias is None else bias[slice(*part)]
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        pixels, flat = x.permute(0, 2, 3, 1), weight.flatten(1)
        if layer.packed and packing.why_not(pixels, layer.weight, bias) is None:
            return packing.packed_linear(pixels, layer.weight, bias, part).permute(0, 3, 1, 2)
        forced = layer.always_onednn and why_not(pixels, flat, bias) is None
        if forced or taken_by_auto(pixels, flat, bias):
            return linear(pixels, flat, bias, "onednn").permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias)


_FAST: dict[type[nn.Module], type[nn.Module]] = {
    HaloAttn: AcceleratedHaloAttn,
    FocalModulation: AcceleratedFocalModulation,
}


def accelerate(
    model: nn.Module,
    linears: bool | Literal["auto"] = "auto",
    channels_last: bool | Literal["auto"] = "auto",
    pack: bool = False,
) -> nn.Module:
    """Make timm's halo attention and focal modulation, and linear layers, of a model run faster.

    Halo attention and focal modulation run on visionsel's operators. Linear layers, and convolutions of
    single pixels, in float32 on the CPU run through oneDNN, which on some processors, AMD's among them, is
    much faster than what PyTorch takes.

    Only the computation changes, in place: the model stays the same object with the same parameters,
    state-dict keys, hooks, mode, device and dtype, and `isinstance` of the layers' classes holds. Subclasses
    of the four are left alone, since their forward may differ. Calling it again does nothing. Where a
    submodule has become more than its weights (an adapter, pruning, a hook of its own), timm's code runs.
    Moved to another device or dtype, under autocast, compiled or exported, a linear layer computes as
    `nn.Linear` does.

    Args:
        model: any module tree, for example `timm.create_model("halonet50ts")`.
        linears: "auto" changes the layers of a size at which oneDNN is measured to be faster on this
            machine, which takes some milliseconds for each size, once; later each call of them is decided by
            its own number of rows. As that rests on a clock, results may differ between processes by
            rounding. True changes all and measures nothing; False leaves linear layers alone.
        channels_last: whether weights of convolutions are laid out channels-last in memory, from where the
            layout spreads to all maps, the returned ones too: their shapes stay, their strides change. "auto"
            does so with `pack`, and where the model has halo attention or focal modulation, which would
            change the layout of every map they take, or stages of ours that keep their maps channels-last,
            whose convolutions would change the layout of their weights at every call.
        pack: for inference in float32 on the CPU, where weights no longer change: those of linear layers
            (unless `linears=False`) and of convolutions are kept in the layout that oneDNN computes in too,
            made by the first call that no gradient is wanted of, which takes their memory once more. They
            stay the parameters, and what is loaded into them or written in place counts from the next call
            on. Only a change of few numbers through `.data`, which PyTorch does not count, would be missed.

    Returns:
        `model` itself.

    Raises:
        ValueError: for another value of `linears` or `channels_last`.
        NotImplementedError: with `linears=True` or `pack=True`, if this PyTorch has no oneDNN for them.

    Warns:
        UserWarning: if the model holds nothing to accelerate; it is returned as it was.

    Examples:
        >>> import timm, torch, visionsel
        >>> model = timm.create_model("halonet26t", num_classes=10).eval()
        >>> image = torch.randn(1, 3, 256, 256)
        >>> with torch.inference_mode():
        ...     before = model(image)
        ...     after = visionsel.accelerate(model)(image)
        >>> torch.allclose(before, after, atol=1e-5)
        True
    """
    for name, value in {"linears": linears, "channels_last": channels_last}.items():
        if value not in ("auto", True, False):
            raise ValueError(f'{name} must be "auto", True or False, got {value!r}')
    if pack not in (True, False):
        raise ValueError(f"pack must be True or False, got {pack!r}")
    always = linears is True
    if always and (reason := unavailable()):
        raise NotImplementedError(f'linears=True: {reason}; choose "auto" or False')
    if pack and (reason := packing.unavailable()):
        raise NotImplementedError(f"pack=True: {reason}; leave it out")
    fast = {type(module) for module in model.modules()} & {*_FAST, *_FAST.values()}
    staged = any(isinstance(module, Stage) and module.channels_last for module in model.modules())
    laid_out = channels_last is True or (channels_last == "auto" and (bool(fast) or staged or pack))
    if laid_out:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
    kept = _taken_by_weight(model)
    found = laid_out or bool(fast)
    for module in model.modules():
        if type(module) in _FAST:
            module.__class__ = _FAST[type(module)]
        elif id(module) in kept:
            continue
        elif linears and _is_linear(module) and _gains(module, always or pack):
            module.__class__ = AcceleratedLinear if isinstance(module, nn.Linear) else AcceleratedPointwise
            module.always_onednn = always  # type: ignore[assignment]  # a flag, not a tensor or module
        elif pack and _packs(module):
            module.__class__ = Conv2d
            module.packed = True  # type: ignore[assignment]  # a flag, not a tensor or module
        if isinstance(module, AcceleratedLinear | AcceleratedPointwise):
            module.packed = module.packed or (pack and bool(linears))
        found = found or isinstance(module, AcceleratedLinear | AcceleratedPointwise)
        found = found or (isinstance(module, Conv2d) and module.packed)
    if not found:
        others = " and no linear layer that oneDNN would speed up" if linears else ""
        warnings.warn(
            f"{type(model).__name__} holds no timm HaloAttn or FocalModulation{others}; "
            "nothing was accelerated",
            stacklevel=2,
        )
    return model


def _taken_by_weight(model: nn.Module) -> set[int]:
    """Convolutions whose weights the operator of focal modulation takes, which must stay what they are."""
    return {
        id(module)
        for modulation in model.modules()
        if isinstance(modulation, FocalModulation | layers.FocalModulation)
        for module in (modulation.h, *modulation.focal_layers.modules())
    }


def _packs(module: nn.Module) -> bool:
    """Whether a module is a convolution whose weight can be packed, with a padding in numbers of zeros."""
    return (
        isinstance(module, nn.Conv2d)
        and type(module) in (nn.Conv2d, Conv2d)
        and not _is_linear(module)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and why_not(module.weight, module.weight, module.bias) is None
    )


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or a convolution of single pixels."""
    if type(module) is nn.Conv2d:
        return (
            module.kernel_size == module.stride == (1, 1)
            and module.padding in ((0, 0), "valid", "same")
            and module.groups == 1
        )
    return type(module) is nn.Linear


def _gains(layer: nn.Module, always: bool) -> bool:
    """Whether a linear layer is to run through oneDNN: where it can, or where it is measured to be faster."""
    weight, bias = layer.weight, layer.bias
    # the weight stands for an input: it has the layer's device, dtype and width
    if why_not(weight, weight, bias) is not None:  # type: ignore[arg-type]
        return False
    # as many rows as a small map has tokens, or a large one
    flat = weight.flatten(1)  # type: ignore[operator]
    return always or any(onednn_is_faster(rows, flat, bias is not None) for rows in (256, 4096))
