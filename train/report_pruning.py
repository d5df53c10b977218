"""Pruning: one question with fewer and fewer image tokens; what is kept, said and saved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from string import Template
from typing import Any

from PIL import Image

from train.report_marks import FACTOR, mark_caption
from train.report_page import Section, bar, picture, table
from visionsel.data.shapes import CAPTION_PROMPT, Sample
from visionsel.embedded.lvlm_quality import caption_scores, generate_answers
from visionsel.multimodal import DivPrune, FastV
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.pruning.report import Report
from visionsel.viz import enlarge

__all__ = ["KEEP", "METHODS", "Budget", "as_right", "measure_budget", "pruning_section"]

KEEP = (1.0, 0.5, 0.25, 0.1)
METHODS: Mapping[str, Callable[[float], Intervention]] = {
    "FastV": lambda keep: FastV(keep, layer=1),  # of four layers
    "DivPrune": DivPrune,
}
WHERE = {
    "FastV": "drops before layer 1 what the last word of the question did not look at in layer 0",
    "DivPrune": "keeps at the input the patches that differ most, whatever the question",
}
HALF = 0.5  # whose better method stands in the contents


@dataclass(frozen=True)
class Budget:
    """A method at a share of the image tokens.

    Attributes:
        method: its name.
        keep: the share.
        answer: about the first scene.
        picture: which patches of that were kept.
        report: tokens, FLOPs and bytes of that prompt.
        captions: of all scenes.
    """

    method: str
    keep: float
    answer: str
    picture: Image.Image
    report: Report
    captions: list[str]


def pruning_section(model: Any, processor: Any, samples: Sequence[Sample]) -> Section:
    """Describe scenes at each budget; the first one is drawn."""
    full = _describe(model, processor, samples)
    budgets = [measure_budget(model, processor, samples, name, keep) for name in METHODS for keep in KEEP]
    right = {(one.method, one.keep): sum(as_right(one.captions, full, samples)) for one in budgets}
    heads = ["method", "keep", "image tokens", "FLOPs left", "cache left", "as right", "same words", "F1"]
    rows = [_row(one, right[one.method, one.keep], full, samples) for one in budgets]
    body = _BODY.substitute(
        image=picture(enlarge(samples[0].image, FACTOR), "the scene that is asked about"),
        answer=mark_caption(full[0], samples[0]) or "<em>an empty caption</em>",
        question=escape(CAPTION_PROMPT),
        tokens=f"{budgets[0].report.full_tokens:g}",
        table=table("What each budget saves and keeps", heads, rows, _NOTE.substitute(count=len(samples))),
        pictures="\n".join(_pictures(name, budgets, samples[0], full[0]) for name in METHODS),
    )
    kept, best = max((right[name, HALF], name) for name in METHODS)
    return Section(
        "pruning",
        "Pruning",
        f"{kept} of {len(samples)}",
        f"captions as right with half of the image tokens, by {best}",
        body,
    )


def measure_budget(model: Any, processor: Any, samples: Sequence[Sample], method: str, keep: float) -> Budget:
    """Describe scenes under a pruner, the first one by itself too."""
    with METHODS[method](keep)(model) as pruned:
        (answer,) = _describe(model, processor, samples[:1])
        drawn, report = pruned.picture(samples[0].image, processor), pruned.report()
        captions = _describe(model, processor, samples)
    return Budget(method, keep, answer, drawn, report, captions)


def as_right(captions: Sequence[str], full: Sequence[str], samples: Sequence[Sample]) -> list[bool]:
    """Whether each caption is no worse than the other: in F1 of the shapes, and in their colours."""
    found = []
    for caption, other, sample in zip(captions, full, samples, strict=True):
        one, two = caption_scores([caption], [sample]), caption_scores([other], [sample])
        found.append(all(one[key] >= two[key] for key in ("f1", "color_accuracy")))
    return found


def _describe(model: Any, processor: Any, samples: Sequence[Sample]) -> list[str]:
    return generate_answers(model, processor, [s.image for s in samples], [CAPTION_PROMPT] * len(samples))


def _row(one: Budget, right: int, full: Sequence[str], samples: Sequence[Sample]) -> list[str]:
    report, count = one.report, len(samples)
    same = sum(caption == other for caption, other in zip(one.captions, full, strict=True))
    held = "none" if report.cache_bytes is None else f"{report.cache_bytes / 1024:.0f} KiB"
    return [
        one.method,
        f"{one.keep:g}",
        f"{report.equivalent_tokens:.1f}",
        f"{report.flops_ratio:.0%}",
        held if report.cache_ratio is None else f"{held}, {report.cache_ratio:.0%}",
        bar(right / count, f"{right} of {count}"),
        f"{same} of {count}",
        f"{caption_scores(one.captions, samples)['f1']:.2f}",
    ]


def _pictures(name: str, budgets: Sequence[Budget], sample: Sample, full: str) -> str:
    figures = [_figure(one, sample, full) for one in budgets if one.method == name and one.keep < 1]
    return (
        f'<article><h3>{name}</h3>\n<p class="note">{WHERE[name]}</p>\n<div class="kept">\n'
        + "\n".join(figures)
        + "\n</div></article>"
    )


def _figure(one: Budget, sample: Sample, full: str) -> str:
    said = mark_caption(one.answer, sample) or "<em>an empty caption</em>"
    note = "word for word as with all tokens" if one.answer == full else "another caption"
    drawn = picture(one.picture, f"patches that {one.method} kept at {one.keep:.0%}, the others under a veil")
    return (
        f"<figure>{drawn}<figcaption><b>keep {one.keep:g}</b> <span>{note}</span>"
        f'<p class="said">{said}</p></figcaption></figure>'
    )


_BODY = Template("""<p>An image is $tokens tokens of the prompt here. A pruner drops some of them while its
<code>with</code> block is open; the model is otherwise as it was. The question is always
<q>$question</q></p>
$table
<div class="asked">
$image
<div><p class="note">With all $tokens image tokens the model says of the first scene:</p>
<p class="said">$answer</p></div>
</div>
<div class="cards">
$pictures
</div>""")

_NOTE = Template(
    "Image tokens are a mean over the layers of the decoder, FLOPs those of reading the prompt, the cache"
    " is that of the prompt; all three are counted by <code>pruned.report()</code>. As right: captions of"
    " $count scenes whose shapes (F1) and colours are no worse than with all tokens, right or not; an "
    "object that is named twice does not count against them. F1: of the shapes named, over all scenes. "
    "The decoder has four layers, and FastV has passed one of them whole, so it uses more than its share."
    " On a model of this size nothing gets faster; docs/pruning.md has measured times."
)
