"""What heatmap methods share: the rows of attention they read, and where the image tokens lie on grids.

Shapes: `B` answers, `T` new tokens, `L` tokens of the prompt, `n` image tokens in the order of
`Replay.image`, `t` rows that are read: `T`, or 1 where all tokens share the last row of the prompt.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from visionsel.multimodal.attention import AttentionCall, attention_rows
from visionsel.multimodal.families import find_family
from visionsel.multimodal.families.family import View
from visionsel.multimodal.grounding.online import pick
from visionsel.multimodal.grounding.replay import Replay

__all__ = [
    "ROWS",
    "check_row",
    "decoder_layers",
    "existing",
    "finished",
    "image_columns",
    "image_rows",
    "image_views",
    "middle_layers",
    "query_places",
]

ROWS = ("predict", "token", "prompt")
CHUNK = 256  # rows at a time, so that long answers need no [heads, T, L + T] of theirs
See = Callable[[int, Tensor], None]


def check_row(row: str) -> None:
    """Refuse what is none of `ROWS`.

    Raises:
        ValueError: for it.
    """
    if row not in ROWS:
        raise ValueError(f"row must be one of {', '.join(ROWS)}, got {row!r}")


def query_places(replay: Replay, row: str) -> Tensor:
    """int64 `[B, t]`: the places whose rows a method reads.

    Args:
        replay: a prompt and its answers.
        row: `"predict"`: the rows that predict the tokens; `"token"`: those of the tokens themselves;
            `"prompt"`: the last one of the prompt, which all tokens share.
    """
    check_row(row)
    if row == "prompt":
        return replay.rows[:, :1]
    return replay.rows + int(row == "token")


def decoder_layers(replay: Replay) -> list[Any]:
    """The decoder layers of the model."""
    return list(cast(Any, find_family(replay.model).decoder(replay.model)).layers)


def existing(name: str, chosen: Sequence[int], number: int) -> list[int]:
    """Numbers of layers or heads, in order; negative ones count from the last.

    Raises:
        ValueError: for none, for one that comes twice or does not exist.
    """
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in chosen)
    if not chosen or not whole or not all(-number <= one < number for one in chosen):
        raise ValueError(f"{name} {list(chosen)} do not exist: choose among 0 to {number - 1}")
    numbers = sorted(one % number for one in chosen)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{name} {list(chosen)} come more than once")
    return numbers


def middle_layers(number: int) -> list[int]:
    """The layers of a decoder of some layers that look at what is said: 5 to 26 of 32, and so in proportion.

    Jiang et al. 2025 (arXiv:2411.16724) find in LLaVA-1.5-7B that layers 5 to 18 gather what the image shows
    and layers 19 to 26 make sense of it. Layers that others found best lie among them: 14 of 32 in
    LLaVA-1.5-7B, 22 of 28 in Qwen2.5-VL-7B (ViCrop, arXiv:2502.17422).
    """
    return list(range(-(-5 * number // 32), 26 * number // 32 + 1)) or [0]


def image_columns(replay: Replay, values: Tensor) -> Tensor:
    """The image columns of rows `[B, heads, t, L + T]` as `[B, heads, t, n]`; 0 where a sample has fewer."""
    return pick(values, replay.image.to(values.device))


def image_rows(
    replay: Replay, see: See, layers: Sequence[int], row: str = "predict", places: Tensor | None = None
) -> None:
    """Read prompt and answer, and hand on what each layer attends to in the image.

    At most one layer's `[B, heads, t, n]` is held, beside `[B, heads, 256, L + T]` while it is made.

    Args:
        replay: a prompt and its answers.
        see: gets the number of a layer and its rows, float32 `[B, heads, t, n]`, in order of the layers.
        layers: numbers of decoder layers.
        row: see `query_places`.
        places: int64 `[B, t]`: of other rows than these.

    Raises:
        ValueError: for a layer that does not exist, or a prompt without images.
    """
    places = query_places(replay, row) if places is None else places
    if not replay.image.shape[1]:
        raise ValueError("the prompts have no tokens of images, so there is nothing to make a map of")

    def tap(layer: int, call: AttentionCall) -> None:
        here = places.to(call.query.device)
        parts = [
            image_columns(replay, attention_rows(call, here[:, start : start + CHUNK])).float()
            for start in range(0, here.shape[1], CHUNK)
        ]
        see(layer, parts[0] if len(parts) == 1 else torch.cat(parts, 2))

    numbers = existing("layers", layers, len(decoder_layers(replay)))
    replay.run({layer: partial(tap, layer) for layer in numbers})


def finished(replay: Replay, maps: Tensor) -> Tensor:
    """Maps `[B, t, n]` as a method returns them: float32 `[B, T, n]`, 0 in rows of padding."""
    maps = maps.float().expand(-1, replay.tokens.shape[1], -1)
    return maps.masked_fill(~replay.valid.to(maps.device)[..., None], 0)


def image_views(replay: Replay, whole: bool = False) -> list[list[Tensor]]:
    """For each answer the grids of its images, in order.

    Args:
        replay: that has run.
        whole: only such as show a whole image: of an image that was cut into tiles its thumbnail, or the one
            grid of all its tiles, or if it has neither the tiles. Otherwise all.

    Returns:
        for each grid int64 `[h, w]`, numbers of columns among the `n`.

    Raises:
        RuntimeError: before the replay has run.
        NotImplementedError: when the tower did not run, so that it is not known how the tokens lie.
    """
    if replay.scope is None:
        raise RuntimeError("the replay has not run, so it is not known how the image tokens lie")
    rows: list[list[Tensor]] = []
    for pictures in replay.scope.pictures:
        start, found = 0, []
        for picture in pictures:
            if picture.modality != "image":
                continue
            views: Sequence[View] = picture.layout.views
            if whole:
                views = next(
                    (
                        some
                        for kinds in (("image", "thumbnail"), ("tiles",))
                        if (some := [view for view in views if view.kind in kinds])
                    ),
                    views,
                )
            found += [view.index + start for view in views]
            start += picture.layout.n
        rows.append(found)
    return rows
