"""The net of ExplainPrune for the model of the package: which image tokens an answer rests on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionsel.data.shapes import CAPTION_PROMPT, Sample
from visionsel.embedded.files import WEIGHTS
from visionsel.embedded.lvlm_quality import encode_prompts
from visionsel.multimodal.pruning.explainprune import first_layer_maps, select
from visionsel.multimodal.pruning.explainprune_net import RelevancePredictor
from visionsel.multimodal.pruning.relevance import relevance

__all__ = ["foresee_relevance", "load_predictor", "measure_predictor"]

KEEP = 0.25  # of the measures


def load_predictor(folder: str | Path | None = None) -> RelevancePredictor:
    """The net, for `ExplainPrune(keep=0.25, predictor=load_predictor())`.

    Args:
        folder: one that `train.explainprune` exported; None: the shipped one.

    Raises:
        FileNotFoundError: when the folder lacks a file.
        ValueError: for broken files.
    """
    return RelevancePredictor.load(folder or WEIGHTS / "explainprune").eval()


def foresee_relevance(
    predictor: RelevancePredictor,
    model: Any,
    processor: Any,
    images: Sequence[Any],
    questions: Sequence[str],
    answers: Sequence[str],
) -> tuple[Tensor, Tensor, Tensor]:
    """What the net says of image tokens, and what the answers really rest on.

    Args:
        predictor: the net.
        model, processor: the vision-language model.
        images: one for each sample.
        questions: likewise.
        answers: likewise.

    Returns:
        logits, relevance and which tokens there are, `[B, N]` each.
    """
    prompts = encode_prompts(processor, images, questions).to(model.device)
    maps, grids, valid = first_layer_maps(model, prompts)
    answered = encode_prompts(processor, images, questions, answers).to(model.device)
    # padded on the left: what is longer than the prompt is the answer
    length = answered["attention_mask"].sum(1) - prompts["attention_mask"].sum(1)
    target = relevance(model, answered, answered["input_ids"].shape[1] - length)
    return predictor(maps, grids, valid), target, valid


def measure_predictor(
    predictor: RelevancePredictor, model: Any, processor: Any, samples: Sequence[Sample], batch_size: int = 16
) -> dict[str, float]:
    """How much of the relevance of captions and of one question a scene a quarter of the tokens holds.

    Returns:
        `kept_relevance` when the net chooses, `best_relevance` at best; 0.25 by chance.
    """
    kept: list[Tensor] = []
    best: list[Tensor] = []
    asked = [(sample, CAPTION_PROMPT, sample.captions[0]) for sample in samples]
    for number, sample in enumerate(samples):
        question = sample.questions[number % len(sample.questions)]
        asked.append((sample, question.text, question.answer))
    for start in range(0, len(asked), batch_size):
        part, questions, answers = zip(*asked[start : start + batch_size], strict=True)
        images = [sample.image for sample in part]
        with torch.no_grad():
            logits, target, valid = foresee_relevance(predictor, model, processor, images, questions, answers)
        share = target / target.sum(1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
        kept.append((share * select(logits, KEEP, valid)).sum(1))
        best.append((share * select(target, KEEP, valid)).sum(1))
    return {
        "kept_relevance": torch.cat(kept).mean().item(),
        "best_relevance": torch.cat(best).mean().item(),
    }
