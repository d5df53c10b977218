"""Where the time of whole models goes: `python -m benchmarks.profiles --write` (into docs/performance.md).

PyTorch's profiler on forwards of one image, on one thread of a CPU: the time of operators, by kind.
"""

import argparse
import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import visionsel
from benchmarks.model_table import rewrite
from benchmarks.models import TIMMS

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- python -m benchmarks.profiles --write -->\n", "<!-- end of the profiles -->"
MODELS = ("focalnet_tiny_srf", "halonet50ts", "biformer_tiny", "nat_tiny", "dinat_tiny")
FORWARDS = 10
# in this order: the first name that an operator's contains
KINDS = {
    "products, convolutions": ("mm", "conv", "linear_pointwise"),
    "attention kernel": ("scaled_dot_product", "softmax"),
    "activations": ("gelu", "silu", "relu", "sigmoid"),
    "norms": ("norm",),
    "copies, gathers": ("copy", "index", "cat", "clone", "gather"),
}


def measure(model: nn.Module, image: torch.Tensor) -> dict[str, float]:
    """Milliseconds of a forward by kind of operator; `rest` is what is of none."""
    with torch.inference_mode():
        for _ in range(3):
            model(image)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(FORWARDS):
                model(image)
    milliseconds: Counter[str] = Counter()
    for event in found.key_averages():
        milliseconds[kind_of(event.key)] += event.self_cpu_time_total / 1e3 / FORWARDS
    return dict(milliseconds)


def kind_of(operator: str) -> str:
    """The kind of an operator of PyTorch, by its name."""
    for kind, parts in KINDS.items():
        if any(part in operator for part in parts):
            return kind
    return "rest"


def table(found: Iterable[tuple[str, dict[str, float]]]) -> str:
    """As Markdown."""
    kinds = [*KINDS, "rest"]
    lines = [f"| forward | ms | {' | '.join(kinds)} |", "|---|" + "---|" * (len(kinds) + 1)]
    for name, milliseconds in found:
        whole = sum(milliseconds.values())
        shares = [f"{100 * milliseconds.get(kind, 0) / whole:.0f} %" for kind in kinds]
        lines.append(f"| {name} | {whole:.0f} | {' | '.join(shares)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into docs/{PAGE.name}")
    parser.add_argument(
        "--models", nargs="+", default=MODELS, metavar="NAME", help=f"which ({' '.join(MODELS)})"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = []
    for name in options.models:
        model: Any = timm.create_model(name).eval()
        image = torch.randn(1, *model.default_cfg["input_size"])
        plain = f"`{name}`, timm's" if name in TIMMS else f"`{name}`"
        packed = visionsel.accelerate(copy.deepcopy(model), pack=True)
        found += [(plain, measure(model, image)), (f"`{name}`, packed", measure(packed, image))]
    if options.write:
        rewrite(PAGE, BEGIN, END, f"{table(found)}\n")
    else:
        print(table(found))


if __name__ == "__main__":
    main()
