"""Preference pairs of single sentences that a vision-language model wrote itself, by SENTINEL.

After Peng et al. 2025 (arXiv:2507.12455, ICCV). For each image the model's own sentences are sampled, one
step at a time: several candidates behind the same context, of which those that mention something invented
lose against those that do not. What wins is appended, and the next sentences are sampled behind it, so that
every context is true and every pair differs in one sentence, the first that goes wrong.

A mentioned object is factual when all detectors say that it is there, invented when all say that it is not,
and disputed otherwise: a sentence with a disputed object is neither chosen nor appended. A sentence with an
invented object is rejected, whatever else it mentions.

Which factual sentences may win is the rule of coherence:

- `"named"`, the authors': those that mention an object which the context mentions already. They stay with
  the subject, so that a pair is about what is true and not about what to talk of. The first sentence of a
  text has no context and gives no pair.
- `"new"`, for captions whose sentences name one object each and no object twice, as those of the shapes
  world: those that name an object and do not repeat a sentence of the context; only where no candidate does,
  those that name none, such as the one that ends the caption. To fall silent wins against inventing, never
  against naming.

What differs from the authors' code: objects are the words of a table of synonyms, as CHAIR hears them, not
those of a scene graph parser; where no candidate is factual the text ends, while they go on with any.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from visionsel.files import whole_file
from visionsel.multimodal.evaluation import Synonyms, chair
from visionsel.multimodal.prompts import chat_texts

__all__ = [
    "COHERENCE",
    "SPLITTERS",
    "Candidate",
    "Detector",
    "Pair",
    "Picture",
    "bootstrap",
    "build_pairs",
    "read_pairs",
    "sample_sentences",
    "split_phrases",
    "split_sentences",
]

COHERENCE = ("named", "new")


@dataclass(frozen=True)
class Picture:
    """An image to describe.

    Attributes:
        path: of its file; pairs name it.
        image: RGB.
        objects: the names of all that it shows, where that is known.
    """

    path: str
    image: Image.Image
    objects: frozenset[str] | None = None


@dataclass(frozen=True)
class Candidate:
    """A sampled sentence, with the space before it; `last` when the text ended behind it."""

    text: str
    last: bool = False


@dataclass(frozen=True)
class Pair:
    """Two sentences behind one context; context and sentence joined are what the model wrote.

    Attributes:
        image: path of the file.
        question: the user's turn.
        context: what the model had said.
        chosen, rejected: the next sentence.
        chosen_last, rejected_last: the text ended behind it.
        invented: the objects for which it was rejected.
    """

    image: str
    question: str
    context: str
    chosen: str
    rejected: str
    chosen_last: bool
    rejected_last: bool
    invented: list[str]


Detector = Callable[[Picture, Sequence[str]], Mapping[str, bool]]
"""Which of the named objects an image shows."""

Sampler = Callable[[Picture, str], Sequence[Candidate]]
"""Candidates for the sentence behind a context."""


def split_sentences(text: str) -> list[str]:
    """Sentences of prose: parted behind `.`, `!` or `?`, before a space and a capital or a number.

    An abbreviation before a name ("St. Mary") parts a sentence too.
    """
    return _parts(r"(?<=[.!?])(?=\s+[\"'(]?[A-Z0-9])", text)


def split_phrases(text: str) -> list[str]:
    """Phrases of a caption of the shapes world, its only sentence: parted before "and" and before "on".

    `a large star and a small ring on a plain background` has three: two that name an object each, and the
    background, which ends every caption.
    """
    return _parts(r"(?=\s+(?:and|on)\b)", text)


SPLITTERS: Mapping[str, Callable[[str], list[str]]] = {
    "sentences": split_sentences,
    "phrases": split_phrases,
}
"""What a sentence is; the parts joined are the text."""


def _parts(pattern: str, text: str) -> list[str]:
    return [part for part in re.split(pattern, text) if part]


def bootstrap(
    picture: Picture,
    question: str,
    sample: Sampler,
    detectors: Sequence[Detector],
    synonyms: Synonyms | None = None,
    coherence: str = "named",
    max_sentences: int = 16,
) -> tuple[list[str], list[Pair]]:
    """Write a true text about an image step by step, and collect where it could have gone wrong.

    Args:
        picture: the image.
        question: of the pairs.
        sample: gives candidates; the same sentence sampled again counts once, as the authors have it.
        detectors: two in the paper; a single one decides alone.
        synonyms: the words that mean objects (default: those of the 80 COCO classes).
        coherence: which factual sentences may win, see the module.
        max_sentences: after which the text is left.

    Returns:
        The sentences of the text, and the pairs: the first coherent candidate with the first invented one,
        the second with the second, and so on, at each step. The sentence appended is the first that won or,
        at a step without a pair, the first factual one, those first that are coherent or name something new.

    Raises:
        ValueError: for no detectors or another coherence.
    """
    if not detectors:
        raise ValueError("give at least one detector; the paper has two")
    if coherence not in COHERENCE:
        raise ValueError(f"coherence must be one of {', '.join(COHERENCE)}, got {coherence!r}")
    verdicts: dict[str, bool | None] = {}
    named: set[str] = set()
    text: list[str] = []
    pairs: list[Pair] = []
    while len(text) < max_sentences:
        candidates = list(dict.fromkeys(sample(picture, "".join(text))))
        objects = [set(chair.mentions(candidate.text, synonyms)) for candidate in candidates]
        if asked := sorted(set().union(*objects) - verdicts.keys()):
            answers = [detector(picture, asked) for detector in detectors]
            verdicts |= {name: _agree([answer[name] for answer in answers]) for name in asked}
        said = {_plain(sentence) for sentence in text}
        rejected, factual = [], []
        for candidate, names in zip(candidates, objects, strict=True):
            if any(verdicts[name] is False for name in names):
                rejected.append((candidate, names))
            elif all(verdicts[name] for name in names) and _plain(candidate.text) not in said:
                factual.append((candidate, names))
        naming = [(candidate, names) for candidate, names in factual if names]
        if coherence == "named":
            chosen = [(candidate, names) for candidate, names in naming if names & named]
            rest = [(candidate, names) for candidate, names in naming if not names & named]
        else:
            chosen, rest = naming or factual, []
        for (winner, _), (loser, names) in zip(chosen, rejected, strict=False):
            invented = sorted(name for name in names if verdicts[name] is False)
            sentences = (winner.text, loser.text, winner.last, loser.last)
            pairs.append(Pair(picture.path, question, "".join(text), *sentences, invented))
        ahead = [*chosen, *rest, *factual] if chosen and rejected else [*rest, *chosen, *factual]
        if not ahead:
            break
        following, names = ahead[0]
        text.append(following.text)
        named |= names
        if following.last:
            break
    return text, pairs


def _agree(answers: Sequence[bool]) -> bool | None:
    """What all say; None when they do not agree."""
    return bool(answers[0]) if len(set(map(bool, answers))) == 1 else None


def _plain(sentence: str) -> str:
    """A sentence without what joins it to the one before."""
    return re.sub(r"^\W*(?:and\b\W*)?", "", sentence.lower()).rstrip(" .!?")


@torch.inference_mode()
def sample_sentences(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str,
    context: str = "",
    count: int = 10,
    temperature: float = 0.7,
    splitter: str = "sentences",
    max_new_tokens: int = 128,
) -> list[Candidate]:
    """Sentences with which a model goes on behind a context, sampled from all of its vocabulary.

    A sequence is sampled until the sentence behind its first begins, or the text ends. The words keep the
    spaces that the tokenizer decodes, so that context and sentence can be joined.

    Args:
        model, processor: a vision-language model of transformers.
        image, question: the user's turn.
        context: the beginning of the model's turn.
        count: how many (the authors' code: 10).
        temperature: the authors' code: 0.7.
        splitter: what a sentence is, a name of `SPLITTERS`.
        max_new_tokens: a sentence that does not end before is left out.
    """
    from transformers import StoppingCriteriaList

    split = SPLITTERS[splitter]
    prompt = chat_texts(processor, [question])[0] + context
    inputs = processor(images=[image], text=[prompt], return_tensors="pt").to(model.device)
    start = inputs["input_ids"].shape[1]
    tokenizer = processor.tokenizer
    before = tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)

    def text_of(row: torch.Tensor) -> str:
        # decoded with the prompt: some tokenizers drop the space at the beginning of a text
        whole = tokenizer.decode(row, skip_special_tokens=True)
        same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        return whole[same:]

    def complete(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        done = [len(split(text_of(row))) > 1 for row in ids]
        return torch.tensor(done, dtype=torch.bool, device=ids.device)

    out = model.generate(
        **inputs,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        num_return_sequences=count,
        max_new_tokens=max_new_tokens,
        stopping_criteria=StoppingCriteriaList([complete]),
    )
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    ends = torch.as_tensor(ends if isinstance(ends, list) else [ends], device=out.device)
    found = []
    for row in out:
        sentences = split(text_of(row))
        ended = bool(torch.isin(row[start:], ends).any())
        if len(sentences) > 1 or (sentences and ended):
            found.append(Candidate(sentences[0], len(sentences) == 1))
    return found


def build_pairs(
    pictures: Iterable[Picture],
    write: Callable[[Picture], tuple[list[str], list[Pair]]],
    folder: str | Path,
    seed: int = 0,
    save_every: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> list[Pair]:
    """Pairs of many images, as two files of JSON lines; a run that was stopped goes on where it was.

    `texts.jsonl` has a line for each image, with its text and its pairs, and is written again whenever some
    images are done; `pairs.jsonl` has a line for each pair, and is written at the end. The draws for an image
    depend on the seed and its place among the images only.

    Args:
        pictures: the images.
        write: see `bootstrap`.
        folder: of the files.
        seed: of sampling.
        save_every: images.
        progress: told how many images are done and how many pairs there are.

    Raises:
        ValueError: when there are no images, no pairs, or the lines there are of other images.
    """
    folder = Path(folder)
    path, done = folder / "texts.jsonl", []
    if path.is_file():
        done = [json.loads(line) for line in path.read_text().splitlines()]
    number = -1
    for number, picture in enumerate(pictures):
        if number < len(done):
            if done[number]["image"] != picture.path:
                raise ValueError(
                    f"{path} has {done[number]['image']} where image {number} is {picture.path}; the images "
                    "are not those that it was begun with: delete it, or name another folder"
                )
            continue
        devices = list(range(torch.cuda.device_count()))
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed * 2**20 + number)
            text, pairs = write(picture)
        done.append({"image": picture.path, "text": text, "pairs": [asdict(pair) for pair in pairs]})
        if len(done) % save_every == 0:
            _write_lines(done, path)
            if progress is not None:
                progress(len(done), sum(len(row["pairs"]) for row in done))
    if number < 0:
        raise ValueError("there are no images to describe")
    _write_lines(done, path)
    rows = [pair for row in done[: number + 1] for pair in row["pairs"]]
    if not rows:
        raise ValueError(
            f"no pairs from {number + 1} images: as the detectors see it, no coherent sentence was ever "
            "sampled beside an invented one; give more candidates, a higher temperature, or more images"
        )
    _write_lines(rows, folder / "pairs.jsonl")
    return [Pair(**row) for row in rows]


def read_pairs(path: str | Path) -> list[Pair]:
    """Pairs of a file.

    Raises:
        FileNotFoundError: when it is not there.
        ValueError: for a line that is no pair, or no line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no pairs at {path}; make them with the verb pairs")
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            pairs.append(Pair(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"line {number} of {path} is no pair: {error}") from error
    if not pairs:
        raise ValueError(f"{path} has no pairs")
    return pairs


def _write_lines(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    with whole_file(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
