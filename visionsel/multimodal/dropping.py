"""Dropping tokens of a prompt inside the decoder.

A hook before a decoder layer gathers what the layer gets (hidden states, rotary embeddings, masks) at the
tokens that stay; the layer then caches fewer keys, and its cache layer says which
(`visionsel.multimodal.cache`). The kept tokens keep their positions. Before and after, the model speaks of
the whole prompt: masks come in its coordinates and are gathered here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.multimodal.attention import AttentionCall, Output
from visionsel.multimodal.cache import Dropped, cache_of, mark_dropped, seen_tokens
from visionsel.multimodal.scope import PromptScope
from visionsel.multimodal.session import Session

__all__ = ["Arrival", "Dropper", "Point", "Record", "take"]


@dataclass(frozen=True)
class Arrival:
    """The tokens that arrive at a decoder layer where some are to be dropped.

    Attributes:
        scope: of the prompt.
        layer: number of the decoder layer.
        hidden: `[B, m, C]`.
        columns: int64 `[B, m]` places in the prompt.
        real: bool `[B, m]`.
        visual: bool `[B, m]`: tokens of images that are still there.
        previous: the attention of the layer before, as it ran, if it was asked for.
        own: gives what this layer would make of the hidden states.
    """

    scope: PromptScope
    layer: int
    hidden: Tensor
    columns: Tensor
    real: Tensor
    visual: Tensor
    previous: AttentionCall | None
    own: Callable[[], AttentionCall]


@dataclass(frozen=True)
class Point:
    """A place where tokens are dropped.

    Attributes:
        layer: before which decoder layer; 0 is the input.
        select: gives bool `[B, m]`, True for visual tokens that stay, and the hidden states, changed or not.
        previous: whether `select` reads the attention of the layer before.
        truncate: whether the layers before forget the dropped tokens too, after the prompt.
    """

    layer: int
    select: Callable[[Arrival], tuple[Tensor, Tensor]]
    previous: bool = False
    truncate: bool = False


@dataclass
class Record:
    """What happened to the last prompt.

    Attributes:
        scope: of the prompt.
        kept: for each point its layer and bool `[B, L]`: the tokens that entered the layer.
        states: for each decoder layer what was dropped before it; None where nothing was.
        probed: layers whose queries and keys a selection had made, with the number of tokens.
        cache_bytes: what the cache holds of the prompt, and what it would without dropping; None without
            cache.
    """

    scope: PromptScope
    kept: list[tuple[int, Tensor]]
    states: list[Dropped | None]
    probed: list[tuple[int, int]]
    cache_bytes: tuple[int, int] | None = None


class Dropper:
    """The dropping of one session, whichever interventions ask for it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.points: dict[int, Point] = {}
        self.record: Record | None = None
        self._state: Dropped | None = None
        self._previous: AttentionCall | None = None
        self._whole: Dropped | None = None  # the prompt, if its mask is left to this dropper
        self._gathered: dict[tuple[int, int], tuple[Any, Any, Any]] = {}

    @staticmethod
    @contextmanager
    def drop(session: Session, points: list[Point]) -> Iterator["Dropper"]:
        """Drop tokens at points while a context is open; all contexts of a session share one dropper.

        Raises:
            ValueError: for two points at the same layer.
        """
        dropper: Dropper | None = session.shared.get("dropper")
        for point in points:
            if (dropper is not None and point.layer in dropper.points) or (
                sum(other.layer == point.layer for other in points) > 1
            ):
                raise ValueError(
                    f"two interventions drop tokens before layer {point.layer}; give them different layers"
                )
        if dropper is None:
            dropper = session.shared["dropper"] = Dropper(session)
            dropper._install()
        added = {point.layer: point for point in points}
        dropper.points |= added
        ends = [
            session.tap(point.layer - 1, dropper._keep_call, everywhere=True)
            for point in points
            if point.previous
        ]
        for end in ends:
            end.__enter__()
        try:
            yield dropper
        finally:
            for end in reversed(ends):
                end.__exit__(None, None, None)
            for layer in added:
                del dropper.points[layer]

    def _install(self) -> None:
        stack, decoder = self.session.stack, self.session.decoder
        stack.callback(self.session.watch(self._begin, everywhere=True))
        stack.callback(decoder.register_forward_pre_hook(self._withhold, with_kwargs=True).remove)
        stack.callback(self.session.hold(self._hold))
        for number, layer in enumerate(self.session.layers):
            hook = layer.register_forward_pre_hook(self._before(number), with_kwargs=True)
            stack.callback(hook.remove)
        stack.callback(decoder.register_forward_hook(self._after, with_kwargs=True).remove)
        if hasattr(decoder, "_deepstack_process"):
            self.session.wrap(decoder, "_deepstack_process", self._deepstack(decoder._deepstack_process))

    def _begin(self, scope: PromptScope) -> None:
        self._gathered = {}
        if scope.prefill:
            self._state = self._previous = self._whole = None
            self.record = Record(scope, [], [None] * len(self.session.layers), [])

    def _withhold(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Where tokens are dropped before the first layer, the mask of the whole prompt need not be made.

        Of a padded prompt the decoder would make one, `[B, 1, L, L]`; the hook before the first layer makes
        that of the tokens that stay.
        """
        scope, mask = self.session.scope, kwargs.get("attention_mask")
        if scope is None or not scope.prefill or 0 not in self.points or not self._kernel().endswith("sdpa"):
            return None
        if not torch.is_tensor(mask) or mask.ndim != 2 or bool(scope.real.all()):
            return None
        columns = torch.arange(scope.length, device=mask.device).expand(len(mask), -1)
        self._whole = Dropped(scope.length, columns, scope.real.to(mask.device), False)
        return args, {**kwargs, "attention_mask": None}

    @contextmanager
    def _hold(self) -> Iterator[None]:
        """Another prompt is pruned like the main one; what is told is about the main one."""
        record, state, previous, whole = self.record, self._state, self._previous, self._whole
        try:
            yield
        finally:
            self.record, self._state, self._previous, self._whole = record, state, previous, whole
            self._gathered = {}

    def _keep_call(self, call: AttentionCall, run: Callable[[AttentionCall], Output]) -> Output:
        if self.session.scope is not None and self.session.scope.prefill:
            self._previous = call
        return run(call)

    def _before(self, number: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            scope = self.session.scope
            if scope is None:
                return None
            if scope.prefill:
                hidden = args[0] if args else kwargs["hidden_states"]
                if number in self.points:
                    hidden = self._select(self.points[number], hidden, kwargs)
                elif self._state is None and self._whole is None:
                    return None
                changed = kwargs | self._prompt_arguments(kwargs)
                if self._state is not None:
                    assert self.record is not None
                    self.record.states[number] = self._state
                if args:
                    return (hidden, *args[1:]), changed
                return args, {**changed, "hidden_states": hidden}
            cache = cache_of(kwargs)
            layer: Any = cache.layers[number] if cache is not None else None
            state = getattr(layer, "dropped", None)
            if state is None:
                return None
            layer.expected = True
            return args, {**kwargs, "attention_mask": self._later_mask(number, state, args, kwargs)}

        return hook

    def _select(self, point: Point, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Decide, remember, and gather the hidden states."""
        scope, state = self.session.scope, self._state
        assert scope is not None
        assert self.record is not None
        if state is None:
            columns = torch.arange(scope.length, device=hidden.device).expand(len(hidden), -1)
            real = scope.real.to(hidden.device)
        else:
            columns, real = state.columns, state.real
        visual = scope.visual.to(hidden.device).gather(1, columns) & real

        probed = self.record.probed

        def own() -> AttentionCall:
            probed.append((point.layer, hidden.shape[1]))
            return self.session.probe(point.layer, hidden, kwargs | self._prompt_arguments(kwargs))

        previous, self._previous = self._previous, None
        arrival = Arrival(
            scope, point.layer, hidden, columns, real, visual, previous if point.previous else None, own
        )
        keep, hidden = point.select(arrival)
        keep = real & (keep | ~visual)
        kept = torch.zeros_like(scope.real, device=hidden.device).scatter(1, columns, keep)
        self.record.kept.append((point.layer, kept.to(scope.real.device)))
        if bool((keep == real).all()):
            return hidden
        number = int(keep.sum(1).amax())
        # rows with fewer tokens are filled up on the left with dropped ones, which the mask hides
        local = keep.to(torch.int8).argsort(dim=1, stable=True)[:, -number:]
        real = keep.gather(1, local)
        self._state = Dropped(scope.length, columns.gather(1, local), real, bool(real.all()))
        return take(hidden, local, 1)

    def _prompt_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Masks and positions of the tokens that are left, where they are others than the layer gets."""
        changes: dict[str, Any] = {}
        state = self._state or self._whole
        if state is None:
            return changes
        mask = kwargs.get("attention_mask")
        changes["attention_mask"] = self._once(mask, state, lambda: self._prompt_mask(mask, state))
        if state is self._whole:
            return changes
        embeddings = kwargs["position_embeddings"]
        changes["position_embeddings"] = tuple(
            self._once(one, state, partial(_take_positions, one, state.columns)) for one in embeddings
        )
        positions = kwargs.get("position_ids")
        if positions is not None:
            if "flash" in self._kernel():  # these kernels take gaps in them for several packed sequences
                changes["position_ids"] = None
            else:
                changes["position_ids"] = self._once(
                    positions, state, partial(_take_positions, positions, state.columns)
                )
        return changes

    def _once(self, source: Any, state: Dropped, make: Callable[[], Any]) -> Any:
        """The layers get the same masks and positions: gather each once a forward."""
        key = (id(source), id(state))
        if key not in self._gathered:
            self._gathered[key] = (source, state, make())  # holding on to both keeps their ids theirs
        return self._gathered[key][2]

    def _kernel(self) -> str:
        return self.session.decoder.config._attn_implementation or "eager"

    def _prompt_mask(self, mask: Tensor | None, state: Dropped) -> Tensor | None:
        columns, real = state.columns, state.real
        if mask is None:
            if state.complete:
                return None
            if "flash" in self._kernel():
                return real.to(torch.int64)
            size = columns.shape[1]
            causal = torch.ones(size, size, dtype=torch.bool, device=columns.device).tril()
            # the whole prompt has the decoder's own mask, in which padding sees nothing
            return _hide(causal[None, None], real, rows=state is not self._whole)
        if mask.ndim == 2:
            return take(mask, columns, 1) * real.to(mask.dtype)
        if mask.ndim != 4:
            raise NotImplementedError(f"a mask with {mask.ndim} axes; expected none, 2 or 4")
        if mask.shape[-1] != state.length:
            raise NotImplementedError(
                f"the prompt of {state.length} tokens does not fit the sliding window, whose mask has "
                f"{mask.shape[-1]} columns; pruning needs a prompt within the window"
            )
        mask = take(take(mask, columns, 2), columns, 3)
        return mask if state.complete else _hide(mask, real)

    def _later_mask(
        self, number: int, state: Dropped, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """The mask of tokens after the prompt, over the keys that are there."""
        mask = kwargs.get("attention_mask")
        hidden = args[0] if args else kwargs["hidden_states"]
        queries = hidden.shape[1]
        if mask is None and state.complete:
            return None
        total = seen_tokens(cache_of(kwargs), number) + queries

        def gather() -> Tensor:
            after = torch.arange(state.length, total, device=hidden.device).expand(len(hidden), -1)
            columns = torch.cat([state.columns, after], 1)
            real = torch.cat([state.real, torch.ones_like(after, dtype=torch.bool)], 1)
            if mask is None:
                if "flash" in self._kernel():
                    return real.to(torch.int64)
                size = columns.shape[1]
                causal = torch.ones(queries, size, dtype=torch.bool, device=hidden.device)
                return causal.tril(size - queries)[None, None] & real[:, None, None]
            if mask.shape[-1] != total:
                raise NotImplementedError(
                    f"the mask has {mask.shape[-1]} columns for {total} tokens: the sliding window is full; "
                    "generate fewer tokens or leave pruning out"
                )
            if mask.ndim == 2:
                return take(mask, columns, 1) * real.to(mask.dtype)
            return _hide(take(mask, columns, 3), real, rows=False)

        return self._once(mask, state, gather)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Tell the cache layers of the prompt what they hold."""
        record, scope = self.record, self.session.scope
        if scope is None or not scope.prefill or record is None:
            return
        self._gathered, self._previous = {}, None
        # selections have been made: queries and keys of the vision tower need not outlive the prompt
        scope.encoded = {
            kind: replace(encoded, layers={}, features=None) for kind, encoded in scope.encoded.items()
        }
        cache = cache_of(kwargs)
        if cache is None:
            cache = cache_of(output) if hasattr(output, "keys") else None
        if cache is None:
            return
        cached: list[Any] = cache.layers
        for one, state in zip(cached, record.states, strict=False):
            if state is not None:
                _refuse_short_window(one, state)
        for point in self.points.values():
            state = record.states[point.layer]
            if point.truncate and state is not None:
                for layer in range(point.layer):
                    _refuse_short_window(cached[layer], state)
                    _truncate(cached[layer], record.states[layer], state)
                    record.states[layer] = state
        held = whole = 0
        for one, state in zip(cached, record.states, strict=False):
            size = sum(tensor.numel() * tensor.element_size() for tensor in (one.keys, one.values))
            held += size
            whole += size if state is None else size * state.length // state.columns.shape[1]
            if state is not None:
                mark_dropped(one, state)
        record.cache_bytes = (held, whole)

    def _deepstack(self, deepen: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Qwen3-VL adds features of the tower to the image tokens after its first layers, at their places."""

        def process(hidden: Tensor, places: Tensor, features: Tensor) -> Tensor:
            state = self._state
            if state is None:
                return deepen(hidden, places, features)
            whole = features.new_zeros(*places.shape, features.shape[-1])
            whole[places] = features
            stays = take(places, state.columns, 1) & state.real
            return deepen(hidden, stays, take(whole, state.columns, 1)[stays])

        return process


def take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gather along an axis by `index` `[B, m]`; `x` may have one row for all samples."""
    index = index.to(x.device)
    if x.shape[0] != len(index):
        x = x.expand(len(index), *x.shape[1:])
    shape = [len(index)] + [1] * (x.ndim - 1)
    shape[dim] = index.shape[1]
    sizes = list(x.shape)
    sizes[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(sizes))


def _take_positions(x: Tensor, index: Tensor) -> Tensor:
    """Position ids `[B, L]` or embeddings `[B, L, d]`, also with an axis of 3 or 4 kinds in front."""
    if x.ndim == (3 if x.is_floating_point() else 2):
        return take(x, index, 1)
    return torch.stack([take(one, index, 1) for one in x])


def _hide(mask: Tensor, real: Tensor, rows: bool = True) -> Tensor:
    """Close the columns that are not real; a filler sees itself, for a softmax over nothing is NaN."""
    hidden = ~real[:, None, None]
    if mask.dtype != torch.bool:
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    mask = mask & ~hidden
    return mask | torch.diag_embed(~real)[:, None] if rows else mask


def _refuse_short_window(layer: Any, state: Dropped) -> None:
    window = getattr(layer, "sliding_window", None)
    if window is not None and state.length >= window:
        raise NotImplementedError(
            f"the prompt of {state.length} tokens does not fit the sliding window of {window}, which counts "
            "the tokens that are left; pruning needs a prompt within the window"
        )


def _truncate(layer: Any, held: Dropped | None, state: Dropped) -> None:
    """Leave in a cache layer the keys and values of the tokens of a later state."""
    local = state.columns
    if held is not None:
        place = torch.zeros(len(local), state.length, dtype=torch.int64, device=local.device)
        steps = torch.arange(held.columns.shape[1], device=local.device).expand_as(held.columns)
        local = place.scatter(1, held.columns, steps).gather(1, local)
    layer.keys, layer.values = take(layer.keys, local, 2), take(layer.values, local, 2)
