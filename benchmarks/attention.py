"""What selecting saves: attention by itself, without projections, against attention to all tokens.

`visionsel bench attention [--batch 64] [--dtype bfloat16] [--device cuda]`. The baseline is PyTorch's fused
attention over the whole map. It computes something else, so answers are compared among our backends alone;
`tiled`, which gathers keys and values and gives them to the same fused attention, is always among them. Focal
modulation has no attention, so it stands as a layer beside an attention layer with its projections. Beside
each time is the share of the machine's limits that it reaches (`benchmarks.roofline`).
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cases, paired, roofline
from benchmarks import run as run_program
from benchmarks.cases import MODES, Variant
from benchmarks.roofline import Work, limits, tables
from visionsel import ops
from visionsel.layers import FocalModulation

__all__ = ["at_224", "measure", "tables"]

FULL = "attention to all"
MOST = 4096  # tokens that attention to all is measured for on a CPU


@dataclass(frozen=True)
class Attention:
    """An operator on maps of one size.

    Attributes:
        operator: its name among the operators.
        name: of the case.
        size: of the map.
        heads, head_dim: of the attention.
        batch: samples.
        keys: that a query attends to.
        call: computes it from query, key, value and tables, with a backend by name.
        tables: shapes of what it learns beside the maps.
        windows: that routing chooses among, and how many it chooses; None for other operators.
    """

    operator: str
    name: str
    size: tuple[int, int]
    heads: int
    head_dim: int
    batch: int
    keys: int
    call: Callable[..., Tensor]
    tables: Sequence[tuple[int, ...]] = ()
    windows: tuple[int, int] | None = None

    def leaves(self, device: str | torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """What takes gradients, and what does not: a routing."""
        shape = self.batch, *self.size, 3, self.heads, self.head_dim
        maps = torch.randn(shape, device=device, dtype=dtype).unbind(3)  # slices of one projection, as in use
        made = [*maps, *(0.1 * torch.randn(shape, device=device, dtype=dtype) for shape in self.tables)]
        routing: list[Tensor] = []
        if self.windows is not None:
            count, topk = self.windows
            scores = torch.rand(self.batch, count, count, device=device)
            routing = [scores.topk(topk).indices]
        return [x.detach().requires_grad_() for x in made], routing

    def variants(
        self, backends: Sequence[str], device: str | torch.device, dtype: torch.dtype
    ) -> tuple[Variant, dict[str, Variant]]:
        """Attention to all tokens, and ours by backend."""
        leaves, routing = self.leaves(device, dtype)
        all_tokens = Variant(partial(attend_to_all, *leaves[:3]), leaves[:3])
        ours = {
            name: Variant(partial(self.call, *leaves, *routing, backend=name), leaves) for name in backends
        }
        return all_tokens, ours

    def work(self) -> Work:
        """The least work of a forward pass."""
        tokens = self.batch * self.size[0] * self.size[1] * self.heads
        return Work(4 * tokens * self.keys * self.head_dim, tokens * self.keys, 4 * tokens * self.head_dim)


@dataclass(frozen=True)
class Modulation:
    """Focal modulation as a layer; see `cases.Focal`."""

    case: cases.Focal
    operator: str = "focal_modulation"

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def size(self) -> tuple[int, int]:
        return self.case.side, self.case.side

    def variants(
        self, backends: Sequence[str], device: str | torch.device, dtype: torch.dtype
    ) -> tuple[Variant, dict[str, Variant]]:
        """An attention layer, and ours by backend."""
        dim, levels = self.case.dim, self.case.levels
        x = torch.randn(self.case.batch, *self.size, dim).to(device, dtype)
        attention = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        state = FocalModulation(dim, focal_level=levels).state_dict()

        def ours(backend: str) -> Variant:
            layer = FocalModulation(dim, focal_level=levels, backend=backend)
            layer.load_state_dict(state)
            return cases.of_layer(cases.apply, layer.to(device, dtype), x)

        theirs = cases.of_layer(attention_layer, attention.to(device, dtype), x)
        return theirs, {name: ours(name) for name in backends}

    def work(self) -> Work:
        """The least work of a forward pass."""
        return self.case.work()


def attend_to_all(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Full attention on maps `[B, H, W, heads, head_dim]`."""
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(query.shape)


def attention_layer(layer: nn.ModuleDict, x: Tensor) -> Tensor:
    """Full attention with projections, in heads of 32, on `[B, H, W, dim]`."""
    query, key, value = layer["qkv"](x).unflatten(-1, (3, -1, 32)).unbind(3)
    out: Tensor = layer["proj"](attend_to_all(query, key, value).flatten(3))
    return out


def at_224(batch: int = 1) -> list[Attention | Modulation]:
    """Stages of the published models at a 224 image (halo: 256), and two of a detector at 800x1216."""
    found: list[Attention | Modulation] = []
    for one in cases.at_224(batch):
        if isinstance(one, cases.Neighborhood):
            rows = 2 * one.kernel_size - 1
            bias = [(one.heads, rows, rows)] if one.bias else []
            call = partial(_neighborhood, one.kernel_size, one.dilation)
            size, keys = (one.side, one.side), one.kernel_size**2
            found.append(
                Attention("neighborhood", one.name, size, one.heads, one.head_dim, batch, keys, call, bias)
            )
        elif isinstance(one, cases.BilevelRouting):
            windows = one.num_windows
            size = (-(-one.size[0] // windows) * windows, -(-one.size[1] // windows) * windows)
            keys = one.topk * size[0] * size[1] // windows**2
            call = partial(_bilevel, windows, one.topk)
            name = f"bilevel routing {size[0]}x{size[1]}, {windows}x{windows} windows, topk {one.topk}"
            found.append(
                Attention(
                    "bilevel_routing",
                    name,
                    size,
                    one.heads,
                    one.head_dim,
                    batch,
                    keys,
                    call,
                    windows=(windows**2, one.topk),
                )
            )
        elif isinstance(one, cases.Halo):
            head_dim, window = one.dim // one.heads, one.block_size + 2 * one.halo_size
            tables = [(2 * window - 1, head_dim)] * 2
            call = partial(_halo, one.block_size, one.halo_size)
            size = one.side, one.side
            found.append(
                Attention("halo", one.name, size, one.heads, head_dim, batch, window**2, call, tables)
            )
        else:
            found.append(Modulation(one))
    return found


def _neighborhood(
    kernel_size: int,
    dilation: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str,
) -> Tensor:
    return ops.neighborhood_attention(q, k, v, kernel_size, dilation, bias, backend=backend)


def _bilevel(
    windows: int, topk: int, q: Tensor, k: Tensor, v: Tensor, routing: Tensor, backend: str
) -> Tensor:
    return ops.bilevel_routing_attention(q, k, v, windows, topk, routing=routing, backend=backend)


def _halo(
    block: int, halo: int, q: Tensor, k: Tensor, v: Tensor, height: Tensor, width: Tensor, *, backend: str
) -> Tensor:
    return ops.halo_attention(q, k, v, block, halo, height, width, backend=backend)


def measure(
    *,
    rounds: int,
    batch: int,
    operators: Sequence[str],
    backends: Sequence[str],
    dtype: str,
    device: str | torch.device,
    say: Callable[[str], None] = paired.quiet,
) -> dict[str, Any]:
    """All cases of some operators, forward and training.

    Raises:
        ValueError: for a backend that no operator has.
        RuntimeError: when two of our backends differ.
    """
    options = {name: value for name, value in locals().items() if name not in ("say", "device")}
    cases.check_backends(operators, backends)
    torch.manual_seed(0)
    precision = getattr(torch, dtype)
    say("limits of the machine")
    reached = limits(device, precision)
    timings: list[paired.Timing] = []
    left_out: list[dict[str, str]] = []
    shares: list[dict[str, Any]] = []
    measured = [one for one in at_224(batch) if one.operator in operators]
    for number, case in enumerate(measured, 1):
        say(f"[{number}/{len(measured)}] {case.name}")
        known = {"auto", *cases.backends_of(case.operator)}
        names = [name for name in dict.fromkeys(["tiled", *backends]) if name in known]
        to_all, ours = case.variants(names, device, precision)
        for mode, run in MODES.items():
            name = f"{case.name}, {mode}"
            with paired.exact(device):
                found, refused = paired.usable({key: partial(run, one) for key, one in ours.items()})
                differences = paired.check(
                    name, {key: one() for key, one in found.items()}, paired.TOLERANCE[dtype]
                )
                functions: dict[str, Callable[[], Any]] = {}
                if torch.device(device).type == "cuda" or case.size[0] * case.size[1] <= MOST:
                    functions[FULL] = partial(run, to_all)
                else:
                    refused[FULL] = f"more than {MOST:,} tokens"
                functions |= found
                own = paired.timed(name, functions, rounds, {FULL: 0.0} | differences)
            timings += own
            left_out += [{"case": name, "name": key, "why": why} for key, why in refused.items()]
            if mode == "forward":
                shares += [
                    roofline.share(name, one, case.work(), reached, device) for one in own if one.name != FULL
                ]
    return paired.found(
        "attention",
        timings,
        device,
        options=options,
        left_out=left_out,
        limits=asdict(reached),
        shares=shares,
    )


if __name__ == "__main__":
    sys.exit(run_program("attention"))
