"""The pointing game for every head of a decoder: does it look at the object that is about to be named?"""

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.data.shapes import CAPTION_PROMPT
from visionsel.multimodal.attention import AttentionCall, Output, attention_rows
from visionsel.multimodal.families.family import TokenLayout
from visionsel.multimodal.modulation.samples import batches, encode, object_name, predicting
from visionsel.multimodal.session import Session, open_session

__all__ = ["Pointing", "pointing"]

COVERED = 1 / 8  # of a token's patch, for a hit


@dataclass(frozen=True)
class Pointing:
    """How often heads point at what is about to be named.

    Attributes:
        hits: `[layers, heads]`: share of names at which the token of the image with most attention shows the
            object.
        chance: share that a token drawn at random would have.
        named: how many names were looked at.
    """

    hits: Tensor
    chance: float
    named: int

    def best(self, number: int) -> list[tuple[int, int]]:
        """Layer and head of those with the most hits, more than chance."""
        heads = self.hits.shape[1]
        order = self.hits.flatten().argsort(descending=True, stable=True)[:number].tolist()
        places = [divmod(place, heads) for place in order]
        return [place for place in places if float(self.hits[place]) > self.chance]


@torch.inference_mode()
def pointing(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Any],
    prompt: str = CAPTION_PROMPT,
    batch_size: int = 25,
) -> Pointing:
    """The pointing game (Zhang et al. 2018) for each head, where the names of objects are predicted.

    The first caption of each sample is read as the answer; where a name of an object is about to come, for
    the first time, the token of the image that a head attends to most is looked up. It hits when the mask of
    an object of that name covers more than an eighth of its patch.

    Args:
        model: a vision-language model.
        processor: its own, with a chat template.
        samples: with `image`, `captions` and `objects`.
        prompt: what is asked about each image.
        batch_size: samples at a time.

    Raises:
        ValueError: when no caption names an object, or where the model is pruned.
    """
    found: list[Tensor] = []
    chance: list[float] = []
    for part in batches(samples, batch_size):
        inputs, texts = encode(model, processor, part, prompt, answered=True)
        named = [
            _named(processor, sample, text, mask)
            for sample, text, mask in zip(part, texts, inputs["attention_mask"], strict=True)
        ]
        longest = max(map(len, named))
        if not longest:
            continue
        rows = [[place for place, _ in row] + [0] * (longest - len(row)) for row in named]
        index = torch.tensor(rows, device=inputs["input_ids"].device)
        with open_session(model) as session:
            attention = _rows(session, inputs, index)
            scope = session.scope
            assert scope is not None
            sizes = [(sample.image.height, sample.image.width) for sample in part]
            layouts = scope.family.layouts(model, scope.encoded["image"], processor, sizes)
            columns = (inputs["input_ids"] == scope.family.token_ids(model)["image"]).cpu()
        for row, (sample, layout) in enumerate(zip(part, layouts, strict=True)):
            tokens = columns[row].nonzero()[:, 0]
            for number, (_, name) in enumerate(named[row]):
                mask = _mask(sample, name)
                cover, seen = _cover(mask, layout)
                peak = attention[:, row, :, number][..., tokens].argmax(-1)  # [layers, heads]
                found.append((cover > COVERED)[peak].double())
                chance.append(float((cover > COVERED)[seen].double().mean()))
    if not found:
        raise ValueError("no caption names an object of its sample, so nothing can be pointed at")
    return Pointing(torch.stack(found).mean(0), sum(chance) / len(chance), len(found))


def _named(processor: Any, sample: Any, text: str, mask: Tensor) -> list[tuple[int, str]]:
    """The place before each name, at its first mention, and the name."""
    answer = sample.captions[0]
    names = sorted({object_name(item) for item in sample.objects})
    spans = [(re.search(rf"\b{re.escape(name)}\b", answer.lower()), name) for name in names]
    starts = [(match.start(), name) for match, name in spans if match is not None]
    places, _ = predicting(processor, text, answer, [start for start, _ in starts], mask)
    return [(place, name) for place, (_, name) in zip(places, starts, strict=True)]


def _rows(session: Session, inputs: Any, index: Tensor) -> Tensor:
    """Attention `[layers, B, heads, t, L]` of the queries at `index` `[B, t]`, on the CPU."""
    rows: dict[int, Tensor] = {}

    def watch(layer: int) -> Callable[[AttentionCall, Callable[[AttentionCall], Output]], Output]:
        def see(call: AttentionCall, run: Callable[[AttentionCall], Output]) -> Output:
            if call.key.shape[2] != inputs["input_ids"].shape[1]:
                raise ValueError(
                    "a pruner drops image tokens of this model; calibrate outside of its context"
                )
            rows[layer] = attention_rows(call, index.to(call.query.device)).float().cpu()
            return run(call)

        return see

    with ExitStack() as stack:
        for layer in range(len(session.layers)):
            stack.enter_context(session.tap(layer, watch(layer)))
        session.model(**inputs, use_cache=False)
    return torch.stack([rows[layer] for layer in range(len(session.layers))])


def _mask(sample: Any, name: str) -> Tensor:
    """bool `[H, W]`: all objects of a name."""
    masks = [torch.as_tensor(item.mask) for item in sample.objects if object_name(item) == name]
    return torch.stack(masks).bool().any(0)


def _cover(mask: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """What share of its patch each token of an image shows of a mask, `[n]`; and which tokens have one."""
    cover = torch.zeros(layout.n)
    seen = torch.zeros(layout.n, dtype=torch.bool)
    # sums over all pixels above and left of a corner
    sums = torch.nn.functional.pad(mask.double(), (1, 0, 1, 0)).cumsum(0).cumsum(1)
    for view in layout.views:
        assert view.box is not None
        height, width = view.index.shape
        x0, y0, x1, y1 = view.box
        xs = torch.linspace(x0, x1, width + 1).round().long().clamp(0, mask.shape[1])
        ys = torch.linspace(y0, y1, height + 1).round().long().clamp(0, mask.shape[0])
        corners = sums[ys][:, xs]
        inside = corners[1:, 1:] - corners[1:, :-1] - corners[:-1, 1:] + corners[:-1, :-1]
        area = ((y1 - y0) / height) * ((x1 - x0) / width)
        cover[view.index.flatten()] = (inside / area).float().flatten()
        seen[view.index.flatten()] = True
    return cover, seen
