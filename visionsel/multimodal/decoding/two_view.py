"""Decoding with two views: each token is chosen by what the model says to a prompt and to another view of it.

    with TwoView(view, contrast(1.0), beta=0.1)(model):
        out = model.generate(**inputs)

While the context is open, `generate()` takes one more logits processor. It owns a cache for the second view
(the same prompt with its image noised, transformed or removed, with another instruction, ...), appends each
token that is chosen to it, and combines the logits of the two. VCD, ICD, M3ID, RITUAL and AGLA differ only in
the view and in the combination.

With other interventions on the same model: pruners drop tokens and VHR reinforces heads in both views, each
by what that view shows, and they tell of the main one. What edits attention acts on the main view only, as in
the released code of PAI. Calls of the model other than `generate()` are as without the context.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from visionsel.multimodal.cache import cache_of, seen_tokens
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.session import Session, input_names

__all__ = [
    "TwoView",
    "Views",
    "agree",
    "check_beta",
    "check_strengths",
    "contrast",
    "guidance",
    "implausible",
]

Combine = Callable[[Tensor, Tensor, int], Tensor]
View = Callable[[dict[str, Any]], dict[str, Any]]
_FOREIGN = {  # what chooses tokens in its own way, and when it is not asked to
    "assistant_model": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "custom_generate": None,
    "dola_layers": None,
    "penalty_alpha": None,
    "guidance_scale": 1,
    "token_healing": False,
}


@dataclass(frozen=True)
class TwoView(Intervention):
    """Chooses tokens by the logits of the prompt and of a second view of it.

    Works for greedy decoding, sampling and beams, with any logits processors of the user, which come first:
    what they forbid stays forbidden, and is not the most probable token that `beta` is counted from. Under
    beams the combination is made log-probabilities again.

    Args:
        view: maps the inputs of `generate()`, a dict as the user passed them, to those of the second view,
            with the same samples in the same order. It may call `model.generate()` itself.
        combine: gets the logits of the main and of the second view `[rows, vocabulary]` and the number of the
            token, from 0; gives `[rows, vocabulary]`. None: the second view is not wanted and nothing
            changes, whatever `beta` is.
        beta: tokens less probable than `beta` times the most probable one of the main view are out (Li et al.
            2023); 0: all are in.
        once: whether the second view is asked for the first token only, and is taken to equal the main one
            after.

    Raises:
        ValueError: for a `beta` outside of [0, 1].

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> import torch
        >>> from visionsel.multimodal.decoding import TwoView, contrast
        >>> def black(inputs):
        ...     return {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
        >>> with TwoView(black, contrast(1.0))(model):
        ...     answer = model.generate(**inputs)
    """

    view: View
    combine: Combine | None
    beta: float = 0.1
    once: bool = False

    def __post_init__(self) -> None:
        check_beta(self.beta)

    @contextmanager
    def attach(self, session: Session) -> Iterator["Views"]:
        """See `Intervention`; yields the second view's side."""
        if "decoding" in session.shared:
            raise ValueError(
                f"two decoding methods at once: {session.shared['decoding']} is open on this model; leave "
                "its context first"
            )
        model: Any = session.model
        views = Views(session, self)
        ours = views.wrapped(model.generate)
        had, before = "generate" in vars(model), vars(model).get("generate")
        session.shared["decoding"] = type(self).__name__ + f"(view={self.view!r})"
        model.generate = ours
        try:
            yield views
        finally:
            del session.shared["decoding"]
            views.open = False
            if vars(model).get("generate") is ours:  # else somebody wrapped it again, and ours only passes on
                if had:
                    model.generate = before
                else:
                    del model.generate


class Views:
    """What the context of a two-view decoder yields.

    Attributes:
        inputs: of the second view, for the last `generate()`; None before, or if there was none.
    """

    def __init__(self, session: Session, method: TwoView) -> None:
        self.inputs: dict[str, Any] | None = None
        self.open = True
        self._session, self._method = session, method
        self._busy = False

    def wrapped(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate()` with the second view."""
        signature = inspect.signature(generate)

        @functools.wraps(generate)
        def with_second_view(*args: Any, **kwargs: Any) -> Any:
            if self._busy or not self.open:
                return generate(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            given = dict(bound.arguments)
            given |= given.pop("kwargs", {})
            self._refuse(given)
            if self._method.combine is None:
                return generate(*args, **kwargs)
            self._busy = True
            try:
                with torch.no_grad():
                    processor = self._processor(given)
                    given["logits_processor"] = [*(given.get("logits_processor") or ()), processor]
                    return generate(**given)
            finally:
                self._busy = False

        return with_second_view

    def _option(self, given: dict[str, Any], name: str) -> Any:
        """What `generate()` will take for an option."""
        configs = (given.get("generation_config"), cast(Any, self._session.model).generation_config)
        values = [given.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), None)

    def _refuse(self, given: dict[str, Any]) -> None:
        for name, neutral in _FOREIGN.items():
            value = self._option(given, name)
            if value is not None and value != neutral:
                raise NotImplementedError(
                    f"{name}={value!r} chooses tokens in its own way (assisted decoding, guidance, ...), "
                    "which does not go together with a second view; leave it out, or leave the context"
                )
        if seen_tokens(cache_of(given)):
            raise NotImplementedError(
                "a cache with earlier turns holds nothing of the second view; run the whole conversation as "
                "one prompt, without a cache"
            )
        if given.get("inputs_embeds") is not None:
            raise NotImplementedError("a second view of inputs_embeds is not known; pass input_ids")

    def _processor(self, given: dict[str, Any]) -> "_SecondView":
        """Make the second view of what the user passed."""
        known = input_names(self._session.model)
        inputs = {name: value for name, value in given.items() if name in known and value is not None}
        if given.get("inputs") is not None:
            inputs.setdefault("input_ids", given["inputs"])
        if "input_ids" not in inputs:
            raise ValueError("two-view decoding needs input_ids, as the processor returns them")
        ids = inputs["input_ids"]
        if "attention_mask" not in inputs:
            inputs["attention_mask"] = self._mask(ids, given)
        second = self._method.view(dict(inputs))
        if not isinstance(second, dict) or not torch.is_tensor(second.get("input_ids")):
            raise ValueError(f"view must give a dict with input_ids, got {type(second).__name__}")
        if len(second["input_ids"]) != len(ids):
            raise ValueError(
                f"view must give as many samples as it gets: {len(ids)}, got {len(second['input_ids'])}"
            )
        self.inputs = second
        beams = (self._option(given, "num_beams") or 1) > 1
        return _SecondView(self._session, self._method, second, beams)

    def _mask(self, ids: Tensor, given: dict[str, Any]) -> Tensor:
        """What `generate()` takes for the mask where none is given."""
        pad, end = self._option(given, "pad_token_id"), self._option(given, "eos_token_id")
        ends = end if isinstance(end, list | tuple) else [end]
        return torch.ones_like(ids) if pad is None or pad in ends else (ids != pad).long()


class _SecondView(LogitsProcessor):
    """Runs the second view of one `generate()` along, on a cache of its own."""

    def __init__(self, session: Session, method: TwoView, inputs: dict[str, Any], beams: bool) -> None:
        self._session, self._method, self._beams = session, method, beams
        self._model: Any = session.model
        device: Any = self._model.device
        self._inputs = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()
        }
        arguments = inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if "cache" in arguments else "past_key_values"  # renamed in 5.24
        self._cache: DynamicCache | None = None
        self._previous: Tensor | None = None
        self._number = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Combine; the model's own logits are not changed in place."""
        method = self._method
        assert method.combine is not None
        if self._previous is not None and input_ids.shape[1] != self._previous.shape[1] + 1:
            raise NotImplementedError("a second view needs its tokens one at a time (no assisted decoding)")
        if method.once and self._number:
            other = scores
        else:
            with torch.no_grad(), self._session.beside():
                other = self._first(len(input_ids)) if self._cache is None else self._next(input_ids)
            other = other.to(scores)
        self._previous = input_ids.clone()
        combined = method.combine(scores, other, self._number)
        self._number += 1
        combined = combined.masked_fill(implausible(scores, method.beta), -torch.inf)
        return combined.log_softmax(-1) if self._beams else combined

    def _run(self, **arguments: Any) -> Tensor:
        """Logits of the last token `[rows, vocabulary]`."""
        arguments |= {self._cache_name: self._cache, "use_cache": True, "return_dict": True}
        return self._model(**arguments, logits_to_keep=1).logits[:, -1]

    def _first(self, rows: int) -> Tensor:
        """Read the prompt, each sample once, then repeat it for its beams or answers."""
        inputs = dict(self._inputs)
        ids = inputs["input_ids"]
        self._copies, rest = divmod(rows, len(ids))
        if rest:
            raise ValueError(f"{rows} rows cannot be shared by the {len(ids)} samples of the second view")
        if inputs.get("attention_mask") is None:
            inputs["attention_mask"] = torch.ones_like(ids)
        if inputs.get("position_ids") is None:
            inputs["position_ids"] = self._model._prepare_position_ids_for_generation(ids, inputs)
        mask, place = inputs["attention_mask"].long(), inputs["position_ids"]
        self._cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        logits = self._run(**inputs | {"attention_mask": mask})
        copies = self._copies
        if copies > 1:
            self._cache.batch_repeat_interleave(copies)
            logits, mask = (one.repeat_interleave(copies, 0) for one in (logits, mask))
            if place.shape[-2] == len(ids):
                place = place.repeat_interleave(copies, -2)
        self._mask, self._place = mask, place[..., -1:]
        return logits

    def _next(self, ids: Tensor) -> Tensor:
        """Append the token that was chosen, after the beams that it continues."""
        assert self._cache is not None
        assert self._previous is not None
        if self._copies > 1:
            # a beam may go on from any beam of its sample; other samples may have the same text
            old = self._previous.unflatten(0, (-1, self._copies))
            new = ids[:, :-1].unflatten(0, (-1, self._copies))
            same = (new[:, :, None] == old[:, None]).all(-1)
            if not bool(same.any(-1).all()):
                raise RuntimeError("a beam does not continue any beam of its sample")
            first = torch.arange(len(new), device=ids.device)[:, None] * self._copies
            self._cache.reorder_cache((same.int().argmax(-1) + first).flatten().to(self._mask.device))
        self._mask = torch.cat((self._mask, self._mask.new_ones(len(ids), 1)), 1)
        self._place = self._place + 1
        last = ids[:, -1:].to(self._mask.device)
        return self._run(input_ids=last, attention_mask=self._mask, position_ids=self._place)


def contrast(alpha: float) -> Combine | None:
    """What the second view says is taken off: `(1 + alpha) z - alpha z'` (Leng et al. 2024, VCD)."""
    if not alpha:
        return None
    return lambda main, other, number: (1 + alpha) * main - alpha * other


def agree(alpha: float) -> Combine | None:
    """What the second view says counts too: `z + alpha z'` (RITUAL, AGLA).

    Both views being one, this sharpens the distribution to a temperature of `1 / (1 + alpha)`.
    """
    return (lambda main, other, number: main + alpha * other) if alpha else None


def guidance(gamma: float) -> Combine | None:
    """Log-probabilities go on from the second view through the main one: `gamma (p - p') + p'` (PAI's code).

    Args:
        gamma: how far; 1: the main view.

    Raises:
        ValueError: for a `gamma` that is not above 0.
    """
    if gamma <= 0:
        raise ValueError(f"gamma must be above 0, got {gamma}")
    if gamma == 1:
        return None
    return lambda main, other, number: gamma * main.log_softmax(-1) - (gamma - 1) * other.log_softmax(-1)


def implausible(logits: Tensor, beta: float) -> Tensor:
    """The tokens that the adaptive plausibility constraint rules out (Li et al. 2023).

    Args:
        logits: `[..., vocabulary]` of the main view, or log-probabilities.
        beta: in [0, 1].

    Returns:
        bool `[..., vocabulary]`: True where the probability is below `beta` times the largest.
    """
    if not beta:
        return torch.zeros_like(logits, dtype=torch.bool)
    return logits < logits.amax(-1, keepdim=True) + math.log(beta)


def check_beta(beta: float) -> None:
    """Refuse what is no ratio of probabilities."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is a ratio of probabilities from 0 (off) to 1, got {beta}")


def check_strengths(alpha: float, beta: float) -> None:
    """Refuse a negative weight of the second view, and what `check_beta` does."""
    if alpha < 0:
        raise ValueError(f"alpha must be 0 or more, got {alpha}")
    check_beta(beta)
