"""Pruning: one question at several budgets of image tokens, side by side: what is kept, said, saved."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import torch
from PIL import Image

from demos import inputs
from demos.examples import example_gallery, scenes
from demos.models import MAX_NEW_TOKENS, Models
from demos.page import QUEUE, hint, own_uploads
from demos.sessions import Sessions
from visionsel.data.shapes import CAPTION_PROMPT
from visionsel.embedded.files import WEIGHTS
from visionsel.multimodal.intervention import method_name
from visionsel.multimodal.prompts import chat_inputs, user_turn
from visionsel.multimodal.pruning import PRUNERS
from visionsel.multimodal.pruning.budget import has_budget, with_budget
from visionsel.multimodal.pruning.measure import measure_in_turn
from visionsel.multimodal.pruning.report import Report

__all__ = ["PrunedAnswer", "compare", "pruner_names", "pruning_tab"]

BUDGETS = (0.5, 0.25, 0.1)
FIRST = "divprune"
ROUNDS = 3  # of the clock


def pruning_tab(models: Models, sessions: Sessions) -> None:
    """Put the tab where it is called, inside of `gr.Blocks`."""
    with gr.Row(elem_classes="halves"):
        with gr.Column(scale=5, min_width=300):
            image = inputs.image_input(
                label="Image",
                value=scenes()[1].image,
                sources=["upload", "webcam", "clipboard"],
                height=260,
                alt_text="The image to ask about",
            )
            example_gallery(image, sessions)
        with gr.Column(scale=7, min_width=300):
            question = gr.Textbox(CAPTION_PROMPT, label="Question", lines=1, max_lines=4)
            method = gr.Dropdown(
                pruner_names(models), value=FIRST, label="Method", filterable=False, elem_id="pruner"
            )
            run = gr.Button("Compare", variant="primary")
            whole = gr.HTML(hint("The answer with all image tokens will stand here."), elem_id="whole")
    with gr.Row(elem_classes="budgets"):
        budgets, pictures, answers = [], [], []
        for number, budget in enumerate(BUDGETS):
            with gr.Column(min_width=260):
                budgets.append(
                    gr.Slider(
                        0.05,
                        1.0,
                        budget,
                        step=0.05,
                        label="Share of image tokens",
                        elem_id=f"budget-{number}",
                    )
                )
                pictures.append(
                    gr.Image(
                        label="Kept patches",
                        show_label=False,
                        format="png",
                        interactive=False,
                        buttons=["fullscreen"],
                        elem_id=f"kept-{number}",
                        elem_classes="kept",
                    )
                )
                answers.append(gr.HTML('<div class="answer-text"></div>', elem_id=f"pruned-{number}"))
    table = gr.HTML(elem_id="costs")

    def on_run(
        path: str | None,
        text: str,
        name: str,
        first: float,
        second: float,
        third: float,
        request: gr.Request,
    ) -> tuple[Any, ...]:
        sessions.own(request, path)
        session = sessions.of(request)
        picture, asked = inputs.read_image(path), inputs.read_question(text)
        with inputs.explained(), models.in_use():
            full, found = compare(models, picture, asked, name, [first, second, third])
        shown, said = [], []
        for one in found:
            file = session.path("kept.png")
            one.picture.save(file)
            kept, of = one.report.equivalent_tokens, one.report.full_tokens
            alt = f"Which patches are kept at a share of {one.budget:.0%}: {kept:.0f} tokens of {of:.0f}"
            shown.append(gr.Image(value=str(file), alt_text=alt))
            same = one.answer == full
            note = "the same answer" if same else "another answer"
            said.append(f'<div class="answer-text">{html.escape(one.answer)}{_small(note)}</div>')
        return (_whole(full), *shown, *said, _costs(found))

    everything = [image, question, method, *budgets]
    outputs = [whole, *pictures, *answers, table]
    options: dict[str, Any] = {**QUEUE, "api_visibility": "private", "show_progress_on": [whole, *pictures]}
    run.click(on_run, everything, outputs, **options)
    question.submit(on_run, everything, outputs, **options)
    method.input(on_run, everything, outputs, **options)
    for slider in budgets:
        slider.release(on_run, everything, outputs, **options)
    own_uploads(image, sessions)


@dataclass(frozen=True)
class PrunedAnswer:
    """One budget.

    Attributes:
        budget: that was asked for.
        answer: of the model.
        picture: which patches were kept, and at which layer the others went.
        report: tokens, FLOPs, bytes and measured seconds.
    """

    budget: float
    answer: str
    picture: Image.Image
    report: Report


@torch.inference_mode()
def compare(
    models: Models, image: Image.Image, question: str, name: str, budgets: Sequence[float]
) -> tuple[str, list[PrunedAnswer]]:
    """Answers with all image tokens and at each budget.

    Args:
        models: that answer, greedily.
        image: RGB.
        question: to ask.
        name: of a pruner.
        budgets: shares of the image tokens in the mean over the decoder layers, see
            `visionsel.multimodal.pruning.budget`. A method that decides itself gives the same each time.

    Raises:
        ValueError: for an unknown method, or one that does not fit the model.
    """
    known = {method_name(kind): kind for kind in PRUNERS}
    if name not in known:
        raise ValueError(f"no method is called {name!r}; there are {', '.join(known)}")
    more = {"predictor": WEIGHTS / "explainprune"} if name == "explainprune" else {}
    pruners = {budget: with_budget(known[name], budget, models.layers, **more) for budget in budgets}
    model, processor = models.model, models.processor
    asked = chat_inputs(processor, [[user_turn(question)]], [[image]]).to(model.device, model.dtype)

    def answer() -> str:
        tokens = model.generate(**asked, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = tokens[:, asked["input_ids"].shape[1] :]
        text: str = processor.batch_decode(new, skip_special_tokens=True)[0]
        return text.strip()

    full = answer()
    seen = {}
    for budget, pruner in pruners.items():
        with pruner(model) as pruned:
            said = answer()
            seen[budget] = said, pruned.picture(image, processor)
    timed = measure_in_turn(model, {str(budget): one for budget, one in pruners.items()}, asked, ROUNDS)
    return full, [PrunedAnswer(budget, *seen[budget], timed[str(budget)]) for budget in budgets]


def pruner_names(models: Models) -> list[str]:
    """Methods that need nothing that is trained, or for the embedded model what ships with it."""
    names = [method_name(kind) for kind in PRUNERS if has_budget(kind) or method_name(kind) == "prumerge"]
    return [name for name in names if models.embedded or name != "explainprune"]


def _whole(answer: str) -> str:
    return f'<div class="answer-text">{_small("with all image tokens")}{html.escape(answer)}</div>'


def _small(text: str) -> str:
    return f'<div class="hint">{html.escape(text)}</div>'


def _costs(found: Sequence[PrunedAnswer]) -> str:
    """A table: a row a budget, and the full prompt above."""
    first = found[0].report
    heads = "".join(f'<th class="number">{name}</th>' for name in COLUMNS)
    rows = [_row("all image tokens", first, full=True)]
    rows += [_row(f"share {one.budget:.0%}", one.report) for one in found]
    note = (
        "A share is a mean over the layers of the decoder. FLOPs are those of the decoder for the prompt; "
        f"the time to the first token and its ratio are medians of {ROUNDS} rounds in turn on this machine."
    )
    body = "".join(rows)
    return (
        f'<div class="wide"><table class="plain"><tr><th></th>{heads}</tr>{body}</table></div>'
        f'<div class="hint">{note}</div>'
    )


COLUMNS = ("image tokens", "prefill FLOPs", "cache of the prompt", "first token")


def _row(name: str, report: Report, full: bool = False) -> str:
    tokens = report.full_tokens if full else report.equivalent_tokens
    flops = report.full_flops if full else report.flops
    held = report.full_cache_bytes if full else report.cache_bytes
    seconds = report.seconds
    cells = [
        (f"{tokens:.1f}", tokens / (report.full_tokens or 1)),
        (_scaled(flops, 1000, ("", "k", "M", "G", "T", "P"), ""), report.flops_ratio),
        ("-" if held is None else _scaled(held, 1024, ("", "Ki", "Mi", "Gi"), "B"), report.cache_ratio),
        (
            "-" if seconds is None else f"{1e3 * (seconds.full if full else seconds.pruned):.1f} ms",
            None if seconds is None else seconds.ratio,
        ),
    ]
    told = "".join(
        f'<td class="number">{text}<small>{"" if full or ratio is None else f"x {ratio:.2f}"}</small></td>'
        for text, ratio in cells
    )
    return f"<tr><th>{html.escape(name)}</th>{told}</tr>"


def _scaled(value: float, step: int, prefixes: Sequence[str], unit: str) -> str:
    power = 0
    while value >= step and power < len(prefixes) - 1:
        value, power = value / step, power + 1
    return f"{value:.4g} {prefixes[power]}{unit}".strip()


if __name__ == "__main__":
    from demos.app import run

    run(tabs=("Pruning",))
