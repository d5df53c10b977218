"""What dropping tokens must equal, said plainly: the whole prompt runs, and nobody sees the dropped ones.

Nothing here is shared with `visionsel.multimodal`, and nothing is dropped: masks get more closed columns.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.multimodal.tiny import IMAGE, VIDEO

Merge = Callable[[Tensor, Tensor], Tensor]
SCORES = torch.rand(4096, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def visual_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """bool `[B, L]`: tokens that stand for images and videos."""
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


def chosen(inputs: Mapping[str, Any], stages: Mapping[int, Sequence[float]]) -> dict[int, Tensor]:
    """Which tokens are there from each stage on, when the ones with the highest `SCORES` stay.

    Args:
        inputs: of the model.
        stages: for each layer, what part of the tokens still there stays, by sample (cyclically).

    Returns:
        for each layer bool `[B, L]`: False for dropped tokens alone, True for text and padding.
    """
    visual = visual_tokens(inputs)
    keep = {layer: torch.ones_like(visual) for layer in stages}
    for row in range(len(visual)):
        places = visual[row].nonzero()[:, 0].tolist()
        alive = list(range(len(places)))
        for layer in sorted(stages):
            ratio = stages[layer][row % len(stages[layer])]
            number = max(1, round(ratio * len(alive))) if alive else 0
            alive = sorted(alive, key=lambda token: -float(SCORES[token]))[:number]
            for token, place in enumerate(places):
                keep[layer][row, place] = token in alive
    return keep


def merged(hidden: Tensor, keep: Tensor, alive: Tensor) -> Tensor:
    """A kept token becomes the mean of itself and the tokens that go behind it, up to the next kept one.

    Args:
        hidden: `[B, L, C]`.
        keep: bool `[B, L]`: visual tokens that stay.
        alive: bool `[B, L]`: visual tokens that are there.
    """
    out = hidden.clone()
    for row in range(len(hidden)):
        places = alive[row].nonzero()[:, 0].tolist()
        for number, place in enumerate(places):
            if keep[row, place]:
                group = [place]
                for follower in places[number + 1 :]:
                    if keep[row, follower]:
                        break
                    group.append(follower)
                out[row, place] = hidden[row, group].mean(0)
    return out


class MaskOracle:
    """A context in which the columns of dropped tokens are closed in every layer from a stage on.

    Args:
        model: to run.
        keep: for each stage bool `[B, L]`, False for tokens that are gone from this layer on, for good. If
            the model runs more rows than `B`, each sample is repeated in turn.
        merge: for a stage, what becomes of the hidden states `[B, L, C]` that enter it.
    """

    def __init__(
        self,
        model: Any,
        keep: Mapping[int, Tensor],
        merge: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        decoder = getattr(model.model, "language_model", None)
        self.decoder = model.model.text_model if decoder is None else decoder
        self.keep, self.merge = keep, merge or {}
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for number, layer in enumerate(self.decoder.layers):
            if number >= min(self.keep):
                hook = layer.register_forward_pre_hook(self._before(number), with_kwargs=True)
                self.handles.append(hook)

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, number: int) -> Callable[..., Any]:
        stage = max(layer for layer in self.keep if layer <= number)

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            cache = kwargs.get("cache")
            cache = kwargs.get("past_key_values") if cache is None else cache
            past = 0 if cache is None else int(cache.get_seq_length(number))
            if past == 0 and number in self.merge:
                hidden = self.merge[number](hidden)
            mask = self._mask(self.keep[stage], kwargs["attention_mask"], hidden, past)
            arguments = {**kwargs, "attention_mask": mask}
            return ((hidden, *args[1:]), arguments) if args else ((), {**arguments, "hidden_states": hidden})

        return hook

    def _mask(self, keep: Tensor, mask: Tensor | None, hidden: Tensor, past: int) -> Tensor:
        rows, queries = hidden.shape[:2]
        total = past + queries
        if mask is None:
            mask = torch.ones(queries, total, dtype=torch.bool, device=hidden.device).tril(past)[None, None]
            if self.decoder.config._attn_implementation == "eager":
                lowest = torch.finfo(hidden.dtype).min
                mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, lowest)
        assert mask.shape[-2:] == (queries, total), "masks are over the whole prompt and what follows"
        keep = keep.repeat_interleave(rows // len(keep), 0)
        gone = ~torch.cat([keep, keep.new_ones(rows, total - keep.shape[1])], 1)[:, None, None]
        # a dropped token looks at itself, so that its row is not empty; nobody sees what comes of it
        itself = torch.eye(total, dtype=torch.bool, device=gone.device)[past:]
        mask = mask.expand(rows, -1, -1, -1)
        if mask.dtype == torch.bool:
            return (mask & ~gone) | (itself & gone)
        return mask.masked_fill(gone & ~itself, torch.finfo(mask.dtype).min).masked_fill(gone & itself, 0)
