"""Whole models, in turn: `visionsel bench models [--rounds 5]`.

Our families with the authors' formulation of the attention in its place (`benchmarks.formulations`; nothing
else runs the NAT and DiNAT weights today), SelectFormer, which has no other, with the plain reference; timm's
HaloNets and FocalNets, and transformers' FocalNet, which is the authors' code. All of ours and timm's also
after `visionsel.accelerate`, for inference on the CPU with packed weights too, and with `--compile` through
`torch.compile` besides.
"""

import copy
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

import visionsel
import visionsel.ops.packed as packed
from benchmarks import cases, formulations, paired
from benchmarks import run as run_program
from benchmarks.paired import tables
from visionsel.layers import BilevelRoutingAttention, FocalModulation, HaloAttention, NeighborhoodAttention
from visionsel.layers.lepe_attention import AttentionLePE
from visionsel.ops.compilation import no_compiler

__all__ = ["measure", "pair", "tables"]

OURS = {
    "nat_tiny": "naive gather",
    "dinat_tiny": "naive gather",
    "biformer_tiny": "authors'",
    "selectformer_nano": "reference",
}
TIMMS = ("focalnet_tiny_srf", "halonet50ts")
TOLERANCE = 1e-3  # of the largest value; rounding adds up over fifty layers and their gradients
FORMULATIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    NeighborhoodAttention: formulations.neighborhood_layer,
    BilevelRoutingAttention: formulations.bilevel_routing,
    AttentionLePE: formulations.full_attention,
}
OPERATOR_OF: dict[type[nn.Module], str] = {
    NeighborhoodAttention: "neighborhood",
    BilevelRoutingAttention: "bilevel_routing",
    HaloAttention: "halo",
    FocalModulation: "focal_modulation",
}
# names of timm's FocalNet -> of transformers'; a stage ends with the downsampling that opens timm's next one
RENAMED = (
    (r"^stem\.proj\.", "focalnet.embeddings.patch_embeddings.projection."),
    (r"^stem\.norm\.", "focalnet.embeddings.norm."),
    (r"^layers\.(\d)\.blocks\.", r"focalnet.encoder.stages.\1.layers."),
    (r"\.modulation\.f\.", ".modulation.projection_in."),
    (r"\.modulation\.h\.", ".modulation.projection_context."),
    (r"\.modulation\.proj\.", ".modulation.projection_out."),
    (r"^norm\.", "focalnet.layernorm."),
    (r"^head\.fc\.", "classifier."),
)


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


def pair(name: str, backends: Sequence[str] = ("auto",)) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The baseline, others and ours, with the same weights; and what cannot be compared here, and why.

    In evaluation mode, so that outputs can be compared.
    """
    baseline = timm.create_model(name).eval()
    left_out: dict[str, str] = {}
    if name in TIMMS:
        models: dict[str, nn.Module] = {"timm": baseline}
        if name.startswith("focalnet"):
            try:
                models["transformers"] = _to_transformers(baseline)
            except ImportError:
                left_out["transformers"] = "it is not installed"
        return {**models, **_accelerated(baseline, left_out)}, left_out
    models = {OURS[name]: _plain(copy.deepcopy(baseline), OURS[name] == "reference")}
    for backend in backends:
        if backend == "auto" or all(
            backend in cases.backends_of(operator) for operator in _operators(baseline)
        ):
            models[backend] = _with_backend(copy.deepcopy(baseline), backend)
        else:
            left_out[backend] = "not every operator of the model has such a backend"
    return {**models, **_accelerated(baseline, left_out)}, left_out


def _accelerated(model: nn.Module, left_out: dict[str, str]) -> dict[str, nn.Module]:
    """Accelerated copies, one with packed weights; or why there is none."""
    ways: dict[str, dict[str, bool]] = {"accelerated": {}, "packed": {"pack": True}}
    if reason := packed.unavailable():
        left_out["packed"] = reason
        del ways["packed"]
    return {name: visionsel.accelerate(copy.deepcopy(model), **options) for name, options in ways.items()}


def _plain(model: nn.Module, reference: bool) -> nn.Module:
    """The model with the authors' formulations in the place of its attention, or with the plain reference."""
    if reference:
        return _with_backend(model, "reference")
    module: Any
    for module in model.modules():
        if type(module) in FORMULATIONS:
            module.forward = partial(FORMULATIONS[type(module)], module)
    return model


def _with_backend(model: nn.Module, backend: str) -> nn.Module:
    module: Any
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    return model


def _operators(model: nn.Module) -> set[str]:
    """The operators that its layers call."""
    return {
        operator
        for module in model.modules()
        for kind, operator in OPERATOR_OF.items()
        if isinstance(module, kind)
    }


class _Logits(nn.Module):
    """A model of transformers that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image).logits


def _to_transformers(model: Any) -> nn.Module:
    """transformers' FocalNet with the weights of timm's."""
    from transformers import FocalNetConfig, FocalNetForImageClassification

    config = FocalNetConfig(
        embed_dim=model.embed_dim[0],
        depths=[len(stage.blocks) for stage in model.layers],
        focal_levels=[stage.blocks[0].modulation.focal_level for stage in model.layers],
    )
    config.num_labels = model.num_classes
    theirs = FocalNetForImageClassification(config)
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    state = {_renamed(name): value for name, value in model.state_dict().items()}
    # their linear layers are 1x1 convolutions in timm
    theirs.load_state_dict({name: value.reshape(shapes[name]) for name, value in state.items()})
    return _Logits(theirs).eval()


def _renamed(name: str) -> str:
    down = re.fullmatch(r"layers\.(\d)\.downsample\.(proj|norm)\.(.*)", name)
    if down is not None:
        part = {"proj": "projection", "norm": "norm"}[down[2]]
        return f"focalnet.encoder.stages.{int(down[1]) - 1}.downsample.{part}.{down[3]}"
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def measure(
    *,
    rounds: int,
    batch: int,
    models: Sequence[str] | None,
    backends: Sequence[str],
    device: str | torch.device,
    compile: bool = False,
    say: Callable[[str], None] = paired.quiet,
) -> dict[str, Any]:
    """Some models, or all, forward and training.

    Raises:
        ValueError: for an unknown model, or a backend that no model's operator has.
        RuntimeError: when two ways to compute a model differ.
    """
    options = {name: value for name, value in locals().items() if name not in ("say", "device")}
    names = (*OURS, *TIMMS)
    if unknown := [name for name in models or () if name not in names]:
        raise ValueError(f"no model here is called {', '.join(unknown)}; there are {', '.join(names)}")
    chosen = list(models or names)
    cases.check_backends(cases.OPERATORS, backends)
    torch.manual_seed(0)
    timings: list[paired.Timing] = []
    left_out: list[dict[str, str]] = []
    for number, name in enumerate(chosen, 1):
        say(f"[{number}/{len(chosen)}] {name}")
        made, others = pair(name, backends)
        net: Any
        for net in made.values():
            net.to(device)
        size = net.default_cfg["input_size"]  # the last one is ours
        image = torch.randn(batch, *size, device=device)
        for mode, run in {"forward": forward, "training": train}.items():
            case = f"{name} {size[1]}, {mode}"
            left_out += [{"case": case, "name": other, "why": why} for other, why in others.items()]
            ways = {key: partial(run, model, image) for key, model in made.items()}
            if mode == "training" or image.device.type != "cpu":
                ways.pop("packed", None)  # it would be the accelerated one once more
            if compile and mode == "forward" and (why := no_compiler(image.device.type)):
                left_out.append({"case": case, "name": "torch.compile", "why": why})
            elif compile and mode == "forward":
                torch.compiler.reset()  # each model is its own; none shall meet the limit of recompilations
                compiled: Any = torch.compile(made["accelerated"], fullgraph=True)
                ways["torch.compile"] = partial(run, compiled, image)
            functions, reasons = paired.usable(ways)
            left_out += [{"case": case, "name": other, "why": why} for other, why in reasons.items()]
            with paired.exact(device):
                timings += paired.compare(case, functions, rounds, TOLERANCE)
    return paired.found("models", timings, device, options=options, left_out=left_out)


if __name__ == "__main__":
    sys.exit(run_program("models"))
