"""Attention of generated tokens, recorded around `generate()`.

    with AttentionRecorder(model) as recorder:
        out = model.generate(**inputs)
    recorder.attentions    # [layers, B, heads, new tokens, columns]

Rows are computed from queries and keys, under any kernel; no model has to be loaded with eager attention, and
no `[N, N]` matrix is made.
"""

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from visionsel.multimodal.attention import AttentionCall, attention_rows
from visionsel.multimodal.cache import cache_of, seen_tokens
from visionsel.multimodal.families import find_family
from visionsel.multimodal.grounding.online import (
    Steps,
    find_decoder,
    pick,
    some_heads,
    taken_by_hooks,
    taken_by_taps,
)
from visionsel.multimodal.grounding.replay import (
    Replay,
    generation_option,
    places_of,
    refuse_pruned,
    until_end,
)
from visionsel.multimodal.session import session_of

__all__ = ["AttentionRecorder"]

CHUNK = 256  # rows at a time, so that long answers need no [heads, T, L + T] of theirs
MODES = ("replay", "online", "eager")
_ONE_BY_ONE = {  # what makes a step of generate() something else than one more token a row
    "assistant_model": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "custom_generate": None,
    "penalty_alpha": None,
    "num_beams": 1,
}


class AttentionRecorder:
    """Records what the model attends to as it predicts each new token of `generate()`.

    After the block, `attentions` holds the rows of the last `generate()` inside it. It takes 4 bytes x layers
    x B x heads x new tokens x columns, layers, heads and columns being those that are asked for, and while it
    is made once more B x heads x min(T, 256) rows of whole length (prompt and answer).

    Under a modulator that edits attention (VAR, PAI, ...) it is the attention before the edit of that layer.

    Args:
        model: a vision-language model of transformers.
        layers: numbers of decoder layers; negative ones count from the last; None: all.
        heads: numbers of query heads, the same in all layers; None: all.
        columns: `"image"`: the image tokens of each sample in order (videos left out), filled up with 0 where
            a sample has fewer than another; `"prompt"`: all tokens of the prompt, padding with 0.
        mode: `"replay"`: after the block prompt and answer are read once more, in one forward. Any kernel,
            cache and way of choosing tokens will do: beams, sampling, several answers, assisted decoding.
            Contexts open on the model during `generate()` must still be open at the end of the block, so
            enter the recorder inside them. `"online"`: rows are taken while tokens are generated, one by one;
            works inside the context of a pruner, where dropped columns are 0. `"eager"`: as online, from the
            weights that the modules called `self_attn` return; for models of other code than transformers',
            which must have eager attention then, and holds one layer of it at a time.

    Attributes:
        layers: the numbers of the first axis of `attentions`.
        heads: those of its third axis.
        replay: the prompt and its answers, in mode `"replay"`; None before.

    Raises:
        ValueError: for an unknown option, layers or heads that do not exist, or a model of no supported
            family (mode `"eager"` takes others).

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import AttentionRecorder
        >>> with AttentionRecorder(model) as recorder:
        ...     answer = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
        >>> recorder.attentions.shape  # layers, B, heads, new tokens, image tokens
        torch.Size([4, 1, 4, 4, 64])
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        columns: str = "image",
        mode: str = "replay",
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if columns not in ("image", "prompt"):
            raise ValueError(f'columns must be "image" or "prompt", got {columns!r}')
        self.model, self.columns, self.mode = model, columns, mode
        try:
            decoder, config = self._decoder()
        except ValueError as error:
            hint = "" if mode == "eager" else '. For models of other code there is mode="eager"'
            raise ValueError(f"{error}{hint}") from error
        self.layers = _numbers("layers", layers, len(decoder.layers))
        self.heads = _numbers("heads", heads, int(config.num_attention_heads))
        self._image_token = self._find_image_token()
        self.replay: Replay | None = None
        self._attentions: Tensor | None = None
        self._positions: Tensor | None = None
        self._generated: tuple[dict[str, Any], Tensor, int] | None = None
        self._stack: ExitStack | None = None
        self._steps = Steps(self.layers, self.heads)
        self._busy = False

    @property
    def attentions(self) -> Tensor:
        """float32 `[layers, B, heads, new tokens, columns]`, on the CPU.

        Row t is the one that predicts new token t; rows of padding behind an answer are 0, as are columns
        that the layer does not see (padding, keys out of a sliding window, tokens that a pruner dropped).

        Raises:
            RuntimeError: before the block has ended, or when nothing was generated in it.
        """
        return self._recorded()[0]

    @property
    def positions(self) -> Tensor:
        """int64 `[B, columns]`: the place in the prompt of each column; -1 where a sample has fewer.

        Raises:
            RuntimeError: as for `attentions`.
        """
        return self._recorded()[1]

    def _recorded(self) -> tuple[Tensor, Tensor]:
        if self._stack is not None:
            raise RuntimeError("attentions are there when the block of the recorder has ended")
        if self._attentions is None or self._positions is None:
            raise RuntimeError(
                "nothing was recorded: call model.generate() on this very model inside the block"
            )
        return self._attentions, self._positions

    def __enter__(self) -> "AttentionRecorder":
        if self._stack is not None:
            raise RuntimeError("this recorder is open already; make another one")
        self.replay = self._attentions = self._positions = self._generated = None
        with ExitStack() as stack:
            if self.mode != "replay":
                source = taken_by_hooks if self.mode == "eager" else taken_by_taps
                stack.enter_context(source(self.model, self._steps))
            stack.enter_context(self._generate_wrapped())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        assert self._stack is not None
        stack, self._stack = self._stack, None
        stack.close()
        generated, self._generated = self._generated, None
        if kind is None and generated is not None:
            inputs, tokens, contexts = generated
            if self.mode == "replay":
                self._play(inputs, tokens, contexts)
            else:
                self._collect(inputs, tokens)

    def _play(self, inputs: dict[str, Any], tokens: Tensor, contexts: int) -> None:
        """Read prompt and answer."""
        if contexts != _contexts(self.model):
            raise RuntimeError(
                f"{contexts} contexts were open on the model during generate(), {_contexts(self.model)} are "
                "now: a replay would run another model than the one that answered; enter the recorder inside "
                "of them"
            )
        replay = Replay(self.model, inputs, tokens)
        places = self._places(replay.sequences[:, : replay.length])
        out = self._zeros(replay.valid, places)

        def see(number: int, call: AttentionCall) -> None:
            call, device = some_heads(call, self.heads), call.query.device
            for start in range(0, replay.rows.shape[1], CHUNK):
                part = slice(start, start + CHUNK)
                rows = attention_rows(call, replay.rows[:, part].to(device))
                out[number, :, :, part] = pick(rows, places.to(device)).float().cpu()

        replay.run({layer: partial(see, number) for number, layer in enumerate(self.layers)})
        out.masked_fill_(~replay.valid.cpu()[None, :, None, :, None], 0)
        self.replay, self._attentions, self._positions = replay, out, places

    def _collect(self, inputs: dict[str, Any], tokens: Tensor) -> None:
        """Put together what was seen while tokens were generated."""
        ids = _prompts(inputs)
        new = tokens[:, ids.shape[1] :].cpu()
        valid = until_end(
            new,
            generation_option(self.model, inputs, "eos_token_id"),
            generation_option(self.model, inputs, "pad_token_id"),
        )
        places = self._places(ids).repeat_interleave(len(tokens) // len(ids), 0)
        out = self._zeros(valid, places)
        for number, rows in enumerate(self._steps.rows):
            if len(rows) != new.shape[1]:
                raise RuntimeError(f"{len(rows)} forwards were seen for {new.shape[1]} new tokens")
            for step, row in enumerate(rows):
                out[number, :, :, step] = row
        out.masked_fill_(~valid[None, :, None, :, None], 0)
        self._steps.rows, self._attentions, self._positions = [], out, places

    def _zeros(self, valid: Tensor, places: Tensor) -> Tensor:
        rows, new = valid.shape
        return torch.zeros(len(self.layers), rows, len(self.heads), new, places.shape[1])

    def _decoder(self) -> tuple[Any, Any]:
        """The language model and its configuration."""
        if self.mode == "eager":
            return find_decoder(self.model)
        decoder: Any = find_family(self.model).decoder(self.model)
        return decoder, decoder.config

    def _find_image_token(self) -> int | None:
        """The token id that stands for images; None where it is not known."""
        try:
            return find_family(self.model).token_ids(self.model)["image"]
        except ValueError:  # mode "eager"
            config: Any = self.model.config
            names = ("image_token_id", "image_token_index")
            found = next((getattr(config, name) for name in names if hasattr(config, name)), None)
            if found is None and self.columns == "image":
                raise ValueError(
                    f"{type(self.model).__name__} does not say which token stands for images (no "
                    'config.image_token_id); use columns="prompt"'
                ) from None
            return found

    def _places(self, ids: Tensor) -> Tensor:
        """int64 `[rows, columns]`: places of the columns in prompts `[rows, L]`, on the CPU."""
        ids = ids.cpu()
        if self.columns == "prompt":
            return torch.arange(ids.shape[1]).repeat(len(ids), 1)
        places = places_of(torch.eq(ids, cast(int, self._image_token)))
        if not places.shape[1]:
            raise ValueError('the prompt has no tokens of images; use columns="prompt"')
        return places

    @contextmanager
    def _generate_wrapped(self) -> Iterator[None]:
        """Note what `generate()` of this model gets and gives."""
        model: Any = self.model
        had, before = "generate" in vars(model), vars(model).get("generate")
        generate = model.generate
        signature = inspect.signature(generate)

        @functools.wraps(generate)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._busy or self._stack is None:
                return generate(*args, **kwargs)
            given = dict(signature.bind(*args, **kwargs).arguments)
            given |= given.pop("kwargs", {})
            self._refuse(given)
            ids = _prompts(given)
            places, contexts = self._places(ids), _contexts(model)
            self._busy = True
            if self.mode != "replay":
                self._steps.begin(places, ids.shape[1])
            try:
                out = generate(*args, **kwargs)
            finally:
                self._busy = False
                self._steps.end()
            inputs = {name: one for name, one in given.items() if name not in ("cache", "past_key_values")}
            self._generated = inputs, getattr(out, "sequences", out), contexts
            return out

        model.generate = recorded
        try:
            yield
        finally:
            if vars(model).get("generate") is recorded:  # else somebody wrapped it again, and ours passes on
                if had:
                    model.generate = before
                else:
                    del model.generate

    def _refuse(self, given: dict[str, Any]) -> None:
        """What cannot be recorded.

        Raises:
            NotImplementedError: for it.
        """
        if seen_tokens(cache_of(given)):
            raise NotImplementedError(
                "a cache with earlier turns: run the whole conversation as one prompt, without a cache"
            )
        if self.mode == "replay":
            return refuse_pruned(session_of(self.model))
        for name, neutral in _ONE_BY_ONE.items():
            value = generation_option(self.model, given, name)
            if value is not None and value != neutral:
                raise NotImplementedError(
                    f"{name}={value!r} does not go one token after the other, which mode={self.mode!r} "
                    'records; use mode="replay"'
                )
        return None


def _prompts(given: dict[str, Any]) -> Tensor:
    """int64 `[samples, L]`: what `generate()` is given.

    Raises:
        ValueError: when it is no token ids.
    """
    ids = given.get("inputs") if given.get("input_ids") is None else given["input_ids"]
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(
            "attention is recorded for prompts of input_ids [B, L], as the processor returns them"
        )
    return ids


def _contexts(model: nn.Module) -> int:
    """How many contexts are open on a model."""
    session = session_of(model)
    return 0 if session is None else session.users


def _numbers(name: str, given: Sequence[int] | None, number: int) -> list[int]:
    """Numbers of layers or heads, none of them negative.

    Raises:
        ValueError: for none, for one that comes twice or does not exist.
    """
    chosen = list(range(number)) if given is None else list(given)
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in chosen)
    if not chosen or not whole or not all(-number <= one < number for one in chosen):
        raise ValueError(f"{name} {chosen} do not exist: choose among 0 to {number - 1}")
    chosen = [one % number for one in chosen]
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"{name} {chosen} come more than once")
    return chosen
