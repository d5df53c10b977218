"""RefCOCO, panoptic narratives and VizWiz grounding: masks of what texts mean.

Detection, COCO's, LVIS's and CODA's, is in `detection_tasks`.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from visionsel.data.narratives import read_narratives
from visionsel.data.refcoco import read_references
from visionsel.data.vizwiz import read_answer_groundings
from visionsel.multimodal.evaluation.grounded import Case, GroundingTask, overlaps_of, pixels
from visionsel.multimodal.evaluation.segmentation import Overlap, average_recall, box_scores, score

__all__ = ["NARRATIVE_PROMPT", "VIZWIZ_PROMPT", "narratives_task", "refcoco_task", "vizwiz_task"]

NARRATIVE_PROMPT = "Please give me a description of the image."
"""Before a narrative that is read as if the model had said it (F-LMM, Wu et al. 2025)."""
VIZWIZ_PROMPT = "{}\nAnswer the question using a single word or phrase."
"""Of questions to LLaVA-1.5 and its kin (Liu et al. 2023)."""

_SENTENCES = {
    "all": "each sentence is a sample, as LISA and GLaMM count",
    "first": "the first sentence of each ref alone, as F-LMM counts",
}
Row = dict[str, Any]
Pictures = Sequence[Image.Image]


def refcoco_task(
    folder: str | Path,
    images: str | Path,
    split: str = "val",
    sentences: str = "all",
    refs: str | None = None,
    limit: int | None = None,
) -> GroundingTask:
    """Referring expressions of RefCOCO, RefCOCO+, RefCOCOg or gRefCOCO.

    Its scores are those of `segmentation.score`, and `box_accuracy` and `box_iou` over the sentences that
    mean one object.

    Args:
        folder, split, sentences, refs: see `read_references`.
        images: the folder of COCO's train2014.
        limit: the first so many sentences.

    Raises:
        FileNotFoundError, ValueError: see `read_references`.
    """
    references = read_references(folder, split, sentences, refs)[: check_limit(limit)]
    sizes = [one.instances.images[one.image] for one in references]

    def measure(grounder: Any, pictures: Pictures, numbers: Sequence[int]) -> list[Row]:
        chosen = [references[number] for number in numbers]
        words = grounder.refer_many(pictures, [one.text for one in chosen])
        return [
            {
                "overlap": pixels(word.mask, one.mask()),
                "box": None if word.box is None else list(word.box),
                "score": float(word.score),
            }
            for word, one in zip(words, chosen, strict=True)
        ]

    def measured(rows: Sequence[Row]) -> dict[str, Any]:
        pairs = [(row["box"], box) for row, one in zip(rows, references, strict=True) if (box := one.box())]
        scores: dict[str, Any] = score(overlaps_of(rows))
        if pairs:
            boxes = box_scores([said for said, _ in pairs], [there for _, there in pairs])
            scores |= {"box_accuracy": boxes["accuracy"], "box_iou": boxes["iou"]}
        return scores

    refs_there = len({one.ref for one in references})
    return GroundingTask(
        [
            Case(
                {"sentence": one.id, "ref": one.ref, "image": one.image, "text": one.text},
                Path(images) / one.file_name,
                (size["height"], size["width"]),
            )
            for one, size in zip(references, sizes, strict=True)
        ],
        measure,
        ("overlap", "box", "score"),
        measured,
        f"split {split}, {_SENTENCES[sentences]}: {len(references)} sentences of {refs_there} refs",
        batched=True,
    )


def narratives_task(
    folder: str | Path,
    images: str | Path,
    split: str = "val2017",
    prompt: str = NARRATIVE_PROMPT,
    limit: int | None = None,
) -> GroundingTask:
    """Panoptic Narrative Grounding: the phrases of the true captions, read as if the model had said them.

    Its scores are those of `average_recall` for all phrases, things, stuff, singular and plural.

    Args:
        folder, split: see `read_narratives`.
        images: the folder of COCO's images of the split.
        prompt: what the captions are taken to answer.
        limit: the first so many narratives.

    Raises:
        FileNotFoundError, ValueError: see `read_narratives`.
    """
    narratives = [one for one in read_narratives(folder, split) if one.phrases][: check_limit(limit)]

    def measure(grounder: Any, pictures: Pictures, numbers: Sequence[int]) -> list[Row]:
        found = []
        for picture, number in zip(pictures, numbers, strict=True):
            one = narratives[number]
            words = grounder.ground_text(picture, prompt, one.caption, [p.span for p in one.phrases])
            pairs = zip(words, one.masks(), strict=True)
            found.append({"overlaps": [pixels(word.mask, truth) for word, truth in pairs]})
        return found

    def measured(rows: Sequence[Row]) -> dict[str, Any]:
        phrases = [phrase for one in narratives for phrase in one.phrases]
        groups = {
            "things": [phrase.thing for phrase in phrases],
            "stuff": [not phrase.thing for phrase in phrases],
            "singular": [not phrase.plural for phrase in phrases],
            "plural": [phrase.plural for phrase in phrases],
        }
        overlaps = [Overlap(*one) for one in chain.from_iterable(row["overlaps"] for row in rows)]
        return {"narratives": len(rows), "phrases": len(phrases), **average_recall(overlaps, groups)}

    return GroundingTask(
        [
            Case({"number": number, "image": one.image, "caption": one.caption}, Path(images) / one.file_name)
            for number, one in enumerate(narratives)
        ],
        measure,
        ("overlaps",),
        measured,
        f"split {split}, average recall of the phrases of {len(narratives)} true captions, read after "
        f"{prompt!r}",
    )


def vizwiz_task(
    folder: str | Path,
    images: str | Path,
    split: str = "val",
    prompt: str = VIZWIZ_PROMPT,
    limit: int | None = None,
) -> GroundingTask:
    """VizWiz-VQA-Grounding: where the model looks while it gives its own answer.

    The map of the whole answer makes one mask. Its scores are those of `segmentation.score`; the benchmark's
    number is `g_iou`.

    Args:
        folder, split: see `read_answer_groundings`.
        images: the folder of the images.
        prompt: what to say to the model; `{}` stands for the question.
        limit: the first so many questions.

    Raises:
        FileNotFoundError: see `read_answer_groundings`.
        ValueError: likewise, and for a prompt without `{}`.
    """
    if "{}" not in prompt:
        raise ValueError(f"the prompt needs {{}} where the question stands, got {prompt!r}")
    asked = read_answer_groundings(folder, split)[: check_limit(limit)]

    def measure(grounder: Any, pictures: Pictures, numbers: Sequence[int]) -> list[Row]:
        found = []
        for picture, number in zip(pictures, numbers, strict=True):
            one, question = asked[number], prompt.replace("{}", asked[number].question)
            answer = grounder.ask(picture, question, max_new_tokens=32).answer
            truth = one.mask()
            mask = truth & False  # of an empty answer
            if answer:
                (word,) = grounder.ground_text(picture, question, answer, [(0, len(answer))])
                mask = word.mask
            found.append({"answer": answer, "overlap": pixels(mask, truth)})
        return found

    return GroundingTask(
        [
            Case({"image": one.file_name, "question": one.question}, Path(images) / one.file_name, one.size)
            for one in asked
        ],
        measure,
        ("answer", "overlap"),
        lambda rows: {**score(overlaps_of(rows))},
        f"split {split}, {len(asked)} questions, the masks of the model's own answers to {prompt!r}",
    )


def check_limit(limit: int | None) -> int | None:
    """A limit as it is.

    Raises:
        ValueError: for one below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"the limit must be at least 1, got {limit}")
    return limit
