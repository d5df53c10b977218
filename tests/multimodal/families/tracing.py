"""Which patch goes into which token, found by changing pixels and running the model.

A family's `pool`, `View.index`, `View.source` and `View.box` say the same without running it; the checks here
compare. All use a blinded model: with the attention of the tower silenced, a token depends on its own patches
and on nothing else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.multimodal.tiny import make_model
from visionsel.multimodal.families.family import Encoded, Family, TokenLayout

EPSILON = 1e-9  # float64: what did not change is equal but for the order of sums
BLANK, MARK = 110, 255  # grey values: none is zero after normalisation

Arguments = Mapping[str, Any]


def blinded(family: Family, name: str) -> Any:
    """A tiny model whose tower has no attention, as if each patch were alone."""
    model = make_model(name)
    for layer in family.tower_layers(model):
        attention: Any = family.tower_attention(layer)
        out = attention.out_proj if hasattr(attention, "out_proj") else attention.proj
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
    return model


@torch.no_grad()
def encode(model: Any, encoded: Encoded) -> Tensor:
    """`[tokens, C]`: the features of the call in the order in which they take the placeholders."""
    method = getattr(model.model, f"get_{encoded.modality}_features")
    features = method(**encoded.arguments, return_dict=True).pooler_output
    return torch.cat([feature.flatten(0, -2) for feature in features])


def tower_input(family: Family, model: Any, encoded: Encoded) -> tuple[Tensor, Tensor]:
    """`[patches, C]` as they enter the first layer of the tower, crop after crop, and the features."""
    seen: list[Tensor] = []
    handle = family.tower_layers(model)[0].register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2))
    )
    features = encode(model, encoded)
    handle.remove()
    return seen[0], features


def changed(before: Tensor, after: Tensor) -> list[int]:
    """The rows that differ."""
    return ((before - after).abs().amax(-1) > EPSILON).nonzero().flatten().tolist()


def each_patch(encoded: Encoded, patch: int = 4) -> Iterator[tuple[tuple[int, ...], Encoded]]:
    """Every patch of the pixels by its place, with a call in which only this patch differs.

    The place is a row for the Qwen families and picture, row and column for the others. Pictures of zeros,
    which fill up samples, are left out.
    """
    key = "pixel_values_videos" if encoded.modality == "video" else "pixel_values"
    pixels: Tensor = encoded.arguments[key]
    flat = pixels if pixels.ndim == 2 else pixels.flatten(0, -4)
    places: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []
    if pixels.ndim == 2:
        places = [((row,), (row,)) for row in range(len(flat))]
    else:
        real = [k for k in range(len(flat)) if flat[k].any()]
        for number, k in enumerate(real):
            for y in range(flat.shape[-2] // patch):
                for x in range(flat.shape[-1] // patch):
                    rows, columns = slice(y * patch, (y + 1) * patch), slice(x * patch, (x + 1) * patch)
                    places.append(((number, y, x), (k, slice(None), rows, columns)))
    noise = torch.randn(flat.shape[-1], generator=torch.Generator().manual_seed(5), dtype=flat.dtype)
    for place, where in places:
        other = flat.clone()
        other[where] += noise[: other[where].shape[-1]]
        yield place, Encoded(encoded.modality, encoded.arguments | {key: other.view(pixels.shape)}, {})


def trace(family: Family, model: Any, encoded: Encoded) -> dict[tuple[int, ...], tuple[int, int]]:
    """For each patch, by place: its row in the tower and the token that it goes into."""
    rows, features = tower_input(family, model, encoded)
    found = {}
    for place, other in each_patch(encoded):
        other_rows, other_features = tower_input(family, model, other)
        (row,), (token,) = changed(rows, other_rows), changed(features, other_features)
        found[place] = (row, token)
    assert len(found) == len(rows), "some patches were never changed"
    return found


def check_pool(family: Family, model: Any, encoded: Encoded, traces: Mapping[Any, tuple[int, int]]) -> None:
    """`pool` is the mean over the patches that the trace puts into a token."""
    tokens = 1 + max(token for _, token in traces.values())
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(len(traces), 2, 3, generator=generator, dtype=torch.float64)
    expected, count = torch.zeros(tokens, 2, 3, dtype=torch.float64), torch.zeros(tokens, 1, 1)
    for row, token in traces.values():
        expected[token] += values[row]
        count[token] += 1
    torch.testing.assert_close(family.pool(model, values, encoded), expected / count)


def check_sources(layouts: Sequence[TokenLayout], n: int) -> None:
    """The layouts number the tokens of the call one after the other, each in one view."""
    assert sum(layout.n for layout in layouts) == n
    torch.testing.assert_close(torch.cat([layout.source() for layout in layouts]), torch.arange(n))
    for layout in layouts:
        index = torch.cat([view.index.flatten() for view in layout.views])
        torch.testing.assert_close(index.sort().values, torch.arange(layout.n))


def check_boxes(
    family: Family,
    model: Any,
    modality: str,
    process: Callable[[list[np.ndarray]], Arguments],
    shapes: Sequence[tuple[int, ...]],
    processor: Any,
    step: int = 1,
) -> list[TokenLayout]:
    """A mark in the middle of a cell changes the token of this cell most, and no token of another image.

    Args:
        family: to be checked.
        model: blinded.
        modality: of the call.
        process: makes the arguments of the call from images `[H, W, 3]` or videos `[T, H, W, 3]`, uint8.
        shapes: H, W or T, H, W.
        processor: for the layouts.
        step: look at every step-th cell.

    Returns:
        The layouts.
    """
    frames = 2  # of a video to a view
    blank = [np.full((*shape, 3), BLANK, np.uint8) for shape in shapes]
    encoded = Encoded(modality, process(blank), {})
    before = encode(model, encoded)
    sizes = [(shape[-2], shape[-1]) for shape in shapes]
    layouts = family.layouts(model, encoded, processor, sizes)
    assert len(layouts) == len(shapes)
    check_sources(layouts, len(before))
    first = 0
    for number, layout in enumerate(layouts):
        for v, view in enumerate(layout.views):
            assert view.box is not None
            x0, y0, x1, y1 = view.box
            rows, columns = view.index.shape
            for cell in range(0, rows * columns, step):
                r, c = divmod(cell, columns)
                x, y = x0 + (c + 0.5) * (x1 - x0) / columns, y0 + (r + 0.5) * (y1 - y0) / rows
                rx, ry = max((x1 - x0) / columns / 4, 1), max((y1 - y0) / rows / 4, 1)
                marked = [image.copy() for image in blank]
                area = marked[number] if len(shapes[number]) == 2 else marked[number][frames * v :][:frames]
                area[..., round(y - ry) : round(y + ry), round(x - rx) : round(x + rx), :] = MARK
                change = (encode(model, Encoded(modality, process(marked), {})) - before).norm(dim=-1)
                alike = [other for other in layout.views if other.kind == view.kind]
                source = torch.cat([other.source.flatten() for other in alike])
                assert int(source[change[source].argmax()]) == int(view.source[r, c]), (number, v, r, c)
                change[first : first + layout.n] = 0
                assert change.max() < EPSILON, "another image changed"
        first += layout.n
    return layouts


def check_prompt(family: Family, model: Any, inputs: Arguments) -> dict[str, list[TokenLayout]]:
    """The layouts deal out the placeholders of a batch in order, and no image is in two samples.

    Returns:
        The layouts by modality.
    """
    names = {
        "image": ("pixel_values", "image_grid_thw", "pixel_attention_mask"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }
    found = {}
    with torch.no_grad():
        seen: list[Tensor] = []
        handle = family.decoder(model).register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(**inputs)
        handle.remove()
    for modality, token in family.token_ids(model).items():
        arguments = {name: inputs[name] for name in names[modality] if name in inputs}
        if not arguments:
            continue
        encoded = Encoded(modality, arguments, {})
        features, layouts = encode(model, encoded), family.layouts(model, encoded)
        place = inputs["input_ids"] == token
        check_sources(layouts, int(place.sum()))
        torch.testing.assert_close(seen[0][place], features, rtol=0, atol=0)
        ends = torch.tensor([layout.n for layout in layouts]).cumsum(0).tolist()
        assert set(place.sum(1).cumsum(0).tolist()) <= {0, *ends}
        found[modality] = layouts
    return found


def check_calls(
    monkeypatch: pytest.MonkeyPatch, family: Family, model: Any, encoded: Encoded, together: bool = False
) -> list[int]:
    """The calls of the attention kernel of a layer, joined along the length, have the patches in tower order.

    Args:
        monkeypatch: undoes the watching.
        family: to be checked.
        model: not blinded, so that a wrong split would change the features.
        encoded: the call.
        together: the kernel takes all images of a call at once and is told where each ends, as flash
            attention does. Played on the CPU, by the kernel that is there.

    Returns:
        The number of calls of each layer.
    """
    layers = [family.tower_attention(layer) for layer in family.tower_layers(model)]
    calls: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    inputs: dict[nn.Module, Tensor] = {}
    before = encode(model, encoded)
    original = type(ALL_ATTENTION_FUNCTIONS).get_interface

    def get_interface(self: Any, name: str, default: Any) -> Any:
        kernel = original(self, name, default)

        def watching(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            calls[module].append(value)
            if not together:
                return kernel(module, query, key, value, *args, **kwargs)
            ends = kwargs.pop("cu_seq_lens_q").diff().tolist()
            parts = zip(*(t.split(ends, 2) for t in (query, key, value)), strict=True)
            return torch.cat([kernel(module, *part, *args, **kwargs)[0] for part in parts], 1), None

        return watching

    monkeypatch.setattr(type(ALL_ATTENTION_FUNCTIONS), "get_interface", get_interface)
    if together:
        monkeypatch.setattr(f"{type(model).__module__}.is_flash_attention_requested", lambda _: True)
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: inputs.__setitem__(layer, (*args, *kwargs.values())[0]),
            with_kwargs=True,
        )
        for layer in layers
    ]
    torch.testing.assert_close(encode(model, encoded), before)
    for handle in handles:
        handle.remove()
    for layer in layers:
        with torch.no_grad():
            hidden = inputs[layer].flatten(0, -2)
            value: Tensor = (
                layer.v_proj(hidden) if hasattr(layer, "v_proj") else layer.qkv(hidden).chunk(3, 1)[2]
            )
        joined = torch.cat(calls[layer], 2).transpose(1, 2).flatten(0, 1).flatten(1)
        torch.testing.assert_close(joined, value)
    return [len(calls[layer]) for layer in layers]
