"""What a CLIP knows of the shapes world: retrieval, and telling a text from one with a wrong word."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visionsel.data.shapes import BACKGROUNDS, COLORS, SHAPES, SIZES, Sample, ShapeObject
from visionsel.data.shapes.language import with_article

__all__ = [
    "KINDS",
    "Phrase",
    "choose_phrase",
    "measure_clip",
    "phrase_text",
    "preferred",
    "quality",
    "quality_texts",
    "retrieval",
    "wrong_caption",
]

KINDS: dict[str, tuple[str, ...]] = {
    "color": COLORS,
    "shape": SHAPES,
    "size": SIZES,
    "background": BACKGROUNDS,
}
"""The words of captions that can be exchanged."""

Phrase = tuple[str | None, str | None, str]
"""Size, colour and shape of one mention; None is not said."""


def wrong_caption(caption: str, kind: str, generator: np.random.Generator) -> str:
    """The caption with one word of a kind exchanged.

    A caption mentions every object once, so that it is never true of its scene afterwards.

    Raises:
        ValueError: when the caption has no word of that kind.
    """
    words = caption.split()
    places = [i for i, word in enumerate(words) if word in KINDS[kind]]
    if not places:
        raise ValueError(f"no {kind} in the caption {caption!r}")
    place = places[generator.integers(len(places))]
    others = [word for word in KINDS[kind] if word != words[place]]
    words[place] = others[generator.integers(len(others))]
    return " ".join(words)


def choose_phrase(
    objects: Sequence[ShapeObject], generator: np.random.Generator, said: int | None = None
) -> tuple[Phrase, Phrase]:
    """A phrase that fits an object, and one that differs in one word and fits none.

    Args:
        objects: of the scene.
        generator: of the choices.
        said: 1 for the shape, 2 for colour and shape, 3 for all; None chooses (1 one time in five).
    """
    said = int(generator.choice([1, 2, 3], p=[0.2, 0.4, 0.4])) if said is None else said
    o = objects[int(generator.integers(len(objects)))]
    phrase: Phrase = (o.size if said > 2 else None, o.color if said > 1 else None, o.shape)
    kinds = (SIZES, COLORS, SHAPES)
    wrong: list[Phrase] = []
    while not wrong:
        part = int(generator.integers(3 - said, 3))
        for word in kinds[part]:
            size, color, shape = (word if i == part else own for i, own in enumerate(phrase))
            other: Phrase = (size, color, str(shape))
            if not any(_fits(other, p) for p in objects):
                wrong.append(other)
    return phrase, wrong[generator.integers(len(wrong))]


def phrase_text(phrase: Phrase) -> str:
    """`a small red star`."""
    return with_article(" ".join(word for word in phrase if word is not None))


def _fits(phrase: Phrase, o: ShapeObject) -> bool:
    return all(word in (None, own) for word, own in zip(phrase, (o.size, o.color, o.shape), strict=True))


def retrieval(images: Tensor, texts: Tensor, among: int = 100) -> tuple[float, float]:
    """Recall at 1 of the text for an image and of the image for a text.

    Args:
        images, texts: normalized features `[N, C]` of pairs.
        among: candidates of each choice; what does not fill a group is left out, unless there is only one.
    """
    hits = torch.zeros(2)
    groups = max(1, len(images) // among)
    count = 0
    for start in range(0, groups * among, among):
        similar = images[start : start + among] @ texts[start : start + among].T
        own = torch.arange(len(similar), device=similar.device)
        hits[0] += (similar.argmax(1) == own).sum().item()
        hits[1] += (similar.argmax(0) == own).sum().item()
        count += len(similar)
    to_text, to_image = (hits / count).tolist()
    return to_text, to_image


def preferred(images: Tensor, right: Tensor, wrong: Tensor) -> float:
    """How often an image is nearer to the right text than to the wrong one; features `[N, C]`."""
    return ((images * right).sum(1) > (images * wrong).sum(1)).float().mean().item()


@torch.no_grad()
def measure_clip(
    model: nn.Module,
    preprocess: Callable[..., Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    samples: Sequence[Sample],
    seed: int = 0,
    batch_size: int = 100,
) -> dict[str, float]:
    """Quality on scenes of the shapes world.

    Args:
        model, preprocess, tokenizer: as `load_clip` or open_clip gives them; the model in evaluation mode.
        samples: at least one; retrieval is among 100 of them in turn.
        seed: of the wrong words.
        batch_size: of the encoders.

    Returns:
        `image_to_text`, `text_to_image`: recall at 1 of captions among 100. `color`, `shape`: how often the
        caption is preferred to one with a wrong word of that kind. `phrase`: the same for a phrase of one
        object, such as "a red star", and one that fits none.

    Raises:
        ValueError: when there are no samples.
    """
    if not len(samples):
        raise ValueError("measure_clip needs at least one sample, got none")
    encoder: Any = model
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(samples), batch_size):
        part = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
        texts: dict[str, list[str]] = {"right": [], "color": [], "shape": [], "phrase": [], "wrong": []}
        for offset, sample in enumerate(part):
            for name, text in quality_texts(sample, np.random.default_rng((seed, start + offset))).items():
                texts[name].append(text)
        pixels = torch.stack([preprocess(sample.image) for sample in part]).to(device)
        found.setdefault("image", []).append(encoder.encode_image(pixels, normalize=True))
        for name, lines in texts.items():
            features = encoder.encode_text(tokenizer(lines).to(device), normalize=True)
            found.setdefault(name, []).append(features)
    return quality({name: torch.cat(parts) for name, parts in found.items()})


def quality_texts(sample: Sample, generator: np.random.Generator) -> dict[str, str]:
    """The texts that a scene is measured with, by name."""
    caption = sample.captions[0]
    phrase, wrong = choose_phrase(sample.objects, generator)
    return {
        "right": caption,
        "color": wrong_caption(caption, "color", generator),
        "shape": wrong_caption(caption, "shape", generator),
        "phrase": phrase_text(phrase),
        "wrong": phrase_text(wrong),
    }


def quality(features: dict[str, Tensor]) -> dict[str, float]:
    """The measures of `measure_clip` from normalized features `[N, C]` of "image" and the texts by name."""
    images, right = features["image"], features["right"]
    to_text, to_image = retrieval(images, right)
    return {
        "image_to_text": to_text,
        "text_to_image": to_image,
        "color": preferred(images, right, features["color"]),
        "shape": preferred(images, right, features["shape"]),
        "phrase": preferred(images, features["phrase"], features["wrong"]),
    }
