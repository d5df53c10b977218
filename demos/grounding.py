"""Grounding: ask about an image, click a word of the answer, and see what the model looked at."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import gradio as gr
import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from demos import inputs
from demos.examples import example_gallery, scenes
from demos.head_maps import draw_head_maps
from demos.models import MAX_NEW_TOKENS, Models
from demos.page import QUEUE, hint, own_uploads
from demos.sessions import Session, Sessions
from visionsel.data.shapes import CAPTION_PROMPT
from visionsel.files import whole_file, write_json
from visionsel.multimodal.grounding.results import Grounding, Word
from visionsel.viz import OKABE_ITO

__all__ = ["ask_in_pieces", "ground", "grounding_tab", "heatmap_choices", "word_pieces"]

Pieces = list[tuple[str, str | None]]
PALETTE = list(OKABE_ITO.values())
LEGIBLE = 400  # pixels that the longer side of a picture has, roughly, where the image is smaller
MEANS = "all layers, mean of the heads"


def grounding_tab(models: Models, sessions: Sessions) -> None:
    """Put the tab where it is called, inside of `gr.Blocks`."""
    with gr.Row(elem_classes="halves"):
        with gr.Column(scale=5, min_width=300):
            image = inputs.image_input(
                label="Image",
                value=scenes()[0].image,
                sources=["upload", "webcam", "clipboard"],
                height=300,
                alt_text="The image to ask about",
                elem_id="asked",
            )
            example_gallery(image, sessions)
            question = gr.Textbox(CAPTION_PROMPT, label="Question", lines=1, max_lines=4, max_length=None)
            with gr.Row():
                ask = gr.Button("Ask", variant="primary", min_width=120)
                detect = gr.Button("Detect everything", min_width=120)
            with gr.Accordion("How attention becomes a heatmap", open=False):
                heatmap = gr.Dropdown(
                    heatmap_choices(models), label="Method", filterable=False, interactive=True
                )
        with gr.Column(scale=7, min_width=300):
            answer = gr.HighlightedText(
                label="Answer",
                color_map={str(number): color for number, color in enumerate(PALETTE)},
                show_legend=False,
                show_inline_category=False,
                elem_id="answer",
                buttons=[],
            )
            told = gr.HTML(
                hint("Ask, then choose any word of the answer: click, or arrow keys and Enter."),
                elem_id="word",
            )
            with gr.Row():
                overlay = gr.Image(
                    label="Mask, box and name",
                    format="png",
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="overlay",
                    min_width=240,
                )
                heat = gr.Image(
                    label="Heatmap and points",
                    format="png",
                    interactive=False,
                    buttons=["fullscreen"],
                    elem_id="heat",
                    min_width=240,
                )
            with gr.Row():
                png = gr.DownloadButton("Picture (PNG)", interactive=False, min_width=120, size="sm")
                coco = gr.DownloadButton("Objects (COCO JSON)", interactive=False, min_width=120, size="sm")
            with gr.Accordion("Layers and heads", open=False):
                with gr.Row(elem_classes="bottom"):
                    layer = gr.Dropdown(
                        [MEANS, *(f"layer {number}" for number in range(models.layers))],
                        label="Look into",
                        filterable=False,
                    )
                    look = gr.Button("Show what the last word saw", min_width=160)
                heads = gr.Gallery(
                    label="Attention to the image",
                    columns=4,
                    height="auto",
                    format="png",
                    buttons=[],
                    interactive=False,
                    elem_id="heads",
                )

    outputs = [answer, told, overlay, heat, png, coco, heads]

    def on_ask(path: str | None, text: str, method: str, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        sessions.own(request, path)
        session = sessions.of(request)
        session.results.pop("grounding", None)
        with inputs.explained():
            for said in ask_in_pieces(models, path, text, method):
                if isinstance(said, Grounding):
                    session.results["grounding"] = (said, inputs.read_question(text))
                    with models.in_use():
                        shown = _shown(session, said)
                    yield shown
                else:
                    yield [(said, None)], hint("The model is answering."), *[gr.skip()] * 5

    def on_detect(path: str | None, method: str, request: gr.Request) -> tuple[Any, ...]:
        sessions.own(request, path)
        session = sessions.of(request)
        picture = inputs.read_image(path)
        with inputs.explained(), models.in_use():
            found = models.grounder(method).detect(picture, max_new_tokens=MAX_NEW_TOKENS)
            session.results["grounding"] = (found, None)
            return _shown(session, found)

    def on_word(request: gr.Request, event: gr.SelectData) -> tuple[Any, ...]:
        session = sessions.of(request)
        found, _ = session.results.get("grounding", (None, None))
        number = event.index[0] if isinstance(event.index, list | tuple) else event.index
        if found is None or not 0 <= number < len(found.words):
            raise inputs.refused("This answer is no longer known. Ask again.")
        session.results["word"] = found.words[number]
        with inputs.explained(), models.in_use():
            return _word(session, found, found.words[number])

    def on_look(chosen: str, request: gr.Request) -> list[tuple[str, str]]:
        session = sessions.of(request)
        found, asked = session.results.get("grounding", (None, None))
        word = session.results.get("word")
        if found is None or word is None or word not in found.words:
            raise inputs.refused("Click a word of the answer first.")
        if asked is None:
            raise inputs.refused("What is detected comes from many questions. Ask one of your own first.")
        number = None if chosen == MEANS else int(chosen.rpartition(" ")[2])
        with inputs.explained(), models.in_use():
            maps = draw_head_maps(models, found.image, asked, word.span, number)
        shown = []
        for picture, caption in maps:
            path = session.path(f"{caption.replace(' ', '-').replace(',', '')}.png")
            picture.save(path)
            shown.append((str(path), caption))
        return shown

    options: dict[str, Any] = {**QUEUE, "api_visibility": "private"}
    for event in (ask.click, question.submit):
        event(on_ask, [image, question, heatmap], outputs, show_progress_on=[answer], **options)
    detect.click(on_detect, [image, heatmap], outputs, show_progress_on=[answer], **options)
    answer.select(on_word, None, [told, overlay, heat, png], show_progress_on=[overlay], **options)
    look.click(on_look, layer, heads, show_progress_on=[heads], **options)
    own_uploads(image, sessions)
    _api(models, sessions)


def heatmap_choices(models: Models) -> list[tuple[str, str]]:
    """Names and specifications of heatmap methods, the default first."""
    first = [("localization heads", "localization_heads:row='predict'")]
    if models.embedded:
        first = [("localization heads, calibrated", "localization_heads:heads='embedded',row='predict'")]
    others = [
        ("VL-SAM's attention flow", "vl_sam"),
        ("mean of all heads", "mean"),
        ("mean, against another prompt", "relative"),
        ("rollout of the largest values", "v_max"),
        ("token activation map", "tam"),
    ]
    return first + others + ([("trained mask head", "mask_head")] if models.embedded else [])


def ask_in_pieces(
    models: Models, path: str | None, text: str | None, heatmap: str
) -> Iterator[str | Grounding]:
    """The answer as it grows, then what it is about.

    Raises:
        gr.Error: for an image or a question that cannot be.
        ValueError: and others, as `Grounder.ask`.
    """
    picture, question = inputs.read_image(path), inputs.read_question(text)
    streamer = TextIteratorStreamer(models.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    gone = threading.Event()

    def work() -> Grounding:
        try:
            with models.in_use():
                return models.grounder(heatmap).ask(
                    picture,
                    question,
                    max_new_tokens=MAX_NEW_TOKENS,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_When(gone)]),
                )
        finally:
            streamer.end()

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(work)
        try:
            said = ""
            for piece in streamer:
                said += piece
                if said.strip():
                    yield said.strip()
            yield result.result()
        finally:
            gone.set()


def ground(models: Models, path: str | None, text: str | None, heatmap: str) -> dict[str, Any]:
    """The answer and its words as JSON; `box` is None where nothing stands out."""
    picture, question = inputs.read_image(path), inputs.read_question(text)
    with inputs.explained(), models.in_use():
        found = models.grounder(heatmap).ask(picture, question, max_new_tokens=MAX_NEW_TOKENS)
        words = [
            {
                "text": word.text,
                "name": word.name,
                "span": list(word.span),
                "prob": float(word.prob),
                "points": word.points.tolist(),
                "box": None if word.box is None else list(word.box),
                "score": float(word.score),
            }
            for word in found.words
        ]
    size = {"width": found.image.width, "height": found.image.height}
    return {"answer": found.answer, "image": size, "words": words}


def word_pieces(found: Grounding) -> Pieces:
    """The answer cut into one piece a word, objects with the number of their colour in `Grounding.plot`."""
    shown = _with_masks(found.objects)
    colors = {id(word): str(number % len(PALETTE)) for number, word in enumerate(shown)}
    if any(one.span[1] > two.span[0] for one, two in pairwise(found.words)):  # detected, in several answers
        return [(word.text, colors.get(id(word))) for word in found.words]
    pieces: Pieces = []
    start, ends = 0, [*(word.span[0] for word in found.words[1:]), len(found.answer)]
    for word, end in zip(found.words, ends, strict=True):
        color = colors.get(id(word))
        # blanks belong to the word before them, but for coloured words, which end where they end
        stop = end if color is None or end == len(found.answer) else word.span[1]
        pieces.append((found.answer[start:stop], color))
        start = stop
    return pieces


def _api(models: Models, sessions: Sessions) -> None:
    """The endpoint `/ground(image, question)`."""
    with gr.Row(visible=False):
        image, question, found = inputs.image_input(label="image"), gr.Textbox(label="question"), gr.JSON()
        run = gr.Button()
    method = heatmap_choices(models)[0][1]

    def on_ground(image: str | None, question: str, request: gr.Request) -> dict[str, Any]:
        """Ask about an image; each word of the answer has its probability, points, box and score."""
        sessions.own(request, image)
        return ground(models, image, question, method)

    run.click(on_ground, [image, question], found, api_name="ground", **QUEUE)


def _shown(session: Session, found: Grounding) -> tuple[Any, ...]:
    """What the page has after an answer: all objects."""
    session.results.pop("word", None)
    objects = _with_masks(found.objects)
    if not found.words:
        said = hint("The model said nothing." if not found.answer else "Nothing was found.")
        pieces: Pieces = [(found.answer, None)] if found.answer else []
    else:
        number = len(objects)
        said = hint(
            f"{number} object{'s' if number != 1 else ''} found. Click a word to see what it was about."
        )
        pieces = word_pieces(found)
    export = write_json(found.to_coco(), session.path("objects.json"))
    overlay = _save(session, "grounded.png", found, objects)
    return (
        pieces,
        said,
        gr.Image(value=overlay, alt_text=f"The image with masks: {_named(objects) or 'none'}"),
        None,
        gr.DownloadButton(value=overlay, interactive=True),
        gr.DownloadButton(value=str(export), interactive=True),
        None,
    )


def _word(session: Session, found: Grounding, word: Word) -> tuple[Any, ...]:
    """What the page has after a click on a word."""
    overlay = _save(session, "grounded.png", found, _with_masks([word]))
    path = session.path("heatmap.png")
    word.plot(_scale(found)).save(path)
    mask = gr.Image(value=overlay, alt_text=f"The image with a mask: {_named([word]) or 'none'}")
    heat = gr.Image(value=str(path), alt_text=f"Where the model looked as it said {word.text!r}")
    facts = {"probability": f"{word.prob:.2f}", "score": f"{word.score:.2f}"}
    if word.box is None:
        facts["mask"] = "nothing stands out"
    else:
        facts["box"] = _corners(word)
        facts["points"] = str(len(word.points))
    return hint(word.text, facts), mask, heat, gr.DownloadButton(value=overlay, interactive=True)


def _save(session: Session, name: str, found: Grounding, words: Sequence[Word]) -> str:
    path = session.path(name)
    with whole_file(path) as partial:
        found.plot(words, scale=_scale(found)).save(partial)
    return str(path)


def _named(words: Sequence[Word]) -> str:
    """Words with their boxes, for those who do not see the picture."""
    return ", ".join(f"{word.text} at {_corners(word)}" for word in _with_masks(words))


def _corners(word: Word) -> str:
    assert word.box is not None
    x0, y0, x1, y1 = word.box
    return f"{x0}, {y0} to {x1}, {y1}"


def _scale(found: Grounding) -> int:
    return max(1, LEGIBLE // max(found.image.size))


def _with_masks(words: Sequence[Word]) -> list[Word]:
    return [word for word in words if word.box is not None]


class _When(StoppingCriteria):
    """Stops an answer that nobody waits for."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


if __name__ == "__main__":
    from demos.app import run

    run(tabs=("Grounding",))
