"""What a pruner did to the last prompt: which tokens stayed, and what that saves."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from visionsel.multimodal.dropping import Dropper, Record
from visionsel.multimodal.pruning.picture import draw_kept
from visionsel.multimodal.session import Session

__all__ = ["Pruned", "Report", "Times"]

BYTES = ("B", "KiB", "MiB", "GiB", "TiB")
FLOPS = ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs")


@dataclass(frozen=True)
class Times:
    """Seconds without and with pruning, measured in turn.

    Attributes:
        full, pruned: medians over the rounds.
        ratio: pruned / full, the median of the ratios of the rounds; drifts of the machine cancel in it.
    """

    full: float
    pruned: float
    ratio: float

    @classmethod
    def of(cls, full: Sequence[float], pruned: Sequence[float]) -> "Times":
        """From the seconds of each round."""
        ratios = [p / f for f, p in zip(full, pruned, strict=True)]
        return cls(median(full), median(pruned), median(ratios))


@dataclass(frozen=True)
class Report:
    """A prompt before and after pruning. What is "full" is what the same batch costs without pruning.

    FLOPs are those of the prefill in the decoder layers, for the batch: two for each multiplication with a
    weight of a linear module, and in both products of attention, where each query sees half of the keys
    (causal). They count what is computed, so padding, and the dropped tokens that fill up shorter samples,
    cost like any token. Queries and keys that a method has made for its selection (`reads="own"`) count as
    well; scores and sorting, norms, the vision tower and the head do not. Nor is counted what Yopo saves
    other than by dropping tokens.

    Attributes:
        visual_tokens: for each decoder layer the image tokens that enter it, a mean over the batch.
        full_tokens: image tokens of the prompt, a mean over the batch.
        flops, full_flops: of the prefill.
        cache_bytes, full_cache_bytes: of keys and values of the prompt; None without a cache.
        seconds, cpu_seconds: to the first token, by the clock and of the process; None unless measured.
        decoder_seconds, decoder_cpu_seconds: the decoder's part of it, which is what the FLOPs are about.
        token_seconds, token_cpu_seconds: for each later token.
    """

    visual_tokens: tuple[float, ...]
    full_tokens: float
    flops: int
    full_flops: int
    cache_bytes: int | None = None
    full_cache_bytes: int | None = None
    seconds: Times | None = None
    cpu_seconds: Times | None = None
    decoder_seconds: Times | None = None
    decoder_cpu_seconds: Times | None = None
    token_seconds: Times | None = None
    token_cpu_seconds: Times | None = None

    @property
    def equivalent_tokens(self) -> float:
        """Image tokens in the mean over the decoder layers."""
        return sum(self.visual_tokens) / len(self.visual_tokens)

    @property
    def flops_ratio(self) -> float:
        """After / before."""
        return self.flops / self.full_flops

    @property
    def cache_ratio(self) -> float | None:
        """After / before; None without a cache."""
        if self.cache_bytes is None or not self.full_cache_bytes:
            return None
        return self.cache_bytes / self.full_cache_bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers; what was not measured is left out."""
        values: dict[str, Any] = {
            "visual_tokens": list(self.visual_tokens),
            "equivalent_tokens": self.equivalent_tokens,
            "full_tokens": self.full_tokens,
            "flops": self.flops,
            "full_flops": self.full_flops,
            "flops_ratio": self.flops_ratio,
            "cache_bytes": self.cache_bytes,
            "full_cache_bytes": self.full_cache_bytes,
            "cache_ratio": self.cache_ratio,
        }
        for name, _ in _CLOCKS:
            times: Times | None = getattr(self, name)
            if times is not None:
                values |= {
                    name: times.pruned,
                    f"full_{name}": times.full,
                    f"{name.removesuffix('seconds')}ratio": times.ratio,
                }
        return values

    def __str__(self) -> str:
        layers = len(self.visual_tokens)
        share = self.equivalent_tokens / self.full_tokens if self.full_tokens else 1.0
        rows = [
            (
                f"image tokens (mean of {layers} layers)",
                f"{self.full_tokens:.1f}",
                f"{self.equivalent_tokens:.1f}",
                share,
            ),
            (
                "prefill of the decoder",
                *_scaled((self.full_flops, self.flops), FLOPS, 1000),
                self.flops_ratio,
            ),
        ]
        if (
            self.cache_bytes is not None
            and self.full_cache_bytes is not None
            and self.cache_ratio is not None
        ):
            sizes = _scaled((self.full_cache_bytes, self.cache_bytes), BYTES, 1024)
            rows.append(("cache of the prompt", *sizes, self.cache_ratio))
        for name, title in _CLOCKS:
            times: Times | None = getattr(self, name)
            if times is not None:
                full, pruned = (f"{1e3 * value:.1f} ms" for value in (times.full, times.pruned))
                rows.append((title, full, pruned, times.ratio))
        lines = [f"{'':32}  {'full':>12}  {'pruned':>12}  {'ratio':>6}"]
        lines += [
            f"{title:32}  {full:>12}  {pruned:>12}  {ratio:6.3f}" for title, full, pruned, ratio in rows
        ]
        return "\n".join([*lines, "image tokens of each layer: " + _runs(self.visual_tokens)])


_CLOCKS = (
    ("seconds", "first token, wall"),
    ("cpu_seconds", "first token, CPU"),
    ("decoder_seconds", "prefill of the decoder, wall"),
    ("decoder_cpu_seconds", "prefill of the decoder, CPU"),
    ("token_seconds", "each later token, wall"),
    ("token_cpu_seconds", "each later token, CPU"),
)


class Pruned:
    """What the context of a pruner yields: what all pruners on the model dropped from the last prompt."""

    def __init__(self, session: Session, dropper: Dropper) -> None:
        self._session, self._dropper = session, dropper
        self._record: Record | None = None

    def finish(self) -> None:
        """The context ends: hold on to the last record."""
        self._record = self._dropper.record

    @property
    def record(self) -> Record:
        """Of the last prompt.

        Raises:
            RuntimeError: before the model has read one.
        """
        record = self._record or self._dropper.record
        if record is None:
            raise RuntimeError("no prompt yet: call the model or generate() inside the context")
        return record

    @property
    def kept(self) -> list[tuple[int, Tensor]]:
        """For each stage its layer and bool `[B, L]`: the tokens of the prompt that entered the layer."""
        return self.record.kept

    def report(self) -> Report:
        """Tokens, FLOPs and bytes of the last prompt; `visionsel.multimodal.pruning.measure` adds times.

        Raises:
            RuntimeError: before the model has read a prompt.
        """
        record, layers = self.record, self._session.layers
        scope, batch = record.scope, len(record.scope.input_ids)
        lengths = layer_lengths(record, len(layers))
        held, whole = record.cache_bytes or (None, None)
        flops = sum(_layer_flops(layer, length) for layer, length in zip(layers, lengths, strict=True))
        flops += sum(length * _projections(layers[layer].self_attn) for layer, length in record.probed)
        full = sum(_layer_flops(layer, scope.length) for layer in layers)
        return Report(
            visual_tokens=tuple(visual_tokens(record, len(layers))),
            full_tokens=scope.visual.sum().item() / batch,
            flops=batch * flops,
            full_flops=batch * full,
            cache_bytes=held,
            full_cache_bytes=whole,
        )

    def picture(self, images: Any, processor: Any = None) -> Image.Image:
        """Which patches of the images were kept, and where the others went.

        Args:
            images: the images of the last prompt, in order; one image or several.
            processor: that made the pixels. Without it the patches are laid over the whole image, which is
                right where the processor only resizes it.

        Raises:
            ValueError: for another number of images than the prompt has, or where the processor is needed.
        """
        return draw_kept(self.record, images, processor)


def visual_tokens(record: Record, layers: int) -> list[float]:
    """For each decoder layer the image tokens that enter it, a mean over the batch."""
    found, visual, kept = [], record.scope.visual, dict(record.kept)
    for layer in range(layers):
        if layer in kept:
            visual = record.scope.visual & kept[layer]
        found.append(visual.sum().item() / len(visual))
    return found


def layer_lengths(record: Record, layers: int) -> list[int]:
    """For each decoder layer the columns that it computes, padding and fillers among them."""
    lengths, length, real, kept = [], record.scope.length, record.scope.real, dict(record.kept)
    for layer in range(layers):
        if layer in kept and not torch.equal(kept[layer], real):
            real = kept[layer]
            length = int(real.sum(1).amax())
        lengths.append(length)
    return lengths


def _layer_flops(layer: nn.Module, length: int) -> int:
    """Linear modules and the two products of attention, half of them for being causal; for one row."""
    attention: Any = layer.self_attn
    config = attention.config
    heads, width = config.num_attention_heads, attention.head_dim
    weights = sum(m.in_features * m.out_features for m in layer.modules() if isinstance(m, nn.Linear))
    pairs = length * (length + 1) // 2
    return 2 * length * weights + 2 * 2 * pairs * heads * width


def _projections(attention: nn.Module) -> int:
    """FLOPs of queries, keys and values for one token."""
    linears = {name: m for name, m in attention.named_modules() if isinstance(m, nn.Linear)}
    return 2 * sum(m.in_features * m.out_features for name, m in linears.items() if "o_proj" not in name)


def _scaled(values: tuple[float, float], units: Sequence[str], step: int) -> list[str]:
    """Both in the unit of the larger one."""
    power = 0
    while max(values) / step**power >= step and power < len(units) - 1:
        power += 1
    return [f"{value / step**power:.4g} {units[power]}" for value in values]


def _runs(values: Sequence[float]) -> str:
    """`576 (0-1), 144 (2-31)`."""
    parts, start = [], 0
    for end in range(1, len(values) + 1):
        if end == len(values) or values[end] != values[start]:
            where = f"{start}" if end == start + 1 else f"{start}-{end - 1}"
            parts.append(f"{values[start]:g} ({where})")
            start = end
    return ", ".join(parts)
