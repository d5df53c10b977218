"""Open-ended detection: what a vision-language model names, asked about in many ways and at two scales.

VL-SAM (Lin et al. 2024, arXiv:2410.05963): the image and its four quarters are asked about with ten
questions that list objects; the objects of all answers are segmented, and non-maximum suppression takes away
what is found twice. In the paper's ablation most of the recall comes from these two ensembles (on CODA from
14.1 to 27.3 with the quarters, and to 40.1 with the questions).
"""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torchvision.ops import batched_nms

from visionsel.multimodal.grounding.nouns import Names, find_names
from visionsel.multimodal.grounding.proposals import Heat, Proposal
from visionsel.multimodal.grounding.reading import Reading
from visionsel.multimodal.grounding.results import Box, Grounding, Word
from visionsel.multimodal.grounding.sources import Mention, Source
from visionsel.multimodal.grounding.words import tokens_between

__all__ = ["QUESTIONS", "ask_questions", "find_objects", "quarters", "suppress"]

QUESTIONS = (
    "describe the image.",
    "list all objects in the image.",
    "what objects can you see in this picture?",
    "name every thing that is visible, large or small.",
    "which people, animals and vehicles are in the image?",
    "what stands in the foreground, and what in the background?",
    "which small objects could easily be overlooked here?",
    "what is on the left, in the middle and on the right of the image?",
    "give a list of the things that a person would have to avoid in this scene.",
    "describe in detail everything that the image shows.",
)
"""Ours; the paper has the model write such questions (`"model"`)."""

REQUEST = (
    "Write ten different questions that ask to list all objects in an image, such as "
    '"What objects are in the image?". One question a line, nothing else.'
)
LEAST = 16  # pixels a side of a quarter: about one patch of most vision towers

Read = Callable[[Sequence[Image.Image], Sequence[str]], list[Reading]]
MakeWord = Callable[[str, tuple[int, int], Mention, Heat, Proposal, Box], Word]


def find_objects(
    image: Image.Image,
    questions: Sequence[str],
    crops: bool,
    *,
    read: Read,
    source: Source,
    make_word: MakeWord,
    names: Names,
    nms: float,
) -> Grounding:
    """Everything that answers about an image and its quarters name.

    Args:
        image: in RGB.
        questions: asked about each view.
        crops: look at the quarters too.
        read: asks the model.
        source: of heatmaps and masks.
        make_word: makes a result of a name, its span, mention, heatmap, proposal and window.
        names: see `find_names`.
        nms: IoU of boxes.

    Raises:
        ValueError: without questions.
    """
    if not questions:
        raise ValueError("detect needs at least one question")
    whole = (0, 0, image.width, image.height)
    windows = [whole, *(quarters(image.width, image.height) if crops else [])]
    views = [image if window == whole else image.crop(window) for window in windows]
    readings = read([view for view in views for _ in questions], [*questions] * len(views))
    found: list[Word] = []
    for number, (view, window) in enumerate(zip(views, windows, strict=True)):
        named = [
            (name, span, Mention(reading, tokens, view))
            for reading in readings[number * len(questions) : (number + 1) * len(questions)]
            for name, span in find_names(reading.answer, names)
            if (tokens := tokens_between(reading.spans, span))
        ]
        mentions = [mention for _, _, mention in named]
        heats = source.heats(mentions)
        rounds = source.segment(mentions, heats)
        for (name, span, mention), heat, proposals in zip(named, heats, rounds, strict=True):
            words = [make_word(name, span, mention, heat, one, window) for one in proposals]
            found += [word for word in words if word.box and not _is_cut(word.box, window, whole)]
    return Grounding(readings[0].answer, suppress(found, nms), image)


def suppress(words: Sequence[Word], nms: float) -> list[Word]:
    """Non-maximum suppression among the words of one name, by boxes; what stays, the best first.

    Args:
        words: with boxes.
        nms: the IoU above which the one with the lower score goes.
    """
    if not words:
        return []
    numbers = {name: number for number, name in enumerate(dict.fromkeys(word.name for word in words))}
    boxes = torch.tensor([word.box for word in words], dtype=torch.float32)
    scores = torch.tensor([word.score for word in words], dtype=torch.float32)
    groups = torch.tensor([numbers[word.name] for word in words])
    return [words[place] for place in batched_nms(boxes, scores, groups, nms).tolist()]


def quarters(width: int, height: int) -> list[Box]:
    """The four corners of an image, half as wide and high each; none where they were too small to look at."""
    w, h = -(-width // 2), -(-height // 2)
    if min(w, h) < LEAST:
        return []
    return [(x, y, x + w, y + h) for y in (0, height - h) for x in (0, width - w)]


def ask_questions(read: Read, image: Image.Image, number: int = 10) -> list[str]:
    """Questions that the model writes.

    Raises:
        ValueError: when it writes none.
    """
    answer = read([image], [REQUEST])[0].answer
    lines = (line.strip().lstrip("0123456789.)-*\u2022 ").strip(' "') for line in answer.splitlines())
    found = list(dict.fromkeys(line for line in lines if line.endswith("?") and " " in line))[:number]
    if not found:
        raise ValueError(f"the model wrote no questions but {answer!r:.80}; pass questions=[...]")
    return found


def _is_cut(box: Box, window: Box, whole: Box) -> bool:
    """Whether a box ends at an edge of its window that is inside of the image."""
    margin = max(1, round(0.01 * max(window[2] - window[0], window[3] - window[1])))
    low = any(window[i] > whole[i] and box[i] < window[i] + margin for i in (0, 1))
    return low or any(window[i] < whole[i] and box[i] > window[i] - margin for i in (2, 3))
