"""Classification: what `train.quickstart` measured of the backbones that it trained on digits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from train.report_page import Section, picture_file, table

__all__ = ["Digits", "classification_section"]

SELECTS = {
    "biformer": "the regions that matter to a region, by routing",
    "dinat": "neighborhoods of a pixel, near and far in turn",
    "focalnet": "focal contexts, summed through gates",
    "halonet": "a block and its halo",
    "nat": "the neighborhood of a pixel",
    "selectformer": "neighborhoods, then routed regions, then focal contexts",
}


@dataclass(frozen=True)
class Digits:
    """What the training gave.

    Attributes:
        rows: for each model those of `results.json`.
        confusion, predictions: pictures.
    """

    rows: Sequence[Mapping[str, Any]]
    confusion: Path
    predictions: Path


def classification_section(digits: Digits | None) -> Section:
    """The table and the pictures; None: how to get them."""
    if digits is None:
        return Section(
            "classification", "Classification", "not run", "<code>make quickstart</code>", _MISSING
        )
    heads = ["model and what it selects", "parameters", "test accuracy", "images/s", "training s"]
    body = _BODY.substitute(
        images=digits.rows[0]["test_images"],
        table=table("Backbones on digits", heads, map(_row, digits.rows), _NOTE),
        confusion=picture_file(
            digits.confusion, "confusion matrices, one a model: true digits against predicted"
        ),
        predictions=picture_file(
            digits.predictions, "test digits with what each model said: mistakes and doubts first"
        ),
    )
    best = max(row["test_top1"] for row in digits.rows)
    return Section(
        "classification", "Classification", f"{best:.1%}", "of the test digits right, the best model", body
    )


def _row(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{escape(row['name'])} <small>{escape(SELECTS[row['name']])}</small>",
        f"{row['parameters']:,}",
        f"{row['test_top1']:.2%}",
        f'<span class="time">{row["images_per_second"]:.0f}</span>',
        f'<span class="time">{row["training_seconds"]:.0f}</span>',
    ]


_MISSING = """<p>Nothing was trained for this page. <code>make quickstart</code>, or <code>python -m
train.quickstart --output quickstart</code>, trains three small backbones on real scanned digits in a few
minutes and puts their table and pictures here.</p>"""

_BODY = Template("""<p>Small backbones of the package, trained just now from nothing on real scanned digits,
and tested on $images that training never saw. What they share is that a pixel does not look at all others,
but at some.</p>
$table
<figure class="plate wide" role="region" aria-label="Confusion matrices" tabindex="0">$confusion</figure>
<figure class="plate wide" role="region" aria-label="Predictions" tabindex="0">$predictions</figure>""")

_NOTE = (
    "The weights are those at the end of training; nothing was chosen by the test. The digits are easy, "
    "and small differences between the models say nothing about them on ImageNet. Images a second: "
    "inference at a batch of 64 on this machine, the best of several rounds."
)
