"""Vision-aware head reinforcement (He et al. 2024, arXiv 2412.13949).

The divergence of a head is how far its output at the last token moves when the images are taken out of the
prompt (eq. 4). In each chosen layer the heads above the median (eq. 7) are multiplied by `alpha`; before,
outliers are set to zero (eq. 6): heads that diverge because they are louder without the image. It goes layer
by layer: the divergence of a layer is measured where the layers before are reinforced already. Heads are
found for each sample when its prompt is read, and kept while it is continued.

Where the paper is silent: sigma in eq. 6 is that of a sample (divided by heads - 1), and the median of an
even number of heads is the lower one, so that without ties half of them are reinforced. The prompt without
images runs beside the model in the same forward, see `visionsel.multimodal.modulation.image_free`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.multimodal.cache import cache_of
from visionsel.multimodal.intervention import Intervention
from visionsel.multimodal.modulation.heads import check_layers, head_hook, head_shape
from visionsel.multimodal.modulation.image_free import ImageFree, divergence, local_places
from visionsel.multimodal.session import Session

__all__ = ["VHR", "Reinforced", "select", "t_vhd"]


@dataclass(frozen=True)
class VHR(Intervention):
    """Heads that look at the image are strengthened.

    Without a KV cache (`use_cache=False`) each forward is a prompt of its own, and finds heads anew.

    Attributes:
        alpha: what the output of a chosen head is multiplied by; the authors' is 2.
        layers: decoder layers, from 0; None: layer 1 and the last 14, the authors' for LLaVA-1.5. They warn
            that layer 1 does not help every model: name the layers to leave it out.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import VHR
        >>> with VHR(alpha=2.0, layers=(1, 2, 3))(model) as vhr:
        ...     answer = model.generate(**inputs)
        >>> vhr.heads[3].shape
        torch.Size([1, 4])
    """

    alpha: float = 2.0
    layers: Sequence[int] | None = None

    @contextmanager
    def attach(self, session: Session) -> Iterator["Reinforced"]:
        """See `Intervention`; yields the heads.

        Raises:
            ValueError: for layers that do not exist, an `alpha` that is no positive number, or a second one
                on the same model.
        """
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha must be a positive number, got {self.alpha!r}; 1 changes nothing")
        number = len(session.layers)
        chosen = {1, *range(max(0, number - 14), number)} if self.layers is None else self.layers
        layers = check_layers(chosen, session)
        if session.shared.get("vhr"):
            raise ValueError("VHR is on this model already: the heads of one are measured without another")
        session.tap_decoder()
        session.shared["vhr"] = True
        reinforced = Reinforced(session, self.alpha, layers)
        try:
            with ExitStack() as stack:
                reinforced._install(stack)
                yield reinforced
        finally:
            del session.shared["vhr"]


class Reinforced:
    """What VHR did to the last prompt.

    Attributes:
        heads: for each layer bool `[B, heads]`: the reinforced heads; none in rows without an image. With
            beams `B` counts them. A second view of two-view decoding has heads of its own, not told here.
        divergence: for each layer `[B, heads]` (eq. 4), outliers as they are.
    """

    def __init__(self, session: Session, alpha: float, layers: list[int]) -> None:
        self.heads: dict[int, Tensor] = {}
        self.divergence: dict[int, Tensor] = {}
        self._session, self._alpha, self._layers = session, alpha, layers
        self._text: ImageFree | None = None
        self._with_image: Tensor | None = None
        self._found: dict[int, Tensor] = {}  # heads of the prompt that runs, and divergences of its layers
        self._apart: dict[int, Tensor] = {}
        self._current: Mapping[int, Tensor] | None = None  # heads of the forward that runs, if it has any

    def _install(self, stack: ExitStack) -> None:
        decoder = self._session.decoder
        stack.callback(self._forget)
        stack.callback(decoder.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        stack.callback(decoder.register_forward_hook(self._end, with_kwargs=True).remove)
        for layer in self._layers:
            stack.enter_context(head_hook(self._session, layer, partial(self._factors, layer), first=True))

    def _forget(self) -> None:
        self._text = self._with_image = self._current = None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scope = self._session.scope
        assert scope is not None
        self._forget()
        if not scope.prefill:
            self._current = self._remembered(cache_of(kwargs), len(scope.input_ids))
            return
        none = torch.zeros(len(scope.input_ids), head_shape(self._session)[1], dtype=torch.bool)
        self._found, self._apart = dict.fromkeys(self._layers, none), {}
        if not self._session.aside:
            self.heads, self.divergence = self._found, self._apart
        if bool(scope.visual.any()):
            self._text = ImageFree(self._session, kwargs)
            self._current = self._found

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        scope = self._session.scope
        if scope is not None and scope.prefill:
            cache: Any = cache_of(kwargs)
            if cache is None:
                cache = cache_of(output) if hasattr(output, "keys") else None
            if cache is not None:
                # on the cache as what was dropped is: each continues with its own, and so do copies
                cache.reinforced_heads = self._found
        self._forget()

    def _remembered(self, cache: Any, rows: int) -> dict[int, Tensor] | None:
        """The heads that the prompt in a cache was read with; beams may have come since."""
        heads: dict[int, Tensor] = getattr(cache, "reinforced_heads", {})
        if not set(self._layers) <= set(heads):
            raise RuntimeError(
                "the prompt in this cache was read without this VHR, so the heads to reinforce are not "
                "known; read the prompt within the context"
            )
        known = len(heads[self._layers[0]])
        if rows % known:
            raise RuntimeError(
                f"the prompt in this cache had {known} rows, this forward has {rows}: which row continues "
                "which is not known; read the prompts together that are continued together"
            )
        if not any(bool(one.any()) for one in heads.values()):
            return None
        return {layer: heads[layer].repeat_interleave(rows // known, 0) for layer in self._layers}

    def _factors(self, layer: int, outputs: Tensor) -> Tensor | None:
        """Called in a layer by the model; and within that once more, by the prompt without images."""
        if self._current is None:
            return None
        if self._session.untapped:
            self._choose(layer, outputs[:, -1])
        elif self._text is not None:
            assert self._session.scope is not None
            last = local_places(self._session, layer, self._session.scope.last[:, None]).to(outputs.device)
            self._with_image = outputs.detach()[torch.arange(len(outputs), device=last.device), last[:, 0]]
            self._text.advance(layer)
        chosen = self._current[layer].to(outputs.device)[:, None, :, None]
        return torch.ones_like(chosen, dtype=outputs.dtype).masked_fill(chosen, self._alpha)

    def _choose(self, layer: int, without_image: Tensor) -> None:
        assert self._session.scope is not None
        assert self._with_image is not None
        seeing = self._session.scope.visual.any(1, keepdim=True).to(without_image.device)
        self._found[layer] = select(self._with_image, without_image) & seeing
        self._apart[layer] = divergence(self._with_image, without_image)


def select(with_image: Tensor, without_image: Tensor) -> Tensor:
    """The heads to reinforce (He et al. 2024, eq. 4, 6, 7).

    Args:
        with_image: `[B, heads, D]`: outputs of the heads at the last token, before the output projection.
        without_image: the same for the prompt without its images.

    Returns:
        bool `[B, heads]`: heads whose divergence is above the lower median. An outlier counts as 0: its
        divergence, and the square of its length without the image, are both above mean + sigma of its layer,
        with the sigma of a sample.

    Raises:
        ValueError: for other shapes, or values that are not finite.
    """
    if with_image.ndim != 3 or with_image.shape != without_image.shape:
        raise ValueError(
            "outputs with and without the image are [B, heads, D] both, got "
            f"{list(with_image.shape)} and {list(without_image.shape)}"
        )
    found = divergence(with_image, without_image)
    loud = without_image.to(found.dtype).square().sum(-1)
    if not bool(torch.isfinite(found).all() & torch.isfinite(loud).all()):
        raise ValueError("outputs of heads have NaN or infinite values; run the model in a wider type")
    outlier = _above_sigma(found) & _above_sigma(loud)
    found = found.masked_fill(outlier, 0)
    return found > found.median(-1, keepdim=True).values


def _above_sigma(values: Tensor) -> Tensor:
    """Which values `[B, heads]` are above the mean of their row by more than sigma."""
    off = values - values.mean(-1, keepdim=True)
    sigma = (off.square().sum(-1, keepdim=True) / max(1, values.shape[-1] - 1)).sqrt()
    return off > sigma


def t_vhd(divergences: Mapping[int, Tensor] | Sequence[Tensor], k: int) -> Tensor:
    """How much a token depends on the image: T-VHD (He et al. 2024, eq. 5). It is low for invented words.

    Args:
        divergences: for each layer `[..., heads]`: `Reinforced.divergence`, for the first token after the
            prompt, or what `visual_sensitivity` gives, for all.
        k: how many heads of a layer count, the highest ones; the paper does not say how many it takes.

    Returns:
        `[...]`: sums over heads and layers.

    Raises:
        ValueError: for a `k` below 1 or above the number of heads, or without layers.
    """
    layers = list(divergences.values()) if isinstance(divergences, Mapping) else list(divergences)
    if not layers:
        raise ValueError("no layer has a divergence: was a prompt with an image read?")
    heads = layers[0].shape[-1]
    if not 1 <= k <= heads:
        raise ValueError(f"k must be from 1 to {heads}, the heads of a layer; got {k}")
    return torch.stack([one.topk(k, -1).values.sum(-1) for one in layers]).sum(0)
