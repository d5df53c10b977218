"""Hallucination: captions with remedies and without, and where a remedy makes the model look."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from html import escape
from string import Template
from typing import Any

from train.report_attention import attention_pairs
from train.report_marks import FACTOR, mark_caption
from train.report_page import Section, bar, picture, table
from visionsel.data.shapes import CAPTION_PROMPT, Sample
from visionsel.embedded.hallucination_quality import adapted
from visionsel.embedded.lvlm_quality import generate_answers
from visionsel.multimodal import ACT, VCD, GroundingHeads, Stack
from visionsel.multimodal.evaluation import chair, shapes_synonyms
from visionsel.multimodal.intervention import Intervention
from visionsel.viz import enlarge

__all__ = ["caption_scenes", "hallucination_section", "invents", "remedies"]

SHOWN = 4  # scenes with captions
PLAIN, CONTRAST, HEADS, BOTH, SINKS = "no method", "VCD", "GroundingHeads", "both", "ACT"


def hallucination_section(model: Any, processor: Any, samples: Sequence[Sample]) -> Section:
    """Describe scenes with each remedy and without; attention is drawn for one of them."""
    methods = remedies(model, processor)
    captions = caption_scenes(model, processor, samples, methods)
    scores = {name: _score(said, samples) for name, said in captions.items()}
    tempted = [i for i, s in enumerate(samples) if invents(captions[PLAIN][i], s)]
    cured = [i for i in tempted if not invents(captions[HEADS][i], samples[i])]
    chosen = (cured or tempted or [0])[0]
    heads, sinks = methods[HEADS], methods[SINKS]
    assert isinstance(heads, GroundingHeads)
    assert isinstance(sinks, ACT)
    columns = ["method", "CHAIR<sub>i</sub>", "invented", "captions that invent", "recall", "words"]
    most = max(one["chair_i"] for one in scores.values())
    body = _BODY.substitute(
        count=len(samples),
        table=table(
            "What remedies do to invented objects",
            columns,
            [_row(name, one, most) for name, one in scores.items()],
            _NOTE,
        ),
        told=_told(tempted, samples),
        scenes="\n".join(_card(i, samples[i], captions) for i in (tempted or [0])[:SHOWN]),
        why=_why(chosen, tempted, cured),
        looks=attention_pairs(model, processor, samples[chosen], heads, sinks),
    )
    before, after = (scores[name]["chair_i"] for name in (PLAIN, CONTRAST))
    figure = f"{before:.0%} → {after:.0%}"
    return Section("hallucination", "Hallucination", figure, "of the named objects invented, with VCD", body)


def remedies(model: Any, processor: Any) -> dict[str, Intervention | None]:
    """The methods by name."""
    contrast, heads = VCD(alpha=1.0), GroundingHeads.preset("embedded")
    return {
        PLAIN: None,
        CONTRAST: contrast,
        HEADS: heads,
        BOTH: Stack(heads, contrast),
        SINKS: ACT(**adapted("act", model, processor)),
    }


def caption_scenes(
    model: Any, processor: Any, samples: Sequence[Sample], methods: Mapping[str, Intervention | None]
) -> dict[str, list[str]]:
    """For each method the captions of all scenes."""
    images, found = [sample.image for sample in samples], {}
    for name, method in methods.items():
        with nullcontext() if method is None else method(model):
            found[name] = generate_answers(model, processor, images, [CAPTION_PROMPT] * len(images))
    return found


def invents(caption: str, sample: Sample) -> bool:
    """Whether a caption names a shape that is not in the image."""
    return not set(chair.mentions(caption, shapes_synonyms())) <= {o.shape for o in sample.objects}


def _score(captions: Sequence[str], samples: Sequence[Sample]) -> dict[str, Any]:
    return chair.score(captions, [{o.shape for o in sample.objects} for sample in samples], shapes_synonyms())


def _row(name: str, scores: Mapping[str, Any], most: float) -> list[str]:
    share = scores["chair_i"] / most if most else 0.0
    return [
        escape(name),
        bar(share, f"{scores['chair_i']:.1%}", "bad"),
        f"{sum(scores['invented'].values())} of {scores['mentions']}",
        f"{scores['chair_s']:.0%}",
        f"{scores['recall']:.1%}",
        f"{scores['length']:.1f}",
    ]


def _told(tempted: Sequence[int], samples: Sequence[Sample]) -> str:
    if not tempted:
        return "In none of these scenes does the model by itself invent anything; the first stands below."
    shown = min(SHOWN, len(tempted))
    return (
        f"By itself the model invents something in {len(tempted)} of the {len(samples)} scenes; the first "
        f"{shown} of these stand below."
    )


def _why(chosen: int, tempted: Sequence[int], cured: Sequence[int]) -> str:
    if cured:
        return f"Scene {chosen + 1} is the first in which the strengthened heads end the invention."
    why = "the first with an invention" if tempted else "the first"
    return f"Scene {chosen + 1} is {why}; the strengthened heads end none here."


def _card(number: int, sample: Sample, captions: Mapping[str, Sequence[str]]) -> str:
    there = ", ".join(f"{o.color} {o.shape}" for o in sample.objects)
    lines = "\n".join(
        f'<dt>{escape(name)}</dt><dd class="said">'
        f"{mark_caption(captions[name][number], sample) or '<em>an empty caption</em>'}</dd>"
        for name in (PLAIN, CONTRAST, HEADS)
    )
    return _CARD.substitute(
        number=number + 1,
        image=picture(enlarge(sample.image, FACTOR), f"scene {number + 1}: {there}"),
        there=escape(there),
        captions=lines,
    )


_BODY = Template("""<p>These are $count scenes of “anti”: a star, heart or cross is there without the ring,
moon or arrow that it usually has in training, and the model tends to say that the companion is there. VCD
contrasts each word with what the model would say of a noised image. GroundingHeads multiplies what a few
heads say that were found on other scenes to point at what is named. ACT takes attention from sinks, tokens
that draw it whatever is asked, and gives it to the others.</p>
$table
<p class="legend">$told <mark class="invented">Vermilion</mark> marks what is not in the image.</p>
<div class="cards scenes">
$scenes
</div>
<h3>Where the model looks, without a method and with it</h3>
<p>$why A row of attention belongs to the word that comes next; shown is the part that goes to the 64
patches of the image. In a pair a colour means the same attention. A sink of ACT is a token that many rows
look at, which can be an object itself.</p>
<div class="cards pairs">
$looks
</div>""")

_NOTE = (
    "CHAIR<sub>i</sub>: invented objects of all that are named, each mention counts. Recall: of the "
    "objects that are there; words: of a caption. Fewer inventions are worth something only while recall "
    "stays, for a caption that says less invents less. The longest bar is the worst row. "
    "docs/hallucination.md has thirteen methods, five seeds and a control."
)

_CARD = Template("""<article class="beside">
$image
<div><h3>Scene $number</h3>
<p class="note">There: $there</p>
<dl>
$captions
</dl></div>
</article>""")
