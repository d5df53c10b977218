"""The table of exports in docs/proof.md: `python -m benchmarks.export_table --write`.

The smallest model of each architecture, at its full depth and with random weights, is exported by
`torch.export` and as ONNX with free batch, height and width, and both are run with images of two sizes; the
table says how far their logits are from the model's. It takes a minute a model; `--models` takes others.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch

import visionsel  # noqa: F401  (registers the models with timm)
from benchmarks.model_table import millions, parameters, rewrite
from visionsel.export import write_onnx, write_program

PAGE = Path(__file__).parents[1] / "docs" / "proof.md"
SMALLEST = (
    "biformer_tiny",
    "biformer_stl",
    "nat_mini",
    "dinat_mini",
    "dinat_s_tiny",
    "halonet_h0_256",
    "focalnet_tiny_iso_16",
    "selectformer_pico",
)
BEGIN, END = "<!-- python -m benchmarks.export_table --write -->\n", "<!-- end of the exports -->"


@dataclass(frozen=True)
class Exported:
    """One architecture.

    Attributes:
        shapes: of the images that both files were run with.
        program, onnx: largest difference of the logits, in units of the largest logit where that is above 1.
    """

    name: str
    parameters: int
    shapes: list[list[int]]
    program: float
    onnx: float


def measure(names: Iterable[str], say: Callable[[str], None]) -> list[Exported]:
    """Export and run each; a difference beyond `visionsel.export.TOLERANCE` raises ValueError."""
    found = []
    for name in names:
        say(name)
        torch.manual_seed(0)
        model: Any = timm.create_model(name).eval()
        size = model.default_cfg["input_size"][1:]
        with TemporaryDirectory() as folder:
            program = write_program(model, Path(folder) / "model.pt2", size)
            onnx = write_onnx(model, Path(folder) / "model.onnx", size)
        shapes = program["shapes"]
        assert shapes == onnx["shapes"]
        found.append(Exported(name, parameters(model), shapes, program["difference"], onnx["difference"]))
    return found


def table(rows: Iterable[Exported]) -> str:
    """As Markdown."""
    lines = ["| model | parameters | images | `torch.export` | ONNX |", "|---|---|---|---|---|"]
    for row in rows:
        images = ", ".join(f"{batch} of {height} x {width}" for batch, _, height, width in row.shapes)
        cells = [f"`{row.name}`", millions(row.parameters), images, f"{row.program:.0e}", f"{row.onnx:.0e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into docs/{PAGE.name}")
    parser.add_argument(
        "--models", nargs="+", default=SMALLEST, metavar="NAME", help=f"which ({' '.join(SMALLEST)})"
    )
    options = parser.parse_args(arguments)
    rows = measure(options.models, lambda name: print(name, file=sys.stderr, flush=True))
    versions = f"torch {torch.__version__}, random weights, float32 on the CPU."
    if options.write:
        rewrite(PAGE, BEGIN, END, f"{table(rows)}\n\n{versions}\n")
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
