"""The same prompt without its images, run beside the model, layer by layer.

What a head says because of the image is what it says less what it would say without. The tokens of the text
are packed together, as if the images had never been in the prompt, and take the positions that they then
have. Their way through the decoder is kept in step with the model's: when the model is in a layer, `advance`
brings the text to the same place. So a method can change both, and see both, in one forward; nothing is
cached, and the batch that other interventions see is the model's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.multimodal.dropping import take
from visionsel.multimodal.session import Session

__all__ = ["ImageFree", "divergence", "local_places"]


class ImageFree:
    """The text of one prompt on its way through the decoder.

    Attributes:
        columns: int64 `[B, T]`: the places of the text tokens in the prompt, to the right; what fills up a
            shorter row stands on the left.
        real: bool `[B, T]`: False for what fills up.
    """

    def __init__(self, session: Session, arguments: dict[str, Any]) -> None:
        """Prepare the text of the prompt that runs.

        Args:
            session: whose scope is that of a prompt.
            arguments: of the decoder, by name.

        Raises:
            ValueError: for a prompt that is nothing but images.
        """
        scope = session.scope
        assert scope is not None
        embeddings: Tensor = arguments["inputs_embeds"]
        text = scope.text("all").to(embeddings.device)
        numbers = text.sum(1)
        if not bool(numbers.all()):
            raise ValueError("a prompt of images alone leaves nothing without them; add some text")
        self.session = session
        self.columns = text.to(torch.int8).argsort(dim=1, stable=True)[:, -int(numbers.amax()) :]
        self.real = text.gather(1, self.columns)
        self._layer = 0
        with torch.no_grad():
            self._hidden, self._arguments = self._prepare(take(embeddings, self.columns, 1), arguments)

    def advance(self, layer: int) -> None:
        """Run all layers up to this one, and this one too, without the hooks of the layers themselves."""
        session = self.session
        assert not session.untapped
        session.untapped = True
        try:
            with torch.no_grad():
                while self._layer <= layer:
                    module: nn.Module = session.layers[self._layer]
                    # its hooks are for the tokens of the model: pruners gather there
                    self._hidden = module.forward(self._hidden, **self._arguments[self._layer])
                    self._layer += 1
        finally:
            session.untapped = False

    def beside(self, layer: int, outputs: Tensor) -> Tensor:
        """What the model has at the tokens of the text.

        Args:
            layer: where the model is.
            outputs: `[B, m, ...]` of the tokens that are there.

        Returns:
            `[B, T, ...]`.
        """
        return take(outputs, local_places(self.session, layer, self.columns).to(outputs.device), 1)

    def _prepare(self, hidden: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, list[dict[str, Any]]]:
        """What the decoder gives to its first layer, and to each of them beside hidden states."""
        given: list[tuple[Tensor, dict[str, Any]]] = []
        positions = (self.real.cumsum(1) - 1).clamp(min=0)
        decoder = self.session.decoder
        with _layers_noted(decoder, self.session.layers, given):
            decoder.forward(
                inputs_embeds=hidden,
                attention_mask=self._mask(arguments.get("attention_mask")),
                position_ids=positions,
                use_cache=False,
            )
        return given[0][0], [arguments for _, arguments in given]

    def _mask(self, mask: Any) -> Any:
        """For the decoder: which tokens are real, or all that is known of who sees whom."""
        if self.session.family.name != "PaliGemma":
            return self.real.to(torch.int64)
        # the model hands masks on in which a prompt sees itself in both directions
        if isinstance(mask, dict):
            return {kind: self._mask(one) for kind, one in mask.items()}
        if mask is None or mask.ndim != 4:
            return self.real.to(torch.int64)
        mask = take(take(mask, self.columns, 2), self.columns, 3)
        hidden = ~self.real.to(mask.device)[:, None, None]
        itself = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
        if mask.dtype == torch.bool:
            return (mask & ~hidden) | (itself & hidden)
        return mask.masked_fill(hidden & ~itself, torch.finfo(mask.dtype).min)


def divergence(with_image: Tensor, without_image: Tensor) -> Tensor:
    """How much what heads say depends on the image: VHD (He et al. 2024, eq. 4).

    Args:
        with_image: `[..., heads, D]`: outputs of the heads, before the output projection.
        without_image: the same for the prompt without its images.

    Returns:
        `[..., heads]`, float32 (float64 where the outputs are): Euclidean distances.
    """
    wide = torch.promote_types(with_image.dtype, torch.float32)
    return torch.linalg.vector_norm(with_image.to(wide) - without_image.to(wide), dim=-1)


def local_places(session: Session, layer: int, columns: Tensor) -> Tensor:
    """Where tokens of the prompt, none of them dropped, are among those that a layer has.

    Args:
        session: in whose prompt a pruner may have dropped others.
        layer: number of the decoder layer.
        columns: int64 `[B, T]` places in the prompt.

    Returns:
        int64 `[B, T]`.
    """
    dropper = session.shared.get("dropper")
    state = None if dropper is None or dropper.record is None else dropper.record.states[layer]
    if state is None:
        return columns
    places = torch.arange(state.columns.shape[1], device=state.columns.device).expand_as(state.columns)
    table = torch.zeros(len(columns), state.length, dtype=torch.int64, device=places.device)
    return table.scatter(1, state.columns, places).gather(1, columns.to(places.device))


class _Note:
    """Stands for a decoder layer: notes what it is given, and gives the hidden states back."""

    def __init__(self, layer: Any, given: list[tuple[Tensor, dict[str, Any]]]) -> None:
        self._layer, self._given = layer, given

    def __call__(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self._given.append((hidden_states, arguments))
        return hidden_states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


@contextmanager
def _layers_noted(
    decoder: Any, layers: list[Any], given: list[tuple[Tensor, dict[str, Any]]]
) -> Iterator[None]:
    """Let the decoder call notes instead of its layers; the modules it holds stay where they are."""
    vars(decoder)["layers"] = [_Note(layer, given) for layer in layers]
    try:
        yield
    finally:
        del vars(decoder)["layers"]
