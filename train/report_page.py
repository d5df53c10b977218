"""The page of the report: sections in one HTML file that needs no other; its style is `report_page.html`."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from PIL import Image

__all__ = ["Section", "bar", "fill_page", "picture", "picture_file", "table"]

TEMPLATE = Path(__file__).with_suffix(".html")


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: what the contents link to.
        title: of the section.
        figure: the number that stands for it in the contents, as HTML.
        meaning: what that number is, as HTML.
        body: HTML.
    """

    anchor: str
    title: str
    figure: str
    meaning: str
    body: str


def fill_page(sections: Sequence[Section], facts: Iterable[str], seconds: Mapping[str, float]) -> str:
    """The whole page.

    Args:
        sections: in order.
        facts: what the numbers depend on, as text.
        seconds: by section, how long it took; the only part of the page that differs between two runs.
    """
    contents = [
        f'<li><a href="#{one.anchor}"><span class="name">{number} {escape(one.title)}</span>'
        f'<span class="figure">{one.figure}</span><span class="meaning">{one.meaning}</span></a></li>'
        for number, one in enumerate(sections, 1)
    ]
    bodies = [
        f'<section id="{one.anchor}" aria-labelledby="{one.anchor}-title">\n'
        f'<h2 id="{one.anchor}-title"><span class="count">{number}</span> {escape(one.title)}</h2>\n'
        f'{one.body}\n<p class="back"><a href="#contents">Back to the contents</a></p>\n</section>'
        for number, one in enumerate(sections, 1)
    ]
    took = ", ".join(f"{escape(name)} {value:.1f} s" for name, value in seconds.items())
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        contents="\n".join(contents),
        sections="\n".join(bodies),
        facts=" · ".join(map(escape, facts)),
        seconds=took,
    )


def table(label: str, heads: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """A table that scrolls inside itself where there is no room.

    Args:
        label: what it shows, as text.
        heads: of the columns, as HTML.
        rows: cells, as HTML; the first of each row is its head.
        note: below the table, as HTML.
    """
    lines = ["".join(f'<th scope="col">{head}</th>' for head in heads)]
    for first, *cells in rows:
        lines.append(f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in cells))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    below = f'\n<p class="note">{note}</p>' if note else ""
    return (
        f'<div class="wide" role="region" aria-label="{escape(label)}" tabindex="0"><table>\n{body}\n'
        f"</table></div>{below}"
    )


def bar(share: float, text: str, kind: str = "") -> str:
    """A number in a cell, behind a bar as long as a share from 0 to 1."""
    return (
        f'<span class="measure"><i class="bar {kind}" style="--share:{100 * share:.1f}%"></i>'
        f"<span>{escape(text)}</span></span>"
    )


def picture(image: Image.Image, alt: str) -> str:
    """An image as an element that holds its pixels."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return _element(file.getvalue(), image.size, alt)


def picture_file(path: Path, alt: str) -> str:
    """The same for a PNG file, as it is."""
    with Image.open(path) as image:
        size = image.size
    return _element(path.read_bytes(), size, alt)


def _element(content: bytes, size: tuple[int, int], alt: str) -> str:
    data = base64.b64encode(content).decode()
    return (
        f'<img src="data:image/png;base64,{data}" width="{size[0]}" height="{size[1]}" alt="{escape(alt)}">'
    )
