"""VLMEvalKit with any vision-language model of transformers and interventions: a launcher of its `run.py`.

    python -m visionsel.integrations.vlmeval --model llava-hf/llava-1.5-7b-hf --dtype bfloat16 \\
        --modulate vhr:alpha=2 --decode vcd:alpha=1 -- --data POPE MME --work-dir outputs

What stands behind `--` goes to `run.py`. VLMEvalKit finds models by a table in its source and has no place
for others, so this puts one into the table and then runs `run.py`, in one process; under torchrun, write
`torchrun --nproc-per-node=8 -m visionsel.integrations.vlmeval ...`. Results are filed under a name made of
the model and its methods, or `--name`.

Read from VLMEvalKit at commit e8e78f05 (2026-08-18, version 0.2rc1) and tested with its base class.
"""

import argparse
import re
import runpy
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

try:
    from vlmeval.vlm.base import BaseModel
except ImportError as error:
    raise ImportError(
        "visionsel.integrations.vlmeval needs VLMEvalKit: git clone "
        f"https://github.com/open-compass/VLMEvalKit && pip install -e VLMEvalKit ({error})"
    ) from error

from visionsel.generation import load_lvlm, open_image, parse_methods
from visionsel.integrations.conversations import Conversation, answer_conversations, sampling_options

__all__ = ["VisionSel", "main", "result_name"]


class VisionSel(BaseModel):
    """A model of VLMEvalKit; it answers greedily.

    Args:
        model_path: a folder or a name of transformers, or `"embedded"`.
        prune, modulate, decode: methods as text, as for `visionsel generate`.
        dtype: of the weights, such as `"bfloat16"`; default what they are stored in.
        device: default cuda if there is one, else cpu.
        max_new_tokens: of an answer.
        use_vllm: VLMEvalKit passes it to models with certain names; only False is known here.

    Raises:
        ValueError: for an unknown method, or `use_vllm=True`.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        model_path: str = "embedded",
        prune: Sequence[str] = (),
        modulate: Sequence[str] = (),
        decode: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        max_new_tokens: int = 1024,
        use_vllm: bool = False,
    ) -> None:
        super().__init__()
        if use_vllm:
            raise ValueError("interventions need the model of transformers; leave out --use-vllm")
        self.options = sampling_options(max_new_tokens)
        self.model, self.processor = load_lvlm(model_path, device, dtype)
        self.methods = parse_methods(self.model, self.processor, prune, modulate, decode)

    def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to a message of images and texts."""
        return self._answer([(part.get("role", "user"), [part]) for part in message])

    def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
        """The answer to the last of several turns."""
        return self._answer([(turn["role"], turn["content"]) for turn in message])

    def _answer(self, said: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> str:
        turns: list[dict[str, Any]] = []
        images = []
        for role, parts in said:
            if not turns or turns[-1]["role"] != role:
                turns.append({"role": role, "content": []})
            for part in parts:
                if part["type"] == "image":
                    images.append(open_image(part["value"]))
                    turns[-1]["content"].append({"type": "image"})
                elif part["type"] == "text":
                    turns[-1]["content"].append({"type": "text", "text": part["value"]})
                else:
                    raise NotImplementedError(f"visionsel answers about images and text, got {part['type']}")
        one = Conversation(turns, images, self.options)
        return answer_conversations(self.model, self.processor, self.methods, [one])[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Register the model and run VLMEvalKit.

    Raises:
        FileNotFoundError: where its `run.py` is not.
        ValueError: for a name that VLMEvalKit has already.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    cut = given.index("--") if "--" in given else len(given)
    options = _parser().parse_args(given[:cut])
    import vlmeval
    from vlmeval.config import supported_VLM

    script = options.run or Path(vlmeval.__file__).resolve().parents[1] / "run.py"
    if not script.is_file():
        raise FileNotFoundError(
            f"no run.py of VLMEvalKit at {script}; install it from a clone (pip install -e VLMEvalKit), or "
            "pass --run FILE"
        )
    methods = [*options.prune, *options.modulate, *([options.decode] if options.decode else [])]
    name = options.name or result_name(options.model, methods)
    if name in supported_VLM:
        raise ValueError(f"VLMEvalKit has a model called {name}; choose another --name")
    supported_VLM[name] = partial(
        VisionSel,
        model_path=options.model,
        prune=tuple(options.prune),
        modulate=tuple(options.modulate),
        decode=options.decode,
        dtype=options.dtype,
        device=options.device,
        max_new_tokens=options.max_new_tokens,
    )
    before = sys.argv
    sys.argv = [str(script), "--model", name, *given[cut + 1 :]]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = before


def result_name(model: str, methods: Sequence[str]) -> str:
    """A name for files: `llava-1.5-7b-hf+vhr-alpha-2`."""
    parts = [model.rstrip("/").rpartition("/")[2], *methods]
    return "+".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-") for part in parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m visionsel.integrations.vlmeval",
        description="Evaluate a vision-language model with interventions in VLMEvalKit.",
        epilog="what stands behind -- goes to VLMEvalKit's run.py: -- --data POPE --work-dir outputs",
    )
    add = parser.add_argument
    add("--model", required=True, help='a folder or a name of transformers, or "embedded"')
    add("--name", help="under which results are filed (default: made of the model and its methods)")
    several: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "SPEC"}
    add("--prune", help="pruners, such as fastv:keep=0.25,layer=2", **several)
    add("--modulate", help="methods that change attention or heads, such as vhr:alpha=2", **several)
    add("--decode", metavar="SPEC", help="a method of decoding, such as vcd:alpha=1")
    add("--dtype", help="of the weights, such as bfloat16 (default: what they are stored in)")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--max-new-tokens", type=int, default=1024, help="of an answer (default: 1024)")
    add("--run", type=Path, metavar="FILE", help="VLMEvalKit's run.py (default: beside the package)")
    return parser


if __name__ == "__main__":
    main()
