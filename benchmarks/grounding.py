"""What it costs to know where a model looked: `visionsel bench grounding`.

For a LLaVA of realistic width with random weights and a prompt of several images: `generate()` by itself, and
with an `AttentionRecorder`, in turn. `online` takes the rows while tokens are generated, `replay` (the
default) reads prompt and answer once more. What the recorder holds in the end stands beside what
`output_attentions` of the eager kernel would hold for the prompt alone.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import paired
from benchmarks import run as run_program
from benchmarks.pruning import GRID, random_inputs, random_llava
from visionsel.multimodal import AttentionRecorder

__all__ = ["measure", "tables"]


def measure(
    *,
    hidden: int,
    layers: int,
    images: int,
    text_tokens: int,
    new_tokens: int,
    rounds: int,
    device: str | torch.device,
    say: Callable[[str], None] = paired.quiet,
) -> dict[str, Any]:
    """Times, and the bytes that each way keeps."""
    options = {name: value for name, value in locals().items() if name not in ("say", "device")}
    torch.manual_seed(0)
    model = random_llava(hidden, layers, 2).eval().to(device)
    given = random_inputs(images, text_tokens, 1)
    inputs = {name: value.to(device) for name, value in given.items()}
    said: dict[str, Any] = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": 1}
    kept: dict[str, int] = {}

    def plain() -> torch.Tensor:
        return model.generate(**inputs, **said)

    def recorded(mode: str, **chosen: Any) -> torch.Tensor:
        with AttentionRecorder(model, mode=mode, **chosen) as recorder:
            out = model.generate(**inputs, **said)
        kept[f"{mode} 1 layer" if chosen else mode] = recorder.attentions.nbytes
        return out

    middle = (layers // 2,)
    length = inputs["input_ids"].shape[1]
    case = f"{length} tokens + {new_tokens}"
    say(f"{case}: 5 variants, {rounds} rounds")
    with torch.inference_mode():
        timings = paired.compare(
            case,
            {
                "generate": lambda: plain().float(),
                "online": lambda: recorded("online").float(),
                "online 1 layer": lambda: recorded("online", layers=middle).float(),
                "replay": lambda: recorded("replay").float(),
                "replay 1 layer": lambda: recorded("replay", layers=middle).float(),
            },
            rounds,
        )
    heads = model.config.text_config.num_attention_heads
    kept["all attention of the prompt"] = layers * heads * length**2 * 4
    return paired.found(
        "grounding", timings, device, options=options, columns=images * GRID * GRID, bytes=kept
    )


def tables(found: dict[str, Any]) -> list[paired.Table]:
    """The times, and what is held."""
    rows = [[name, f"{size / 1e6:.2f}"] for name, size in found["bytes"].items()]
    return [
        *paired.tables(found),
        (f"held in the end, of {found['columns']} columns:", ["what", "MB"], rows),
    ]


if __name__ == "__main__":
    sys.exit(run_program("grounding"))
