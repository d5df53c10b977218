"""What pruning saves, in turn with the unpruned model: `visionsel bench pruning [--methods fastv dart]`.

For a LLaVA of realistic width with random weights (`--hidden`, `--layers`), or any model (`--model FOLDER`):
the time of the decoder's prefill, to the first token and for each later token, per method and budget, beside
the ratio of FLOPs and of cache bytes. Times are ratios pruned / full of runs side by side; CPU time of the
process stands beside wall time, since a wall clock also counts what other programs do. Every image has 576
tokens, so that 2880 are five.

Two rows say what the hooks themselves cost: `hooks` keeps every token, and `hooks + attention` reads a row of
attention as well; both do everything but drop. Their ratio should be 1.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from benchmarks import run as run_program
from benchmarks.paired import Table, machine, quiet
from visionsel.multimodal.intervention import Intervention, method_name
from visionsel.multimodal.prompts import chat_texts
from visionsel.multimodal.pruning import PRUNERS
from visionsel.multimodal.pruning.budget import has_budget, with_budget
from visionsel.multimodal.pruning.explainprune import RelevancePredictor
from visionsel.multimodal.pruning.fastv import FastV
from visionsel.multimodal.pruning.measure import measure_in_turn
from visionsel.multimodal.pruning.random import RandomPrune
from visionsel.multimodal.pruning.report import Report

__all__ = ["measure", "random_inputs", "random_llava", "tables"]

GRID, PATCH = 24, 14  # an image is 24 x 24 tokens, as in LLaVA-1.5
IMAGE_TOKEN, VOCABULARY = 1000, 1024
RATIOS = {
    "flops_ratio": "FLOPs",
    "cache_ratio": "cache",
    "decoder_cpu_ratio": "decoder CPU",
    "decoder_ratio": "wall",
    "ratio": "first token wall",
    "token_cpu_ratio": "token CPU",
    "token_ratio": "wall",
}


@dataclass(frozen=True)
class Row:
    """One pruner on one prompt."""

    visual_tokens: int
    method: str
    keep: float | None
    pruner: str
    report: Report


def random_llava(hidden: int, layers: int, tower_layers: int) -> Any:
    """A LLaVA with a Llama of this width; its vision tower, which works the same either way, is short."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=tower_layers,
        num_attention_heads=4,
        image_size=GRID * PATCH,
        patch_size=PATCH,
    )
    text = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=8192,
        eos_token_id=None,
        pad_token_id=0,
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    return transformers.LlavaForConditionalGeneration(config)


def random_inputs(images: int, text: int, batch: int) -> dict[str, Any]:
    """A prompt of images between words."""
    words = torch.randint(3, IMAGE_TOKEN, (batch, text))
    pictures = torch.full((batch, images * GRID * GRID), IMAGE_TOKEN)
    ids = torch.cat([words[:, : text // 2], pictures, words[:, text // 2 :]], 1)
    pixels = torch.randn(batch * images, 3, GRID * PATCH, GRID * PATCH)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def load(folder: str, images: int, text: int, batch: int) -> tuple[Any, dict[str, Any]]:
    """A model of a folder with a prompt of grey images."""
    from PIL import Image

    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    [prompt] = chat_texts(processor, ["what is it ? " * (text // 4)], images=images)
    pictures = [Image.effect_noise((672, 672), 64).convert("RGB") for _ in range(images * batch)]
    inputs = processor(images=pictures, text=[prompt] * batch, return_tensors="pt", padding=True)
    return model, dict(inputs)


def variants(
    methods: Sequence[str], keeps: Sequence[float], config: Any
) -> dict[tuple[str, float | None], Intervention]:
    """The pruners to compare, by name and budget, for a decoder of this configuration."""
    known = {method_name(kind): kind for kind in PRUNERS}
    # time does not depend on what a net has learnt
    more = {"explainprune": {"predictor": RelevancePredictor(config.num_attention_heads)}}
    found: dict[tuple[str, float | None], Intervention] = {
        ("hooks", 1.0): RandomPrune(keep=1.0),
        ("hooks + attention", 1.0): FastV(keep=1.0, layer=1),
    }
    for name in methods:
        for keep in keeps if has_budget(known[name]) else [None]:
            pruner = with_budget(known[name], keep or 1.0, config.num_hidden_layers, **more.get(name, {}))
            found[name, keep] = pruner
    return found


def compare(
    model: Any,
    inputs: dict[str, Any],
    pruners: dict[tuple[str, float | None], Intervention],
    rounds: int,
    new: int,
) -> list[Row]:
    """All pruners in turn on one prompt."""
    names = {f"{name} {keep}": (name, keep) for name, keep in pruners}
    reports = measure_in_turn(model, {name: pruners[key] for name, key in names.items()}, inputs, rounds, new)
    tokens = round(next(iter(reports.values())).full_tokens)
    return [Row(tokens, *key, repr(pruners[key]), reports[name]) for name, key in names.items()]


def tables(found: dict[str, Any]) -> list[Table]:
    """One a prompt."""
    made: list[Table] = []
    for tokens in dict.fromkeys(row["image_tokens"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["image_tokens"] == tokens]
        clocks = ("full_decoder_cpu_seconds", "full_decoder_seconds", "full_seconds")
        title = (
            "{} image tokens, without pruning: prefill of the decoder {:.0f} ms CPU, {:.0f} ms wall; ".format(
                tokens, *(1e3 * rows[0][clock] for clock in clocks[:2])
            )
        )
        title += f"first token {1e3 * rows[0][clocks[2]]:.0f} ms wall"
        cells = [
            [
                row["method"],
                "-" if row["keep"] is None else f"{row['keep']:g}",
                f"{row['equivalent_tokens']:.1f}",
                *("-" if row.get(name) is None else f"{row[name]:.3f}" for name in RATIOS),
            ]
            for row in rows
        ]
        made.append((title, ["method", "keep", "tokens", *RATIOS.values()], cells))
    return made


def measure(
    *,
    model: str | None,
    hidden: int,
    layers: int,
    tower_layers: int,
    visual_tokens: Sequence[int],
    text_tokens: int,
    batch: int,
    methods: Sequence[str],
    keep: Sequence[float],
    new_tokens: int,
    rounds: int,
    device: str | torch.device,
    dtype: str,
    say: Callable[[str], None] = quiet,
) -> dict[str, Any]:
    """All methods and budgets on prompts of each length.

    Raises:
        ValueError: for an unknown method.
    """
    options = {name: value for name, value in locals().items() if name != "say"}
    torch.manual_seed(0)
    precision = getattr(torch, dtype)
    known = [method_name(kind) for kind in PRUNERS]
    chosen = known if list(methods) == ["all"] else list(methods)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"no method is called {', '.join(unknown)}; there are {', '.join(known)}, or all")
    rows: list[Row] = []
    net: Any = None
    if model is None:
        torch.set_default_dtype(precision)  # made where it runs: billions of weights take a while to move
        try:
            with torch.device(device):
                net = random_llava(hidden, layers, tower_layers)
        finally:
            torch.set_default_dtype(torch.float32)
    for number, tokens in enumerate(visual_tokens, 1):
        images = max(1, round(tokens / GRID**2))
        if model is not None:
            net, inputs = load(model, images, text_tokens, batch)
        else:
            inputs = random_inputs(images, text_tokens, batch)
        net = net.to(device, precision).eval()
        inputs = {
            key: value.to(device, precision if value.is_floating_point() else None)
            for key, value in inputs.items()
        }
        pruners = variants(chosen, keep, net.config.get_text_config())
        name = f"{tokens} image tokens: {len(pruners) + 1} variants, {rounds} rounds"
        say(f"[{number}/{len(visual_tokens)}] {name}")
        rows += compare(net, inputs, pruners, rounds, new_tokens)
    return {
        "program": "pruning",
        "machine": machine(device),
        "options": {**options, "device": str(device)},
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "rows": [
            {
                "image_tokens": row.visual_tokens,
                "method": row.method,
                "keep": row.keep,
                "pruner": row.pruner,
                **row.report.to_dict(),
            }
            for row in rows
        ],
    }


if __name__ == "__main__":
    sys.exit(run_program("pruning"))
