"""Hallucination: one question with and without remedies; inventions are marked where the truth is known."""

import html
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from demos import inputs
from demos.examples import example_gallery, known_objects, scenes
from demos.models import MAX_NEW_TOKENS, Models
from demos.page import QUEUE, hint, own_uploads
from demos.redistribution import draw_gazes, measure_gaze
from demos.sessions import Sessions
from visionsel.data.shapes import CAPTION_PROMPT
from visionsel.embedded.hallucination_quality import adapted
from visionsel.generation import parse_methods
from visionsel.multimodal.decoding import DECODERS
from visionsel.multimodal.evaluation import chair, shapes_synonyms
from visionsel.multimodal.grounding.words import find_words
from visionsel.multimodal.intervention import method_name
from visionsel.multimodal.modulation import MODULATORS, GroundingHeads, head_importance
from visionsel.multimodal.prompts import chat_inputs, user_turn
from visionsel.viz import heat_colors, ink_on

__all__ = [
    "Remedied",
    "answer_with",
    "hallucination_tab",
    "head_table",
    "mark_invented",
    "measure_heads",
    "redistributed",
    "remedy_names",
]

CALIBRATED = "grounding_heads"
KNOWN = "What is in the examples is known, so inventions are marked there; in other images nothing is marked."
TITLES = {
    "vhr": "VHR",
    "var": "VAR",
    "act": "ACT",
    "pai": "PAI",
    "paint": "Paint",
    CALIBRATED: "Grounding heads",
    "vcd": "VCD",
    "icd": "ICD",
    "m3id": "M3ID",
    "ritual": "Ritual",
    "agla": "AGLA",
    "pai_guidance": "PAI guidance",
    "glc": "GLC",
}


def hallucination_tab(models: Models, sessions: Sessions) -> None:
    """Put the tab where it is called, inside of `gr.Blocks`."""
    names = remedy_names(models)
    first = [name for name in ("vhr", CALIBRATED, "vcd") if name in names]
    with gr.Row(elem_classes="halves"):
        with gr.Column(scale=5, min_width=300):
            image = inputs.image_input(
                label="Image",
                value=scenes()[3].image,
                sources=["upload", "webcam", "clipboard"],
                height=260,
                alt_text="The image to ask about",
            )
            example_gallery(image, sessions, first=(3, 4, 5, 0, 1, 2))
        with gr.Column(scale=7, min_width=300):
            question = gr.Textbox(CAPTION_PROMPT, label="Question", lines=1, max_lines=4)
            chosen = gr.CheckboxGroup(
                [(TITLES.get(name, name), name) for name in names],
                value=first,
                label="Remedies, each by itself",
                elem_id="remedies",
            )
            run = gr.Button("Answer with and without", variant="primary")
            known = gr.HTML(hint(KNOWN))
    table = gr.HTML(elem_id="remedied")
    gazes = gr.HTML(elem_id="redistributed")
    heads = gr.HTML(elem_id="head-table")

    def on_run(path: str | None, text: str, wanted: list[str], request: gr.Request) -> tuple[str, ...]:
        sessions.own(request, path)
        picture, asked = inputs.read_image(path), inputs.read_question(text)
        truth = known_objects(picture)
        with inputs.explained(), models.in_use():
            found = [answer_with(models, picture, asked, name) for name in (None, *wanted)]
            plain = found[0].answer
            sensitivity, moved = None, ""
            if plain:
                moved = redistributed(models, picture, asked, found[0], wanted)
                sensitivity = measure_heads(models, picture, asked, plain)
        said = hint(
            "This is none of the examples: what is in it is not known, so nothing is marked."
            if truth is None
            else f"In the image: {', '.join(sorted(truth))}."
        )
        strong = {one.title: one.heads for one in found if one.heads}
        drawn = hint("The model said nothing.") if sensitivity is None else head_table(sensitivity, strong)
        return said, _answers(found, truth), moved, drawn

    options: dict[str, Any] = {**QUEUE, "api_visibility": "private", "show_progress_on": [table]}
    for event in (run.click, question.submit):
        event(on_run, [image, question, chosen], [known, table, gazes, heads], **options)
    own_uploads(image, sessions)


@dataclass(frozen=True)
class Remedied:
    """An answer under a remedy.

    Attributes:
        title: of the remedy.
        answer: of the model.
        notes: what the remedy did, in words.
        heads: by layer, those that it strengthened.
        tokens: int64 `[1, T]` of the answer.
    """

    title: str
    answer: str
    notes: str
    heads: Mapping[int, Sequence[int]]
    tokens: torch.Tensor


@torch.inference_mode()
def answer_with(models: Models, image: Image.Image, question: str, name: str | None) -> Remedied:
    """The greedy answer under a remedy (None: without any).

    Raises:
        ValueError, NotImplementedError: for an unknown remedy, or one that does not fit the model.
    """
    model, processor = models.model, models.processor
    asked = _prompt(models, image, question)

    def answer() -> tuple[str, torch.Tensor]:
        tokens = model.generate(**asked, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = tokens[:, asked["input_ids"].shape[1] :]
        text: str = processor.batch_decode(new, skip_special_tokens=True)[0]
        return text.strip(), new

    if name is None:
        said, tokens = answer()
        return Remedied("without any", said, "", {}, tokens)
    with _remedy(models, name)(model) as handle:
        said, tokens = answer()
        notes, heads = _told(handle)
    return Remedied(TITLES.get(name, name), said, notes, heads, tokens)


def redistributed(
    models: Models, image: Image.Image, question: str, plain: Remedied, names: Sequence[str]
) -> str:
    """HTML: how remedies change where the model looks while it says what it says without any.

    Args:
        models, image, question: as for `answer_with`.
        plain: the answer without any.
        names: of remedies; those that choose among words are told, for they leave attention as it is.
    """
    moving = [name for name in names if name in {method_name(kind) for kind in MODULATORS}]
    choosing = [TITLES.get(name, name) for name in names if name not in moving]
    said = hint(f"{', '.join(choosing)}: changes which word is chosen, not where the model looks.")
    if not moving:
        return said if choosing else ""
    asked = _prompt(models, image, question)
    before = measure_gaze(models, image, asked, plain.tokens)
    after = {
        TITLES.get(name, name): measure_gaze(models, image, asked, plain.tokens, _remedy(models, name))
        for name in moving
    }
    return draw_gazes(image, before, after) + (said if choosing else "")


def measure_heads(models: Models, image: Image.Image, question: str, answer: str) -> list[list[float]]:
    """`[layers][heads]`: how far what each head says moves when the image is taken away; see `head_table`.

    Args:
        models, image, question: as for `answer_with`.
        answer: over whose tokens the mean is taken.

    Raises:
        ValueError: where the chat template changes the answer.
    """
    sample = SimpleNamespace(image=image, captions=[answer])
    return head_importance(models.model, models.processor, [sample], prompt=question).sensitivity


def remedy_names(models: Models) -> list[str]:
    """Methods that need nothing that is chosen or trained, or for the embedded model what ships with it."""
    names = [method_name(kind) for kind in (*MODULATORS, *DECODERS)]
    return [name for name in names if models.embedded or name not in (CALIBRATED, "agla", "act")]


def mark_invented(answer: str, objects: Collection[str] | None) -> tuple[str, list[str]]:
    """The answer as HTML, and the shapes that it invents; with None nothing is marked."""
    if objects is None:
        return html.escape(answer), []
    table = shapes_synonyms()
    pieces, invented, end = [], [], 0
    for first, last in find_words(answer):
        word = answer[first:last]
        pieces.append(html.escape(answer[end:first]))
        shapes = chair.mentions(word, table)
        if not shapes:
            pieces.append(html.escape(word))
        elif shapes[0] in objects:
            pieces.append(f'<mark class="seen" title="in the image">{html.escape(word)}</mark>')
        else:
            invented.append(shapes[0])
            pieces.append(f'<mark class="invented" title="not in the image">{html.escape(word)}</mark>')
        end = last
    return "".join(pieces) + html.escape(answer[end:]), invented


def head_table(
    sensitivity: Sequence[Sequence[float]], strong: Mapping[str, Mapping[int, Sequence[int]]]
) -> str:
    """HTML: how far what each head says moves when the image is taken away; strengthened heads have a frame.

    Args:
        sensitivity: `[layers][heads]`.
        strong: by remedy, the heads that it strengthened; the first remedy has the frames.
    """
    values = np.array(sensitivity)
    shares = (values - values.min()) / ((values.max() - values.min()) or 1.0)
    title, framed = next(iter(strong.items()), ("", {}))
    rows = ["<tr><th></th>" + "".join(f"<th>head {head}</th>" for head in range(values.shape[1])) + "</tr>"]
    for layer, (row, places) in enumerate(zip(values, shares, strict=True)):
        cells = []
        for head, (value, share) in enumerate(zip(row, places, strict=True)):
            rgb = heat_colors(share).round().astype(int).tolist()
            kind = "strong" if head in framed.get(layer, ()) else ""
            color = f"background: rgb({rgb[0]}, {rgb[1]}, {rgb[2]}); color: {ink_on(rgb)}"
            cells.append(f'<td class="{kind}" style="{color}">{value:.2g}</td>')
        rows.append(f"<tr><th>layer {layer}</th>{''.join(cells)}</tr>")
    frames = f" A frame: strengthened by {html.escape(title)}." if framed else ""
    return (
        '<div class="hint"><b>Which heads look at the image</b>How far the output of each head moves when '
        f"the image is taken away, mean over the answer without any remedy.{frames}</div>"
        f'<div class="wide"><table class="heads">{"".join(rows)}</table></div>'
    )


def _prompt(models: Models, image: Image.Image, question: str) -> Any:
    inputs = chat_inputs(models.processor, [[user_turn(question)]], [[image]])
    return inputs.to(models.model.device, models.model.dtype)


def _remedy(models: Models, name: str) -> Any:
    known = {method_name(kind): kind for kind in (*MODULATORS, *DECODERS)}
    if name not in known:
        raise ValueError(f"no remedy is called {name!r}; there are {', '.join(known)}")
    if not models.embedded:
        decodes = name in {method_name(kind) for kind in DECODERS}
        chosen: dict[str, Any] = {"decode": name} if decodes else {"modulate": [name]}
        return parse_methods(models.model, models.processor, **chosen)[0]
    if name == CALIBRATED:
        return GroundingHeads.preset("embedded")
    with torch.inference_mode(False):  # AGLA's view takes gradients
        return known[name](**adapted(name, models.model, models.processor))


def _told(handle: Any) -> tuple[str, dict[int, list[int]]]:
    """What a remedy did to the prompt, in words, and the heads that it strengthened."""
    heads = handle if isinstance(handle, dict) else getattr(handle, "heads", None)
    if isinstance(heads, dict) and all(isinstance(mask, torch.Tensor) for mask in heads.values()):
        strong = {
            layer: mask.reshape(-1, mask.shape[-1])[0].nonzero().flatten().tolist()
            for layer, mask in heads.items()
        }
        strong = {layer: chosen for layer, chosen in strong.items() if chosen}
        number = sum(map(len, strong.values()))
        where = ", ".join(f"layer {layer}: {', '.join(map(str, own))}" for layer, own in strong.items())
        return f"{number} heads strengthened ({where})", strong
    notes = []
    if changed := getattr(handle, "changed", None):
        total = sum(changed.values())
        where = ", ".join(f"layer {layer}: {rows}" for layer, rows in changed.items())
        notes.append(f"attention redistributed in {total} rows of heads and tokens ({where})")
    if sinks := getattr(handle, "sinks", None):
        where = ", ".join(f"layer {layer}: {int(marks.sum())}" for layer, marks in sinks.items())
        notes.append(f"tokens taken for sinks ({where})")
    return "; ".join(notes), {}


def _answers(found: Sequence[Remedied], truth: Collection[str] | None) -> str:
    """A table of the answers."""
    rows = []
    for one in found:
        text, invented = mark_invented(one.answer, truth)
        count = "-" if truth is None else str(len(invented))
        named = "-"
        if truth is not None:
            said = set(chair.mentions(one.answer, shapes_synonyms()))
            named = f"{len(said & set(truth))} of {len(truth)}"
        notes = f"<small>{html.escape(one.notes)}</small>" if one.notes else ""
        rows.append(
            f'<tr><th>{html.escape(one.title)}</th><td class="said">{text}{notes}</td>'
            f'<td class="number" data-name="invented">{count}</td>'
            f'<td class="number" data-name="named">{named}</td></tr>'
        )
    head = '<tr><th></th><th>answer</th><th class="number">invented</th><th class="number">named</th></tr>'
    return f'<div class="wide"><table class="plain stacked">{head}{"".join(rows)}</table></div>'


if __name__ == "__main__":
    from demos.app import run

    run(tabs=("Hallucination",))
