"""Which heads look at the image: how far what each says moves when the image is taken away.

The measure is the divergence of VHR (He et al. 2024, arXiv 2412.13949, eq. 4), here at every token of a text
at once, without changing the model. Its mean over samples is a table of layers and heads; summed over the
highest heads (`vhr.t_vhd`, eq. 5) it says how much a token owes to the image.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.data.shapes import CAPTION_PROMPT
from visionsel.files import whole_file, write_json
from visionsel.multimodal.modulation.heads import check_layers, head_hook
from visionsel.multimodal.modulation.image_free import ImageFree, divergence
from visionsel.multimodal.modulation.samples import batches, encode, predicting
from visionsel.multimodal.session import Session, open_session

__all__ = ["HeadImportance", "head_importance", "visual_sensitivity"]


@dataclass(frozen=True)
class HeadImportance:
    """A number for each head.

    Attributes:
        sensitivity: `[layers][heads]`: the mean divergence.
        samples: over how many samples.
        tokens: over how many tokens of their answers.
    """

    sensitivity: list[list[float]]
    samples: int
    tokens: int

    def top(self, number: int) -> dict[int, list[int]]:
        """The heads with the highest numbers, by layer: what `GroundingHeads` takes.

        Raises:
            ValueError: for a number below 1 or above that of all heads.
        """
        table = torch.tensor(self.sensitivity)
        if not 1 <= number <= table.numel():
            raise ValueError(f"number must be from 1 to {table.numel()}, got {number}")
        chosen: dict[int, list[int]] = {}
        order = table.flatten().argsort(descending=True, stable=True)[:number].tolist()
        for place in sorted(order):
            chosen.setdefault(place // table.shape[1], []).append(place % table.shape[1])
        return chosen

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all."""
        content = {"sensitivity": self.sensitivity, "samples": self.samples, "tokens": self.tokens}
        return write_json(content, path)

    @classmethod
    def load(cls, path: str | Path) -> "HeadImportance":
        """Read what `save` wrote.

        Raises:
            ValueError: for a file with other content.
        """
        try:
            content = json.loads(Path(path).read_text())
            table = [[float(value) for value in row] for row in content["sensitivity"]]
            if not table or not table[0] or len({len(row) for row in table}) > 1:
                raise ValueError("sensitivity must be a table of layers and heads")
            return cls(table, int(content["samples"]), int(content["tokens"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no table of heads: {error}") from error

    def plot(self, path: str | Path) -> Path:
        """Draw a heatmap, a row a layer, and write it as a picture.

        Raises:
            ImportError: without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError as error:
            raise ImportError('the heatmap needs matplotlib: pip install "visionsel[train]"') from error
        layers, heads = len(self.sensitivity), len(self.sensitivity[0])
        figure = Figure(figsize=(2 + 0.3 * max(8, heads), 1.4 + 0.25 * max(8, layers)), layout="constrained")
        axes = figure.subplots()
        picture = axes.imshow(self.sensitivity, aspect="auto", cmap="viridis")
        axes.set(xlabel="head", ylabel="layer", title=f"visual sensitivity, {self.samples} samples")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(picture, label="mean divergence")
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=150)
        return Path(path)


def head_importance(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Any],
    prompt: str = CAPTION_PROMPT,
    batch_size: int = 8,
) -> HeadImportance:
    """How much each head looks at the image while the model says what is true of it.

    Args:
        model: a vision-language model.
        processor: its own, with a chat template.
        samples: with `image` and `captions`, as those of `ShapesWorld`.
        prompt: what is asked about each image.
        batch_size: samples at a time.

    Returns:
        the mean of `visual_sensitivity` over the places at which tokens of the first captions are predicted.

    Raises:
        ValueError: without samples, or where the chat template changes a caption.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.data.shapes import ShapesWorld
        >>> from visionsel.multimodal import GroundingHeads, head_importance
        >>> samples = list(ShapesWorld("balanced", seed=1, size=4))
        >>> importance = head_importance(model, processor, samples)
        >>> len(importance.sensitivity), len(importance.sensitivity[0])  # layers, heads
        (4, 4)
        >>> heads = GroundingHeads(importance.top(3))
    """
    total: Tensor | None = None
    tokens = 0
    for part in batches(samples, batch_size):
        inputs, texts = encode(model, processor, part, prompt, answered=True)
        mask = inputs["attention_mask"]
        counted = torch.zeros_like(mask, dtype=torch.bool)
        for row, (sample, text) in enumerate(zip(part, texts, strict=True)):
            [first], end = predicting(processor, text, sample.captions[0], [0], mask[row])
            counted[row, first : end - 1] = True
        layers = visual_sensitivity(model, inputs)
        table = torch.stack([one[counted.to(one.device)].double().sum(0).cpu() for one in layers.values()])
        total = table if total is None else total + table
        tokens += int(counted.sum())
    assert total is not None
    return HeadImportance((total / tokens).tolist(), len(samples), tokens)


@torch.no_grad()
def visual_sensitivity(
    model: nn.Module, inputs: Mapping[str, Any], layers: Iterable[int] | None = None
) -> dict[int, Tensor]:
    """The divergence of heads at every token of a text, for a model that is not changed.

    Args:
        model: a vision-language model.
        inputs: of the model, as its processor gives them; what it answered may follow the prompt.
        layers: decoder layers; None: all.

    Returns:
        for each layer `[B, L, heads]`. The value at a token is that of the prediction of the next one; it is
        0 at image tokens and padding.

    Raises:
        ValueError: for layers that do not exist, inputs without an image, or a model under VHR.
    """
    with open_session(model) as session, ExitStack() as stack:
        if session.shared.get("vhr"):
            raise ValueError("the model is under VHR, which compares prompts itself: leave its context")
        chosen = check_layers(range(len(session.layers)) if layers is None else layers, session)
        session.tap_decoder()
        watcher = _Watcher(session)
        hook = session.decoder.register_forward_pre_hook(watcher.begin, with_kwargs=True)
        stack.callback(hook.remove)
        for layer in chosen:
            stack.enter_context(head_hook(session, layer, partial(watcher.see, layer)))
        model(**{**inputs, "use_cache": False})
    return watcher.found


class _Watcher:
    """Sees the heads of a prompt with and without its images."""

    def __init__(self, session: Session) -> None:
        self.found: dict[int, Tensor] = {}
        self._session = session
        self._text: ImageFree | None = None
        self._with_image: Tensor | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scope = self._session.scope
        assert scope is not None
        if not bool(scope.visual.any()):
            raise ValueError("the prompt has no image that heads could look at")
        self._text = ImageFree(self._session, kwargs)

    def see(self, layer: int, outputs: Tensor) -> None:
        scope, text = self._session.scope, self._text
        assert scope is not None
        assert text is not None
        if not self._session.untapped:
            self._with_image = text.beside(layer, outputs)
            text.advance(layer)
            return
        assert self._with_image is not None
        apart = divergence(self._with_image, outputs) * text.real[..., None].to(outputs.device)
        columns = text.columns.to(apart.device)[..., None].expand_as(apart)
        self.found[layer] = apart.new_zeros(len(apart), scope.length, apart.shape[-1]).scatter(
            1, columns, apart
        )
