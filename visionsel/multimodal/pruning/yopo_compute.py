"""What Yopo changes in the layers of a decoder: windows, blind heads, and narrow feed-forward layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from visionsel.multimodal.attention import AttentionCall, Output
from visionsel.multimodal.cache import Dropped, cache_of
from visionsel.multimodal.dropping import Dropper, take
from visionsel.multimodal.scope import PromptScope
from visionsel.multimodal.session import Session

__all__ = ["Reading", "narrowed"]

_VISUAL = "visionsel_visual"  # on a cache: which tokens of its prompt are visual
Run = Callable[[AttentionCall], Output]


class Reading:
    """Where the image tokens are in each decoder layer, while a model reads and answers.

    Args:
        session: of the model.
        dropper: of the session: pruners may drop tokens before any layer.
        window: side of the windows, or None.
        forward: whether image tokens see later ones in their window.
    """

    def __init__(self, session: Session, dropper: Dropper, window: int | None, forward: bool) -> None:
        self._session, self._dropper, self._window, self._forward = session, dropper, window, forward
        self._cache: Any = None
        self._places: Tensor | None = None
        self._masks: dict[tuple[int, int], tuple[Any, Any, Tensor]] = {}

    def begin(self, scope: PromptScope) -> None:
        """A forward begins."""
        self._cache, self._places, self._masks = None, None, {}

    def see_cache(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a layer: leave with the cache what later forwards on it must know of the prompt."""
        self._cache = cache_of(kwargs)
        if self._scope.prefill and self._cache is not None:
            vars(self._cache)[_VISUAL] = self._scope.visual

    @property
    def _scope(self) -> PromptScope:
        assert self._session.scope is not None
        return self._session.scope

    def _state(self, layer: int) -> Dropped | None:
        """What was dropped before a layer."""
        if self._scope.prefill:
            assert self._dropper.record is not None
            return self._dropper.record.states[layer]
        return None if self._cache is None else getattr(self._cache.layers[layer], "dropped", None)

    def _visual(self, layer: int) -> Tensor:
        """bool `[B, m]`: which tokens of the prompt, of those that a layer has, are visual."""
        visual = self._scope.visual if self._scope.prefill else vars(self._cache).get(_VISUAL)
        if visual is None:
            raise NotImplementedError(
                "the prompt was read outside of this context, so that it does not know the image tokens in "
                "the cache; read it inside"
            )
        state = self._state(layer)
        return visual if state is None else take(visual, state.columns.to(visual.device), 1) & state.real

    def image_rows(self, layer: int) -> Callable[[], Tensor | None]:
        """Gives bool `[B, m]`, the image tokens among those that a layer works on; None if there are none."""

        def rows() -> Tensor | None:
            if self._session.untapped or not self._scope.prefill:  # a text beside, or no images in it
                return None
            visual = self._visual(layer)
            return visual if bool(visual.any()) else None

        return rows

    def attend(self, layer: int, inactive: Sequence[int]) -> Callable[[AttentionCall, Run], Output]:
        """The attention of a layer with windows, and with heads that do not see image tokens."""

        def attend(call: AttentionCall, run: Run) -> Output:
            prefill = self._scope.prefill
            if not (prefill or inactive):
                return run(call)
            visual = self._visual(layer).to(call.query.device)
            if not bool(visual.any()):
                return run(call)
            if prefill and self._window is not None:
                call = replace(call, mask=self._windowed(call, layer, visual))
            if not inactive:
                return run(call)
            copies, rest = divmod(len(call.query), len(visual))
            if rest or not copies:
                raise NotImplementedError(f"a cache of {len(visual)} rows that became {len(call.query)}")
            # rows may have been repeated after the prompt, tokens added, the last of the prompt cropped
            keys = visual.repeat_interleave(copies, 0)
            keys = pad(keys, (0, call.key.shape[2] - keys.shape[1]))
            heads = torch.zeros(call.query.shape[1], dtype=torch.bool, device=visual.device)
            heads[list(inactive)] = True
            output, weights = blinded(call, run, keys, heads)
            if prefill:
                output = output.masked_fill(visual[:, :, None, None] & heads[:, None], 0)
            return output, weights

        return attend

    def _windowed(self, call: AttentionCall, layer: int, visual: Tensor) -> Tensor:
        """The mask of a call with windows; made once for all layers with the same mask and tokens."""
        state = self._state(layer)
        key = (id(call.mask), id(state))
        if key not in self._masks:
            places = self._all_places.to(visual.device)
            if state is not None:
                places = take(places, state.columns, 1)
            mask = window_mask(call.mask, visual, places, self._window or 1, self._forward)
            self._masks[key] = (call.mask, state, mask)  # holding on to both keeps their ids theirs
        return self._masks[key][2]

    @property
    def _all_places(self) -> Tensor:
        """int64 `[B, L, 3]`: grid, row and column of each token of the prompt; -1 where it is on no grid."""
        if self._places is None:
            self._places = torch.full((*self._scope.input_ids.shape, 3), -1)
            for sample, row in enumerate(self._scope.pictures):
                views = [(picture.positions, view.index) for picture in row for view in picture.layout.views]
                for number, (positions, index) in enumerate(views):
                    cells = torch.cartesian_prod(*(torch.arange(side) for side in index.shape))
                    self._places[sample, positions[index.flatten()]] = pad(cells, (1, 0), value=number)
        return self._places


def window_mask(
    mask: Tensor | None, visual: Tensor, places: Tensor, window: int, forward: bool = False
) -> Tensor:
    """A mask in which image tokens see those image tokens only that are near them on their grid.

    Args:
        mask: bool or additive `[B or 1, 1, m, m]`; None: causal.
        visual: bool `[B, m]`: image tokens.
        places: int64 `[B, m, 3]`: grid, row and column; grid -1 for those on none, which stay as they are.
        window: side of the window, odd.
        forward: whether they also see the later ones in the window.

    Returns:
        `[B, 1, m, m]`, of the kind of `mask`.
    """
    placed = visual & (places[..., 0] >= 0)
    pairs = placed[:, :, None] & placed[:, None]
    apart = (places[:, :, None] - places[:, None]).abs()
    near = (apart[..., 0] == 0) & (apart[..., 1:].amax(-1) <= window // 2)
    far, near = (pairs & ~near)[:, None], (pairs & near)[:, None]
    if mask is None:
        size = visual.shape[1]
        mask = torch.ones(1, 1, size, size, dtype=torch.bool, device=visual.device).tril()
    if mask.ndim != 4:
        raise NotImplementedError(f"windows need a mask with 4 axes, got {mask.ndim}; use sdpa attention")
    if mask.dtype == torch.bool:
        return (mask | near if forward else mask) & ~far
    mask = mask.masked_fill(far, torch.finfo(mask.dtype).min)
    return mask.masked_fill(near, 0) if forward else mask


def blinded(call: AttentionCall, run: Run, keys: Tensor, heads: Tensor) -> Output:
    """Attention in which some heads get nothing from some keys, after the softmax.

    Args:
        call: of a layer.
        run: continues it.
        keys: bool `[B, k]`: from which.
        heads: bool `[heads]`: which; heads that share keys and values may differ.
    """
    groups = heads.view(call.key.shape[1], -1)
    silent = call.value.masked_fill(keys[:, None, :, None], 0)
    if not bool((groups.any(1) & ~groups.all(1)).any()):
        return run(replace(call, value=torch.where(groups.all(1)[:, None, None], silent, call.value)))
    config: Any = call.module.config
    if "flash" in (config._attn_implementation or ""):
        dark, weights = run(replace(call, value=silent))
        light, _ = run(call)
    else:  # one pass, the two kinds of values side by side
        output, weights = run(replace(call, value=torch.cat([call.value, silent], -1)))
        light, dark = output.chunk(2, -1)
    return torch.where(heads[:, None], dark, light), weights


@contextmanager
def narrowed(mlp: Any, ratio: float, image_rows: Callable[[], Tensor | None]) -> Iterator[None]:
    """Let a gated feed-forward layer use its first neurons only, for image tokens.

    Args:
        mlp: the layer.
        ratio: of all neurons to those used.
        image_rows: gives bool `[B, m]`, or None for none.

    Raises:
        NotImplementedError: for a layer of another kind.
    """
    parts: list[Any] = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(type(part) is nn.Linear for part in parts) or not hasattr(mlp, "act_fn"):
        raise NotImplementedError(
            "mlp_ratio needs feed-forward layers of plain linear gate_proj, up_proj and down_proj, got "
            f"{type(mlp).__name__}; use mlp_ratio=1"
        )
    gate, up, down = parts
    whole, width = mlp.forward, max(1, int(gate.out_features / ratio))

    def first(part: nn.Linear, rows: Tensor) -> Tensor:
        return linear(rows, part.weight[:width], None if part.bias is None else part.bias[:width])

    def forward(hidden: Tensor) -> Tensor:
        visual = image_rows()
        if visual is None:
            return whole(hidden)
        visual = visual.to(hidden.device)
        rows, output = hidden[visual], torch.empty_like(hidden)
        output[~visual] = whole(hidden[~visual])
        inner = mlp.act_fn(first(gate, rows)) * first(up, rows)
        output[visual] = linear(inner, down.weight[:, :width], down.bias)
        return output

    before = vars(mlp).get("forward")
    mlp.forward = forward
    try:
        yield
    finally:
        if before is None:
            del mlp.forward
        else:
            mlp.forward = before
