"""Rows of attention taken while tokens are generated, one step at a time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from visionsel.multimodal.attention import AttentionCall, Output, attention_rows
from visionsel.multimodal.cache import Dropped
from visionsel.multimodal.families import find_family
from visionsel.multimodal.session import open_session, session_of

__all__ = ["Steps", "find_decoder", "pick", "some_heads", "taken_by_hooks", "taken_by_taps"]


class Steps:
    """The last row of each forward of one `generate()`, in chosen layers, at chosen columns.

    Attributes:
        rows: for each layer one `[B, heads, n]`, float32 on the CPU, a step.
    """

    def __init__(self, layers: list[int], heads: list[int]) -> None:
        self.layers, self.heads = layers, heads
        self.rows: list[list[Tensor]] = []
        self.places: Tensor | None = None

    def begin(self, places: Tensor, length: int) -> None:
        """Forget what was there; the next forward reads a prompt.

        Args:
            places: int64 `[samples, n]`: the places of the columns in the prompt, -1 for none.
            length: of the prompt.
        """
        self.places, self._length = places, length
        self.rows, self._seen = [[] for _ in self.layers], [0] * len(self.layers)

    def end(self) -> None:
        """Take nothing more until the next `begin`."""
        self.places = None

    def take(self, number: int, rows: Tensor, dropped: Dropped | None = None) -> None:
        """One step of one layer.

        Args:
            number: which of `layers`.
            rows: `[B, heads, k]`: the attention of the last query.
            dropped: what a pruner has dropped of the prompt before this layer.

        Raises:
            NotImplementedError: when the model reads another prompt than it was given.
        """
        assert self.places is not None
        first, keys = not self.rows[number], rows.shape[-1]
        if first and dropped is None and keys != self._length:
            raise NotImplementedError(
                f"the decoder reads {keys} tokens of a prompt of {self._length}: where its columns are "
                "is not known (the model puts in the images by itself, or a prompt comes in chunks)"
            )
        seen = self._seen[number] = self._length if first else self._seen[number] + 1
        places = self.places.repeat_interleave(len(rows) // len(self.places), 0).to(rows.device)
        if dropped is not None:
            places = _left(places, dropped)
        elif seen > keys:  # a sliding window has lost the oldest keys
            places = torch.where(places < 0, -1, (places - (seen - keys)).clamp(min=-1))
        self.rows[number].append(pick(rows[:, :, None], places)[:, :, 0].float().cpu())


def _left(places: Tensor, dropped: Dropped) -> Tensor:
    """Where the keys of places are among those that are left, -1 for those that are not."""
    table = torch.full((len(places), dropped.length + 1), -1, device=places.device)
    columns = dropped.columns.masked_fill(~dropped.real, dropped.length).to(places.device)
    number = torch.arange(columns.shape[1], device=places.device).expand_as(columns)
    table = table.scatter(1, columns, number)
    table[:, -1] = -1  # what only fills up a row, and places that are none
    return table.gather(1, places % (dropped.length + 1))


def pick(rows: Tensor, places: Tensor) -> Tensor:
    """Columns of rows `[B, heads, t, k]` at int64 `[B, n]` places; 0 where these are -1."""
    rows = pad(rows, (0, 1))
    index = torch.where(places < 0, rows.shape[-1] - 1, places)
    return rows.gather(-1, index[:, None, None].expand(-1, rows.shape[1], rows.shape[2], -1))


def some_heads(call: AttentionCall, heads: list[int]) -> AttentionCall:
    """The call with these query heads alone."""
    every, shared = call.query.shape[1], call.key.shape[1]
    if heads == list(range(every)):
        return call
    index = torch.tensor(heads, device=call.query.device)
    of = index // (every // shared)
    mask = call.mask
    if mask is not None and mask.ndim == 4 and mask.shape[1] == every:
        mask = mask[:, index]
    return replace(call, query=call.query[:, index], key=call.key[:, of], value=call.value[:, of], mask=mask)


@contextmanager
def taken_by_taps(model: nn.Module, steps: Steps) -> Iterator[None]:
    """Take rows from queries and keys, under any kernel."""
    with open_session(model) as session, ExitStack() as stack:

        def see(number: int, call: AttentionCall, run: Callable[[AttentionCall], Output]) -> Output:
            if steps.places is not None:
                scope, queries = session.scope, call.query.shape[2]
                assert scope is not None
                if scope.drafted or (not scope.prefill and queries > 1):
                    raise NotImplementedError(
                        'several tokens at once in a step of generate(): record with mode="replay"'
                    )
                last = torch.full((len(call.query), 1), queries - 1, device=call.query.device)
                rows = attention_rows(some_heads(call, steps.heads), last)[:, :, 0]
                dropper = session.shared.get("dropper")
                record = None if dropper is None else dropper.record
                state = None if record is None else record.states[steps.layers[number]]
                steps.take(number, rows, state)
            return run(call)

        for number, layer in enumerate(steps.layers):
            stack.enter_context(session.tap(layer, partial(see, number)))
        yield


@contextmanager
def taken_by_hooks(model: nn.Module, steps: Steps) -> Iterator[None]:
    """Take rows from the weights that attention modules return, under eager attention.

    Raises:
        NotImplementedError: inside other contexts, whose taps it would cut off.
    """
    if session_of(model) is not None:
        raise NotImplementedError(
            'mode="eager" exchanges the attention kernel under other contexts that are open on the model; '
            'use mode="online", or leave them'
        )
    decoder, config = find_decoder(model)
    layers: list[Any] = list(cast(Any, decoder).layers)

    def see(number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if steps.places is None:
            return
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, Tensor) or weights.ndim != 4:
            raise RuntimeError(
                f"{type(module).__name__} returned no attention weights [B, heads, q, k] as its second "
                "output; load the model with eager attention"
            )
        steps.take(number, weights[:, torch.tensor(steps.heads, device=weights.device), -1])

    with ExitStack() as stack:
        configs = [config, *(getattr(layer.self_attn, "config", None) for layer in layers)]
        for one in {id(one): one for one in configs if hasattr(one, "_attn_implementation")}.values():
            stack.callback(setattr, one, "_attn_implementation", one._attn_implementation)
            one._attn_implementation = "eager"
        for number, layer in enumerate(steps.layers):
            hook = layers[layer].self_attn.register_forward_hook(partial(see, number))
            stack.callback(hook.remove)
        yield


def find_decoder(model: nn.Module) -> tuple[nn.Module, Any]:
    """The language model with `layers`, each with a `self_attn`, and its configuration, in any model.

    Raises:
        ValueError: when there is none to be found.
    """
    config: Any = model.config
    try:
        decoder: Any = find_family(model).decoder(model)
    except ValueError:
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
        decoder = getattr(decoder, "model", decoder)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(layer, "self_attn") for layer in layers):
        raise ValueError(
            f"no decoder layers with self_attn were found in {type(model).__name__}: its get_decoder() must "
            "give a module with layers"
        )
    return decoder, config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
