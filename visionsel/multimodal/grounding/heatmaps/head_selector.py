"""Finding the heads of a model that look at what a text is about.

Kang et al. 2025, "Your Large Vision-Language Model Only Needs A Few Attention Heads For Visual Grounding",
CVPR 2025, arXiv:2503.06287; release seilk/LocalizationHeads. Each prompt has an image and says one thing of
it; of each head the row of attention of the last prompt token counts, on the image tokens:

1. Its sum tells heads that look at the image at all: those at or above the value at which the sorted curve of
   the sums bends, in the mean of all samples.
2. Of these, heads whose map holds together have a low spatial entropy. In each sample the lowest `top` are
   counted, heads that look at the whole bottom row left out.

The heads that are counted most often are the localization heads. The release compares a place in the sorted
curve with the numbers of heads; here the sums are compared, as in the paper.

The map of a head lies on the grids that show a whole image (`image_views`): of an image in tiles on its
thumbnail; where there are several images, the components on all of them count together.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from visionsel.files import write_json
from visionsel.multimodal.grounding.heatmaps.rows import decoder_layers, image_rows, image_views
from visionsel.multimodal.grounding.heatmaps.sinks import SinkFilter, sink_columns, without_sinks
from visionsel.multimodal.grounding.heatmaps.spatial import bend, fills_bottom, spatial_entropy
from visionsel.multimodal.grounding.replay import Replay
from visionsel.multimodal.head_presets import ABOUT, describe_model, preset_file, refuse_other_model
from visionsel.multimodal.prompts import chat_inputs, user_turn

__all__ = ["HeadSelector", "HeadStatistics", "head_statistics", "order_heads"]

PRESETS = Path(__file__).parent / "head_presets"
Head = tuple[int, int]


@dataclass(frozen=True)
class HeadStatistics:
    """What the last prompt token attends to, for each head.

    Attributes:
        maps: float32 `[B, layers, heads, n]`.
        sums: float64 `[B, layers, heads]`: attention to the image.
        entropy: float64 `[B, layers, heads]`: spatial entropy; infinite for flat maps, and for those that
            fill the bottom row.
    """

    maps: Tensor
    sums: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class HeadSelector:
    """Heads of a model in the order of how often they were among the best.

    Attributes:
        counts: layer, head and in how many samples it was among the `top`, most often first; heads that
            never were are left out.
        tau: the least mean attention to the image of the heads that could be counted.
        samples: how many there were.
        top: how many heads a sample counts.
        model: whose heads they are: `type` and `decoder`, as their configurations call them, `layers`,
            `heads` a layer and `width` of the decoder.
        made: how, in words of whoever made it.
    """

    counts: tuple[tuple[int, int, int], ...]
    tau: float
    samples: int
    top: int
    model: Mapping[str, Any] = field(compare=False)
    made: Mapping[str, Any] | None = field(default=None, compare=False)

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        processor: Any,
        images: Sequence[Any],
        texts: Sequence[str],
        *,
        top: int = 10,
        batch_size: int = 8,
        sinks: str | SinkFilter | None = None,
    ) -> "HeadSelector":
        """Count heads over images with a text about one thing in each.

        Of each sample two numbers a head are kept, so that any number of samples will do.

        Args:
            model: a vision-language model.
            processor: its own.
            images: one of each sample, or a list of some; the paper takes 1,000 of RefCOCO.
            texts: what the user says, such as a question about one object.
            top: how many heads a sample counts; the paper takes 10 of a thousand. Choose it well below the
                number of heads.
            batch_size: samples at a time.
            sinks: image tokens to leave out first, see `sinks.py`.

        Raises:
            ValueError: for no samples, numbers that do not fit, or when no head passes.
        """
        if not len(texts) or len(images) != len(texts) or batch_size < 1:
            raise ValueError(
                "there must be an image for each text, and a batch of at least 1; got "
                f"{len(images)} images, {len(texts)} texts and {batch_size}"
            )

        def replays() -> Iterator[Replay]:
            for start in range(0, len(texts), batch_size):
                part = slice(start, start + batch_size)
                pictures = [list(one) if isinstance(one, (list, tuple)) else [one] for one in images[part]]
                turns = [
                    [user_turn(text, len(some))] for text, some in zip(texts[part], pictures, strict=True)
                ]
                inputs = chat_inputs(processor, turns, pictures)
                inputs = inputs.to(cast(Any, model).device, cast(Any, model).dtype)
                # any token will do for an answer: only the prompt is looked at, which does not see it
                yield Replay(model, inputs, inputs["input_ids"][:, -1:])

        return cls.from_replays(replays(), top=top, sinks=sinks)

    @classmethod
    def from_replays(
        cls, replays: Iterable[Replay], *, top: int = 10, sinks: str | SinkFilter | None = None
    ) -> "HeadSelector":
        """As `fit`, from prompts that are ready to be read, with any answers.

        Args:
            replays: of one model; looked at one by one.
            top: how many heads a sample counts.
            sinks: image tokens to leave out first, see `sinks.py`.

        Raises:
            ValueError: for no samples, a `top` below 1, or when no head passes.
        """
        if top < 1:
            raise ValueError(f"top must be at least 1 head, got {top}")
        sums: list[Tensor] = []
        entropies: list[Tensor] = []
        model: nn.Module | None = None
        for replay in replays:
            layers = range(len(decoder_layers(replay)))
            statistics = head_statistics(replay, sink_columns(replay, sinks, layers))
            sums.append(statistics.sums.cpu())
            entropies.append(statistics.entropy.cpu())
            model = replay.model
        if model is None:
            raise ValueError("there are no samples to find heads with")
        mean, entropy = torch.cat(sums).mean(0), torch.cat(entropies)
        tau = bend(mean)
        counts = torch.zeros(mean.shape, dtype=torch.long)
        for sample in entropy:
            for head in order_heads(mean, sample, tau)[:top]:
                counts[head] += 1
        order = counts.flatten().argsort(descending=True, stable=True).tolist()
        places = [divmod(place, counts.shape[1]) for place in order]
        found = tuple((layer, head, int(counts[layer, head])) for layer, head in places)
        found = tuple(one for one in found if one[2])
        if not found:
            raise ValueError(
                "no head passes: the maps of all that look at the image are flat or fill the bottom row"
            )
        return cls(found, tau, len(entropy), top, describe_model(model))

    def best(self, k: int = 3) -> tuple[Head, ...]:
        """Layer and head of those that were counted most often; of equal ones the lower comes first.

        Raises:
            ValueError: for fewer than 1, or more than were counted.
        """
        if not 1 <= k <= len(self.counts):
            raise ValueError(f"k must be in 1 to {len(self.counts)}, as many heads were counted; got {k}")
        return tuple((layer, head) for layer, head, _ in self.counts[:k])

    def check(self, model: nn.Module) -> None:
        """Refuse a model of another kind.

        Raises:
            ValueError: for it.
        """
        refuse_other_model(self.model, model, "HeadSelector.fit")

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all."""
        content = {
            "model": dict(self.model),
            "heads": [list(one) for one in self.counts],
            "tau": self.tau,
            "samples": self.samples,
            "top": self.top,
            "made": self.made,
        }
        return write_json(content, path)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> "HeadSelector":
        """Read what `save` wrote.

        Args:
            path: of the file.
            model: that the heads are for; None: it is checked when they are used.

        Raises:
            FileNotFoundError: where there is no file.
            ValueError: for a file with other content, or heads of another model.
        """
        try:
            content = json.loads(Path(path).read_text())
            counts = tuple((int(layer), int(head), int(count)) for layer, head, count in content["heads"])
            about = {name: content["model"][name] for name in ABOUT}
            if not counts or not all(
                0 <= layer < about["layers"] and 0 <= head < about["heads"] for layer, head, _ in counts
            ):
                raise ValueError("it has no heads, or such as its model has not")
            found = cls(
                counts,
                float(content["tau"]),
                int(content["samples"]),
                int(content["top"]),
                about,
                content.get("made"),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no file of HeadSelector: {error}") from error
        if model is not None:
            found.check(model)
        return found

    @classmethod
    def preset(cls, name: str) -> "HeadSelector":
        """What ships with the package.

        Args:
            name: `"embedded"`: of `visionsel.embedded.load_lvlm`, as
                `python -m visionsel.embedded.localization_preset` finds it.

        Raises:
            ValueError: for a name that there is not.
        """
        return cls.load(preset_file(PRESETS, name, "HeadSelector.fit"))


def head_statistics(replay: Replay, without: Tensor | None = None) -> HeadStatistics:
    """Maps of the last prompt token in all heads, their sums and their spatial entropy.

    Args:
        replay: prompts with any answers.
        without: bool `[B, n]`: image tokens to leave out first.
    """
    found: list[Tensor] = []

    def see(layer: int, rows: Tensor) -> None:
        found.append(rows[:, :, 0])

    image_rows(replay, see, range(len(decoder_layers(replay))), "prompt")
    maps = torch.stack([rows.to(found[0].device) for rows in found], 1)
    maps = without_sinks(maps, without)
    entropy = torch.full(maps.shape[:-1], torch.inf, dtype=torch.float64, device=maps.device)
    for row, views in enumerate(image_views(replay, whole=True)):
        if views:
            grids = [maps[row][..., view.to(maps.device)] for view in views]
            entropy[row] = spatial_entropy(grids).masked_fill(fills_bottom(grids), torch.inf)
    return HeadStatistics(maps, maps.double().sum(-1), entropy)


def order_heads(sums: Tensor, entropy: Tensor, tau: float) -> list[Head]:
    """Heads that look at the image at least `tau`, from the lowest entropy on, those of infinite left out.

    Args:
        sums, entropy: `[layers, heads]`.
        tau: see `bend`.
    """
    entropy = entropy.masked_fill(sums < tau, torch.inf).flatten()
    order = entropy.argsort(stable=True).tolist()
    return [divmod(place, sums.shape[1]) for place in order if float(entropy[place]) < torch.inf]
