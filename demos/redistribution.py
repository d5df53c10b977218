"""What a remedy changes about where the model looks: attention to the image, without it and with it.

The same text is read both times, the answer without any remedy, so that what differs comes from the remedy.
Remedies that move attention and those that strengthen heads are told in one measure: of what all heads read,
each counted as much as it is strengthened, the part that comes from each image token.
"""

import base64
import html
import io
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from demos.models import Models
from visionsel.multimodal.attention import AttentionCall, Output, explicit_attention
from visionsel.multimodal.grounding import TokenGrid
from visionsel.multimodal.grounding.replay import Replay
from visionsel.multimodal.modulation.heads import output_projection
from visionsel.multimodal.session import Session, open_session
from visionsel.viz import CHANGE, HEAT, overlay_heatmap

__all__ = ["Gaze", "draw_gazes", "measure_gaze"]

SIDE = 192  # pixels of the longer side of a picture


@dataclass(frozen=True, eq=False)
class Gaze:
    """Where the model looks while it says something.

    Attributes:
        tokens: float64 `[n]`: for each image token its part of all that is read, in the mean over the tokens
            that are said, the layers and the heads.
        grid: where the tokens are in the image.
    """

    tokens: Tensor
    grid: TokenGrid

    @property
    def share(self) -> float:
        """The part that comes from the image."""
        return float(self.tokens.sum())


@torch.inference_mode()
def measure_gaze(
    models: Models, image: Image.Image, inputs: Mapping[str, Any], tokens: Tensor, remedy: Any = None
) -> Gaze:
    """Read a prompt and its answer under a remedy.

    Args:
        models: the model that reads.
        image: of the prompt.
        inputs: of the prompt, as the processor gives them; one sample.
        tokens: int64 `[1, T]`: the answer.
        remedy: an `Intervention`; None: the model as it is.
    """
    replay = Replay(models.model, inputs, tokens)
    rows, seen = replay.rows[0][replay.valid[0]], replay.image[0]
    read: list[Tensor] = []  # of each layer [t, n]
    with ExitStack() as stack:
        if remedy is not None:
            stack.enter_context(remedy(models.model))
        session = stack.enter_context(open_session(models.model))
        for number in range(len(session.layers)):
            watch = _Layer(session, number, rows, seen, read)
            stack.enter_context(session.tap(number, watch.attend, outer=True))
            projection = output_projection(session.layers[number])
            # the remedies' own hooks are between the two
            for hook, first in ((watch.before, True), (watch.after, False)):
                stack.callback(projection.register_forward_pre_hook(hook, prepend=first).remove)
        replay.run()
    size = (image.height, image.width)
    grid = TokenGrid.from_inputs(models.model, models.processor, inputs, size)
    return Gaze(torch.stack(read).mean((0, 1)), grid)


class _Layer:
    """What one decoder layer reads from the image, after remedies have changed attention and heads."""

    def __init__(self, session: Session, number: int, rows: Tensor, seen: Tensor, read: list[Tensor]) -> None:
        self.session, self.number, self.rows, self.seen, self.read = session, number, rows, seen, read

    def attend(self, call: AttentionCall, run: Callable[[AttentionCall], Output]) -> Output:
        out, weights = run(replace(call, kernel=partial(_with_weights, call)))
        assert weights is not None
        rows, seen = self.rows.to(weights.device), self.seen.to(weights.device)
        self.weights = weights[0][:, rows][:, :, seen].double().cpu()  # [heads, t, n]
        return out, None

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not (self.session.untapped or self.session.aside):
            self.plain = self._heads(args[0])

    def after(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.session.untapped or self.session.aside:
            return
        scaled, plain = self._heads(args[0]), self.plain
        length = plain.square().sum(-1)
        strength = torch.where(length > 0, (scaled * plain).sum(-1) / length, 1.0)[..., None]  # [heads, t, 1]
        self.read.append((strength * self.weights).sum(0) / strength.sum(0))

    def _heads(self, outputs: Tensor) -> Tensor:
        """float64 `[heads, t, head_dim]` of `[1, L, heads * head_dim]`."""
        chosen = outputs[0, self.rows.to(outputs.device)].detach().double().cpu()
        return chosen.unflatten(-1, (len(self.weights), -1)).transpose(0, 1)


def _with_weights(call: AttentionCall, *tensors: Any, **arguments: Any) -> Output:
    """A kernel that tells its weights."""
    return explicit_attention(call)


def draw_gazes(image: Image.Image, plain: Gaze, changed: Mapping[str, Gaze]) -> str:
    """HTML: for each remedy where the model looks without it and with it, and the difference.

    Args:
        image: that it looks at.
        plain: without any.
        changed: with each, by its title.
    """
    size = SIDE / max(image.size)
    small = image.resize((max(1, round(image.width * size)), max(1, round(image.height * size))))
    most = max(float(gaze.tokens.max()) for gaze in (plain, *changed.values()))
    moved = max((float((gaze.tokens - plain.tokens).abs().max()) for gaze in changed.values()), default=0.0)

    def figure(values: Tensor, change: bool, caption: str, alt: str) -> str:
        limits, colors = ((-moved or -1.0, moved or 1.0), CHANGE) if change else ((0.0, most or 1.0), HEAT)
        heatmap = plain.grid.rasterize(values, smooth=False).float()[None, None]
        sized = torch.nn.functional.interpolate(heatmap, (small.height, small.width), mode="nearest")
        picture = overlay_heatmap(small, sized[0, 0].numpy(), 0.75, False, limits=limits, colors=colors)
        return (
            f'<figure><img alt="{html.escape(alt)}" src="{_data_uri(picture)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    rows = []
    for title, gaze in changed.items():
        before, after = f"{plain.share:.1%} from the image", f"{gaze.share:.1%} from the image"
        change = f"{100 * (gaze.share - plain.share):+.1f} points"
        figures = (
            figure(plain.tokens, False, f"without: {before}", f"Attention without {title}: {before}"),
            figure(gaze.tokens, False, f"with: {after}", f"Attention with {title}: {after}"),
            figure(
                gaze.tokens - plain.tokens,
                True,
                f"change: {'none' if torch.equal(gaze.tokens, plain.tokens) else change}",
                f"Where attention with {title} is more or less than without",
            ),
        )
        rows.append(f'<div class="gaze"><h3>{html.escape(title)}</h3>{"".join(figures)}</div>')
    return (
        '<div class="hint"><b>What was redistributed</b>Of all that the heads read while they say the answer '
        "without any remedy, the part that comes from each image token: without a remedy, with it, and the "
        "difference. A head that is strengthened counts as much more.</div>"
        f'<div class="scales">{_scale(HEAT, "0", f"{most:.2%} from a token")}'
        f"{_scale(CHANGE, f'-{moved:.2%}', f'+{moved:.2%}')}</div>"
        f'<div class="gazes">{"".join(rows)}</div>'
    )


def _scale(colors: tuple[str, ...], low: str, high: str) -> str:
    ramp = f"linear-gradient(to right, {', '.join(colors)})"
    return f'<span>{low}<i style="background: {ramp}"></i>{high}</span>'


def _data_uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
