"""What the demos show: a vision-language model and a segmenter, and what is known about them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from visionsel.devices import choose_device
from visionsel.embedded.files import WEIGHTS
from visionsel.multimodal.grounding.grounder import Grounder
from visionsel.multimodal.grounding.segmenters import build_segmenter

__all__ = ["MAX_NEW_TOKENS", "Models", "load_models"]

MAX_NEW_TOKENS = 128


@dataclass(eq=False)
class Models:
    """The models of one app; one request at a time works with them.

    Attributes:
        model, processor: a vision-language model of transformers.
        segmenter: what `Grounder` takes.
        segmenter_name: what the page calls it; default the class of its model.
    """

    model: Any
    processor: Any
    segmenter: Any
    segmenter_name: str = ""
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _grounders: dict[str, Grounder] = field(default_factory=dict, repr=False)

    @cached_property
    def embedded(self) -> bool:
        """Whether the model is the one of the package, which knows coloured shapes only."""
        name = getattr(self.model, "name_or_path", "")
        return bool(name) and Path(name).resolve() == (WEIGHTS / "lvlm").resolve()

    @property
    def name(self) -> str:
        """What the page calls the model."""
        if self.embedded:
            return "the embedded LLaVA"
        return Path(self.model.name_or_path).name or type(self.model).__name__

    @property
    def facts(self) -> dict[str, str]:
        """What the page says of the models: names, sizes, and where they run."""
        inner = getattr(self.segmenter, "model", self.segmenter)
        named = self.segmenter_name or getattr(inner, "name_or_path", "") or type(inner).__name__
        precision = str(self.model.dtype).removeprefix("torch.")
        return {
            "model": f"{self.name}, {_size(self.model)} parameters",
            "segmenter": f"{named}, {_size(inner)} parameters",
            "on": f"{self.model.device}, {precision}",
        }

    @property
    def layers(self) -> int:
        """Of the decoder."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Nobody else uses the models in the block: interventions change a model while they last."""
        with self._lock:
            yield

    def grounder(self, heatmap: str) -> Grounder:
        """The grounder of a heatmap method; each is made once."""
        with self._lock:
            if heatmap not in self._grounders:
                self._grounders[heatmap] = Grounder(self.model, self.processor, self.segmenter, heatmap)
            return self._grounders[heatmap]


def load_models(
    name: str = "embedded",
    segmenter: str = "embedded",
    device: str | None = None,
    dtype: str | None = None,
    checkpoint: Path | None = None,
) -> Models:
    """Load models by name, see `visionsel.generation.load_lvlm` and `build_segmenter`.

    Args:
        name: of the vision-language model: `"embedded"`, a folder, or a name of transformers.
        segmenter: `"embedded"`, `"sam:vit_b"` or `"hf:NAME"`.
        device: default cuda if there is one, else cpu.
        dtype: of the model's weights; default what they are stored in.
        checkpoint: weights of `"sam:..."`.

    Raises:
        ImportError, OSError, ValueError: as the loaders.
    """
    from visionsel.generation import load_lvlm

    # segmenters are quick to refuse: before a large model is loaded
    made = build_segmenter(segmenter, choose_device(device), checkpoint=checkpoint)
    model, processor = load_lvlm(name, device, dtype)
    called = "the embedded SAM" if segmenter == "embedded" else segmenter.removeprefix("hf:")
    return Models(model, processor, made, called)


def _size(model: Any) -> str:
    """How many parameters a model has, in thousands, millions or billions."""
    number = float(sum(parameter.numel() for parameter in model.parameters()))
    for unit in ("", " k", " M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} B"
