"""What pruning saves, in turn with the unpruned model: `python -m benchmarks.pruning [--methods fastv dart]`.

For a LLaVA of realistic width with random weights (`--hidden`, `--layers`), or any model (`--model FOLDER`):
the time of the decoder's prefill, to the first token and for each later token, per method and budget, beside
the ratio of FLOPs and of cache bytes. Times are ratios pruned / full of runs side by side; CPU time of the
process stands beside wall time, since a wall clock also counts what other programs do. Every image has 576
tokens, so that 2880 are five.

Two rows say what the hooks themselves cost: `hooks` keeps every token, and `hooks + attention` reads a row of
attention as well; both do everything but drop. Their ratio should be 1.
"""

import argparse
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from visionsel.files import write_json
from visionsel.multimodal.intervention import Intervention, method_name
from visionsel.multimodal.prompts import chat_texts
from visionsel.multimodal.pruning import PRUNERS
from visionsel.multimodal.pruning.budget import has_budget, with_budget
from visionsel.multimodal.pruning.explainprune import RelevancePredictor
from visionsel.multimodal.pruning.fastv import FastV
from visionsel.multimodal.pruning.measure import measure_in_turn
from visionsel.multimodal.pruning.random import RandomPrune
from visionsel.multimodal.pruning.report import Report

METHODS = ("random", "fastv", "pyramiddrop", "visionzip")  # one of each place and signal
GRID, PATCH = 24, 14  # an image is 24 x 24 tokens, as in LLaVA-1.5
IMAGE_TOKEN, VOCABULARY = 1000, 1024
WIDTHS = {
    "flops_ratio": 6,
    "cache_ratio": 6,
    "decoder_cpu_ratio": 11,
    "decoder_ratio": 6,
    "ratio": 16,
    "token_cpu_ratio": 9,
    "token_ratio": 6,
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
    methods: list[str], keeps: list[float], config: Any
) -> dict[tuple[str, float | None], Intervention]:
    """The pruners to compare, by name and budget, for a decoder of this configuration."""
    known = {method_name(kind): kind for kind in PRUNERS}
    if unknown := [name for name in methods if name not in known]:
        raise SystemExit(f"no method is called {', '.join(unknown)}; there are {', '.join(known)}")
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


def show(rows: list[Row]) -> None:
    """Print a table for one prompt."""
    report = rows[0].report
    times = [report.decoder_cpu_seconds, report.decoder_seconds, report.seconds]
    print(f"\n{rows[0].visual_tokens} image tokens, without pruning: prefill of the decoder", end=" ")
    print(
        "{:.0f} ms CPU, {:.0f} ms wall; first token {:.0f} ms wall".format(
            *(1e3 * t.full for t in times if t)
        )
    )
    header = f"{'method':18}  {'keep':>5}  {'tokens':>7}  {'FLOPs':>6}  {'cache':>6}"
    header += f"  {'decoder CPU':>11}  {'wall':>6}  {'first token wall':>16}  {'token CPU':>9}  {'wall':>6}"
    print(header)
    for row in rows:
        values = row.report.to_dict()
        keep = "-" if row.keep is None else f"{row.keep:g}"
        line = f"{row.method:18}  {keep:>5}  {values['equivalent_tokens']:7.1f}"
        for name, width in WIDTHS.items():
            line += f"  {values[name]:{width}.3f}" if values.get(name) is not None else f"  {'-':>{width}}"
        print(line)


def write(rows: list[Row], options: argparse.Namespace, model: nn.Module) -> None:
    """Everything as JSON."""
    content = {
        "machine": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "options": {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
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
    write_json(content, options.out)
    print(f"\nwritten to {options.out}")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a folder of transformers (default: random weights)")
    parser.add_argument("--hidden", type=int, default=768, help="width of the decoder (default: 768)")
    parser.add_argument("--layers", type=int, default=12, help="of the decoder (default: 12)")
    parser.add_argument("--tower-layers", type=int, default=2, help="of the vision tower (default: 2)")
    parser.add_argument("--visual-tokens", type=int, nargs="+", default=[576, 2880])
    parser.add_argument("--text-tokens", type=int, default=75)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--methods", nargs="+", default=METHODS, help=f"default: {' '.join(METHODS)}; or: all"
    )
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.11])
    parser.add_argument("--new-tokens", type=int, default=8, help="generated after the first; 0 for none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path, default=Path("runs/bench/pruning.json"))
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    methods = [method_name(kind) for kind in PRUNERS] if options.methods == ["all"] else list(options.methods)
    dtype = getattr(torch, options.dtype)
    rows: list[Row] = []
    model: Any = None
    if not options.model:
        torch.set_default_dtype(dtype)  # made where it runs: billions of weights take a while to move
        with torch.device(options.device):
            model = random_llava(options.hidden, options.layers, options.tower_layers)
        torch.set_default_dtype(torch.float32)
    for tokens in options.visual_tokens:
        images = max(1, round(tokens / GRID**2))
        if options.model:
            model, inputs = load(options.model, images, options.text_tokens, options.batch)
        else:
            inputs = random_inputs(images, options.text_tokens, options.batch)
        model = model.to(options.device, dtype).eval()
        inputs = {
            key: value.to(options.device, dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        }
        pruners = variants(methods, options.keep, model.config.get_text_config())
        print(f"{tokens} image tokens: {len(pruners) + 1} variants, {options.rounds} rounds", file=sys.stderr)
        found = compare(model, inputs, pruners, options.rounds, options.new_tokens)
        show(found)
        rows += found
    write(rows, options, model)


if __name__ == "__main__":
    main()
