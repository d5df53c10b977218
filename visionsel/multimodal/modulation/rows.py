"""Rows of attention that a method changes, under any kernel.

The kernel runs as ever. The rows in question are computed again from queries and keys, the method says what
they shall be, and the output of the kernel is corrected by the difference: `out += (a' - a) V`. It equals an
eager kernel whose weights are changed, and costs these rows alone.

What is known of a prompt (where its images are, which tokens were marked) stays with the cache that holds the
prompt: beams and later turns find it there, and other prompts read in between do not disturb it.

Shapes: `B` batch, `q` queries and `k` keys of a call, `t` rows in question, `n` tokens of a sequence so far.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from visionsel.multimodal.attention import AttentionCall, Output, attention_logits
from visionsel.multimodal.cache import cache_of, notes_of, seen_tokens
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.scope import PromptScope
from visionsel.multimodal.session import Session

__all__ = ["Edited", "Prompt", "RowEditor", "Rows"]

CHUNK = 256  # rows at a time, so that long prompts need no [heads, t, k] of theirs


@dataclass(frozen=True)
class Prompt:
    """What is known of a prompt and of the tokens after it.

    Attributes:
        visual: bool `[B, L]`: tokens that stand for images and videos.
        final: int64 `[B, 1]`: the place of the last of them, -1 without any.
        pictured: whether there are any at all.
        chosen: bool `[B, sets, L]`: tokens of the images that the method chose; None where it does not.
        marks: for each layer bool `[B, n]` or `[B, heads, n]`: tokens that the method marked.
        changed: for each layer the number of rows that changed, over samples, heads and steps.
    """

    visual: Tensor
    final: Tensor
    pictured: bool
    chosen: Tensor | None = None
    marks: dict[int, Tensor] = field(default_factory=dict)
    changed: dict[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.visual)

    def rows(self, index: Tensor) -> "Prompt":
        """The same for other rows of the batch."""
        index = index.to(self.visual.device)
        marks = {layer: mark[index.to(mark.device)] for layer, mark in self.marks.items()}
        chosen = None if self.chosen is None else self.chosen[index]
        return replace(self, visual=self.visual[index], final=self.final[index], chosen=chosen, marks=marks)


@dataclass(frozen=True)
class Rows:
    """Rows of the attention of one layer, as the kernel has them.

    Attributes:
        layer: its number.
        call: of the kernel.
        index: int64 `[t]`: their places among the queries of the call.
        wanted: bool `[B, t]`: the rows that the method asked for.
        visual: bool `[B, k]`: keys that stand for images.
        marked: bool `[B, k]` or `[B, heads, k]`: keys that the method marked.
        chosen: bool `[B, sets, k]`: keys that the method chose; None where it does not.
    """

    layer: int
    call: AttentionCall
    index: Tensor
    wanted: Tensor
    visual: Tensor
    marked: Tensor
    chosen: Tensor | None = None

    @cached_property
    def logits(self) -> Tensor:
        """`[B, heads, t, k]` before the softmax, -inf where a query does not see."""
        return attention_logits(self.call, self.index.expand(len(self.wanted), -1))

    @cached_property
    def attention(self) -> Tensor:
        """`[B, heads, t, k]`."""
        return self.logits.softmax(-1).nan_to_num(0.0)


Edit = Callable[[Rows], tuple[Tensor, Tensor]]


class RowEditor:
    """The rows that one method changes in one session.

    Args:
        session: of the model.
        method: whose rows; a prompt that was read under an equal one is known.
        edit: gives the new attention `[B, heads, t, k]` and bool `[B, heads, t]`, True for rows that change.
        which: `"text"`: the text after the last image and all that is generated; `"last"`: the rows that
            tokens are predicted from; `"all"`: every row, of prompts without images too.
        mark: tells from hidden states `[B, m, C]`, as they enter a layer, which tokens `[B, m]` to mark.
        mark_generated: whether tokens after the prompt may be marked.
        measure: tells from the attention over a prompt, whose tokens are bool `[B, k]`, which keys
            `[B, heads, k]` to mark; instead of `mark`.
        choose: tells of a prompt with images, once it is read, sets of its tokens, bool `[B, sets, L]`.

    Attributes:
        prompt: what is known of the one read last; None before the first.
    """

    def __init__(
        self,
        session: Session,
        method: Intervention,
        edit: Edit,
        which: str,
        mark: Callable[[Tensor], Tensor] | None = None,
        mark_generated: bool = True,
        measure: Callable[[AttentionCall, Tensor], Tensor] | None = None,
        choose: Callable[[PromptScope], Tensor] | None = None,
    ) -> None:
        self.session, self.method, self.edit, self.which = session, method, edit, which
        self.mark, self.mark_generated, self.measure = mark, mark_generated, measure
        self.choose = choose
        self.prompt: Prompt | None = None
        self._read: object = None
        self._caches: dict[int, tuple[Any, int]] = {}  # and tokens seen, of layers that were entered

    @contextmanager
    def edited(self, layers: Sequence[int]) -> Iterator["RowEditor"]:
        """Change the attention of these layers while a context is open.

        Raises:
            ValueError: where another method changes the attention of one of them.
        """
        owners: dict[int, str] = self.session.shared.setdefault("attention rows", {})
        name = type(self.method).__name__
        if taken := sorted(set(layers) & set(owners)):
            raise ValueError(
                f"{owners[taken[0]]} and {name} both change the attention of layers {taken}; give them "
                "different layers"
            )
        with ExitStack() as stack:
            for number in layers:
                owners[number] = name
                stack.callback(owners.pop, number)
                layer = self.session.layers[number]
                stack.callback(layer.register_forward_pre_hook(self._before(number), with_kwargs=True).remove)
                if self.mark is not None:
                    # the norm gets what is left when all hooks before the layer have dropped or merged
                    norm = layer.input_layernorm
                    stack.callback(norm.register_forward_pre_hook(self._look(number)).remove)
                stack.enter_context(self.session.tap(number, self._attend(number)))
            yield self

    def _before(self, number: int) -> Callable[..., None]:
        """Find the prompt that a forward belongs to, once, and what the layer has seen of it."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.session.aside or self.session.untapped:
                return
            cache = cache_of(kwargs)
            scope = self.session.scope
            if scope is not None and self._read is not scope:
                self._read = scope
                self.prompt = self._begin(cache) if scope.prefill else self._find(cache)
            hidden = args[0] if args else kwargs["hidden_states"]
            if self.prompt is not None and len(hidden) != len(self.prompt.visual):
                raise NotImplementedError(
                    f"the decoder reads {len(hidden)} rows for a prompt of {len(self.prompt.visual)}; "
                    f"{type(self.method).__name__} does not go with what adds rows to a batch"
                )
            self._caches[number] = cache, seen_tokens(cache, number)

        return hook

    def _begin(self, cache: Cache | None) -> Prompt:
        scope = self.session.scope
        assert scope is not None
        place = torch.arange(scope.length, device=scope.visual.device).expand_as(scope.visual)
        final = place.masked_fill(~scope.visual, -1).amax(1, keepdim=True)
        pictured = bool(scope.visual.any())
        chosen = self.choose(scope) if self.choose is not None and pictured else None
        prompt = Prompt(scope.visual, final, pictured, chosen)
        if cache is not None:
            notes_of(cache)[self.method] = prompt
        return prompt

    def _find(self, cache: Cache | None) -> Prompt:
        prompt: Prompt | None = getattr(cache, "notes", {}).get(self.method)
        if prompt is None:
            raise NotImplementedError(
                f"the prompt in this cache was not read under {self.method}, which must know where its "
                "images are; run the whole conversation inside the context"
            )
        return prompt

    def _places(self, number: int, new: int, device: torch.device) -> Tensor:
        """int64 `[1 or B, n]`: the place in the sequence of each key of a layer, -1 for fillers.

        Args:
            number: of the layer.
            new: how many tokens it reads, what was dropped before it not counted.
            device: of the result.
        """
        scope, (cache, seen) = self.session.scope, self._caches[number]
        assert scope is not None
        if scope.prefill:
            dropper = self.session.shared.get("dropper")
            record = None if dropper is None else dropper.record
            state = record.states[number] if record is not None and record.scope is scope else None
            total = scope.length
        else:
            state = getattr(cache.layers[number], "dropped", None)
            total = seen + new
        places = torch.arange(total, device=device)[None]
        if state is None:
            return places
        columns = state.columns.masked_fill(~state.real, -1).to(device)
        return torch.cat([columns, places[:, state.length :].expand(len(columns), -1)], 1)

    def _look(self, number: int) -> Callable[..., None]:
        """Mark tokens by the hidden states that enter a layer."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self.session.aside or self.session.untapped:
                return
            scope, prompt, hidden = self.session.scope, self.prompt, args[0].detach()
            if prompt is None or self.mark is None or self._read is not scope or scope is None:
                return
            if number not in self._caches:  # a selection looks at this layer before it drops tokens
                return
            if not prompt.pictured:
                return
            marks = self.mark(hidden)
            if scope.prefill:
                places = self._places(number, hidden.shape[1], hidden.device)
                if places.shape[1] != hidden.shape[1]:
                    return
                marks = _spread(marks, places, scope.length)
                if not self.mark_generated:
                    marks = marks & scope.prompt.to(marks.device)
            else:
                seen = self._caches[number][1]
                before = prompt.marks[number][:, :seen]
                marks = torch.cat([before, marks if self.mark_generated else torch.zeros_like(marks)], 1)
            prompt.marks[number] = marks

        return hook

    def _attend(self, number: int) -> Callable[[AttentionCall, Callable[[AttentionCall], Output]], Output]:
        def attend(call: AttentionCall, run: Callable[[AttentionCall], Output]) -> Output:
            out, weights = run(call)
            scope, prompt, device = self.session.scope, self.prompt, call.query.device
            assert scope is not None
            assert prompt is not None
            q, k = call.query.shape[2], call.key.shape[2]
            places = self._places(number, q, device)
            del self._caches[number]
            if not prompt.pictured and self.which != "all":
                return out, weights
            wanted = self._wanted(prompt, places[:, -q:])
            visual = _at(prompt.visual, places[:, -k:])
            if self.measure is not None and scope.prefill:
                marks = self.measure(call, _at(scope.prompt, places).expand(len(visual), -1))
                prompt.marks[number] = _spread(marks, places, scope.length)
            marked = prompt.marks.get(number)
            marked = torch.zeros_like(visual) if marked is None else _at(marked, places[:, -k:])
            chosen = None if prompt.chosen is None else _at(prompt.chosen, places[:, -k:])
            count = prompt.changed.get(number, torch.zeros((), dtype=torch.int64, device=device))
            # a step of generation has one row: no need to wait for the device to say which
            index = torch.arange(1, device=device) if q == 1 else wanted.any(0).nonzero()[:, 0]
            for part in index.split(CHUNK):
                rows = Rows(number, call, part, wanted[:, part], visual, marked, chosen)
                edited, changed = self.edit(rows)
                changed = changed & rows.wanted[:, None]
                count = count + changed.sum()
                out, weights = _correct(out, weights, rows, edited, changed)
            prompt.changed[number] = count
            return out, weights

        return attend

    def _wanted(self, prompt: Prompt, places: Tensor) -> Tensor:
        """bool `[B, q]`: the queries whose rows are in question."""
        scope = self.session.scope
        assert scope is not None
        final = prompt.final.to(places.device)
        wanted = (final >= 0) | (self.which == "all")
        wanted = wanted & (_at(scope.real, places) if scope.prefill else places >= 0)
        if self.which == "all":
            return wanted
        if self.which == "text":
            return wanted & (places > final)
        if scope.prefill:
            return wanted & (places >= scope.last[:, None].to(places.device))
        number = torch.arange(places.shape[1], device=places.device)
        return wanted & (number >= len(number) - 1 - scope.drafted)


class Edited:
    """What a method that changes rows of attention tells about its work.

    Attributes:
        layers: in which it acts.
    """

    def __init__(self, editor: RowEditor, layers: Sequence[int]) -> None:
        self._editor, self.layers = editor, tuple(layers)

    @property
    def changed(self) -> dict[int, int]:
        """For each layer how many rows were changed for the last prompt, over samples, heads and tokens."""
        prompt = self._editor.prompt
        return {} if prompt is None else {layer: int(number) for layer, number in prompt.changed.items()}


def _at(mask: Tensor, places: Tensor) -> Tensor:
    """bool `[B, ..., k]`: a mask `[B, ..., n]` at places of the sequence; False beyond it and for fillers."""
    mask = mask.to(places.device)
    n = mask.shape[-1]
    places = torch.where((places < 0) | (places > n), n, places)
    places = places.view(len(places), *[1] * (mask.ndim - 2), -1).expand(*mask.shape[:-1], -1)
    return pad(mask, (0, 1)).gather(-1, places)


def _spread(marks: Tensor, places: Tensor, length: int) -> Tensor:
    """bool `[B, ..., length]`: marks `[B, ..., k]` at their places in the sequence, none of fillers."""
    places = places % (length + 1)
    places = places.view(len(places), *[1] * (marks.ndim - 2), -1).expand_as(marks)
    return marks.new_zeros(*marks.shape[:-1], length + 1).scatter(-1, places, marks)[..., :length]


def _correct(
    out: Tensor, weights: Tensor | None, rows: Rows, edited: Tensor, changed: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The output `[B, q, heads, head_dim]` of the kernel, had the rows been the edited ones."""
    value = rows.call.value
    changed = changed[..., None]
    delta = (edited - rows.attention).masked_fill(~changed, 0)
    groups = delta.shape[1] // value.shape[1]
    more = (delta.unflatten(1, (-1, groups)) @ value.to(delta.dtype)[:, :, None]).flatten(1, 2)
    before = out[:, rows.index]
    after = (before + more.transpose(1, 2)).to(out.dtype)
    out = out.index_copy(1, rows.index, torch.where(changed.transpose(1, 2), after, before))
    if weights is not None:
        before = weights[:, :, rows.index]
        after = torch.where(changed, edited.to(weights.dtype), before)
        weights = weights.index_copy(2, rows.index, after)
    return out, weights
