"""`visionsel demo`: the three demos in a browser, served on this machine only."""

import argparse
import os
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

from visionsel.cli_text import add_verb

__all__ = ["add_demo"]


def add_demo(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb `demo` to the command; `common` has the options of every verb."""
    demo = add_verb(
        verbs,
        "demo",
        common,
        "see it in the browser: grounding, pruning and hallucination, on this machine only",
        "visionsel demo --port 7860  # then open http://127.0.0.1:7860",
    )
    demo.add_argument(
        "--model",
        default="embedded",
        help="a folder or a name of a vision-language model of transformers, such as "
        "llava-hf/llava-1.5-7b-hf (default: the small one of the package, which knows coloured shapes)",
    )
    demo.add_argument(
        "--segmenter",
        default="embedded",
        metavar="SPEC",
        help="sam:vit_b (or vit_l, vit_h) with --checkpoint, hf:NAME for a SAM, SAM 2 or SAM 3 of "
        "transformers, or embedded (default: the small one of the package)",
    )
    demo.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights of sam:...")
    demo.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    demo.add_argument(
        "--share",
        action="store_true",
        help="open a public link through a server of Gradio's: whoever has it can use the demo",
    )
    demo.add_argument("--device", help="default: cuda if there is one, else cpu")
    demo.add_argument("--dtype", help="of the model's weights, such as bfloat16 (default: as stored)")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    if options.port is not None and not 1 <= options.port <= 65535:
        raise ValueError(f"--port is a number from 1 to 65535, got {options.port}")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    try:
        import_module("gradio")
    except ImportError as error:
        raise ImportError('the demo needs Gradio: pip install "visionsel[demo]"') from error
    try:
        run = import_module("demos.app").run
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("demos"):
            raise
        raise ImportError(
            "the package demos of visionsel was not found, or another one of this name comes first; "
            "run the command in another folder, or install visionsel anew"
        ) from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its end deletes files, as that of Ctrl-C
    run(
        options.port,
        options.share,
        name=options.model,
        segmenter=options.segmenter,
        device=options.device,
        dtype=options.dtype,
        checkpoint=options.checkpoint,
    )
