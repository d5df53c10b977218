"""What is measured of the operators: the sizes of the published models, and what each is compared with.

A case has a name, the work that it is at least, and after `prepare` several ways to compute it that share
weights and input: the first of `others` is the baseline. Bi-level routing, halo attention and focal
modulation are measured as layers, with their projections, as they replace the authors'.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import torch
from timm.layers.halo_attn import HaloAttn
from timm.models.focalnet import FocalModulation as TimmFocalModulation
from torch import Tensor, nn

from benchmarks import formulations
from benchmarks.paired import Output, usable
from benchmarks.roofline import Work
from visionsel import ops
from visionsel.layers import BilevelRoutingAttention, FocalModulation, HaloAttention
from visionsel.ops.choice import ORDER

__all__ = [
    "MODES",
    "OPERATORS",
    "Case",
    "Prepared",
    "Variant",
    "at_224",
    "check_backends",
    "chosen",
    "first_stages",
    "functions",
]

OPERATORS = tuple(ORDER)
DENSE = 4096  # tokens: the mask of full attention over more is not worth its memory


@dataclass
class Variant:
    """One way to compute a case.

    Attributes:
        call: gives the output.
        leaves: what training gives gradients of, in one order for all variants of a case.
        cotangent: what the output's gradient is, the same numbers for all.
    """

    call: Callable[[], Tensor]
    leaves: list[Tensor]
    cotangent: Tensor | None = None

    def forward(self) -> Tensor:
        """One call without gradients."""
        with torch.inference_mode():
            return self.call()

    def training(self) -> tuple[Tensor, ...]:
        """One call and its backward; returns the gradients of all leaves."""
        out = self.call()
        if self.cotangent is None:
            values = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            self.cotangent = torch.empty_like(out).copy_(values)  # laid out as the output is
        return torch.autograd.grad(out, self.leaves, self.cotangent)


MODES: dict[str, Callable[[Variant], Output]] = {"forward": Variant.forward, "training": Variant.training}


@dataclass(frozen=True)
class Prepared:
    """The ways to compute a case.

    Attributes:
        others: by name, the baseline first.
        ours: by backend.
        left_out: what else there is, and why it cannot be compared here.
    """

    others: dict[str, Variant]
    ours: Callable[[str], Variant]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Neighborhood:
    """NAT's attention by itself, kernel 7 and head_dim 32."""

    side: int
    heads: int
    dilation: int = 1
    bias: bool = True
    batch: int = 1
    kernel_size: int = 7
    head_dim: int = 32
    operator: ClassVar[str] = "neighborhood"

    @property
    def name(self) -> str:
        dilated = f", dilation {self.dilation}" if self.dilation > 1 else ""
        size = f"{self.side}x{self.side}, k={self.kernel_size}, {self.heads} heads"
        return f"neighborhood {size}{dilated}, {'bias' if self.bias else 'no bias'}"

    def prepare(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Prepared:
        # slices of one fused projection, as in use
        fused = torch.randn(self.batch, self.side, self.side, 3, self.heads, self.head_dim)
        inputs = list(fused.to(device, dtype).unbind(3))
        if self.bias:
            rows = 2 * self.kernel_size - 1
            inputs.append((0.1 * torch.randn(self.heads, rows, rows)).to(device, dtype))

        def variant(function: Callable[..., Tensor], **settings: Any) -> Variant:
            leaves = [x.detach().requires_grad_() for x in inputs]
            call = partial(function, *leaves[:3], self.kernel_size, self.dilation, *leaves[3:], **settings)
            return Variant(call, leaves)

        def ours(backend: str) -> Variant:
            return variant(ops.neighborhood_attention, backend=backend)

        others = {"naive gather": variant(formulations.neighborhood_by_gather)}
        left_out = {}
        if self.side % self.dilation == 0:
            others["naive unfold"] = variant(formulations.neighborhood_by_unfold)
        else:
            left_out["naive unfold"] = f"dilation {self.dilation} does not divide the map"
        if self.side**2 <= DENSE:
            others["dense SDPA"] = variant(formulations.neighborhood_dense)
        else:
            left_out["dense SDPA"] = f"its mask has {self.side**4:.1e} numbers"
        others["natten"] = ours("natten")
        return Prepared(others, ours, left_out)

    def work(self) -> Work:
        numbers = self.batch * self.side**2 * self.heads * self.head_dim
        logits = self.batch * self.side**2 * self.heads * self.kernel_size**2
        return Work(4 * logits * self.head_dim, logits, 4 * numbers)


@dataclass(frozen=True)
class BilevelRouting:
    """BiFormer's attention as a layer, head_dim 32."""

    size: tuple[int, int]
    heads: int
    topk: int
    num_windows: int = 7
    batch: int = 1
    head_dim: int = 32
    operator: ClassVar[str] = "bilevel_routing"

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def name(self) -> str:
        height, width = self.size
        windows = f"{self.num_windows}x{self.num_windows} windows, topk {self.topk}"
        return f"bilevel routing {height}x{width}, {self.dim} channels, {windows}"

    def prepare(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Prepared:
        x = torch.randn(self.batch, *self.size, self.dim).to(device, dtype)
        layer = BilevelRoutingAttention(self.dim, self.heads, self.num_windows, self.topk)
        state = layer.state_dict()

        def variant(call: Callable[..., Tensor], x: Tensor = x, backend: str = "auto") -> Variant:
            own = BilevelRoutingAttention(self.dim, self.heads, self.num_windows, self.topk, backend=backend)
            own.load_state_dict(state)
            return of_layer(call, own.to(device, dtype), x)

        others = {"authors'": variant(formulations.bilevel_routing)}
        left_out = {}
        if any(side % self.num_windows for side in self.size):
            left_out["authors', NCHW"] = "it pads in another way, with other numbers"
            left_out["dense SDPA"] = "the windows do not divide the map"
        else:
            others["authors', NCHW"] = variant(_nchw(formulations.bilevel_routing_nchw), _as_nchw(x))
            if self.size[0] * self.size[1] <= DENSE:
                others["dense SDPA"] = variant(formulations.bilevel_routing_dense)
            else:
                left_out["dense SDPA"] = f"its mask has {(self.size[0] * self.size[1]) ** 2:.1e} numbers"
        return Prepared(others, lambda backend: variant(apply, backend=backend), left_out)

    def work(self) -> Work:
        windows = self.num_windows**2
        region = -(-self.size[0] // self.num_windows) * -(-self.size[1] // self.num_windows)
        tokens = self.batch * windows * region
        logits = tokens * self.heads * self.topk * region
        projections = 8 * tokens * self.dim**2
        local = 2 * 5**2 * tokens * self.dim
        routing = 2 * self.batch * windows**2 * self.dim
        flops = projections + local + routing + 4 * logits * self.head_dim
        map_numbers = self.batch * self.size[0] * self.size[1] * self.dim
        return Work(flops, logits, 2 * map_numbers + 4 * self.dim**2)


@dataclass(frozen=True)
class Halo:
    """HaloNet's attention as a layer: blocks of 8, halo 3."""

    side: int
    dim: int
    heads: int
    batch: int = 1
    block_size: int = 8
    halo_size: int = 3
    operator: ClassVar[str] = "halo"

    @property
    def name(self) -> str:
        blocks = f"blocks of {self.block_size}, halo {self.halo_size}"
        return f"halo {self.side}x{self.side}, {self.dim} channels, {self.heads} heads, {blocks}"

    def prepare(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Prepared:
        x = torch.randn(self.batch, self.dim, self.side, self.side).to(device, dtype)
        settings: dict[str, Any] = {
            "num_heads": self.heads,
            "block_size": self.block_size,
            "halo_size": self.halo_size,
        }
        theirs = HaloAttn(self.dim, **settings)

        def ours(backend: str) -> Variant:
            layer = HaloAttention(self.dim, backend=backend, **settings)
            layer.load_state_dict(theirs.state_dict())
            return of_layer(apply, layer.to(device, dtype), x)

        return Prepared({"timm": of_layer(apply, theirs.to(device, dtype), x)}, ours, {})

    def work(self) -> Work:
        tokens = self.batch * self.side**2
        window = self.block_size + 2 * self.halo_size
        logits = tokens * self.heads * window**2
        relative = 4 * tokens * window * self.dim
        flops = 6 * tokens * self.dim**2 + relative + 4 * logits * (self.dim // self.heads)
        return Work(flops, logits, 2 * tokens * self.dim + 3 * self.dim**2)


@dataclass(frozen=True)
class Focal:
    """FocalNet's modulation as a layer; two levels in the "srf" models, three in "lrf"."""

    side: int
    dim: int
    levels: int = 2
    batch: int = 1
    operator: ClassVar[str] = "focal_modulation"

    @property
    def name(self) -> str:
        return f"focal modulation {self.side}x{self.side}, {self.dim} channels, {self.levels} levels"

    def prepare(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Prepared:
        x = torch.randn(self.batch, self.side, self.side, self.dim).to(device, dtype)
        state = FocalModulation(self.dim, focal_level=self.levels).state_dict()

        def variant(call: Callable[..., Tensor], backend: str = "auto") -> Variant:
            layer = FocalModulation(self.dim, focal_level=self.levels, backend=backend)
            layer.load_state_dict(state)
            return of_layer(call, layer.to(device, dtype), x)

        timms = TimmFocalModulation(self.dim, focal_window=3, focal_level=self.levels)
        timms.load_state_dict({key: state[key].view_as(value) for key, value in timms.state_dict().items()})
        others = {
            "authors'": variant(formulations.focal_modulation),
            "timm": of_layer(_nchw(apply), timms.to(device, dtype), _as_nchw(x)),
        }
        left_out = {}
        try:
            others["transformers"] = self._transformers(state, x)
        except ImportError:
            left_out["transformers"] = "it is not installed"
        return Prepared(others, lambda backend: variant(apply, backend), left_out)

    def _transformers(self, state: Mapping[str, Tensor], x: Tensor) -> Variant:
        from transformers import FocalNetConfig
        from transformers.models.focalnet.modeling_focalnet import FocalNetModulation

        layer = FocalNetModulation(FocalNetConfig(focal_levels=[self.levels]), 0, self.dim)
        theirs = {"f": "projection_in", "h": "projection_context", "proj": "projection_out"}
        names = {}
        for key in sorted(state):
            first, _, rest = key.partition(".")
            names[key] = f"{theirs.get(first, first)}.{rest}"
        layer.load_state_dict({name: state[key] for key, name in names.items()})
        return of_layer(apply, layer.to(x.device, x.dtype), x, list(names.values()))

    def work(self) -> Work:
        numbers = self.batch * self.side**2 * self.dim
        projections = 2 * numbers * (4 * self.dim + self.levels + 1)
        depthwise = 2 * numbers * sum((3 + 2 * level) ** 2 for level in range(self.levels))
        return Work(projections + depthwise, numbers * self.levels, 2 * numbers + 4 * self.dim**2)


Case = Neighborhood | BilevelRouting | Halo | Focal


def of_layer(
    call: Callable[..., Tensor], layer: nn.Module, x: Tensor, names: list[str] | None = None
) -> Variant:
    """A variant that computes `call(layer, x)`; its leaves are x and the parameters.

    Args:
        call: of the layer and its input.
        layer: with parameters of its own.
        x: the input.
        names: of the parameters, in the order of the other variants; default: sorted.
    """
    x = x.detach().requires_grad_()
    parameters = dict(layer.named_parameters())
    leaves = [x, *(parameters[name] for name in names or sorted(parameters))]
    return Variant(partial(call, layer, x), leaves)


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer itself."""
    out: Tensor = layer(x)
    return out


def _nchw(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of a layer and `[B, C, H, W]` as one of `[B, H, W, C]`; nothing is copied."""
    return lambda layer, x: call(layer, x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _as_nchw(x: Tensor) -> Tensor:
    """`[B, H, W, C]` in the memory of `[B, C, H, W]`."""
    return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)


def at_224(batch: int = 1) -> list[Case]:
    """Stages of the published models at a 224 image (halo: 256), and of a detector at 800x1216."""
    cases: list[Case] = [
        Neighborhood(56, 2, bias=False, batch=batch),
        Neighborhood(56, 2, batch=batch),
        Neighborhood(56, 2, dilation=8, batch=batch),
        Neighborhood(28, 4, batch=batch),
        Neighborhood(14, 8, batch=batch),
    ]
    for size, heads, topk in ((56, 2, 1), (28, 4, 4), (14, 8, 16)):
        cases.append(BilevelRouting((size, size), heads, topk, batch=batch))
    for height, width, heads, topk in ((200, 304, 2, 1), (100, 152, 4, 4), (50, 76, 8, 16)):
        cases.append(BilevelRouting((height, width), heads, topk, num_windows=16, batch=batch))
    cases += [Halo(64, 64, 4, batch), Halo(32, 128, 8, batch), Halo(16, 256, 8, batch)]
    cases += [Focal(56, 96, 2, batch), Focal(28, 192, 2, batch), Focal(56, 96, 3, batch)]
    return cases


def first_stages(side: int) -> list[Case]:
    """A first stage of each operator on a map of this side, the windows of bi-level routing always 8 x 8."""
    return [
        Neighborhood(side, 2),
        BilevelRouting((side, side), 2, 1, num_windows=side // 8),
        Halo(side, 64, 4),
        Focal(side, 96, 2),
    ]


def chosen(cases: list[Case], operators: Sequence[str]) -> list[Case]:
    """Those of these operators."""
    return [case for case in cases if case.operator in operators]


def check_backends(operators: Sequence[str], backends: Sequence[str]) -> None:
    """Refuse names that no operator has.

    Raises:
        ValueError: with the names that there are.
    """
    known = {"auto"}.union(*(backends_of(operator) for operator in operators))
    if unknown := [name for name in backends if name not in known]:
        raise ValueError(
            f"no backend of {', '.join(operators)} is called {', '.join(unknown)}; "
            f"there are {', '.join(sorted(known))}"
        )


def backends_of(operator: str) -> set[str]:
    """Names of all backends of an operator, usable here or not."""
    return set(import_module(f"visionsel.ops.{operator}").BACKENDS)


def functions(
    case: Case, prepared: Prepared, backends: Sequence[str], mode: str
) -> tuple[dict[str, Callable[[], Output]], dict[str, str]]:
    """The ways to compute a case in a mode, the baseline first, and what cannot and why.

    Args:
        case: that was prepared.
        prepared: its variants.
        backends: of ours; one that the operator does not have, or that cannot serve the call, is left out.
        mode: "forward" or "training".
    """
    known = {"auto", *backends_of(case.operator)}
    variants = dict(prepared.others)
    variants |= {name: prepared.ours(name) for name in backends if name in known and name not in variants}
    unknown = {name: "the operator has no such backend" for name in backends if name not in known}
    found, refused = usable({name: partial(MODES[mode], variant) for name, variant in variants.items()})
    return found, prepared.left_out | unknown | refused
