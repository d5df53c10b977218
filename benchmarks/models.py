"""Whole models, in turn: `visionsel bench models [--rounds 5]`.

timm's HaloNets and FocalNets before and after `visionsel.accelerate`; our families with the plain reference
and with the chosen backends (nothing else runs the NAT and DiNAT weights today).
"""

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

import visionsel
from benchmarks import run as run_program
from benchmarks.paired import Timing, compare, found, quiet, tables

__all__ = ["measure", "pair", "tables"]

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


def pair(name: str) -> dict[str, Any]:
    """The baseline and ours, with the same weights; in evaluation mode, so that outputs can be compared."""
    if name in TIMMS:
        baseline = timm.create_model(name).eval()
        return {"timm": baseline, "accelerated": visionsel.accelerate(copy.deepcopy(baseline))}
    model = timm.create_model(name).eval()
    plain = copy.deepcopy(model)
    module: Any
    for module in plain.modules():
        if hasattr(module, "backend"):
            module.backend = "reference"
    return {"reference": plain, "auto": model}


def measure(
    *, rounds: int, batch: int, device: str | torch.device, say: Callable[[str], None] = quiet
) -> dict[str, Any]:
    """All models, forward and training."""
    torch.manual_seed(0)
    timings: list[Timing] = []
    names = (*OURS, *TIMMS)
    for number, name in enumerate(names, 1):
        say(f"[{number}/{len(names)}] {name}")
        models = {key: model.to(device) for key, model in pair(name).items()}
        size = models[next(iter(models))].default_cfg["input_size"]
        image = torch.randn(batch, *size, device=device)
        for mode, run in {"forward": forward, "training": train}.items():
            functions: dict[str, Callable[[], Tensor]] = {
                key: partial(run, model, image) for key, model in models.items()
            }
            timings += compare(f"{name} {size[1]}, {mode}", functions, rounds)
    return found(timings)


if __name__ == "__main__":
    sys.exit(run_program("models"))
