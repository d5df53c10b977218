"""What a frozen vision-language model knows of words of its answer: attention of all heads, hidden states.

The features of F-LMM (Wu et al. 2025, arXiv:2406.05821, section 3), read by one replay; and the replays that
they are read from.

Shapes: `B` answers, `T` new tokens, `n` image tokens of an answer, `C` attention maps (layers x heads).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from visionsel.multimodal.families import find_family
from visionsel.multimodal.families.family import View
from visionsel.multimodal.grounding.grid import TokenGrid
from visionsel.multimodal.grounding.heatmaps.rows import decoder_layers, image_rows, query_places
from visionsel.multimodal.grounding.replay import Replay, generation_option
from visionsel.multimodal.prompts import chat_inputs, user_turn

__all__ = ["WordReadings", "Words", "answer_replay", "fine_view", "grid_maps", "read_words", "refer_replay"]

Words = Sequence[Sequence[Sequence[int]]]
"""For each answer its words, for each word the numbers of its new tokens: `[[[0], [3, 4]], [[1]]]`."""


@dataclass(frozen=True)
class WordReadings:
    """What was read for each answer and each of its words.

    Attributes:
        attention: for each answer float32 `[words, C, n]`, maps in the order layer, head.
        hidden: for each answer and word float32 `[tokens, layers, width]`: what each decoder layer makes of
            each token of the word, the last one behind the final norm; empty unless asked for.
    """

    attention: list[Tensor]
    hidden: list[list[Tensor]]


def read_words(
    replay: Replay, words: Words, row: str = "token", merge: str = "mean", hidden: bool = False
) -> WordReadings:
    """Read prompt and answers once, and keep the attention of all heads of all layers for some words.

    Held are 4 bytes x words x C x n, beside one layer's rows of all new tokens.

    Args:
        replay: a prompt and its answers.
        words: for each answer those that are wanted; an answer may have none.
        row: of a token: `"token"`, its own (F-LMM), or `"predict"`, the one that predicts it.
        merge: the rows of a word's tokens: their `"mean"` (F-LMM) or their `"max"`.
        hidden: read the hidden states at these rows, too.

    Raises:
        ValueError: for an unknown option, no words at all, a word without tokens or with one that the answer
            does not have, or prompts without images.
    """
    if row not in ("token", "predict"):
        raise ValueError(f'row must be "token" or "predict", got {row!r}')
    if merge not in ("mean", "max"):
        raise ValueError(f'merge must be "mean" or "max", got {merge!r}')
    _check_words(replay, words)
    layers = decoder_layers(replay)
    found: list[list[Tensor]] = [[] for _ in words]

    def see(layer: int, rows: Tensor) -> None:
        for answer, chosen in enumerate(words):
            parts = [rows[answer][:, list(word)] for word in chosen]  # [heads, tokens, n]
            merged = [part.mean(1) if merge == "mean" else part.amax(1) for part in parts]
            if merged:
                found[answer].append(torch.stack(merged).cpu())

    states: list[Tensor] = []
    with _hidden_states(replay, layers, query_places(replay, row), states if hidden else None):
        image_rows(replay, see, range(len(layers)), row)
    whole = [torch.cat(maps, 1) if maps else None for maps in found]
    nothing = next(maps for maps in whole if maps is not None)[:0]
    attention = [nothing if maps is None else maps for maps in whole]
    if not hidden:
        return WordReadings(attention, [])
    by_token = torch.stack(states, 2)  # [B, T, layers, width]
    return WordReadings(
        attention, [[by_token[b, list(word)] for word in chosen] for b, chosen in enumerate(words)]
    )


def _check_words(replay: Replay, words: Words) -> None:
    if len(words) != len(replay.tokens):
        raise ValueError(
            f"words for {len(words)} answers were given, but the replay has {len(replay.tokens)}"
        )
    if not any(len(chosen) for chosen in words):
        raise ValueError("no answer has a word that could be found in its image: words is empty")
    for answer, chosen in enumerate(words):
        there = int(replay.valid[answer].sum())
        for word in chosen:
            if not len(word):
                raise ValueError(f"answer {answer} has a word without tokens")
            if wrong := [token for token in word if not 0 <= token < there]:
                raise ValueError(
                    f"answer {answer} has {there} tokens, 0 to {there - 1}; a word has token {wrong[0]}"
                )


@contextmanager
def _hidden_states(
    replay: Replay, layers: list[Any], places: Tensor, states: list[Tensor] | None
) -> Iterator[None]:
    """Put what each layer gives at some places, `[B, T, width]`, into a list, if there is one."""
    if states is None:
        yield
        return
    # the forward has answers of a sample apart, see `Replay`
    order = torch.arange(len(places)).view(replay.copies, -1).T.flatten()

    def watch(module: nn.Module, arguments: Any, output: Any) -> None:
        values: Tensor = output[0] if isinstance(output, tuple) else output
        rows = torch.arange(len(places), device=values.device)[:, None]
        ordered = values[order.to(values.device)]
        states.append(ordered[rows, places.to(values.device)].float().cpu())

    # the last layer's as the head of the model gets it
    decoder: Any = find_family(replay.model).decoder(replay.model)
    handles = [module.register_forward_hook(watch) for module in (*layers[:-1], decoder.norm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fine_view(grid: TokenGrid) -> View:
    """The finest grid of a whole image: its tiles as one grid, or the one grid that it has.

    Raises:
        NotImplementedError: for tiles that make no grid.
    """
    tiles = [view for view in grid.views if view.kind == "tile"]
    if tiles:
        return _joined(tiles)
    return next((view for view in grid.views if view.kind == "tiles"), grid.views[0])


def _joined(tiles: list[View]) -> View:
    """Tiles that lie in rows and columns, as one view."""
    places = {(view.box[1], view.box[0]): view for view in tiles if view.box is not None}
    rows, columns = (sorted({place[axis] for place in places}) for axis in (0, 1))
    if len(places) != len(tiles) or len(tiles) != len(rows) * len(columns):
        raise NotImplementedError("the tiles of this image do not lie in rows and columns")
    grid = [[places[row, column] for column in columns] for row in rows]
    index = torch.cat([torch.cat([view.index for view in line], 1) for line in grid])
    first, last = grid[0][0].box, grid[-1][-1].box
    assert first is not None
    assert last is not None
    return View("tiles", index, index, (*first[:2], *last[2:]))


def grid_maps(attention: Tensor, grid: TokenGrid, views: int = 1) -> Tensor:
    """Maps over image tokens as maps on the finest grid of the image.

    Args:
        attention: `[words, C, n]`, columns of all image tokens of an answer.
        grid: of the image.
        views: 1: the finest grid alone. 2: for families that show an image whole and in tiles, the coarse
            grid, enlarged bilinearly, and behind it the fine one; where the image has one grid only, twice
            this.

    Returns:
        `[words, views * C, h, w]`.

    Raises:
        ValueError: when the columns are fewer than the grid's.
        NotImplementedError: for tiles that make no grid.
    """
    start = grid.start or 0
    if attention.shape[-1] < start + grid.n:
        raise ValueError(
            f"the grid has tokens {start} to {start + grid.n - 1}, but there is attention to "
            f"{attention.shape[-1]} only; make it from the inputs of the replay"
        )
    fine = attention[..., start + fine_view(grid).index.to(attention.device)]
    if views == 1:
        return fine
    whole = next((view for view in grid.views if view.kind in ("thumbnail", "image")), None)
    if whole is None:
        return torch.cat([fine, fine], 1)
    coarse = attention[..., start + whole.index.to(attention.device)]
    coarse = interpolate(coarse, fine.shape[-2:], mode="bilinear", align_corners=False)
    return torch.cat([coarse, fine], 1)


def answer_replay(
    model: nn.Module, processor: Any, images: Sequence[Any], prompts: Sequence[str], answers: Sequence[str]
) -> tuple[Replay, list[TokenGrid]]:
    """A replay of answers that are given as text, and for each answer the grid of its image.

    New token t of an answer is token t of `processor.tokenizer(answer, add_special_tokens=False)`.

    Args:
        model, processor: a vision-language model of transformers.
        images: one for each prompt, PIL or `[H, W, 3]`.
        prompts: what the user says.
        answers: what the model is taken to have said.

    Raises:
        ValueError: for an answer without tokens.
    """
    inputs, grids = _prompt_inputs(model, processor, images, prompts)
    tokenizer = processor.tokenizer
    rows = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    if empty := [number for number, row in enumerate(rows) if not row]:
        raise ValueError(f"answer {empty[0]} has no tokens: {answers[empty[0]]!r}")
    end = generation_option(model, inputs, "eos_token_id")
    end = end[0] if isinstance(end, list) else end
    if end is not None:
        rows = [[*row, end] for row in rows]
    fill = generation_option(model, inputs, "pad_token_id")
    fill = end if fill is None else fill
    length = max(map(len, rows))
    if fill is None and length > min(map(len, rows)):
        raise ValueError("the model has neither eos_token_id nor pad_token_id; give one answer at a time")
    tokens = torch.tensor([row + [fill] * (length - len(row)) for row in rows])
    return Replay(model, inputs, tokens), grids


def refer_replay(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    texts: Sequence[str],
    prompt: str,
    max_new_tokens: int = 16,
) -> tuple[Replay, list[TokenGrid], list[list[list[int]]]]:
    """A replay in which one word, of all tokens of the answer, stands for a referring expression.

    Args:
        model, processor: a vision-language model of transformers.
        images: one for each expression, PIL or `[H, W, 3]`.
        texts: the expressions.
        prompt: with `{}`, such as `"locate {}."`: it gets the expression, and the model answers, greedily.
            Without: the expression is taken for the answer, as F-LMM does.
        max_new_tokens: of answers that the model gives.

    Returns:
        the replay, for each expression the grid of its image, and its only word.

    Raises:
        ValueError: for an empty expression.
    """
    if empty := [number for number, text in enumerate(texts) if not text.strip()]:
        raise ValueError(f"expression {empty[0]} is empty; say what to look for")
    if "{}" in prompt:
        inputs, grids = _prompt_inputs(model, processor, images, [prompt.replace("{}", t) for t in texts])
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
        replay = Replay(model, inputs, model.generate(**inputs, **options))
    else:
        replay, grids = answer_replay(model, processor, images, [prompt] * len(texts), texts)
    ends = generation_option(model, {}, "eos_token_id")
    over = torch.tensor([] if ends is None else ends, dtype=torch.long, device=replay.tokens.device)
    words = []
    for tokens, valid in zip(replay.tokens, replay.valid, strict=True):
        said = [int(place) for place in (valid & ~torch.isin(tokens, over.flatten())).nonzero()[:, 0]]
        words.append([said or [0]])  # a model that says nothing has decided so in its first token
    return replay, grids, words


def _prompt_inputs(
    model: Any, processor: Any, images: Sequence[Any], prompts: Sequence[str]
) -> tuple[Any, list[TokenGrid]]:
    turns = [[user_turn(prompt)] for prompt in prompts]
    inputs = chat_inputs(processor, turns, [[image] for image in images])
    sizes = [(image.height, image.width) if hasattr(image, "height") else image.shape[:2] for image in images]
    grids = [TokenGrid.from_inputs(model, processor, inputs, sizes, number) for number in range(len(images))]
    return inputs.to(model.device, model.dtype), grids
