"""Where a row of attention looks in the image, without a method and with it, on one scale.

`GroundingHeads` multiplies what some heads say, so that a head's attention counts as often in the mean with
it. `ACT` takes attention from sinks and gives it to the other tokens; a recorder sees rows before that, and
the function of the method is applied to them here as the method itself does.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from html import escape
from string import Template
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from train.report_marks import FACTOR
from train.report_page import picture
from visionsel.data.shapes import CAPTION_PROMPT, Sample
from visionsel.multimodal import ACT, AttentionRecorder, GroundingHeads, TokenGrid
from visionsel.multimodal.evaluation.segmentation import energy_inside
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.modulation import act
from visionsel.multimodal.prompts import chat_inputs, user_turn
from visionsel.viz import HEAT, enlarge, overlay_heatmap

__all__ = ["Looks", "Seen", "act_looks", "attention_pairs", "draw_looks", "heads_looks", "record"]


@dataclass(frozen=True)
class Seen:
    """A caption and the attention that it was written with.

    Attributes:
        new: its tokens.
        rows: float32 `[layers, heads, new tokens, prompt]`; row 0 is the last one of the prompt.
        visual: bool `[prompt]`: tokens of the image.
        grid: where these lie.
        handle: what the method tells; None without one.
    """

    new: list[int]
    rows: Tensor
    visual: Tensor
    grid: TokenGrid
    handle: Any = None


@dataclass(frozen=True)
class Looks:
    """A row of attention over the pixels of the image, float `[H, W]`, without a method and with it.

    Attributes:
        before, after: each pixel has the attention of its patch.
        shares: of the whole row, what goes to the image, before and after.
    """

    before: np.ndarray
    after: np.ndarray
    shares: tuple[float, float]


def attention_pairs(model: Any, processor: Any, sample: Sample, heads: GroundingHeads, sinks: ACT) -> str:
    """Pairs of pictures of a scene, as HTML.

    For each method the last row of the prompt, and the row at which its caption parts from the plain one, if
    it does.
    """
    plain, strong, cut = (record(model, processor, sample, one) for one in (None, heads, sinks))
    pairs = []
    for name, seen, looks in (
        ("GroundingHeads", strong, partial(heads_looks, plain, strong, heads)),
        ("ACT", cut, partial(act_looks, plain, cut, sinks)),
    ):
        where = "the last row of the prompt: the first word is next"
        pairs.append(_pair(name, where, looks(0), sample))
        parted = (row for row, (a, b) in enumerate(zip(plain.new, seen.new, strict=False)) if a != b)
        if row := next(parted, 0):
            before, after = (_word(processor, one.new[row]) for one in (plain, seen))
            written = processor.decode(plain.new[:row], skip_special_tokens=True).split()
            where = f"after “{' '.join(written[-4:])}”, where “{before}” becomes “{after}”"
            pairs.append(_pair(name, where, looks(row), sample))
    return "\n".join(pairs)


@torch.inference_mode()
def record(model: Any, processor: Any, sample: Sample, method: Intervention | None = None) -> Seen:
    """Describe a scene, with a method or without."""
    inputs = chat_inputs(processor, [[user_turn(CAPTION_PROMPT)]], [[sample.image]])
    inputs = inputs.to(model.device, model.dtype)
    with (
        nullcontext() if method is None else method(model) as handle,
        AttentionRecorder(model, columns="prompt") as recorder,
    ):
        tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    ids = inputs["input_ids"]
    return Seen(
        tokens[0, ids.shape[1] :].tolist(),
        recorder.attentions[:, 0],
        (ids[0] == model.config.image_token_id).cpu(),
        TokenGrid.from_inputs(model, processor, inputs, sample.pixels.shape[:2]),
        handle,
    )


def heads_looks(plain: Seen, strong: Seen, heads: GroundingHeads, row: int) -> Looks:
    """The mean over all layers and heads, in which a strengthened head counts as much as it is multiplied."""
    weights = torch.ones(plain.rows.shape[:2])
    for layer, chosen in heads.heads.items():
        weights[layer, list(chosen)] = heads.strength
    before = plain.rows[:, :, row].mean((0, 1))
    after = (strong.rows[:, :, row] * weights[..., None]).sum((0, 1)) / weights.sum()
    return _looks(plain, before, after)


def act_looks(plain: Seen, cut: Seen, method: ACT, row: int) -> Looks:
    """The mean over the heads in which ACT finds sinks; over all heads of its layers where it finds none."""
    before, after, changed = [], [], []
    for layer in cut.handle.layers:
        attention = cut.rows[layer][None, :, row : row + 1]
        sinks = cut.handle.sinks[layer][:1, :, : attention.shape[-1]].cpu()
        # the tokens written so far get their part of what is freed: one more column stands for them
        whole = torch.cat([attention, 1 - attention.sum(-1, keepdim=True)], -1)
        edited = act.calibrate(whole, pad(sinks, (0, 1)), method.beta)
        before.append(plain.rows[layer][:, row])
        after.append(edited[0, :, 0, :-1])
        changed.append(sinks[0].any(-1))
    heads = torch.cat(changed)
    heads = heads if bool(heads.any()) else ~heads
    return _looks(plain, torch.cat(before)[heads].mean(0), torch.cat(after)[heads].mean(0))


def _looks(seen: Seen, before: Tensor, after: Tensor) -> Looks:
    image = [row[seen.visual] for row in (before, after)]
    maps = [seen.grid.rasterize(row, smooth=False).numpy() for row in image]
    return Looks(maps[0], maps[1], (float(image[0].sum()), float(image[1].sum())))


def draw_looks(image: Image.Image, looks: Looks) -> tuple[Image.Image, Image.Image]:
    """Two pictures in which a colour means the same attention."""
    both = Image.new("RGB", (2 * image.width, image.height))
    both.paste(image, (0, 0))
    both.paste(image, (image.width, 0))
    heat = np.concatenate([looks.before, looks.after], 1).repeat(FACTOR, 0).repeat(FACTOR, 1)
    drawn = overlay_heatmap(enlarge(both, FACTOR), heat, legend=False)
    middle = drawn.width // 2
    return drawn.crop((0, 0, middle, drawn.height)), drawn.crop((middle, 0, drawn.width, drawn.height))


def _word(processor: Any, token: int) -> str:
    if token == processor.tokenizer.eos_token_id:
        return "the end"
    text: str = processor.decode([token])
    return text.strip()


def _pair(method: str, where: str, looks: Looks, sample: Sample) -> str:
    objects = np.any([o.mask for o in sample.objects], axis=0)
    figures = []
    for name, drawn, heat, share in zip(
        ("without", "with"),
        draw_looks(sample.image, looks),
        (looks.before, looks.after),
        looks.shares,
        strict=True,
    ):
        alt = f"attention to the image {name} {method}, {where}"
        told = f"{share:.1%} of the row on the image, {energy_inside(heat, objects):.1%} of that on objects"
        caption = f"<figcaption><b>{name}</b> <span>{told}</span></figcaption>"
        figures.append(f"<figure>{picture(drawn, alt)}{caption}</figure>")
    both = np.stack([looks.before, looks.after])
    return _PAIR.substitute(
        method=method,
        where=escape(where),
        figures="\n".join(figures),
        low=f"{both.min():.1%}",
        high=f"{both.max():.1%}",
        heat=", ".join(HEAT),
    )


_PAIR = Template("""<article>
<h4>$method</h4>
<p class="note">$where</p>
<div class="pictures">
$figures
</div>
<p class="ramp"><span>$low</span> <i style="background:linear-gradient(90deg,$heat)"></i>
<span>$high a patch</span></p>
</article>""")
