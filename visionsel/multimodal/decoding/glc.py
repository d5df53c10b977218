"""GLC: the last layer is corrected by the layer that looks most at the region which matters.

Shu et al. 2025, "When Semantics Mislead Vision: Mitigating Large Multimodal Models Hallucinations in Scene
Text Spotting and Understanding", NeurIPS 2025, arXiv:2506.05551; from the paper alone. ZoomText estimates the
region T of the image tokens I. Glimpse (eq. 4): candidates are the `keep` image tokens that the question
attends to most in the last layer. Refocus (eq. 5): candidates whose attention shifts little between the first
layer and the last are background. Then the grounded layer l* is the one whose attention among image tokens
goes to T most (eq. 3), and `(1 - w) H(L) + w H(l*)` (eq. 6, "Fusion") takes the place of the last hidden
state before the final norm. T and l* are found when a prompt is read, and kept while it is continued.

Where the paper is silent or open:

- Attention is the mean over heads; the question is all text after the last image.
- Eq. 5 has a matrix of shifts among the candidates, and what is wanted is one number for each of them, "how
  much its importance evolves": we take as importance the attention that a token gets from all candidates, in
  each layer as a share of what they get together, and its relative change with `eps` in the denominator.
- No threshold is given: the `stable` part of the candidates, whose importance changes least in either
  direction, is dropped. Half of them by default, which is ours. 0 is the paper's ablation without Refocus,
  a `keep` of all image tokens the one without Glimpse.
- Fused are the states that tokens are predicted from: the end of the prompt and all after it.

With `fidelity="code"` it does as the release does, as far as that can be had: importances are scaled to
0 ... 1 and divided without `eps`, and stay only where they change by more than a factor of 1e8, that is,
where they were least in the first layer; all but the last layer are in question; and the *input* of the last
layer is fused, at all tokens, with `w = 0.2`. The release looks anew at each token and runs the decoder twice
for it, on one cache; here the second run is left out: T is of the attention that the last layer would have.
As later tokens are seen by fewer, the last candidate is often the least in both layers, and where all image
tokens are candidates it always is: 0 / 0 does not count as a change, T is empty, and nothing is fused.

Nothing forces the eager kernel: attention is computed again from queries and keys, some rows at a time, and
summed at once. While a prompt is read it takes a few times `[B, heads, 128, L]` for the layer that runs,
`[B, L]` for each, the queries of the first layer, and hidden states of each layer at the end of the prompt
(with `"code"` at all tokens). A step of generation keeps one hidden state of the layers that were chosen.

With pruners, a layer's attention is that of the tokens it has, to the image tokens that the last one has. Of
two views only the main one is fused. What edits rows of attention in a layer, as VAR does, does not change
what is measured in that layer.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.multimodal.attention import AttentionCall, Output, attention_rows
from visionsel.multimodal.cache import Dropped, cache_of, notes_of
from visionsel.multimodal.decoding.glc_rules import (
    check_rules,
    choose_layer,
    glimpse,
    layer_scores,
    refocus,
    text_regions,
)
from visionsel.multimodal.dropping import take
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.scope import PromptScope
from visionsel.multimodal.session import Session

__all__ = ["GLC", "Corrected", "choose_layer", "glimpse", "layer_scores", "refocus", "text_regions"]

CHUNK = 128  # rows at a time, so that long prompts need no [heads, L, L]


@dataclass(frozen=True)
class GLC(Intervention):
    """Mixes the hidden state of the layer that looks at the right region into the last one.

    It was made for text in images; the authors report small gains on general questions too. Without a KV
    cache (`use_cache=False`) each forward is a prompt of its own, and finds its region anew.

    Args:
        w: weight of the grounded layer, from 0 (nothing changes) to 1; None: 0.1 as in the paper, 0.2 with
            `fidelity="code"`.
        keep: how many image tokens are candidates; the paper's 128 are all of them for small images.
        stable: which part of the candidates is dropped as background, below 1; not in the paper.
        eps: what keeps the relative change finite.
        fidelity: `"paper"` or `"code"`, where they differ (see above).

    Raises:
        ValueError: for a value out of range.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import GLC
        >>> with GLC(keep=16)(model) as glc:
        ...     answer = model.generate(**inputs)
        >>> glc.layer.shape, glc.scores.shape
        (torch.Size([1]), torch.Size([4, 1]))
    """

    w: float | None = None
    keep: int = 128
    stable: float = 0.5
    eps: float = 1e-6
    fidelity: str = "paper"

    def __post_init__(self) -> None:
        if self.w is not None and not 0 <= self.w <= 1:
            raise ValueError(f"w must be from 0 (nothing changes) to 1, got {self.w!r}")
        check_rules(self.keep, self.stable, self.eps, self.fidelity)

    @property
    def weight(self) -> float:
        """`w`, or the default of the fidelity."""
        if self.w is None:
            return 0.1 if self.fidelity == "paper" else 0.2
        return float(self.w)

    @contextmanager
    def attach(self, session: Session) -> Iterator["Corrected"]:
        """See `Intervention`; yields what was found in the last prompt.

        Raises:
            ValueError: for a second one on the same model.
        """
        if "glc" in session.shared:
            raise ValueError("GLC is on this model already: leave its context first")
        session.shared["glc"] = True
        corrected = Corrected(session, self)
        try:
            with ExitStack() as stack:
                corrected._install(stack)
                yield corrected
        finally:
            del session.shared["glc"]


@dataclass(frozen=True)
class _Chosen:
    """Stays with the cache of a prompt: the layer of each row, int64 `[B]` on the CPU."""

    layer: Tensor

    def __len__(self) -> int:
        return len(self.layer)

    def rows(self, index: Tensor) -> "_Chosen":
        return _Chosen(self.layer[index.to(self.layer.device)])


class Corrected:
    """What GLC found in the last prompt; with beams `B` counts them.

    Attributes:
        layer: int64 `[B]`: the grounded layer, from 0; -1 for rows that have none, as those without an image.
            None before the first prompt, like the others.
        regions: bool `[B, L]`, in the places of the prompt: the region T.
        scores: `[layers, B]`: which part of the attention among image tokens goes to T (eq. 3), of all layers
            in question.
    """

    def __init__(self, session: Session, method: GLC) -> None:
        self.layer: Tensor | None = None
        self.regions: Tensor | None = None
        self.scores: Tensor | None = None
        self._session, self._method = session, method
        self._last = len(session.layers) - 1
        self._early = method.fidelity == "code"  # whether the input of the last layer is fused
        self._forget()

    def _forget(self) -> None:
        """What a forward needs, and no other may see."""
        self._chosen: Tensor | None = None  # of the rows of this forward; None until it is known
        self._received: list[Tensor] = []  # of each layer so far, see `_attention`
        self._first: AttentionCall | None = None
        self._hidden: dict[int, Tensor] = {}
        self._ended = False  # whether the last layer has run
        self._found: dict[tuple[int, int], tuple[Any, ...]] = {}

    def _install(self, stack: ExitStack) -> None:
        session = self._session
        stack.callback(self._forget)
        stack.callback(session.decoder.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        for number, layer in enumerate(session.layers):
            stack.enter_context(session.tap(number, self._measure(number)))
            stack.callback(layer.register_forward_hook(self._after(number), with_kwargs=True).remove)
        if self._early:
            last = session.layers[self._last]
            stack.callback(last.register_forward_pre_hook(self._before_last, with_kwargs=True).remove)
        else:
            stack.callback(session.decoder.norm.register_forward_pre_hook(self._before_norm).remove)

    # finding the layer

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder runs: a new prompt, or one whose layer is known."""
        scope = self._session.scope
        if self._session.aside or scope is None:
            return
        self._forget()
        if not scope.prefill:
            note = getattr(cache_of(kwargs), "notes", {}).get(self._method)
            if note is None:
                raise NotImplementedError(
                    f"the prompt in this cache was not read under {self._method}, so its grounded layer is "
                    "not known; run the whole conversation inside the context"
                )
            if len(note) != len(scope.input_ids):
                raise NotImplementedError(
                    f"the prompt in this cache has {len(note)} rows, this forward has {len(scope.input_ids)};"
                    " GLC does not go with what adds rows to a batch"
                )
            self._chosen = note.layer
            return
        seeing = scope.visual.any(1)
        self.regions, self.scores = torch.zeros_like(scope.visual), None
        if not bool(seeing.any()):
            self._chosen = self.layer = torch.full((len(seeing),), -1)
            return
        self.layer = None
        if not bool((scope.text().any(1) | ~seeing).all()):
            raise ValueError(
                "a prompt has no text after its last image, so that no question says what in the image "
                "matters; put the text after the image"
            )
        end = torch.arange(scope.length, device=scope.real.device) - scope.last[:, None]
        self._end = (end >= 0) & (end <= scope.drafted)  # what tokens are predicted from, bool [B, L]

    def _measure(self, number: int) -> Callable[..., Output]:
        def attend(call: AttentionCall, run: Callable[[AttentionCall], Output]) -> Output:
            scope, out = self._session.scope, run(call)
            if scope is not None and scope.prefill and self._chosen is None:
                if number == 0:
                    self._first = call
                with torch.no_grad():
                    self._received.append(self._attention(number, call, scope.visual))
                    if number == self._last:
                        self._decide(scope, call)
            return out

        return attend

    def _decide(self, scope: PromptScope, call: AttentionCall) -> None:
        """Find the region and the layer.

        Args:
            scope: of the prompt.
            call: of the last layer.
        """
        method, state = self._method, self._state(self._last)
        there = scope.visual
        if state is not None:
            held = state.real.new_zeros(there.shape).scatter(1, state.columns, state.real)
            there = there & held.to(there.device)
        question = scope.text()
        query = self._attention(self._last, call, question) / question.sum(1, keepdim=True).clamp(min=1)
        candidates = glimpse(query_attention=query, keep=method.keep, valid=there)
        assert self._first is not None
        self.regions = refocus(
            first=self._attention(0, self._first, candidates),
            last=self._attention(self._last, call, candidates),
            candidates=candidates,
            stable=method.stable,
            eps=method.eps,
            fidelity=method.fidelity,
        )
        received = torch.stack(self._received)
        self.scores = layer_scores(received=received, regions=self.regions, valid=there)
        self.layer = choose_layer(received=received, regions=self.regions, valid=there).cpu()
        self._chosen = self.layer
        self._first, self._received = None, []

    def _attention(self, number: int, call: AttentionCall, rows: Tensor) -> Tensor:
        """`[B, L]`: what tokens of the prompt get from chosen ones, in the sum; the mean over heads.

        Args:
            number: of the layer.
            call: of it.
            rows: bool `[B, L]`: the chosen ones; those that a pruner dropped before the layer give nothing.
        """
        index, real = self._local(number, rows)
        index, real = index.to(call.query.device), real.to(call.query.device)
        total: Any = 0
        for part, wanted in zip(index.split(CHUNK, 1), real.split(CHUNK, 1), strict=True):
            attention = attention_rows(call, part)
            total = total + torch.einsum("bhtk,bt->bk", attention, wanted.to(attention.dtype))
        total = (total / call.query.shape[1]).to(rows.device)
        state = self._state(number)
        if state is None:
            return total
        return total.new_zeros(rows.shape).scatter_add(1, state.columns.to(rows.device), total)

    def _state(self, number: int) -> Dropped | None:
        """Which tokens of the prompt a layer has; None: all."""
        dropper = self._session.shared.get("dropper")
        record = None if dropper is None else dropper.record
        return record.states[number] if record is not None and record.scope is self._session.scope else None

    def _local(self, number: int, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Where tokens of the prompt are among those that a layer has.

        Args:
            number: of the layer.
            mask: bool `[B, L]`.

        Returns:
            int64 `[B, t]`, rising, and bool `[B, t]`: False for what fills up a row with fewer.
        """
        state = self._state(number)
        key = (id(mask), id(state))
        if key not in self._found:
            here = mask if state is None else take(mask, state.columns, 1) & state.real.to(mask.device)
            index = (~here).to(torch.int8).argsort(dim=1, stable=True)[:, : int(here.sum(1).amax())]
            self._found[key] = (index, here.gather(1, index), mask, state)  # the ids stay theirs
        return self._found[key][:2]

    # fusing

    def _after(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            scope = self._session.scope
            if self._session.aside or self._session.untapped or scope is None:
                return
            if self._chosen is None:  # the prompt is being read
                hidden = output if self._early else take(output, self._local(number, self._end)[0], 1)
                self._hidden[number] = hidden
                return
            if number != self._last and number in self._chosen.tolist():
                self._hidden[number] = output
            if number == self._last:
                self._ended = True
                cache = cache_of(kwargs)
                if scope.prefill and cache is not None:
                    notes_of(cache)[self._method] = _Chosen(self._chosen)
                if self._early:
                    self._refuse_pruned()
                    self._forget()

        return hook

    def _before_norm(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        scope = self._session.scope
        if not self._ended or scope is None:  # the norm is called for something else
            return None
        hidden = args[0]
        if not (scope.prefill and self._hidden):
            fused = self._fused(hidden)
        else:
            index = self._local(self._last, self._end)[0].to(hidden.device)[..., None]
            index = index.expand(-1, -1, hidden.shape[-1])
            fused = hidden.scatter(1, index, self._fused(hidden.gather(1, index)))
        self._forget()
        return (fused, *args[1:])

    def _before_last(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scope = self._session.scope
        if self._session.aside or self._session.untapped or scope is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._chosen is None:
            self._refuse_pruned()
            with torch.no_grad():
                self._decide(scope, self._session.probe(self._last, hidden, kwargs))
        fused = self._fused(hidden)
        self._hidden = {}
        return ((fused, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": fused})

    def _fused(self, hidden: Tensor) -> Tensor:
        """Hidden states `[B, t, C]` with those of the grounded layer, at the same tokens, mixed in."""
        assert self._chosen is not None
        if self._method.weight == 0:
            return hidden
        grounded = hidden
        for number in sorted(set(self._chosen.tolist()) & set(self._hidden)):
            rows = (self._chosen == number).to(hidden.device)[:, None, None]
            grounded = torch.where(rows, self._hidden[number].to(hidden.device), grounded)
        return hidden if grounded is hidden else torch.lerp(hidden, grounded, self._method.weight)

    def _refuse_pruned(self) -> None:
        if any(self._state(number) is not None for number in range(self._last + 1)):
            raise NotImplementedError(
                'GLC with fidelity="code" mixes layers at all tokens of the prompt, of which a pruner leaves '
                'some layers fewer; use fidelity="paper", or no pruner'
            )
