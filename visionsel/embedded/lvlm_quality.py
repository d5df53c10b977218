"""How well a vision-language model of the shapes world sees, says and answers; what its card states.

Captions are scored by CHAIR's measures (Rohrbach et al. 2018, eq. 1-2): `chair_i`, the share of mentioned
shapes that are not in the image, and `chair_s`, the share of captions with such a mention.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visionsel.data.shapes import (
    CAPTION_PROMPT,
    COLORS,
    PARTNERS,
    SHAPES,
    Sample,
    answer_to_box,
    split_words,
)
from visionsel.data.shapes.scene import GRID
from visionsel.multimodal.evaluation.asking import generate
from visionsel.multimodal.prompts import chat_texts

__all__ = [
    "caption_scores",
    "encode_prompts",
    "generate_answers",
    "measure_lvlm",
    "pointing_game",
    "question_scores",
]


def generate_answers(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    prompts: Sequence[str],
    batch_size: int = 50,
    max_new_tokens: int = 64,
    **options: Any,
) -> list[str]:
    """Answers, one for each pair of image and prompt; greedy where `options` of `generate()` say no other."""
    return generate(model, processor, images, prompts, batch_size, max_new_tokens, **options)


def encode_prompts(
    processor: Any, images: Sequence[Any], prompts: Sequence[str], answers: Sequence[str] | None = None
) -> Any:
    """Inputs of the model: one image and one prompt a sample, to be answered or (`answers`) answered."""
    texts = chat_texts(processor, prompts, answers)
    return processor(images=list(images), text=texts, return_tensors="pt", padding=True)


def caption_scores(captions: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """Scores of captions against the scenes.

    Returns:
        `f1`, `precision` and `recall` of the sets of mentioned shapes, summed over images; `chair_i`,
        `chair_s`; `partner_share`, the share of invented shapes that are the absent partner of a present one;
        `color_accuracy`, of the word before each shape that is there; `exact`, captions equal to the truth.
    """
    right = wrong = missed = bad = partners = colored = well_colored = exact = 0
    for caption, sample in zip(captions, samples, strict=True):
        words = split_words(caption)
        there = {o.shape for o in sample.objects}
        said = {word for word in words if word in SHAPES}
        right, wrong, missed = (
            right + len(said & there),
            wrong + len(said - there),
            missed + len(there - said),
        )
        bad += bool(said - there)
        partners += sum(shape in {PARTNERS.get(s) for s in there} for shape in said - there)
        for before, word in pairwise(words):
            if word in there and before in COLORS:
                colored += 1
                well_colored += any(o.shape == word and o.color == before for o in sample.objects)
        exact += words == split_words(sample.captions[0])
    return {
        "f1": 2 * right / max(1, 2 * right + wrong + missed),
        "precision": right / max(1, right + wrong),
        "recall": right / max(1, right + missed),
        "chair_i": wrong / max(1, right + wrong),
        "chair_s": bad / max(1, len(samples)),
        "partner_share": partners / max(1, wrong),
        "color_accuracy": well_colored / max(1, colored),
        "exact": exact / max(1, len(samples)),
    }


def question_scores(answers: Sequence[str], questions: Sequence[Any]) -> dict[str, float]:
    """Exact accuracy by kind; `exist_random` and `exist_adversarial` pair each such "no" with a "yes".

    `refer` is the mean IoU of the boxes, `refer_at_half` the share of them above 0.5.
    """
    found: dict[str, list[float]] = {}
    yes: list[float] = []
    no: dict[str, list[float]] = {}
    for answer, question in zip(answers, questions, strict=True):
        correct = float(answer.strip() == question.answer)
        if question.kind == "refer":
            overlap = _overlap(answer, question.answer)
            found.setdefault("refer", []).append(overlap)
            found.setdefault("refer_at_half", []).append(float(overlap > 0.5))
            continue
        found.setdefault(question.kind, []).append(correct)
        if question.kind == "exist":
            if question.answer == "yes":
                yes.append(correct)
            else:
                no.setdefault(question.negative, []).append(correct)
    scores = {kind: float(np.mean(values)) for kind, values in sorted(found.items())}
    for kind, values in no.items():
        if yes:
            scores[f"exist_{kind}"] = float(np.mean(values) + np.mean(yes)) / 2
    return scores


def _overlap(answer: str, truth: str) -> float:
    try:
        said = answer_to_box(answer, GRID)
    except ValueError:
        return 0.0
    there = answer_to_box(truth, GRID)
    x0, y0, x1, y1 = (*map(max, said[:2], there[:2]), *map(min, said[2:], there[2:]))
    shared = max(0.0, x1 - x0) * max(0.0, y1 - y0)
    areas = sum(max(0.0, b[2] - b[0]) * max(0.0, b[3] - b[1]) for b in (said, there))
    return shared / max(areas - shared, 1e-9)


@torch.inference_mode()
def pointing_game(
    model: Any, processor: Any, samples: Sequence[Sample], batch_size: int = 50
) -> dict[str, Any]:
    """Does attention peak inside the object that is about to be named (Zhang et al. 2018)?

    The true caption is given; at the position that predicts the word of a shape (the first of its kind), the
    attention to the image tokens is averaged over the heads of a layer. It hits when the patch where it is
    largest shows the object: its mask covers more than an eighth of the patch. `center` is the stricter
    count of peaks whose patch has its centre inside the mask. Chance is what random patches would give.

    Returns:
        `layers`, the share of hits for each layer; `heads`, the same for single heads `[layers][heads]`;
        `best`, the best layer's; `center`, the strict share of that layer; `chance`.
    """
    tokenizer = processor.tokenizer
    before = model.config._attn_implementation
    side = processor.image_processor.crop_size["height"]
    cells = side // processor.patch_size
    names = {tokenizer.convert_tokens_to_ids(shape): shape for shape in SHAPES}
    hits: list[Tensor] = []
    strict: list[Tensor] = []
    chance: list[float] = []
    model.set_attn_implementation("eager")
    try:
        for start in range(0, len(samples), batch_size):
            part = samples[start : start + batch_size]
            inputs = encode_prompts(
                processor,
                [s.image for s in part],
                [CAPTION_PROMPT] * len(part),
                [s.captions[0] for s in part],
            ).to(model.device)
            rows = torch.stack(model(**inputs, output_attentions=True).attentions, 1)
            for b, sample in enumerate(part):  # rows are [B, layers, heads, N, N]
                ids = inputs["input_ids"][b].tolist()
                image = torch.tensor(
                    [i for i, token in enumerate(ids) if token == model.config.image_token_id]
                )
                objects = {
                    o.shape: o for o in reversed(sample.objects)
                }  # the largest of its kind is named first
                for position in range(int(image[-1]) + 1, len(ids)):
                    named = objects.pop(names.get(ids[position], ""), None)
                    if named is None:
                        continue
                    row = rows[b, :, :, position - 1, image.to(rows.device)].float().cpu()
                    peak = torch.cat([row.mean(1, keepdim=True), row], dim=1).argmax(
                        -1
                    )  # [layers, 1 + heads]
                    cover, center = (torch.from_numpy(x).flatten() for x in _patches(named.mask, cells))
                    hits.append((cover > 1 / 8)[peak].float())
                    strict.append(center[peak].float())
                    chance.append((cover > 1 / 8).float().mean().item())
    finally:
        model.set_attn_implementation(before)
    mean = torch.stack(hits).mean(0)
    best = int(mean[:, 0].argmax())
    return {
        "layers": mean[:, 0].tolist(),
        "heads": mean[:, 1:].tolist(),
        "best": mean[best, 0].item(),
        "center": torch.stack(strict).mean(0)[best, 0].item(),
        "chance": float(np.mean(chance)),
    }


def _patches(mask: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Share of each patch that a mask covers `[cells, cells]`, and whether it holds the patch's centre."""
    side = mask.shape[0] // cells
    cover = mask.reshape(cells, side, cells, side).mean((1, 3))
    return cover, mask[side // 2 :: side, side // 2 :: side]


def measure_lvlm(
    model: Any, processor: Any, samples: Sequence[Sample], per_kind: int = 200
) -> dict[str, Any]:
    """Captions of all samples, and questions of each kind, up to `per_kind` of a kind (or of a kind of "no").

    Returns:
        `captions`, `questions` and `pointing`, see `caption_scores`, `question_scores` and `pointing_game`.
    """
    images = [s.image for s in samples]
    captions = generate_answers(model, processor, images, [CAPTION_PROMPT] * len(images))
    chosen: list[tuple[Any, Any]] = []
    count: dict[tuple[str, str], int] = {}
    for image, sample in zip(images, samples, strict=True):
        for question in sample.questions:
            key = question.kind, question.negative or ("yes" if question.answer == "yes" else "")
            if count.get(key, 0) < per_kind:
                count[key] = count.get(key, 0) + 1
                chosen.append((image, question))
    answers = generate_answers(
        model,
        processor,
        [i for i, _ in chosen],
        [q.text for _, q in chosen],
        batch_size=100,
        max_new_tokens=8,
    )
    return {
        "captions": caption_scores(captions, samples),
        "questions": question_scores(answers, [q for _, q in chosen]),
        "pointing": pointing_game(model, processor, samples[: max(1, len(samples) // 2)]),
    }
