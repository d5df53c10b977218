"""Example images: scenes of the shapes world, drawn on the fly, whose objects are known."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import gradio as gr
from PIL import Image

from visionsel.data.shapes import Sample, ShapesWorld

__all__ = ["Example", "example_gallery", "known_objects", "scenes"]

SIDE = 384  # pixels: enough to look at; the scene is the one that the model knows at 64
SEED = 7
CHOSEN = (("balanced", 0), ("balanced", 2), ("balanced", 3), ("anti", 0), ("anti", 2), ("anti", 3))


@dataclass(frozen=True, eq=False)
class Example:
    """A scene.

    Attributes:
        image: RGB.
        objects: the names of its shapes.
        caption: that is true of it.
    """

    image: Image.Image
    objects: frozenset[str]
    caption: str


@cache
def scenes() -> tuple[Example, ...]:
    """The scenes; in half of them the usual companion of a shape is absent, which models like to invent."""
    return tuple(_example(ShapesWorld(kind, SEED, 8, SIDE)[number]) for kind, number in CHOSEN)


def known_objects(image: Image.Image) -> frozenset[str] | None:
    """What is in an image, if it is one of the scenes, whatever file it comes from."""
    known = {_digest(scene.image): scene.objects for scene in scenes()}
    return known.get(_digest(image))


def example_gallery(image: gr.Image, sessions: Any, first: Sequence[int] = ()) -> gr.Gallery:
    """Thumbnails; a click puts the scene into `image`.

    Args:
        image: the component.
        sessions: of the app, which hold the files.
        first: numbers of the scenes in the order in which they are shown; default all as they are.
    """
    shown = [scenes()[number] for number in first] or list(scenes())
    gallery = gr.Gallery(
        [(scene.image, scene.caption) for scene in shown],  # read aloud, and not shown
        label="Examples",
        columns=6,
        rows=1,
        height="auto",
        allow_preview=False,
        buttons=[],
        format="png",
        interactive=False,
        elem_classes="examples",
    )

    def choose(request: gr.Request, event: gr.SelectData) -> str:
        path = sessions.of(request).path("scene.png")
        shown[int(event.index)].image.save(path)
        return str(path)

    gallery.select(choose, None, image, show_progress="hidden", api_visibility="private", queue=False)
    return gallery


def _example(sample: Sample) -> Example:
    return Example(sample.image, frozenset(thing.shape for thing in sample.objects), sample.captions[0])


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.convert("RGB").tobytes()).hexdigest()
