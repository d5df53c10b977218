"""Small models for the report, and a reader of its HTML."""

import base64
import functools
import io
from html.parser import HTMLParser
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from train.lvlm import build_lvlm
from train.report import Sizes
from visionsel.data.shapes import CAPTION_PROMPT
from visionsel.embedded.lvlm import build_processor
from visionsel.embedded.segmenter import build_sam

SAM = {"patch_size": 8, "encoder_dim": 32, "encoder_depth": 1, "window_size": 4, "global_layers": [0]}
SAM |= {"embed_dim": 32, "decoder_depth": 1, "decoder_mlp_dim": 64}
SMALLEST = Sizes(captions=1, grounding=1, pruning=1, hallucination=2)
WORDS = 6  # of what the stand-in says


def small_models() -> tuple[Any, Any, Any]:
    """As `load_models`: a LLaVA and a SAM of random weights, large ones so that it babbles, but not for long.

    The decoder has the shape of the embedded one, whose heads are the preset's.
    """
    torch.manual_seed(1)
    processor = build_processor()
    small = {"vision_dim": 16, "vision_layers": 2, "vision_heads": 2}
    model = build_lvlm(processor.tokenizer.get_vocab(), **small).eval()
    model.generation_config.update(suppress_tokens=processor.tokenizer.all_special_ids)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(30)
    generate = model.generate

    @functools.wraps(generate)
    def brief(*args: Any, **options: Any) -> Any:
        return generate(*args, **{**options, "max_new_tokens": min(WORDS, options["max_new_tokens"])})

    model.generate = brief
    return model, processor, build_sam(SAM).eval()


class Reader(HTMLParser):
    """Elements, their attributes and the texts of those with a class; every element must be closed.

    Attributes:
        tags: names of the elements.
        attributes: of all of them.
        texts: by class (by name where there is none), the text of each element.
        rows: of all tables, the texts of their cells.
    """

    void = ("meta", "img")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag in self.void:
            return
        name = dict(attrs).get("class") or tag
        self.open.append((tag, name))
        self.texts.setdefault(name, []).append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for name in dict.fromkeys(name for _, name in self.open):
            self.texts[name][-1] += data
        if any(tag in ("th", "td") for tag, _ in self.open):
            self.rows[-1][-1] += data

    @property
    def sources(self) -> list[str]:
        """Of all pictures."""
        return [value for name, value in self.attributes if name == "src"]

    @property
    def pictures(self) -> list[np.ndarray]:
        """The pixels of all pictures, uint8 `[H, W, 3]`."""
        return [pixels_of(source) for source in self.sources]


def pixels_of(source: str) -> np.ndarray:
    """The pixels of a data URI."""
    kind, data = source.split(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        return np.asarray(picture.convert("RGB"))


def plant(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, caption: str, answers: dict[str, str] | None = None
) -> None:
    """Answers of the vision-language model: one caption, and others by prompt."""

    def generate(model: Any, processor: Any, images: list[Any], prompts: list[str], **_: Any) -> list[str]:
        return [caption if prompt == CAPTION_PROMPT else (answers or {})[prompt] for prompt in prompts]

    monkeypatch.setattr(module, "generate_answers", generate)
