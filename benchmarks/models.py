"""Whole models, in turn: `python -m benchmarks.models [--rounds 5]`.

timm's HaloNets and FocalNets before and after `visionsel.accelerate`; our families with the plain reference
and with the chosen backends (nothing else runs the NAT and DiNAT weights today).
"""

import argparse
import copy
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import visionsel
from benchmarks.paired import Timing, compare, report

OURS = ("biformer_tiny", "nat_mini", "dinat_mini", "selectformer_nano")
TIMMS = ("halonet26t", "focalnet_tiny_srf")


def forward(model: nn.Module, image: Tensor) -> Tensor:
    """One call without gradients."""
    with torch.inference_mode():
        return model(image)


def train(model: nn.Module, image: Tensor) -> Tensor:
    """One call and its backward; returns the gradient of the image."""
    model.zero_grad(set_to_none=True)
    image = image.clone().requires_grad_()
    model(image).sum().backward()
    assert image.grad is not None
    return image.grad


def pair(name: str) -> dict[str, nn.Module]:
    """The baseline and ours, with the same weights; in evaluation mode, so that outputs can be compared."""
    if name in TIMMS:
        baseline = timm.create_model(name).eval()
        return {"timm": baseline, "accelerated": visionsel.accelerate(copy.deepcopy(baseline))}
    model = timm.create_model(name).eval()
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"
    return {"reference": plain, "auto": model}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/models.json"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    timings: list[Timing] = []
    for name in (*OURS, *TIMMS):
        models = {key: model.to(device) for key, model in pair(name).items()}
        size = models[next(iter(models))].default_cfg["input_size"]
        image = torch.randn(options.batch, *size, device=device)
        for mode, run in {"forward": forward, "training": train}.items():
            functions = {key: partial(run, model, image) for key, model in models.items()}
            timings += compare(f"{name} {size[1]}, {mode}", functions, options.rounds)
    report(timings, options.out)


if __name__ == "__main__":
    main()
