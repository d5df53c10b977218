"""What visionsel holds on a model while interventions are open: hooks, the scope of each forward, taps.

There is one session a model, however many contexts are open on it; they share it, so that what one drops the
others know. It is opened by the first and closed by the last, and then the model is as it was. State lives
here; models and their classes carry none.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from visionsel.multimodal.attention import AttentionCall, Output, tapped
from visionsel.multimodal.cache import cache_of, seen_tokens
from visionsel.multimodal.families import find_family
from visionsel.multimodal.families.family import Encoded
from visionsel.multimodal.scope import PromptScope

__all__ = ["Session", "input_names", "open_session", "own_positions", "session_of"]

_OPEN: dict[int, "Session"] = {}
_LOCK = threading.Lock()
_ENCODERS = {"image": "get_image_features", "video": "get_video_features"}
_NOT_INPUTS = {
    "cache",
    "past_key_values",
    "use_cache",
    "labels",
    "logits_to_keep",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
}
Attend = Callable[[AttentionCall, Callable[[AttentionCall], Output]], Output]


class Session:
    """One model with interventions.

    Attributes:
        model: the whole model.
        family: what is known of it.
        decoder: its language model, below the head.
        layers: the decoder layers.
        scope: of the forward that runs, or of the last one; None before the first.
        aside: whether the forward that runs is of another prompt than the one that is answered (see
            `beside`). What keeps state from one forward to the next must look here, or leave it alone.
        users: how many contexts are open.
        stack: what is undone when the last of them ends.
        untapped: whether decoder layers run for another purpose than the forward, and all taps are passed
            over.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.family = find_family(model)
        self.decoder = cast(Any, self.family.decoder(model))
        self.layers: list[Any] = list(self.decoder.layers)
        self.scope: PromptScope | None = None
        self.aside = False
        self.untapped = False
        self.shared: dict[str, Any] = {}  # what interventions of one kind have together
        self.users = 0
        self.stack = ExitStack()
        self._drafted = 0
        self._encoded: dict[str, Encoded] = {}
        self._taps: dict[int, list[tuple[Attend, bool, bool]]] = {}
        self._holds: list[Callable[[], AbstractContextManager[None]]] = []
        self._observed: dict[int, list[tuple[Tensor, Tensor, float]]] = {}
        self._observers: set[int] = set()
        self._projected: Tensor | None = None
        self._encoding = False
        self._watches: list[tuple[Callable[[PromptScope], None], bool]] = []

    def open(self) -> None:
        """Hook the model; nothing of what it computes changes by that."""
        base = cast(Any, self.model.model)
        forward = inspect.signature(base.forward)
        self._arguments = list(forward.parameters)
        stack = self.stack
        stack.callback(self.model.register_forward_pre_hook(self._check, with_kwargs=True).remove)
        stack.callback(base.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        stack.callback(self.decoder.register_forward_pre_hook(self._decode, with_kwargs=True).remove)
        for modality, name in _ENCODERS.items():
            if hasattr(base, name):
                self.wrap(base, name, self._recorder(modality, getattr(base, name)))

    def close(self) -> None:
        """Leave the model as it was."""
        self.stack.close()

    def wrap(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Put a function in front of a method of one object, until the session closes."""
        had, before = name in vars(owner), vars(owner).get(name)
        setattr(owner, name, function)
        self.stack.callback(lambda: setattr(owner, name, before) if had else delattr(owner, name))

    # what a forward is about

    def _check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("labels") is not None:
            raise NotImplementedError(
                "interventions change what the model reads, so its loss on labels is not what it says; leave "
                "the context for training"
            )
        # assisted decoding sends candidates along, the first with the prompt, and wants a logit for each
        logits = kwargs.get("logits_to_keep")
        self._drafted = logits - 1 if isinstance(logits, int) and logits > 1 else 0

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out where the images are, before the model runs."""
        kwargs = dict(zip(self._arguments, args, strict=False)) | kwargs
        ids = kwargs.get("input_ids")
        cache = cache_of(kwargs)
        if ids is None:
            raise NotImplementedError(
                "a prompt given as inputs_embeds alone does not say which tokens are images; pass input_ids "
                "and pixel values"
            )
        if cache is not None and cache.is_compileable:
            raise NotImplementedError(
                "a static cache has one length for all layers; use the default DynamicCache "
                "(no cache_implementation)"
            )
        prefill = seen_tokens(cache) == 0
        visual = torch.zeros_like(ids, dtype=torch.bool)
        for token in self.family.token_ids(self.model).values() if prefill else ():
            visual |= ids == token
        names = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
        given = any(kwargs.get(name) is not None and len(kwargs[name]) for name in names)
        if prefill and not given and bool(visual.any()):
            raise NotImplementedError(
                "the prompt has tokens for images, but no images come with it; pass the pixel values, and no "
                "prefill_chunk_size"
            )
        if given and not prefill:
            raise NotImplementedError(
                "images after the first forward on a cache (a later turn with a new image, or "
                "prefill_chunk_size): run the whole conversation as one prompt, without chunks"
            )
        mask = kwargs.get("attention_mask")
        real = torch.ones_like(visual)
        if prefill and mask is not None:
            if not torch.is_tensor(mask) or mask.ndim != 2:
                raise NotImplementedError("attention_mask must be the 2-D mask of the processor [B, L]")
            real = mask.bool()
        typed = "mm_token_type_ids" not in self._arguments or kwargs.get("mm_token_type_ids") is not None
        if not typed and prefill and bool(visual.any()) and _in_a_line(kwargs.get("position_ids"), visual):
            raise ValueError(
                f"{self.family.name} takes its positions from mm_token_type_ids; without them they are "
                "wrong. Pass all that the processor returns"
            )
        drafted, self._drafted = self._drafted, 0
        self.scope = PromptScope(self.model, self.family, ids, visual & real, real, prefill, drafted=drafted)

    def _decode(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The images are encoded by now, before or within the forward."""
        if self.scope is None:
            raise NotImplementedError("the decoder was called by itself; call the model")
        if self.scope.prefill:
            self.scope.encoded, self._encoded = self._encoded, {}
        for watch, everywhere in self._watches:
            if everywhere or not self.aside:
                watch(self.scope)

    def draft(self, tokens: int) -> None:
        """Say of the next forward that so many tokens at its end are no prompt (`PromptScope.drafted`)."""
        self._drafted = tokens

    def watch(self, function: Callable[[PromptScope], None], everywhere: bool = False) -> Callable[[], None]:
        """Call a function before each forward of the decoder, in the order of entry; returns what ends it.

        Args:
            function: gets the scope.
            everywhere: also for prompts that run beside the main one.
        """
        entry = (function, everywhere)
        self._watches.append(entry)
        return lambda: self._watches.remove(entry)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Run forwards of another prompt between those of the main one, which does not notice.

        Taps and watches that were not installed with `everywhere` are passed over meanwhile.
        """
        scope, aside, self.aside = self.scope, self.aside, True
        with own_positions(self.model), ExitStack() as stack:
            for hold in self._holds:
                stack.enter_context(hold())
            try:
                yield
            finally:
                self.scope, self.aside = scope, aside

    def hold(self, context: Callable[[], AbstractContextManager[None]]) -> Callable[[], None]:
        """Enter a context around each `beside`, such as puts state back; returns what ends it."""
        self._holds.append(context)
        return lambda: self._holds.remove(context)

    def _recorder(self, modality: str, encode: Callable[..., Any]) -> Callable[..., Any]:
        """Remember how the vision tower was called, and what its observed layers attended to."""
        signature = inspect.signature(encode)

        def record(*args: Any, **kwargs: Any) -> Any:
            if self._encoding:  # videos may be encoded as images
                return encode(*args, **kwargs)
            self._observed, self._projected = {}, None
            self._encoding = True
            try:
                output = encode(*args, **kwargs)
            finally:
                self._encoding = False
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            arguments |= arguments.pop("kwargs", {})
            self._encoded[modality] = Encoded(modality, arguments, self._observed, self._projected)
            return output

        # transformers looks at what an encoder accepts before it calls it
        record.__signature__ = signature  # type: ignore[attr-defined]
        return record

    # attention

    @contextmanager
    def tap(
        self, layer: int, function: Attend, everywhere: bool = False, outer: bool = False
    ) -> Iterator[None]:
        """Send the attention calls of a decoder layer through a function, before those tapped earlier.

        Args:
            layer: number of the decoder layer.
            function: gets the call and what continues it, gives what the kernel gives.
            everywhere: also for prompts that run beside the main one.
            outer: before all that are not, whenever these come: what changes the call, of which others read
                queries, keys and masks.
        """
        self.tap_decoder()
        functions, entry = self._taps.setdefault(layer, []), (function, everywhere, outer)
        inner = sum(not is_outer for _, _, is_outer in functions)
        functions.insert(len(functions) if outer else inner, entry)
        try:
            yield
        finally:
            functions.remove(entry)

    def tap_decoder(self) -> None:
        """Install the tap of the decoder's attention, once."""
        if "tapped" in self.shared:
            return
        self.shared["tapped"] = True
        modules = {layer.self_attn: self._through(number) for number, layer in enumerate(self.layers)}
        configs = [self.decoder.config, *(layer.self_attn.config for layer in self.layers)]
        self.stack.enter_context(tapped(modules, configs))

    def _through(self, layer: int) -> Callable[[AttentionCall], Output]:
        def attend(call: AttentionCall) -> Output:
            if self.untapped:
                return call.run()[0], None  # no weights, which transformers would collect
            run: Callable[[AttentionCall], Output] = AttentionCall.run
            for function, everywhere, _ in self._taps.get(layer, ()):
                if everywhere or not self.aside:
                    run = _chain(function, run)
            return run(call)

        return attend

    def probe(self, layer: int, hidden: Tensor, arguments: dict[str, Any]) -> AttentionCall:
        """Queries and keys that a decoder layer would make of hidden states; nothing is attended or cached.

        Args:
            layer: number of the decoder layer.
            hidden: `[B, L, C]` as it enters the layer.
            arguments: of the layer.
        """
        self.tap_decoder()
        module = self.layers[layer]
        arguments = {
            key: value
            for key, value in arguments.items()
            if key not in ("cache", "past_key_values", "use_cache")
        }
        found: list[AttentionCall] = []

        def stop(call: AttentionCall, run: Callable[[AttentionCall], Output]) -> Output:
            found.append(call)
            raise _ProbedError

        with self.tap(layer, stop, everywhere=True, outer=True):
            try:
                module.self_attn(hidden_states=module.input_layernorm(hidden), **arguments)
            except _ProbedError:
                return found[0]
        raise RuntimeError(f"layer {layer} of {self.family.name} did not call its attention kernel")

    def observe_tower(self, layer: int | None) -> int:
        """Keep queries and keys of a layer of the vision tower for each prompt, and what its projector gets.

        Args:
            layer: of the tower; None: the one whose output the model uses.

        Returns:
            the number of the layer, from 0.

        Raises:
            ValueError: for a layer that does not exist.
        """
        layers = self.family.tower_layers(self.model)
        number = self.family.feature_layer(self.model) if layer is None else layer
        if not -len(layers) <= number < len(layers):
            raise ValueError(
                f"layer {number} does not exist: the vision tower has layers 0 to {len(layers) - 1}"
            )
        number %= len(layers)
        projector = self.family.projector(self.model)
        if projector is not None and not self._observers:
            self.stack.callback(projector.register_forward_pre_hook(self._project).remove)
        if number not in self._observers:
            self._observers.add(number)
            module: Any = self.family.tower_attention(layers[number])
            every = [self.family.tower_attention(one) for one in layers]
            configs = [getattr(one, "config", None) for one in every]

            def attend(call: AttentionCall) -> Output:
                seen = self._observed.setdefault(number, [])
                seen += [(query, key, call.scale) for query, key in _apart(call)]
                return call.run()

            self.stack.enter_context(
                tapped({module: attend}, [config for config in configs if config is not None])
            )
        return number

    def _project(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._projected = args[0].detach()


def input_names(model: nn.Module) -> set[str]:
    """The arguments of a model's forward that a prompt consists of, and not how it is to be run."""
    return set(inspect.signature(model.forward).parameters) - _NOT_INPUTS


@contextmanager
def own_positions(model: Any) -> Iterator[None]:
    """Qwen models leave on themselves how far the positions of the last prompt are shifted: put it back."""
    base = model.model
    if not hasattr(base, "rope_deltas"):
        yield
        return
    before, base.rope_deltas = base.rope_deltas, None
    try:
        yield
    finally:
        base.rope_deltas = before


def session_of(model: nn.Module) -> Session | None:
    """The session that is open on a model; None where no context is."""
    return _OPEN.get(id(model))


def _in_a_line(positions: Tensor | None, visual: Tensor) -> bool:
    """Whether images have the positions of text, by default or the same in time, height and width."""
    if positions is None or positions.ndim < 3:
        return True
    places = positions[-3:].expand(3, *visual.shape)[:, visual]
    return bool((places == places[:1]).all())


def _apart(call: AttentionCall) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of a call of the vision tower; flash kernels get several pictures in one row."""
    query, key = call.query.detach(), call.key.detach()
    ends = call.arguments.get("cu_seq_lens_q")
    if ends is None:
        return [(query, key)]
    lengths = torch.as_tensor(ends).diff().tolist()
    return list(zip(query.split(lengths, 2), key.split(lengths, 2), strict=True))


class _ProbedError(Exception):
    """Queries and keys are there; the rest of the layer is not wanted."""


def _chain(function: Attend, run: Callable[[AttentionCall], Output]) -> Callable[[AttentionCall], Output]:
    return lambda call: function(call, run)


@contextmanager
def open_session(model: nn.Module) -> Iterator[Session]:
    """The session of a model: a new one, or the one that is open.

    Raises:
        ValueError: for a model of no supported family.
    """
    with _LOCK:
        session = _OPEN.get(id(model))
    if session is None:
        session = Session(model)
        try:
            session.open()
        except BaseException:
            session.close()
            raise
        with _LOCK:
            _OPEN[id(model)] = session
    session.users += 1
    try:
        yield session
    finally:
        session.users -= 1
        if not session.users:
            with _LOCK:
                _OPEN.pop(id(model), None)
            session.close()
