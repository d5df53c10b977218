"""SD-RPN's head: where the model should look closer, told in the middle of its depth, before it answers.

Shi et al. 2025, "Catching the Details: Self-Distilled RoI Predictors for Fine-Grained MLLM Perception", ICLR
2026, arXiv:2509.16944. The language model is frozen and runs up to layer B. Copies of its next R layers go on
from there, and are trained: the last of them only makes queries and keys, without positions, and the map is
that of the last token of the question over the image tokens, the mean over heads. The targets are the
model's own attention, made clean (`roi_labels.py`); what the map is good for is in `roi_regions.py`.

The release has one more norm before the last copy; it is left out here, so that an untrained head computes
what the model computes.
"""

import copy
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from visionsel.files import whole_file, write_json
from visionsel.multimodal.attention import AttentionCall, Output, tapped
from visionsel.multimodal.families import find_family
from visionsel.multimodal.grounding.replay import Replay
from visionsel.multimodal.head_presets import describe_model, written_out
from visionsel.multimodal.session import open_session, session_of

__all__ = ["RoIHead", "read_prompt"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_CACHE = ("cache", "past_key_values", "use_cache")
_UNUSED = ("v_proj.", "o_proj.")  # of the last copy, whose attention is only asked for queries and keys


class RoIHead(nn.Module):
    """Copies of some decoder layers of a frozen model, and the map that they make.

    Args:
        model: a vision-language model of transformers with no context open on it. Its layers are copied, in
            their precision; the model itself is no part of the head and is not changed.
        start: B, the number of the first layer that is copied; None: at 15/32 of the depth, which is layer 15
            of the 32 of LLaVA-1.5-7B, as in the paper.
        number: R, how many layers are copied; 3 in the paper.

    Attributes:
        layers: the copies that run whole, R - 1 of them.
        norm, attention: of the last copy; its value and output projections are not trained.

    Raises:
        ValueError: for layers that there are not, or a model on which a context is open.
        NotImplementedError: when the layers get different masks and positions (sliding windows beside full
            attention: Gemma 3), or image features are added between them (DeepStack: Qwen3-VL, above its
            first layers this is over).
    """

    def __init__(self, model: nn.Module, start: int | None = None, number: int = 3) -> None:
        super().__init__()
        decoder = cast(Any, find_family(model).decoder(model))
        layers = list(decoder.layers)
        if number < 1 or number > len(layers):
            raise ValueError(f"number must be in 1 to {len(layers)}, as many layers there are; got {number}")
        if start is None:
            start = min(len(layers) * 15 // 32, len(layers) - number)
        if not 0 <= start <= len(layers) - number:
            raise ValueError(
                f"{number} layers from layer {start} on are not there: the decoder has layers 0 to "
                f"{len(layers) - 1}"
            )
        if session_of(model) is not None:
            raise ValueError(
                "a context is open on this model, and its hooks would be copied; make the head before"
            )
        self.start, self.number = start, number
        _check_alike(model, decoder.config, start, number)
        copies = [_copied(layer) for layer in layers[start : start + number]]
        self.layers = nn.ModuleList(copies[:-1])
        self.norm: nn.Module = copies[-1].input_layernorm
        self.attention: nn.Module = copies[-1].self_attn
        self.requires_grad_(True)
        for name, parameter in self.attention.named_parameters():
            parameter.requires_grad_(not name.startswith(_UNUSED))
        self.train()  # the model may be in evaluation mode
        self.about = describe_model(model)
        names = {id(module): name for name, module in model.named_modules()}
        self.modules_copied = [names[id(layer)] for layer in layers[start : start + number]]

    def forward(self, replay: Replay) -> Tensor:
        """The map of each prompt; what was answered does not matter, for the last question token is read.

        Args:
            replay: of prompts with any answers; `read_prompt` makes one without.

        Returns:
            float32 logits `[B, n]` in the order of `replay.image`, 0 where that is -1. They have gradients
            of the head's parameters where gradients are on; the frozen model has none.

        Raises:
            ValueError: for another model than the head was made of, or a prompt without images.
            NotImplementedError: for several answers of a prompt, or inside the context of a pruner.
        """
        hidden, arguments = self.enter(replay)
        hidden, arguments = self.go_on(hidden, arguments)
        query, key, scale = self.queries_and_keys(hidden, arguments)
        places = replay.image.to(key.device)
        rows = replay.rows[:, :1].to(query.device)
        query = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        index = places.clamp(min=0)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        key = key.gather(2, index)
        query = query.unflatten(1, (key.shape[1], -1))[:, :, :, 0]  # [B, kv heads, group, head dim]
        logits = torch.einsum("bkgd,bknd->bkgn", query.float(), key.float()) * scale
        return logits.mean((1, 2)).masked_fill(places < 0, 0)

    def enter(self, replay: Replay) -> tuple[Tensor, dict[str, Any]]:
        """Run the frozen model below the copied layers.

        Args:
            replay: see `forward`; its scope is set.

        Returns:
            hidden states `[B, L + T, C]` as they enter layer `start`, and the layer's other arguments: masks
            and positions as the model makes them.
        """
        model = replay.model
        if (here := describe_model(model)) != self.about:
            raise ValueError(
                f"this head was made of {written_out(self.about)}; the model is {written_out(here)}"
            )
        if replay.copies != 1:
            raise NotImplementedError(
                "a prompt with several answers: the head reads prompts, give one answer"
            )
        if not replay.image.shape[1]:
            raise ValueError("the prompts have no tokens of images, so there is no map to make")
        seen: list[tuple[Tensor, dict[str, Any]]] = []
        with open_session(model) as session:
            layer = session.layers[self.start]
            names = list(inspect.signature(layer.forward).parameters)

            def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if session.aside:  # another prompt, that a modulator runs
                    return
                given = dict(zip(names, args, strict=False)) | kwargs
                seen.append((given.pop("hidden_states"), given))
                raise _EnteredError

            handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
            try:
                replay.run()
            except _EnteredError:
                replay.scope = session.scope
            finally:
                handle.remove()
        hidden, arguments = seen[0]
        kept = {name: value for name, value in arguments.items() if name not in _CACHE}
        return hidden, kept

    def go_on(self, hidden: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Run the copies that run whole, in the precision and on the device of the head.

        Returns:
            hidden states as they enter the last copy, and the arguments in that precision.
        """
        weight = next(self.attention.parameters())
        hidden = hidden.to(weight)
        arguments = {name: _like(value, weight) for name, value in arguments.items()}
        for layer in self.layers:
            output = layer(hidden, **arguments)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden, arguments

    def queries_and_keys(
        self, hidden: Tensor, arguments: dict[str, Any], positions: bool = False
    ) -> tuple[Tensor, Tensor, float]:
        """What the last copy makes of hidden states.

        Args:
            hidden, arguments: of `go_on`.
            positions: with the rotary positions that the layer would apply; the head reads them without.

        Returns:
            `[B, heads, L + T, head_dim]`, `[B, kv_heads, L + T, head_dim]`, and what logits are multiplied
            with.
        """
        if not positions:
            cos, sin = arguments["position_embeddings"]
            unturned = torch.ones_like(cos), torch.zeros_like(sin)
            arguments = {**arguments, "position_embeddings": unturned}
        found: list[AttentionCall] = []

        def stop(call: AttentionCall) -> Output:
            found.append(call)
            raise _EnteredError

        attention: Any = self.attention
        with tapped({attention: stop}, [attention.config]), suppress(_EnteredError):
            attention(hidden_states=self.norm(hidden), **arguments)
        return found[0].query, found[0].key, found[0].scale

    def save(self, folder: str | Path) -> Path:
        """Write what was trained, and which layers of which model it came from; returns the folder."""
        from safetensors.torch import save_file

        folder = Path(folder)
        state = {name: value.detach().cpu().contiguous() for name, value in self._trained().items()}
        with whole_file(folder / WEIGHTS) as partial:
            save_file(state, partial, metadata={"format": "pt"})
            partial.chmod(0o644)  # safetensors makes it private
        content = {
            "model": self.about,
            "start": self.start,
            "number": self.number,
            "copied": self.modules_copied,
        }
        write_json(content, folder / CONFIG)
        return folder

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> Self:
        """The head that `save` wrote, for the model that it was made of, in evaluation mode.

        Raises:
            FileNotFoundError: when a file is missing.
            ValueError: for broken files, or a head of another model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"no {name} in {folder}: not a folder of RoIHead; train one with train.grounding_roi"
                )
        try:
            content = json.loads((folder / CONFIG).read_text())
            about, copied = dict(content["model"]), list(content["copied"])
            start, number = int(content["start"]), int(content["number"])
            state = load_file(folder / WEIGHTS)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} holds no RoIHead, or its files are broken: {error}") from error
        if about != (here := describe_model(model)):
            raise ValueError(
                f"the head in {folder} was made of {written_out(about)}; this is {written_out(here)}"
            )
        head = cls(model, start, number)
        if copied != head.modules_copied:
            raise ValueError(
                f"the head in {folder} was made of the layers {', '.join(copied)}; here they are "
                f"{', '.join(head.modules_copied)}"
            )
        own = head._trained()
        if state.keys() != own.keys() or any(state[name].shape != own[name].shape for name in own):
            raise ValueError(f"the weights in {folder} are not those of {number} layers of this model")
        for name, value in state.items():
            own[name].data.copy_(value)
        return head.eval()

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.named_parameters() if value.requires_grad}


def read_prompt(model: nn.Module, inputs: Mapping[str, Any]) -> Replay:
    """Prompts that nothing was answered to yet, ready to be read.

    Args:
        model: a vision-language model of transformers.
        inputs: all that the processor returned, left padded.
    """
    # any token will do for an answer: the prompt does not see it
    return Replay(model, inputs, inputs["input_ids"][:, -1:])


class _EnteredError(Exception):
    """What was wanted of a forward is there; the rest of it is not run."""


def _check_alike(model: nn.Module, config: Any, start: int, number: int) -> None:
    """Refuse layers that are not all called with the same arguments.

    Raises:
        NotImplementedError: for them.
    """
    kinds = set(
        (getattr(config, "layer_types", None) or ["alike"] * (start + number))[start : start + number]
    )
    if len(kinds) > 1:
        raise NotImplementedError(
            f"layers {start} to {start + number - 1} are of different kinds ({', '.join(sorted(kinds))}), "
            "with masks and positions of their own; choose start and number so that they are alike"
        )
    vision: Any = getattr(cast(Any, model).config, "vision_config", None)
    added = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    if start < added:
        raise NotImplementedError(
            f"this model adds image features behind its first {added} layers; choose start from {added} up"
        )


def _copied(layer: nn.Module) -> Any:
    """A copy that shares configurations with the model, so that it follows its attention kernel."""
    shared: Iterator[Any] = (vars(module).get("config") for module in layer.modules())
    memo: dict[int, Any] = {id(config): config for config in shared if config is not None}
    return copy.deepcopy(layer, memo)


def _like(value: Any, weight: Tensor) -> Any:
    """Tensors on the device of a weight, floating ones in its precision, also in tuples."""
    if isinstance(value, Tensor):
        return value.to(weight) if value.is_floating_point() else value.to(weight.device)
    return tuple(_like(one, weight) for one in value) if isinstance(value, tuple) else value
