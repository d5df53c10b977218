"""`Grounder`: ask a vision-language model, and every word of its answer is somewhere on the image.

What the model attends to while it answers becomes prompts of a segmenter; nothing is trained (VL-SAM, Lin et
al. 2024, arXiv:2410.05963, and those that followed).
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from visionsel.multimodal.families import find_family
from visionsel.multimodal.grounding.detect import QUESTIONS, ask_questions, find_objects
from visionsel.multimodal.grounding.given_text import text_spans
from visionsel.multimodal.grounding.mask_head import MaskHead
from visionsel.multimodal.grounding.nouns import Names, find_names
from visionsel.multimodal.grounding.promac import promac
from visionsel.multimodal.grounding.prompts import cut_at
from visionsel.multimodal.grounding.proposals import REFINEMENTS, Heat, Proposal
from visionsel.multimodal.grounding.reading import Method, Reading, open_upright, read
from visionsel.multimodal.grounding.results import Box, Grounding, Word
from visionsel.multimodal.grounding.segmenters import Segmenter, build_segmenter
from visionsel.multimodal.grounding.sources import (
    FromAttention,
    FromHead,
    Mention,
    Source,
    later,
    read_heatmap,
)
from visionsel.multimodal.grounding.words import tokens_between, word_prob

__all__ = ["Grounder"]

CYCLE = "promac"


class Grounder:
    """A vision-language model and a segmenter that work together.

    Both models are left as they were; the segmenter stays set on an image.

    Args:
        model: a vision-language model of transformers.
        processor: of the model.
        segmenter: of `build_segmenter`, or what this takes; None: heatmaps only.
        heatmap: a method by name, with options as text (`"mean:layers=(2,)"`), or an instance. A `MaskHead`,
            or `"mask_head"` for the one that ships, makes the masks by itself, without the segmenter.
        refine: further rounds: `"mask"`, the first mask becomes a prompt beside the points; `"resample"`, the
            heatmap is cut with it and sampled anew; `"promac"`, for `refer` only, asks the model again about
            an image in which all but the mask fades. One name or several; None: `"mask"` and `"resample"`, as
            VL-SAM has it, where a segmenter makes the masks.
        threshold: of heatmaps, a share between the least and the largest value or `"otsu"`; the paper gives
            none.
        prompts: what the segmenter is shown: `"points"`, `"box"`, `"points+box"`, `"points+mask"`,
            `"points+box+mask"`. A mask is the heatmap itself.
        merge: of the maps of a word's tokens: `"mean"` or `"max"` (both are in F-LMM, Wu et al. 2025).
        prob: of a word: the `"product"` of its tokens' probabilities or their `"mean"`.
        consistency: the agreement of mask and attention is a factor of the score (DecAF, ICLR 2026).
        refer_prompt: what `refer` asks, with `{}` for the expression. None: nothing is asked; the expression
            is read as if it were the model's answer to `describe_prompt` (F-LMM), and its words looked up.
        describe_prompt: see there.
        names: what is an object: None, by a rule for English; a list of names; or a function. See
            `nouns.find_names`.
        nms: of two objects of one name in `detect` whose boxes have a larger IoU, the better stays; VL-SAM's
            is not known, SAM has 0.7.
        batch_size: images and questions that the model is asked together.

    Raises:
        TypeError, ValueError: for a value that cannot be, a model of no supported family or an unknown name.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import Grounder, build_segmenter
        >>> grounder = Grounder(model, processor, build_segmenter("embedded"), heatmap="mean")
        >>> result = grounder.ask(scene.image, "describe the image.")
        >>> result.answer
        'a large cyan heart and a large orange triangle and a large orange triangle on a plain background'
        >>> [word.text for word in result.objects]
        ['heart', 'triangle', 'triangle']
        >>> result.objects[0].mask.shape, result.objects[0].heatmap.shape
        ((64, 64), (64, 64))
        >>> picture = result.plot(scale=8)
        >>> grounder.refer(scene.image, "the cyan heart").name
        'the cyan heart'
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        segmenter: Segmenter | str | nn.Module | None,
        heatmap: str | Method | MaskHead = "vl_sam",
        refine: str | Sequence[str] | None = None,
        *,
        threshold: float | str = 0.5,
        prompts: str = "points",
        merge: str = "mean",
        prob: str = "product",
        consistency: bool = False,
        refer_prompt: str | None = "locate {}.",
        describe_prompt: str = "describe the image.",
        names: Names = None,
        nms: float = 0.7,
        batch_size: int = 8,
    ) -> None:
        find_family(model)  # says what is supported
        if isinstance(segmenter, str | nn.Module):
            segmenter = build_segmenter(segmenter)
        if segmenter is not None and not isinstance(segmenter, Segmenter):
            raise TypeError(
                f"segmenter is a {type(segmenter).__name__}; make one with build_segmenter(...) or pass None"
            )
        method = read_heatmap(heatmap)
        if refine is None:
            refine = () if isinstance(method, MaskHead) else REFINEMENTS
        self.refine = (refine,) if isinstance(refine, str) else tuple(refine)
        known = (*REFINEMENTS, CYCLE)
        if unknown := [name for name in self.refine if name not in known]:
            raise ValueError(f"refine knows {', '.join(known)}; got {unknown[0]!r}")
        # these refuse what they do not know
        cut_at(np.zeros(1), threshold)
        word_prob([1.0], [0], prob)
        find_names("", names)
        if refer_prompt is not None and "{}" not in refer_prompt:
            raise ValueError(f"refer_prompt needs {{}} where the expression goes, got {refer_prompt!r}")
        if not 0 <= nms <= 1:
            raise ValueError(f"nms is an IoU from 0 to 1, got {nms}")
        if batch_size < 1:
            raise ValueError(f"batch_size is 1 or more, got {batch_size}")
        self.source: Source
        if isinstance(method, MaskHead):
            if again := [name for name in self.refine if name in REFINEMENTS]:
                raise ValueError(f"refine={again[0]!r} asks a segmenter again, and a mask head has its own")
            self.source = FromHead(method, threshold)
        else:
            rounds = [name for name in self.refine if name in REFINEMENTS]
            self.source = FromAttention(method, segmenter, prompts, threshold, rounds, merge)
        self.model, self.processor, self.segmenter = model, processor, segmenter
        self.prob, self.names, self.nms, self.batch_size = prob, names, nms, batch_size
        self.consistency = threshold if consistency else None
        self.refer_prompt, self.describe_prompt = refer_prompt, describe_prompt

    def ask(self, image: Any, question: str, **options: Any) -> Grounding:
        """An answer, and what each word of it is about.

        Masks are made when the first is looked at: those of all objects together, and those of all other
        words together.

        Args:
            image: a file, a PIL image or uint8 `[H, W, 3]`; its EXIF rotation is applied.
            question: becomes the user's turn of the chat template.
            options: of `generate()`; by default greedy, at most 128 tokens.

        Raises:
            TypeError, ValueError: for an image or question that cannot be, and what the model refuses.
            NotImplementedError: with the refinement `"promac"`.
        """
        self._refuse_cycle("ask")
        picture = open_upright(image)
        reading = self._read([picture], [question], **options)[0]
        named = find_names(reading.answer, self.names)
        # of a name of several words the last stands for it
        names = [
            next((name for name, (_, end) in named if word.span[0] < end <= word.span[1]), None)
            for word in reading.words
        ]
        words: dict[int, Word] = {}
        for wanted in (True, False):
            numbers = [number for number, name in enumerate(names) if (name is not None) is wanted]
            mentions = [Mention(reading, reading.words[number].tokens, picture) for number in numbers]
            for number, (heat, proposal) in zip(numbers, later(self.source, mentions), strict=True):
                word = reading.words[number]
                known = word.text, word.span, word.prob, names[number]
                words[number] = Word(*known, heat, picture, proposal, None, self.consistency)
        return Grounding(reading.answer, [words[number] for number in sorted(words)], picture)

    def refer(self, image: Any, text: str, **options: Any) -> Word:
        """What an expression means: the heatmap of the whole of it, and its mask.

        Args:
            image: see `ask`.
            text: such as `"the left dog"`.
            options: of `generate()`; by default greedy, at most 32 tokens.

        Returns:
            the expression as one word, with `text` as it was given; `prob` is the geometric mean of its
            tokens' probabilities, of the model's answer or of the expression itself.

        Raises:
            TypeError, ValueError: as `ask`.
        """
        return self.refer_many([image], [text], **options)[0]

    def refer_many(self, images: Sequence[Any], texts: Sequence[str], **options: Any) -> list[Word]:
        """`refer` for several pairs; the model is asked `batch_size` of them at a time.

        Raises:
            TypeError, ValueError: as `ask`, or for different numbers of images and texts.
        """
        if isinstance(texts, str) or len(images) != len(texts):
            raise ValueError(f"one expression for each image, got {len(images)} images and {texts!r:.60}")
        pictures = [open_upright(image) for image in images]
        if CYCLE in self.refine:
            return [
                promac(partial(self._refer, **options), picture, text)
                for picture, text in zip(pictures, texts, strict=True)
            ]
        return [
            word
            for start in range(0, len(texts), self.batch_size)
            for word in self._refer_batch(
                pictures[start : start + self.batch_size],
                texts[start : start + self.batch_size],
                pictures[start : start + self.batch_size],
                **options,
            )
        ]

    def ground_text(self, image: Any, prompt: str, text: str, spans: Sequence[tuple[int, int]]) -> list[Word]:
        """What parts of a given text are about, read as if the model had said it (F-LMM's evaluation).

        Args:
            image: see `ask`.
            prompt: what the text is taken to answer.
            text: such as a true caption.
            spans: of its parts, each the first character and one past the last.

        Returns:
            one word a part; of a part without tokens of its own the mask is empty.

        Raises:
            TypeError, ValueError: as `ask`, and for a span that is not in the text.
            NotImplementedError: with the refinement `"promac"`.
        """
        self._refuse_cycle("ground_text")
        if bad := [span for span in spans if not 0 <= span[0] < span[1] <= len(text)]:
            raise ValueError(f"span {tuple(bad[0])} is not in a text of {len(text)} characters")
        picture = open_upright(image)
        reading = self._read([picture], [prompt], [text])[0]
        places = text_spans(self.processor.tokenizer, text)[: len(reading.probs)]
        mentions = [Mention(reading, tokens_between(places, span), picture) for span in spans]
        words = []
        for span, mention, (heat, proposal) in zip(
            spans, mentions, later(self.source, mentions), strict=True
        ):
            part, prob = text[slice(*span)], word_prob(reading.probs, mention.tokens, self.prob)
            known = part, (span[0], span[1]), prob, part.lower()
            words.append(Word(*known, heat, picture, proposal, None, self.consistency))
        return words

    def detect(
        self,
        image: Any,
        questions: str | Sequence[str] = QUESTIONS,
        crops: bool = True,
        **options: Any,
    ) -> Grounding:
        """Everything that the model finds to name, with masks: VL-SAM's open-ended detection.

        Each question is asked about the image and, with `crops`, its four quarters; what the answers name
        (`names`) is segmented, and of all proposals those stay that are not doubled by a better one.

        Args:
            image: see `ask`.
            questions: such as `"list all objects"`; `"model"`: ten that the model itself writes.
            crops: look at quarters too; such of less than 16 pixels a side are left out. What an inner edge
                of a quarter cuts is left to the others, as in SAM's own mask generator.
            options: of `generate()`; by default greedy, at most 128 tokens. VL-SAM samples with temperature
                0.8 and top_p 0.1.

        Returns:
            the objects, by score; `answer` is that to the first question about the whole image.

        Raises:
            TypeError, ValueError: as `ask`.
            RuntimeError: without a segmenter.
            NotImplementedError: with the refinement `"promac"`.
        """
        self._refuse_cycle("detect")
        picture = open_upright(image)
        ask = partial(self._read, **options)
        if questions == "model":
            questions = ask_questions(ask, picture)
        elif isinstance(questions, str):
            questions = [questions]

        def make_word(
            name: str,
            span: tuple[int, int],
            mention: Mention,
            heat: Heat,
            proposal: Proposal,
            window: Box,
        ) -> Word:
            reading = mention.reading
            prob, text = word_prob(reading.probs, mention.tokens, self.prob), reading.answer[slice(*span)]
            known = text, span, prob, name
            return Word(*known, heat, picture, lambda: proposal, window, self.consistency)

        return find_objects(
            picture,
            questions,
            crops,
            read=ask,
            source=self.source,
            make_word=make_word,
            names=self.names,
            nms=self.nms,
        )

    def _refer(self, seen: Image.Image, text: str, image: Image.Image, **options: Any) -> Word:
        """An expression that is looked up in one image and segmented in another of the same size."""
        return self._refer_batch([seen], [text], [image], **options)[0]

    def _refer_batch(
        self, seen: Sequence[Image.Image], texts: Sequence[str], images: Sequence[Image.Image], **options: Any
    ) -> list[Word]:
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"the expression is {text!r}; expected a text such as 'the left dog'")
        if self.refer_prompt is None:
            readings = self._read(seen, [self.describe_prompt] * len(seen), list(texts), **options)
        else:
            asked = [self.refer_prompt.replace("{}", text.strip().rstrip(".")) for text in texts]
            readings = self._read(seen, asked, **{"max_new_tokens": 32, **options})
        mentions = [
            Mention(reading, reading.written, image) for reading, image in zip(readings, images, strict=True)
        ]
        words = []
        for text, mention, (heat, proposal) in zip(
            texts, mentions, later(self.source, mentions), strict=True
        ):
            prob = _geometric_mean([mention.reading.probs[token] for token in mention.tokens])
            known = text, (0, len(text)), prob, text
            words.append(Word(*known, heat, mention.image, proposal, None, self.consistency))
        return words

    def _read(
        self,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        answers: Sequence[str] | None = None,
        **options: Any,
    ) -> list[Reading]:
        options = {"max_new_tokens": 128, "do_sample": False, **options}
        models, size = (self.model, self.processor, self.source.method), self.batch_size
        return read(*models, images, prompts, answers, self.prob, size, **options)

    def _refuse_cycle(self, what: str) -> None:
        if CYCLE in self.refine:
            raise NotImplementedError(
                f'refine="promac" asks again about one expression: use it with refer, not with {what}'
            )


def _geometric_mean(values: Sequence[float]) -> float:
    if not values or min(values) <= 0:
        return 0.0
    return math.exp(sum(math.log(value) for value in values) / len(values))
