"""The pictures of the README and the docs: `python -m benchmarks.pictures [NAME ...] [--out docs/images]`.

Everything in them is what the small models of the package say of scenes of the shapes world; the truth is
used for marks only. The scenes were chosen so that there is something to see. How often a method is right is
in the tables of docs/grounding.md, docs/pruning.md and docs/hallucination.md.
"""

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from benchmarks.panels import Panel, Piece, page, tag, veil
from visionsel.data.shapes import CAPTION_PROMPT, ShapesWorld
from visionsel.embedded import load_classifier, load_lvlm
from visionsel.files import whole_file
from visionsel.multimodal import (
    AttentionRecorder,
    DivPrune,
    Grounder,
    GroundingHeads,
    Intervention,
    Stack,
    TokenGrid,
    build_segmenter,
)
from visionsel.multimodal.evaluation import chair, shapes_synonyms
from visionsel.multimodal.grounding.words import find_words, token_spans, tokens_between
from visionsel.multimodal.prompts import chat_inputs, user_turn
from visionsel.multimodal.pruning.picture import KEPT, token_fates
from visionsel.ops.neighborhood.reference import neighbors
from visionsel.viz import OKABE_ITO, overlay_heatmap, overlay_masks

OUT = Path(__file__).parents[1] / "docs" / "images"
SCENE = 384  # pixels a side; the models see 64 of them
SIDE = 16  # cells a side of the map in which the backbones select
INVENTED = OKABE_ITO["vermilion"]
PALETTE = [OKABE_ITO[name] for name in ("orange", "sky blue", "green", "purple", "yellow", "blue")]
LARGEST = 200_000  # bytes of a file


def grounding() -> Image.Image:
    """A scene, the answer, and for each word that names something what the model looked at, and its mask."""
    image = ShapesWorld("balanced", 7, 16, SCENE)[0].image
    model, processor = load_lvlm()
    grounder = Grounder(model, processor, build_segmenter("embedded"), heatmap="mean")
    result = grounder.ask(image, CAPTION_PROMPT)
    words, colors = result.objects, PALETTE[: len(result.objects)]
    masked = overlay_masks(image, [word.mask for word in words], colors, 0.6)
    draw = ImageDraw.Draw(masked)
    fields = {}
    for number, (word, color) in enumerate(zip(words, colors, strict=True), 1):
        fields[word.span] = Piece(f"{number} {word.text}", color)
        if word.box is not None:
            x0, y0, x1, y1 = word.box
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=color, width=4)
            tag(masked, (x0, y0), str(number), color)
    said = [fields.get(span, Piece(text)) for span, text in _split(result.answer)]
    heated = [
        Panel(f"attention for {number} {word.text}", overlay_heatmap(image, word.heatmap, legend=False))
        for number, word in enumerate(words, 1)
    ]
    panels = [Panel("image", image), *heated, Panel("masks and boxes", masked)]
    return page(CAPTION_PROMPT, said, panels)


def pruning() -> Image.Image:
    """One question at ever fewer image tokens: the patches that are kept, and what the model says."""
    sample = ShapesWorld("balanced", 1, 16, SCENE)[9]
    model, processor = load_lvlm()
    truth = {thing.shape for thing in sample.objects}
    panels = []
    for keep in (1.0, 0.5, 0.25, 0.1):
        method = DivPrune(keep=keep)
        with method(model) as pruned, torch.inference_mode():
            inputs = _inputs(model, processor, sample.image)
            tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        answer = _text(processor, inputs, tokens)
        kept = (token_fates(pruned.record) == KEPT).view(8, 8).numpy()
        flops = pruned.report().to_dict()["flops_ratio"]
        missed = sorted(truth - _named(answer))
        panels.append(
            Panel(
                f"keep={keep:g}: {int(kept.sum())} of 64 tokens",
                veil(sample.image, kept),
                [
                    _marked(answer, truth),
                    [Piece(f"missed: {', '.join(missed)}" if missed else "nothing missed")],
                    [Piece(f"FLOPs of the prefill: {flops:.0%}")],
                ],
            )
        )
    return page(f"{CAPTION_PROMPT}   with DivPrune", [], panels)


def hallucination() -> Image.Image:
    """A caption that invents an object, and that of the same model with some heads strengthened."""
    sample = ShapesWorld("anti", 7, 16, SCENE)[5]
    model, processor = load_lvlm()
    remedy = GroundingHeads.preset("embedded")
    truth = {thing.shape for thing in sample.objects}
    panels = [Panel("image", sample.image, [[Piece(f"in it: {', '.join(sorted(truth))}")]])]
    place = None
    for title, method in (("without", Stack()), ("with GroundingHeads", remedy)):
        answer, attention, words = _attended(model, processor, sample.image, method, remedy.heads)
        if place is None:  # the token that begins the invented word
            place = next(tokens[0] for word, tokens in words if _invented(word, truth))
        heat = overlay_heatmap(sample.image, attention[place].numpy(), legend=False)
        panels.append(Panel(title, heat, [_marked(answer, truth)]))
    return page(CAPTION_PROMPT, [], panels)


def selection() -> Image.Image:
    """What a position of a map attends to; the routed windows are those of the trained BiFormer."""
    sample = ShapesWorld("balanced", 1, 16, SCENE)[10]
    x0, y0, x1, y1 = sample.objects[0].box
    row, column = ((y0 + y1) // 2 * SIDE // SCENE, (x0 + x1) // 2 * SIDE // SCENE)
    routed, number = _routed_windows(sample.image, row, column)
    chosen = {
        "NAT: the nearest 5 x 5": _neighborhood(row, column, 1),
        "DiNAT: 5 x 5, three apart": _neighborhood(row, column, 3),
        "HaloNet: its block and a halo": _halo(row, column),
        f"BiFormer: {number} windows it chose": routed,
    }
    query = (row, column)
    return page("", [], [Panel(title, veil(sample.image, keys, query)) for title, keys in chosen.items()])


def _neighborhood(row: int, column: int, dilation: int) -> np.ndarray:
    """bool `[SIDE, SIDE]`: the 5 x 5 keys of a query, by the index of the operator's reference."""
    index, _ = neighbors(SIDE, 5, dilation, torch.device("cpu"))
    chosen = np.zeros((SIDE, SIDE), dtype=bool)
    chosen[np.ix_(index[row].numpy(), index[column].numpy())] = True
    return chosen


def _halo(row: int, column: int, block: int = 4, halo: int = 2) -> np.ndarray:
    chosen = np.zeros((SIDE, SIDE), dtype=bool)
    top, left = row // block * block, column // block * block
    chosen[max(0, top - halo) : top + block + halo, max(0, left - halo) : left + block + halo] = True
    return chosen


@torch.no_grad()
def _routed_windows(image: Image.Image, row: int, column: int) -> tuple[np.ndarray, int]:
    """bool `[SIDE, SIDE]`: the windows of a query in the second stage of the shipped BiFormer; how many."""
    model = load_classifier("biformer")
    attention: Any = model.stages[1].blocks[-1].attn  # type: ignore[union-attr, index]
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model(create_transform(**resolve_data_config(model=model))(image)[None])
    finally:
        hook.remove()
    windows = attention.num_windows
    length = SIDE // windows
    index = attention.routing(seen[0])[0, row // length * windows + column // length]
    chosen = np.zeros((windows, windows), dtype=bool)
    chosen.flat[index.numpy()] = True
    return chosen.repeat(length, 0).repeat(length, 1), len(index)


def _inputs(model: Any, processor: Any, image: Image.Image) -> Any:
    return chat_inputs(processor, [[user_turn(CAPTION_PROMPT)]], [[image]]).to(model.device, model.dtype)


def _text(processor: Any, inputs: Any, tokens: Tensor) -> str:
    new = tokens[:, inputs["input_ids"].shape[1] :]
    text: str = processor.batch_decode(new, skip_special_tokens=True)[0]
    return text.strip()


@torch.inference_mode()
def _attended(
    model: Any, processor: Any, image: Image.Image, method: Intervention, heads: Mapping[int, Sequence[int]]
) -> tuple[str, Tensor, list[tuple[str, tuple[int, ...]]]]:
    """The answer; `[new tokens, H, W]`, mean attention of some heads; its words with their tokens."""
    inputs = _inputs(model, processor, image)
    with method(model), AttentionRecorder(model) as recorder:
        tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    grid = TokenGrid.from_inputs(model, processor, inputs, (image.height, image.width))
    chosen = [recorder.attentions[layer, 0, head] for layer, own in heads.items() for head in own]
    new = tokens[0, inputs["input_ids"].shape[1] :].tolist()
    text, spans = token_spans(processor.tokenizer, new)
    words = [(text[slice(*span)], tokens_between(spans, span)) for span in find_words(text)]
    return text, grid.rasterize(torch.stack(chosen).mean(0)), words


def _split(text: str) -> list[tuple[tuple[int, int], str]]:
    """Words with their spans."""
    return [(span, text[slice(*span)]) for span in find_words(text)]


def _named(text: str) -> set[str]:
    return set(chair.mentions(text, shapes_synonyms()))


def _invented(word: str, truth: Collection[str]) -> bool:
    return bool(_named(word) - set(truth))


def _marked(answer: str, truth: Collection[str]) -> list[Piece]:
    """The answer, with what it invents struck through."""
    words = (text for _, text in _split(answer))
    return [Piece(word, INVENTED, struck=True) if _invented(word, truth) else Piece(word) for word in words]


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "grounding": grounding,
    "budgets": pruning,
    "hallucination": hallucination,
    "selection": selection,
}


def main(arguments: list[str] | None = None) -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}; default all")
    parser.add_argument("--out", type=Path, default=OUT, help="folder (default: docs/images)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in PICTURES]:
        parser.error(f"no picture is called {unknown[0]!r}; there are {', '.join(PICTURES)}")
    for name in options.names or PICTURES:
        path = options.out / f"{name}.png"
        with whole_file(path) as partial:
            # 256 colours, the rare ones of heatmaps among them, take a quarter of the bytes
            few = PICTURES[name]().quantize(
                256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE
            )
            few.save(partial, optimize=True)
            if partial.stat().st_size > LARGEST:
                raise RuntimeError(f"{name} has {partial.stat().st_size} bytes, more than {LARGEST}")
        print(path)


if __name__ == "__main__":
    main()
