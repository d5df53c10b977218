"""What it costs to know where a model looked: `python -m benchmarks.grounding`.

For a LLaVA of realistic width with random weights and a prompt of several images: `generate()` by itself, and
with an `AttentionRecorder`, in turn. `online` takes the rows while tokens are generated, `replay` (the
default) reads prompt and answer once more. What the recorder holds in the end stands beside what
`output_attentions` of the eager kernel would hold for the prompt alone.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.paired import compare, report
from benchmarks.pruning import GRID, random_inputs, random_llava
from visionsel.multimodal import AttentionRecorder


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768, help="width of the decoder (default: 768)")
    parser.add_argument("--layers", type=int, default=12, help="of the decoder (default: 12)")
    parser.add_argument("--images", type=int, default=5, help="of 576 tokens each (default: 5)")
    parser.add_argument("--text-tokens", type=int, default=70)
    parser.add_argument("--new-tokens", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/grounding.json"))
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_llava(options.hidden, options.layers, 2).eval().to(device)
    given = random_inputs(options.images, options.text_tokens, 1)
    inputs = {name: value.to(device) for name, value in given.items()}
    said: dict[str, Any] = {"do_sample": False, "max_new_tokens": options.new_tokens, "min_new_tokens": 1}
    kept: dict[str, int] = {}

    def plain() -> torch.Tensor:
        return model.generate(**inputs, **said)

    def recorded(mode: str, **chosen: Any) -> torch.Tensor:
        with AttentionRecorder(model, mode=mode, **chosen) as recorder:
            out = model.generate(**inputs, **said)
        name = f"{mode} 1 layer" if chosen else mode
        kept[name] = recorder.attentions.nbytes
        return out

    middle = (options.layers // 2,)
    length = inputs["input_ids"].shape[1]
    case = f"{length} tokens + {options.new_tokens}"
    with torch.inference_mode():
        timings = compare(
            case,
            {
                "generate": lambda: plain().float(),
                "online": lambda: recorded("online").float(),
                "online 1 layer": lambda: recorded("online", layers=middle).float(),
                "replay": lambda: recorded("replay").float(),
                "replay 1 layer": lambda: recorded("replay", layers=middle).float(),
            },
            options.rounds,
        )
    report(timings, options.out)
    heads = model.config.text_config.num_attention_heads
    whole = options.layers * heads * length**2 * 4
    for name, size in kept.items():
        print(f"{name}: {size / 1e6:.2f} MB kept ({options.images * GRID * GRID} columns); ", end="")
        print(f"all attention of the prompt: {whole / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
