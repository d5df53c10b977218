"""How the demos look, and how they are served: on loopback, with files that go when the server stops."""

import html
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from demos.sessions import AGE, Sessions

__all__ = [
    "CSS",
    "DOCS",
    "QUEUE",
    "THEME",
    "about",
    "hint",
    "new_page",
    "own_uploads",
    "serve",
    "served",
    "title",
]

DOCS = "https://github.com/visionsel/visionsel/tree/main/docs"

QUEUE: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}
"""Options of every event that uses the models: one at a time, the others wait in line."""

LARGEST_FILE = "64mb"
WAITING = 200  # requests; more are refused with a message

THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.blue,
    neutral_hue=gr.themes.colors.slate,
    radius_size=gr.themes.sizes.radius_md,
    font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
).set(
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    body_text_color_subdued="*neutral_500",
    body_text_color_subdued_dark="*neutral_400",
    block_shadow="none",
    button_primary_background_fill="#0072b2",
    button_primary_background_fill_hover="#005f96",
    button_primary_background_fill_dark="#0072b2",
    button_primary_background_fill_hover_dark="#1a86c4",
    button_primary_text_color="white",
)

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.35rem; margin: 0.4rem 0 0; letter-spacing: -0.01em; }
#title p { margin: 0.15rem 0; color: var(--body-text-color-subdued); }
#title .facts { font-size: 0.88rem; margin-bottom: 0.4rem; }
#title .facts span { display: inline-block; margin-right: 1rem; }
#title .facts i { font-style: normal; color: var(--body-text-color); }
.tab-container button.selected { color: var(--link-text-color) !important; }
.about { color: var(--body-text-color-subdued); max-width: 60rem; margin: 0; }
#title a, .about a { color: var(--link-text-color); text-decoration: underline;
  padding: 0; }
#answer { cursor: pointer; }
#answer .textfield { font-size: 1.1rem; line-height: 2; }
#answer .text { color: var(--body-text-color) !important; }
#answer .token { border-radius: 4px; padding: 0.1rem 0; margin: 0; }
#answer .token:hover { background: rgba(0, 114, 178, 0.16); }
#answer .token.highlighted { padding: 0.1rem 0.3rem; margin: 0 0.15rem 0 0; }
#answer .token.highlighted:hover { filter: saturate(1.6); }
#answer .token:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 1px; }
.hint { font-size: 0.95rem; color: var(--body-text-color-subdued); min-height: 1.6rem;
  padding: 0.1rem 0.2rem; }
.hint b { color: var(--body-text-color); margin-right: 0.9rem; }
.hint span { white-space: nowrap; margin-right: 0.9rem; }
.hint i { font-style: normal; color: var(--body-text-color); font-variant-numeric: tabular-nums; }
.examples .grid-wrap { min-height: 0; max-height: none; overflow: visible; padding: 1.9rem 0.5rem 0.5rem; }
.examples .grid-container { grid-template: auto / repeat(6, minmax(0, 1fr)) !important; padding: 0;
  width: 100%; gap: 0.4rem; }
.examples .thumbnail-item, .examples .gallery-item { height: auto; width: 100%; aspect-ratio: 1; }
.examples .thumbnail-item img { height: 100%; width: 100%; }
.examples .caption-label { display: none; }
#heads .grid-wrap { min-height: 0; max-height: none; overflow: visible; padding-top: 1.9rem; }
#heads .grid-container { grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)) !important; }
#heads { contain: inline-size; }
.kept .image-frame { padding-top: 1.9rem; }
.bottom { align-items: flex-end; }
.wide { overflow-x: auto; contain: inline-size; }
table.plain { border-collapse: collapse; width: 100%; font-size: 0.92rem; border: 0 !important; }
table.plain th, table.plain td { text-align: left; padding: 0.45rem 0.7rem; vertical-align: top;
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important;
  color: var(--body-text-color); }
table.plain tr, table.plain tbody, table.heads tr, table.heads tbody { border: 0 !important; }
table.plain th { font-weight: 600; color: var(--body-text-color-subdued); white-space: nowrap; }
table.plain td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
table.plain th.number { text-align: right; }
table.plain td.said { min-width: 16rem; line-height: 1.5; }
table.plain small { color: var(--body-text-color-subdued); display: block; }
.answer-text { color: var(--body-text-color); line-height: 1.5; min-height: 3rem; }
.answer-text .hint { font-size: 0.85rem; min-height: 0; padding: 0; }
mark.invented { background: #d55e00; color: black; padding: 0.05rem 0.3rem; border-radius: 4px; }
mark.seen { background: none; color: inherit; border-bottom: 2px solid #009e73; }
table.heads { border-collapse: separate; border-spacing: 2px; font-size: 0.8rem; width: auto;
  border: 0 !important; }
table.heads th, table.heads td { border: 0 !important; }
table.heads th { font-weight: 500; color: var(--body-text-color-subdued); padding: 0 0.4rem;
  text-align: right; }
table.heads td { min-width: 2.6rem; height: 1.7rem; text-align: center; border-radius: 3px;
  font-variant-numeric: tabular-nums; }
table.heads td.strong { outline: 2px solid #d55e00; outline-offset: -2px; font-weight: 700; }
.scales { display: flex; flex-wrap: wrap; gap: 0.3rem 1.6rem; font-size: 0.85rem; padding: 0 0.2rem;
  color: var(--body-text-color-subdued); }
.scales span { display: inline-flex; align-items: center; gap: 0.4rem; }
.scales i { display: inline-block; width: 6rem; height: 0.7rem; border-radius: 2px;
  border: 1px solid var(--border-color-primary); }
.gazes { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  gap: 1rem 1.6rem; padding: 0.6rem 0.2rem; }
.gaze { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 0.4rem; }
.gaze h3 { grid-column: 1 / -1; font-size: 0.95rem; margin: 0; }
.gaze figure { margin: 0; }
.gaze img { width: 100%; margin: 0; border-radius: 3px; display: block; }
.gaze figcaption { font-size: 0.8rem; color: var(--body-text-color-subdued); margin-top: 0.15rem; }
@media (max-width: 640px) {
  .gradio-container .main { padding: 12px !important; }
  .tab-container button { padding-left: 0.6rem !important; padding-right: 0.6rem !important; }
  table.plain { font-size: 0.78rem; }
  table.plain th, table.plain td { padding: 0.35rem 0.25rem; }
  table.plain th, table.plain th.number { white-space: normal; overflow-wrap: normal; }
  table.stacked tr { display: block; padding: 0.4rem 0;
    border-bottom: 1px solid var(--border-color-primary) !important; }
  table.stacked tr:first-child { display: none; }
  table.stacked th, table.stacked td { display: block; border: 0 !important; padding: 0.15rem 0.25rem; }
  table.stacked th, table.stacked td.said { font-size: 0.9rem; }
  table.stacked td.number { display: inline-block; margin-right: 1rem; }
  table.stacked td.number::before { content: attr(data-name) " "; color: var(--body-text-color-subdued); }
}
"""


def new_page(title: str, fill: Callable[[Sessions], None]) -> gr.Blocks:
    """A page whose files go with it.

    Args:
        title: of the window.
        fill: makes what is on the page, inside of `gr.Blocks`.
    """
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(60, AGE)) as page:
        sessions = Sessions(Path(page.GRADIO_CACHE))
        fill(sessions)

        def end(request: gr.Request) -> None:
            own = (path for block in page.blocks.values() for path in block.keep_in_cache)
            sessions.kept.update(Path(path).resolve() for path in own)
            sessions.end(request)

        page.unload(end)
    page.queue(max_size=WAITING, default_concurrency_limit=4)
    return page


@contextmanager
def served(
    make: Callable[[], gr.Blocks], port: int | None = None, share: bool = False, **options: Any
) -> Iterator[gr.Blocks]:
    """Serve a page on 127.0.0.1 for the length of a block; its files are in a folder that goes then.

    Args:
        make: builds the page.
        port: None: the first free one from 7860 on.
        share: whether Gradio opens a public tunnel to it.
        options: further ones of `gr.Blocks.launch`.

    Yields:
        the page, with `local_url`.

    Raises:
        OSError: for a port that is taken.
    """
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="visionsel-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = make()
        try:
            page.launch(
                server_name="127.0.0.1",
                server_port=port,
                share=share,
                quiet=not share,
                prevent_thread_lock=True,
                theme=THEME,
                css=CSS,
                footer_links=[],
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                enable_monitoring=False,
                max_file_size=LARGEST_FILE,
                **options,
            )
            yield page
        finally:
            page.close(verbose=False)
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def serve(make: Callable[[], gr.Blocks], port: int | None = None, share: bool = False) -> None:
    """`served`, until the process is interrupted."""
    with served(make, port, share) as page, suppress(KeyboardInterrupt):
        open_to = "and whoever has the public link can use it" if share else "and for this machine alone"
        print(
            f"Stop with Ctrl-C. Everything happens on this machine, {open_to}: {page.local_url}", flush=True
        )
        threading.Event().wait()


def own_uploads(image: gr.Image, sessions: Sessions) -> None:
    """What is put into an image component is deleted with the page, also if nothing is asked about it."""

    def own(path: str | None, request: gr.Request) -> None:
        sessions.own(request, path)

    for event in (image.upload, image.input):
        event(own, image, None, show_progress="hidden", api_visibility="private", queue=False)


def title(lead: str, facts: Mapping[str, str]) -> str:
    """HTML: the head of the page.

    Args:
        lead: one or two sentences.
        facts: about the models, by name.
    """
    told = " ".join(
        f"<span>{html.escape(name)}: <i>{html.escape(fact)}</i></span>" for name, fact in facts.items()
    )
    return (
        f"<h1>visionsel</h1><p>{html.escape(lead)}</p>"
        f'<p class="facts">{told}{_link("Documentation", DOCS)}</p>'
    )


def about(text: str, page: str) -> str:
    """HTML: what a tab is for, with a link to its page of the documentation."""
    return f'<p class="about">{html.escape(text)} {_link("More about it", f"{DOCS}/{page}")}</p>'


def _link(text: str, address: str) -> str:
    """A link that opens beside this page, so that answers stay, and tells nobody where it was."""
    return f'<a href="{address}" target="_blank" rel="noopener noreferrer">{html.escape(text)}</a>'


def hint(text: str, facts: Mapping[str, str] | None = None) -> str:
    """A line of HTML; with facts, the text is what they are about."""
    if facts is None:
        return f'<div class="hint">{html.escape(text)}</div>'
    told = " ".join(
        f"<span>{html.escape(name)} <i>{html.escape(fact)}</i></span>" for name, fact in facts.items()
    )
    return f'<div class="hint"><b>{html.escape(text)}</b>{told}</div>'
