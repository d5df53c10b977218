"""The three demos as tabs of one page: `visionsel demo`, or `python -m demos.app`."""

from typing import Any

import gradio as gr

from demos.grounding import grounding_tab
from demos.hallucination import hallucination_tab
from demos.models import Models, load_models
from demos.page import about, new_page, serve, title
from demos.pruning import pruning_tab
from demos.sessions import Sessions

__all__ = ["TABS", "build_app", "run"]

TABS = {"Grounding": grounding_tab, "Pruning": pruning_tab, "Hallucination": hallucination_tab}
ABOUT = {
    "Grounding": "Each word of an answer shows where the model looked as it said it: a heatmap, and the mask "
    "and box that a segmenter makes of its peaks.",
    "Pruning": "The same question with fewer image tokens: which patches stay, what the answer becomes, and "
    "what it saves.",
    "Hallucination": "The same question with and without remedies against inventing: what is said, which "
    "heads look at the image, and where attention goes.",
}


def build_app(
    model: Any,
    processor: Any,
    segmenter: Any,
    tabs: tuple[str, ...] = tuple(TABS),
    segmenter_name: str = "",
) -> gr.Blocks:
    """The page, not served yet: `demos.page.serve` does that, or `launch` of Gradio.

    Args:
        model, processor: a vision-language model of transformers, as `visionsel.generation.load_lvlm` gives
            them.
        segmenter: of `build_segmenter`, or what it takes.
        tabs: which of the three.
        segmenter_name: what the page calls the segmenter; default the class of its model.

    Raises:
        ValueError: for an unknown tab, or a model of no supported family.
    """
    if unknown := [name for name in tabs if name not in TABS]:
        raise ValueError(f"there is no tab {unknown[0]!r}; there are {', '.join(TABS)}")
    models = Models(model, processor, segmenter, segmenter_name)
    models.grounder("mean")  # says what is supported

    def fill(sessions: Sessions) -> None:
        words = "coloured shapes, and nothing else" if models.embedded else "what it was trained on"
        lead = f"What does a vision-language model look at? The model here knows {words}."
        gr.HTML(title(lead, models.facts), elem_id="title")
        with gr.Tabs():
            for name in tabs:
                with gr.Tab(name):
                    gr.HTML(about(ABOUT[name], f"{name.lower()}.md"))
                    TABS[name](models, sessions)

    return new_page(f"visionsel: {', '.join(tabs).lower()}", fill)


def run(
    port: int | None = None, share: bool = False, tabs: tuple[str, ...] = tuple(TABS), **named: Any
) -> None:
    """Load models and serve the page on loopback until it is interrupted.

    Args:
        port: default the first free one from 7860 on.
        share: whether Gradio opens a public tunnel.
        tabs: which of the three.
        named: arguments of `load_models`.
    """
    models = load_models(**named)
    parts = models.model, models.processor, models.segmenter
    serve(lambda: build_app(*parts, tabs, models.segmenter_name), port, share)


if __name__ == "__main__":
    run()
