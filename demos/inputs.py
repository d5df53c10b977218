"""What people give to the demos, checked before a model sees it: every refusal says what to do instead."""

import html
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, UnidentifiedImageError

from visionsel.multimodal.grounding.reading import open_upright

__all__ = ["LONGEST", "MOST_PIXELS", "explained", "image_input", "read_image", "read_question", "refused"]

MOST_PIXELS = 80_000_000
LONGEST = 1024  # pixels of the longer side that are worked with; larger images are scaled down
MOST_CHARACTERS = 1000


def image_input(**options: Any) -> gr.Image:
    """An image that arrives as the path of what was uploaded, unread, so that `read_image` can refuse it.

    It takes files, and no addresses: the server opens no connection. (Functions are put on the component, as
    Gradio writes a stub beside each file that subclasses one.)

    Args:
        options: of `gr.Image`.
    """
    image = gr.Image(type="filepath", image_mode=None, format="png", **options)
    move = image.async_move_resource_to_block_cache

    def preprocess(payload: Any) -> str | None:
        if payload is None:
            return None
        if not payload.path:
            raise refused("The image came without a file. Upload it as a file.")
        return str(payload.path)

    async def take_files(path: Any) -> str | None:
        if str(path).lower().startswith(("http://", "https://")):
            raise refused("An image has to be a file: this demo opens no other addresses.")
        return await move(path)

    own = {"preprocess": preprocess, "async_move_resource_to_block_cache": take_files}
    for name, function in own.items():
        setattr(image, name, function)
    return image


def read_image(path: str | None) -> Image.Image:
    """The image of a file, RGB and upright, at most `LONGEST` pixels a side.

    Raises:
        gr.Error: for no file, one that is no image, or a huge one.
    """
    if path is None:
        raise refused("Add an image first: upload one, take a photo, or choose an example.")
    name = Path(path).name
    if not Path(path).is_file():
        raise refused("This image is no longer here, as files are kept for a while only. Add it again.")
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            if width * height > MOST_PIXELS:
                raise refused(
                    f"{name} has {width} x {height} pixels; at most {MOST_PIXELS // 10**6} million are read. "
                    "Scale it down first."
                )
            if max(width, height) > LONGEST:
                opened.draft("RGB", (LONGEST, LONGEST))  # JPEG is decoded at a smaller scale at once
                opened.load()
                opened.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS, reducing_gap=3.0)
                gr.Info(
                    f"The image has {width} x {height} pixels; it is scaled down to "
                    f"{opened.width} x {opened.height}."
                )
            return open_upright(opened)
    except gr.Error:
        raise
    except Image.DecompressionBombError as error:
        raise refused(f"{name} has too many pixels. Scale it down first.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError) as error:
        raise refused(
            f"{name} is not an image that can be read, or it is cut off. Use a PNG, JPEG or WebP file."
        ) from error


def read_question(text: str | None) -> str:
    """A question without blanks at its ends.

    Raises:
        gr.Error: for none, or a very long one.
    """
    question = (text or "").strip()
    if not question:
        raise refused("The question is empty. Write one, such as: describe the image.")
    if len(question) > MOST_CHARACTERS:
        raise refused(
            f"The question has {len(question):,} characters; at most {MOST_CHARACTERS:,} are asked. "
            "Shorten it."
        )
    return question


@contextmanager
def explained() -> Iterator[None]:
    """What the library refuses is told on the page."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, RuntimeError, OSError) as error:
        if isinstance(error, gr.Error):
            raise
        raise refused(str(error)) from error


def refused(message: str) -> gr.Error:
    """A message on the page; the text is shown as it is, whatever file names hold."""
    return gr.Error(html.escape(message), print_exception=False)
