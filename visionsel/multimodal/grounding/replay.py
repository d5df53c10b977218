"""Reading a prompt and its answer once more, all at once: what the model attended to while it answered.

Decoding with a cache and one forward over prompt and answer compute the same. So attention need not be
watched while tokens are generated: whatever chose them (beams, sampling, another kernel, another program), a
replay has the rows that predicted them.

Shapes: `B` rows of the answer, `L` tokens of the prompt with its padding, `T` new tokens.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from visionsel.multimodal.attention import AttentionCall, Output
from visionsel.multimodal.families import find_family
from visionsel.multimodal.scope import PromptScope
from visionsel.multimodal.session import Session, input_names, open_session, own_positions

__all__ = [
    "Replay",
    "Replayed",
    "generation_option",
    "places_of",
    "prompt_mask",
    "refuse_pruned",
    "until_end",
]

Tap = Callable[[AttentionCall], None]


@dataclass(frozen=True)
class Replayed:
    """What one pass gives besides what its taps saw.

    Attributes:
        hidden: `[B, L + T, C]`, what the head of the model gets; None unless asked for.
        logits: `[B, T, vocabulary]`, row t for new token t; None unless asked for.
    """

    hidden: Tensor | None
    logits: Tensor | None


class Replay:
    """A prompt and its answer, ready to be read in one forward.

    Each sample of the prompt may have several answers, as of beams and return sequences; they follow each
    other, as `generate()` returns them.

    Args:
        model: a vision-language model of transformers.
        inputs: what `generate()` was given: all that the processor returned, left padded. Options of
            `generate()` may be among it; `eos_token_id`, `pad_token_id` and `generation_config` are looked
            up here before the model's own.
        generated: int64 `[B, T]`, new tokens, or `[B, L + T]`, prompts and new tokens as `generate()` returns
            them: which of the two is told by whether they begin with the prompt. An output of `generate()`
            with `sequences` is taken too.

    Attributes:
        model: the model.
        length: `L`.
        copies: answers of each sample.
        sequences: int64 `[B, L + T]`.
        tokens: int64 `[B, T]`: the new ones.
        rows: int64 `[B, T]`: the place whose row of attention, hidden state and logits predict new token t;
            `rows + 1` is the place of the token itself.
        valid: bool `[B, T]`: False for the padding behind the end of an answer.
        image: int64 `[B, n]`: the places of the image tokens in order, videos left out; where a row has fewer
            than another, -1 at the end.
        scope: of the last pass, `B` rows of `L + T` tokens of which the last `T` are no prompt; None before.

    Raises:
        ValueError: for inputs without `input_ids`, no new tokens, or answers that do not fit the samples.
        NotImplementedError: when tokens that stand for images were generated, or for features of images that
            were encoded beforehand and have to be repeated.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], generated: Any) -> None:
        family, device = find_family(model), cast(torch.device, model.device)
        known = input_names(model)
        given = {name: value for name, value in inputs.items() if name in known and value is not None}
        if inputs.get("inputs") is not None:  # the name that generate() has for it
            given.setdefault("input_ids", inputs["inputs"])
        if "input_ids" not in given:
            raise ValueError("a replay needs input_ids, as the processor returns them, and the pixel values")
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
        ids: Tensor = given["input_ids"]
        self.tokens = _new_tokens(ids, generated)
        self.model, self.length = model, ids.shape[1]
        self.copies = len(self.tokens) // len(ids)
        self.sequences = torch.cat((ids.repeat_interleave(self.copies, 0), self.tokens), 1)
        steps = torch.arange(self.tokens.shape[1], device=device)
        self.rows = (self.length - 1 + steps).repeat(len(self.tokens), 1)
        self.valid = until_end(
            self.tokens,
            generation_option(model, inputs, "eos_token_id"),
            generation_option(model, inputs, "pad_token_id"),
        )
        stand = family.token_ids(model)
        if any(bool(((self.tokens == token) & self.valid).any()) for token in stand.values()):
            raise NotImplementedError(
                "the answer holds tokens that stand for images, which a replay would take for images"
            )
        self.image = places_of(self.sequences[:, : self.length] == stand["image"])
        self.scope: PromptScope | None = None
        if "attention_mask" not in given:
            given["attention_mask"] = prompt_mask(model, ids, inputs)
        if self.copies > 1 and given.get("mm_encoder_outputs") is not None:
            raise NotImplementedError(
                "images that were encoded beforehand cannot be repeated for several answers; pass the pixel "
                "values"
            )
        # images follow each other sample by sample, so all samples are repeated, not each by itself
        order = torch.arange(len(self.tokens), device=device).view(self.copies, -1)
        self._order = order.T.flatten()  # for each row where the forward has it
        self._given = {name: _tiled(name, value, self.copies) for name, value in given.items()}

    def run(
        self, taps: Mapping[int, Tap] | None = None, hidden: bool = False, logits: bool = False
    ) -> Replayed:
        """Read prompt and answer, without gradients; the model is left as it was.

        Modulators that are open on the model act as they did on the answer. A tap sees queries and keys, so
        attention as it is before what a modulator makes of it in this layer.

        Args:
            taps: for decoder layers a function that gets the call of the attention kernel: queries and keys
                of all `B` rows and `L + T` tokens, positions applied, and the mask. It is called before the
                kernel runs, once.
            hidden: give the last hidden states.
            logits: give the logits of the new tokens; otherwise none are made.

        Raises:
            ValueError: for a layer that does not exist.
            NotImplementedError: inside the context of a pruner, and for attention kernels whose masks cannot
                be read (flex, paged).
        """
        model: Any = self.model
        with torch.no_grad(), own_positions(model), open_session(model) as session, ExitStack() as stack:
            refuse_pruned(session)
            for layer, tap in (taps or {}).items():
                if not 0 <= layer < len(session.layers):
                    raise ValueError(
                        f"layer {layer} does not exist: the decoder has 0 to {len(session.layers) - 1}"
                    )
                stack.enter_context(session.tap(layer, self._through(tap)))
            outputs = self._forward(session, logits)
            self.scope = self._scope(session)
        return Replayed(
            outputs[0].index_select(0, self._order.to(outputs[0].device)) if hidden else None,
            None if outputs[1] is None else outputs[1].index_select(0, self._order.to(outputs[1].device)),
        )

    def _forward(self, session: Session, logits: bool) -> tuple[Tensor, Tensor | None]:
        """Hidden states and logits, rows in the order of the forward."""
        model, new = cast(Any, self.model), self.tokens.shape[1]
        arguments = self._grown() | {"use_cache": False, "return_dict": True}
        if not logits:
            session.draft(new)
            return model.model(**arguments).last_hidden_state, None
        seen: list[Tensor] = []
        handle = model.model.register_forward_hook(lambda _, args, out: seen.append(out.last_hidden_state))
        try:
            out = model(**arguments, logits_to_keep=new + 1)  # says too that the last ones are no prompt
        finally:
            handle.remove()
        return seen[0], out.logits[:, :-1]

    def _grown(self) -> dict[str, Any]:
        """The inputs with the answers appended, as `generate()` appends them."""
        place = self._order.argsort()
        tokens, valid = self.tokens[place], self.valid[place]
        given, paligemma = dict(self._given), cast(Any, self.model).config.model_type == "paligemma"
        positions = given.get("position_ids")
        if positions is None:
            positions = cast(Any, self.model)._prepare_position_ids_for_generation(given["input_ids"], given)
        if paligemma:
            positions = positions + 1  # as it does in each step of generate()
        steps = torch.arange(1, 1 + tokens.shape[1], device=positions.device)
        later = positions[..., -1:] + steps
        mask = given["attention_mask"]
        given |= {
            "input_ids": torch.cat((given["input_ids"], tokens), 1),
            "attention_mask": torch.cat((mask, valid.to(mask.dtype)), 1),
            "position_ids": torch.cat((positions, later), -1),
        }
        for name in ("token_type_ids", "mm_token_type_ids"):
            if (types := given.get(name)) is not None:
                # PaliGemma: 0 is the prompt, which sees itself in both directions; elsewhere 0 is text
                suffix = int(name == "token_type_ids" and paligemma)
                given[name] = torch.cat((types, torch.full_like(tokens, suffix, dtype=types.dtype)), 1)
        return given

    def _through(self, tap: Tap) -> Callable[[AttentionCall, Callable[[AttentionCall], Output]], Output]:
        def attend(call: AttentionCall, run: Callable[[AttentionCall], Output]) -> Output:
            tap(self._ordered(call))
            return run(call)

        return attend

    def _ordered(self, call: AttentionCall) -> AttentionCall:
        """The call with its rows in the order of the answers."""
        if self.copies == 1:
            return call
        order = self._order.to(call.query.device)
        query, key, value = (one[order] for one in (call.query, call.key, call.value))
        mask = call.mask
        if mask is not None and len(mask) == len(order):
            mask = mask[order]
        return replace(call, query=query, key=key, value=value, mask=mask)

    def _scope(self, session: Session) -> PromptScope:
        scope = session.scope
        assert scope is not None
        if self.copies == 1:
            return scope
        rows = self._order
        ordered = replace(
            scope, input_ids=scope.input_ids[rows], visual=scope.visual[rows], real=scope.real[rows]
        )
        if scope.encoded:
            vars(ordered)["pictures"] = [scope.pictures[row] for row in rows.tolist()]
        return ordered


def refuse_pruned(session: Session | None) -> None:
    """Refuse to replay in the context of a pruner.

    Raises:
        NotImplementedError: there.
    """
    dropper = None if session is None else session.shared.get("dropper")
    if dropper is not None and dropper.points:
        raise NotImplementedError(
            "a pruner drops tokens of this model, and a replay reads all of them: leave the context of the "
            'pruner, or record attention while tokens are generated (AttentionRecorder(..., mode="online"))'
        )


def generation_option(model: nn.Module, given: Mapping[str, Any], name: str) -> Any:
    """What `generate()` takes for an option: from its arguments, a configuration among them, or the model."""
    configs = (given.get("generation_config"), cast(Any, model).generation_config)
    values = [given.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in values if value is not None), None)


def prompt_mask(model: nn.Module, ids: Tensor, given: Mapping[str, Any]) -> Tensor:
    """int64 `[B, L]`: what `generate()` takes for the attention mask where none is given.

    Args:
        model: that generates.
        ids: int64 `[B, L]`: its prompts.
        given: arguments of `generate()`.
    """
    pad = generation_option(model, given, "pad_token_id")
    if pad is None or int(pad) in _ends(generation_option(model, given, "eos_token_id")):
        return torch.ones_like(ids)
    return (ids != int(pad)).long()


def _ends(end: Any) -> list[int]:
    """The token ids that end an answer."""
    return [] if end is None else torch.as_tensor(end).flatten().tolist()


def _new_tokens(ids: Tensor, generated: Any) -> Tensor:
    """int64 `[B, T]`: the new tokens, cut from whole sequences where these are given."""
    tokens = getattr(generated, "sequences", generated)
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
        raise ValueError(
            "generated must be token ids [B, T], or what generate() returns; got "
            + (
                f"{tokens.dtype} {list(tokens.shape)}"
                if isinstance(tokens, Tensor)
                else type(tokens).__name__
            )
        )
    tokens, length = tokens.to(ids.device), ids.shape[1]
    if not len(tokens) or len(tokens) % len(ids):
        raise ValueError(
            f"{len(tokens)} answers do not go with {len(ids)} prompts: each prompt has one answer, or "
            "the same number of them"
        )
    if torch.equal(tokens[:, :length], ids.repeat_interleave(len(tokens) // len(ids), 0)):
        tokens = tokens[:, length:]
    if not tokens.shape[1]:
        raise ValueError("nothing was generated: there are no tokens behind the prompt")
    return tokens.long()


def until_end(tokens: Tensor, end: Any, pad: Any) -> Tensor:
    """bool `[B, T]`: tokens up to the end of each answer, the one that ends it counted."""
    ended = torch.zeros_like(tokens, dtype=torch.bool)
    for token in _ends(end):
        ended |= tokens == token
    valid = ended.cumsum(1) - ended.long() == 0
    if pad is not None and int(pad) not in _ends(end):  # answers that something else has stopped
        valid &= (tokens != int(pad)).flip(1).cumsum(1).flip(1) > 0
    return valid


def places_of(here: Tensor) -> Tensor:
    """int64 `[B, n]`: places of what is True in each row, in order, -1 behind the last."""
    number = int(here.sum(1).amax()) if here.numel() else 0
    order = here.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :number]
    return order.masked_fill(~here.gather(1, order), -1)


def _tiled(name: str, value: Any, copies: int) -> Any:
    """An input of the forward with all samples, and all their images, one time after the other."""
    if copies == 1:
        return value
    if isinstance(value, Tensor) and value.ndim:
        if name == "position_ids":
            return torch.cat([value] * copies, -2)
        return torch.cat([value] * copies)
    repeat = isinstance(value, list) and not name.startswith("vision_")  # vision_feature_layer: an option
    return value * copies if repeat else value
