"""Yopo: all image tokens stay, but less is computed for them.

After Zhang et al. 2024, "Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See"
(arXiv:2410.06169): neighbour-aware visual attention, inactive visual heads, sparse feed-forward layers for
image tokens, and no visual computation in the last layers.

- The feed-forward layers really compute less, and from `layer_stop` on image tokens are really gone, from the
  cache too.
- Windows and inactive heads are exact, but by masks and zeroed values, as in the authors' code: they show
  what they cost in accuracy, and save no time.
- Nothing is trained; the authors fine-tune LLaVA for it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.multimodal.attention import AttentionCall, Output, attention_rows
from visionsel.multimodal.dropping import Arrival, Dropper, Point
from visionsel.multimodal.pruning.checks import check_layer
from visionsel.multimodal.pruning.pruner import Pruner, Stage
from visionsel.multimodal.pruning.report import Pruned
from visionsel.multimodal.pruning.yopo_compute import Reading, narrowed
from visionsel.multimodal.scope import PromptScope
from visionsel.multimodal.session import Session, open_session

__all__ = ["Yopo", "calibrate"]

_NEVER_CUT = 2  # the first layers, whose heads all stay active


@dataclass(frozen=True)
class Yopo(Pruner):
    """Less visual computation (Zhang et al. 2024). Each part can be switched off.

    Args:
        window: side of the square, in tokens, within which image tokens attend to each other; odd. Tokens of
            different grids (images, thumbnail and tiles, frames) then do not see each other; image tokens on
            no grid, such as newlines, see and are seen as before. None: no windows.
        inactive: for each decoder layer the heads that do not look at the image, see `calibrate`. What they
            attend to image tokens is zeroed after the softmax, and their output at image tokens is zero.
        mlp_ratio: image tokens use the first `1 / mlp_ratio` of the neurons of the feed-forward layers.
        layer_stop: before this decoder layer image tokens are dropped; None: never.
        fidelity: `"paper"`: windows narrow the order in which the model attends; `"code"`: as in the authors'
            code, an image token also sees the later tokens of its window.

    Raises:
        ValueError: for values out of range; at entry for layers and heads that the decoder does not have.
        NotImplementedError: at entry, for windows under flash kernels, and where `mlp_ratio` meets layers
            that are not three plain linear ones with a gate.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> from visionsel.multimodal import Yopo
        >>> with Yopo(window=5, layer_stop=3)(model) as pruned:
        ...     answer = model.generate(**inputs)
        >>> pruned.report().visual_tokens  # of each decoder layer
        (64.0, 64.0, 64.0, 0.0)
    """

    window: int | None = 7
    inactive: Mapping[int, Sequence[int]] | None = None
    mlp_ratio: float = 1.0
    layer_stop: int | None = None
    fidelity: str = "paper"

    def __post_init__(self) -> None:
        if self.window is not None and (self.window < 1 or self.window % 2 == 0):
            raise ValueError(f"window must be an odd number of tokens from 1 up, or None, got {self.window}")
        if not 1 <= self.mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio must be a number from 1 up, got {self.mlp_ratio}")
        if self.fidelity not in ("paper", "code"):
            raise ValueError(f'fidelity must be "paper" or "code", got {self.fidelity!r}')

    def stages(self, layers: int) -> list[Stage]:
        """None: no method chooses among the tokens."""
        return []

    @contextmanager
    def attach(self, session: Session) -> Iterator[Pruned]:
        """See `Intervention`; yields what `Pruned` tells, which counts tokens."""
        stop = len(session.layers)
        points = []
        if self.layer_stop is not None:
            stop = check_layer(self.layer_stop, stop, first=1)
            points = [Point(stop, _drop_all)]
        inactive = self._existing_heads(session)
        if self.window is not None and "flash" in (session.decoder.config._attn_implementation or ""):
            raise NotImplementedError(
                'flash kernels cannot mask windows; use window=None or model.set_attn_implementation("sdpa")'
            )
        if "yopo" in session.shared:
            raise ValueError("this model has a Yopo already; give one all the hyperparameters")
        with ExitStack() as stack:
            dropper = stack.enter_context(Dropper.drop(session, points))
            reading = Reading(session, dropper, self.window, self.fidelity == "code")
            session.shared["yopo"] = reading
            stack.callback(session.shared.pop, "yopo")
            stack.callback(session.watch(reading.begin, everywhere=True))
            for number, layer in enumerate(session.layers[:stop]):
                heads = inactive.get(number, [])
                if self.window is not None or heads:
                    hook = layer.register_forward_pre_hook(reading.see_cache, with_kwargs=True)
                    stack.callback(hook.remove)
                    tap = session.tap(number, reading.attend(number, heads), everywhere=True, outer=True)
                    stack.enter_context(tap)
                if self.mlp_ratio > 1:
                    stack.enter_context(narrowed(layer.mlp, self.mlp_ratio, reading.image_rows(number)))
            pruned = Pruned(session, dropper)
            try:
                yield pruned
            finally:
                pruned.finish()

    def _existing_heads(self, session: Session) -> dict[int, list[int]]:
        """The inactive heads of each layer, checked."""
        heads = session.decoder.config.num_attention_heads
        for layer, chosen in (self.inactive or {}).items():
            check_layer(layer, len(session.layers))
            if any(not 0 <= head < heads for head in chosen):
                raise ValueError(
                    f"inactive heads {list(chosen)} of layer {layer}: choose from 0 to {heads - 1}"
                )
        return {layer: list(chosen) for layer, chosen in (self.inactive or {}).items()}


def _drop_all(arrival: Arrival) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(arrival.visual), arrival.hidden


@torch.no_grad()
def calibrate(
    model: nn.Module,
    samples: Iterable[Mapping[str, Any]],
    threshold: float = 0.2,
    votes: float = 0.4,
    **options: Any,
) -> Yopo:
    """Find the inactive visual heads of a model.

    In a sample a head is active when the text after the image attends, in sum, more than `threshold` times
    as much to the image as to the rest. A head that is active in no more than the share `votes` of the
    samples is inactive. Heads of the layers 0 and 1 stay active. The rows are computed from queries and
    keys, whatever the kernel is.

    Args:
        model: a supported vision-language model.
        samples: inputs of the model, prompts with images, as the processor makes them; each row of a batch is
            one sample. The authors take 100.
        threshold: the authors take 0.2, 0.077 and 0.035 for LLaVA-1.5-13B.
        votes: share of the samples.
        options: other arguments of `Yopo`.

    Raises:
        ValueError: for values out of range, and without samples.
    """
    if not 0 <= threshold < math.inf or not 0 <= votes < 1:
        raise ValueError(f"threshold must be at least 0 and votes in [0, 1), got {threshold} and {votes}")
    with open_session(model) as session, ExitStack() as stack:
        active: dict[int, Tensor] = {}

        def count(layer: int) -> Callable[[AttentionCall, Callable[[AttentionCall], Output]], Output]:
            def watch(call: AttentionCall, run: Callable[[AttentionCall], Output]) -> Output:
                assert session.scope is not None
                image, rest = _image_and_rest(call, session.scope)
                active[layer] = active.get(layer, 0) + (image > threshold * rest).sum(0).cpu()
                return run(call)

            return watch

        for layer in range(_NEVER_CUT, len(session.layers)):
            stack.enter_context(session.tap(layer, count(layer)))
        number = 0
        base: Any = model.model
        for sample in samples:
            base(**sample, use_cache=False)
            number += len(sample["input_ids"])
    if not number:
        raise ValueError("no samples: give prompts with images, as the processor makes them")
    cut = {layer: (found <= votes * number).nonzero()[:, 0].tolist() for layer, found in active.items()}
    return Yopo(inactive={layer: heads for layer, heads in cut.items() if heads}, **options)


def _image_and_rest(call: AttentionCall, scope: PromptScope) -> tuple[Tensor, Tensor]:
    """`[B, heads]` each: attention of the text after the image, to the image and to the rest."""
    device = call.query.device
    visual, text = scope.visual.to(device), scope.text("after").to(device)
    number = text.sum(1)
    rows = (~text).to(torch.int8).argsort(dim=1, stable=True)[:, : max(1, int(number.amax()))]
    there = torch.arange(rows.shape[1], device=device) < number[:, None]
    received = (attention_rows(call, rows) * there[:, None, :, None]).sum(2)
    image = (received * visual[:, None]).sum(2)
    return image, (received * ~visual[:, None]).sum(2)
