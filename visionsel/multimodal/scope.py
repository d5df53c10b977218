"""Where things are in a prompt: the images, the text, the padding; for one forward of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from visionsel.multimodal.families.family import Encoded, Family, TokenLayout

__all__ = ["Picture", "PromptScope"]


@dataclass(frozen=True)
class Picture:
    """One image or video of a sample.

    Attributes:
        modality: `"image"` or `"video"`.
        positions: int64 `[n]` places of its tokens in the prompt.
        layout: how they lie on grids.
        number: which image or video of the tower's call it is.
    """

    modality: str
    positions: Tensor
    layout: TokenLayout
    number: int


@dataclass
class PromptScope:
    """One forward of the model.

    Attributes:
        model, family: the model.
        input_ids: int64 `[B, L]`: what this forward reads.
        visual: bool `[B, L]`: tokens that stand for images and videos.
        real: bool `[B, L]`: all but padding.
        prefill: nothing was cached before.
        drafted: how many tokens at the end are no prompt any more: candidates that assisted decoding sends
            along.
        encoded: the calls of the vision tower whose results this prompt holds, by modality; empty when the
            caller had them beforehand.
    """

    model: nn.Module
    family: Family
    input_ids: Tensor
    visual: Tensor
    real: Tensor
    prefill: bool
    encoded: Mapping[str, Encoded] = field(default_factory=dict)
    drafted: int = 0

    @property
    def length(self) -> int:
        """Tokens of each row, padding counted."""
        return self.input_ids.shape[1]

    @property
    def prompt(self) -> Tensor:
        """bool `[B, L]`: all but padding and what was drafted."""
        return self.real & (torch.arange(self.length, device=self.real.device) < self.length - self.drafted)

    @property
    def last(self) -> Tensor:
        """int64 `[B]`: the place of each row's last token of the prompt."""
        place = torch.arange(self.length, device=self.real.device)
        return place.expand_as(self.real).masked_fill(~self.prompt, -1).amax(1)

    def text(self, which: str = "after") -> Tensor:
        """bool `[B, L]`: text tokens of the prompt, all of them or those after the last image.

        Raises:
            ValueError: for another `which` than `"all"` and `"after"`.
        """
        text = self.prompt & ~self.visual
        if which == "all":
            return text
        if which != "after":
            raise ValueError(f'which must be "all" or "after", got {which!r}')
        place = torch.arange(self.length, device=text.device)
        final = place.expand_as(self.visual).masked_fill(~self.visual, -1).amax(1, keepdim=True)
        return text & (place > final)

    @cached_property
    def pictures(self) -> list[list[Picture]]:
        """For each row its images and videos, in the order of the prompt.

        The tower may have seen each sample once while the decoder has it several times, for beams or several
        answers: rows that follow each other then share the pictures.

        Raises:
            NotImplementedError: when the tower did not run.
            RuntimeError: when its results are not what the prompt asks for.
        """
        rows: list[list[Picture]] = [[] for _ in range(len(self.input_ids))]
        for modality, token in self.family.token_ids(self.model).items():
            here = (self.input_ids == token).cpu()
            if not here.any():
                continue
            if modality not in self.encoded:
                raise NotImplementedError(
                    f"the vision tower did not run for the {modality}s of this prompt (precomputed "
                    "mm_encoder_outputs?), but the method needs what it sees; pass the pixel values"
                )
            layouts = self.family.layouts(self.model, self.encoded[modality])
            _deal(here, modality, layouts, rows)
        for row in rows:
            row.sort(key=lambda picture: int(picture.positions[0]))
        return rows


def _deal(here: Tensor, modality: str, layouts: Sequence[TokenLayout], rows: list[list[Picture]]) -> None:
    """Give each row the layouts whose tokens it holds, in order."""
    tokens, wanted = sum(layout.n for layout in layouts), int(here.sum())
    copies = wanted // tokens if tokens and wanted % tokens == 0 else 0
    if not copies or len(rows) % copies:
        raise RuntimeError(
            f"the prompt has {wanted} tokens for {modality}s, but the tower made {tokens}: the prompt must "
            "hold as many placeholders as its images have tokens"
        )
    number = 0
    for sample in range(0, len(rows), copies):
        positions = [row.nonzero()[:, 0] for row in here[sample : sample + copies]]
        taken = 0
        while taken < len(positions[0]):
            layout = layouts[number] if number < len(layouts) else None
            if layout is None or taken + layout.n > len(positions[0]):
                raise RuntimeError(f"the {modality} tokens of row {sample} do not end with an {modality}")
            for offset, place in enumerate(positions):
                part = place[taken : taken + layout.n]
                rows[sample + offset].append(Picture(modality, part, layout, number))
            taken += layout.n
            number += 1
