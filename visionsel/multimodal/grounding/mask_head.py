"""F-LMM (Wu et al. 2025, arXiv:2406.05821): masks of the words of a frozen vision-language model.

    head = MaskHead.from_pretrained(folder, sam)
    replay = Replay(model, inputs, model.generate(**inputs))
    head.predict(replay, [[[3], [7, 8]]], [grid], [image])    # logits [2, H, W] for two words of one answer

The attention of all heads of all layers to the image, at the rows of a word's tokens, is a stack of maps on
the token grid. A U-Net makes a mask of it, and a SAM, whose prompts are this mask, its box and the word's
hidden states, makes it sharp (`SAMRefiner`). The language model stays as it is, and so does what it says.

Written from the paper; where it leaves something open: the mask prompt carries no gradient from the refiner's
loss to the U-Net; an empty mask prompts with the box of the whole image.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from visionsel.boxes import mask_boxes
from visionsel.files import whole_file
from visionsel.multimodal.families.family import View
from visionsel.multimodal.grounding.grid import TokenGrid
from visionsel.multimodal.grounding.mask_head_config import MaskHeadConfig, describe_model
from visionsel.multimodal.grounding.replay import Replay
from visionsel.multimodal.grounding.sam_refiner import SAMRefiner
from visionsel.multimodal.grounding.unet import UNet
from visionsel.multimodal.grounding.word_features import Words, fine_view, grid_maps, read_words

__all__ = ["MaskHead", "MaskHeadConfig", "WordFeatures", "describe_model"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class MaskHead(nn.Module):
    """Masks from attention.

    Args:
        config: sizes.
        sam: with one the head has a `refiner`: a `Sam` of segment_anything, see `SAMRefiner`.
    """

    def __init__(self, config: MaskHeadConfig, sam: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        channels = config.views * config.layers * config.heads
        self.unet = UNet(channels, config.base, config.stages, config.convolutions, config.groups)
        self.out = nn.Conv2d(config.base, 1, 1)
        # masks are small: from 0 the first steps push everything outside, and what is inside may never return
        nn.init.constant_(cast(Tensor, self.out.bias), -2.0)
        self.refiner = None if sam is None else SAMRefiner(sam, config.layers, config.hidden)

    def forward(self, maps: Tensor) -> Tensor:
        """Logits of masks, `[N, h', w']`: above 0 is inside.

        Args:
            maps: attention on a grid, `[N, channels, h, w]`, the channels in the order of `grid_maps`. How
                much of the attention the image gets does not matter: each map is divided by its sum.

        Raises:
            ValueError: for another number of channels: a head is made for one model.
        """
        if maps.ndim != 4 or maps.shape[1] != self.unet.channels:
            raise ValueError(
                f"this head was made for a model with {self.config.layers} layers of {self.config.heads} "
                f"heads and {self.config.views} grid(s), {self.unet.channels} maps; got {list(maps.shape)}"
            )
        maps = normalized(maps.to(self.out.weight))
        side = max(maps.shape[2:])
        if side < self.config.min_side:
            height, width = (max(1, round(one * self.config.min_side / side)) for one in maps.shape[2:])
            maps = interpolate(maps, (height, width), mode="bilinear", align_corners=False)
        return self.out(self.unet(maps))[:, 0]

    def predict(
        self,
        replay: Replay,
        words: Words,
        grids: Sequence[TokenGrid],
        images: Sequence[Any] | None = None,
    ) -> list[Tensor]:
        """Masks of words.

        Args:
            replay: prompts and answers of the model that the head is for.
            words: for each answer its words, for each word the numbers of its new tokens.
            grids: for each answer the grid of its image, by `TokenGrid.from_inputs` with the inputs of the
                replay.
            images: for each answer its image, for the refiner; None: coarse masks, of the U-Net alone.

        Returns:
            for each answer logits in pixels of its image, float32 `[words, H, W]`: above 0 is inside.

        Raises:
            ValueError: for words that are not in the answers, no words at all, prompts without images, images
                where the head has no refiner, or numbers of grids or images that are not that of the answers.
        """
        if images is not None and self.refiner is None:
            raise ValueError("this head has no refiner; leave out images, or load it with its sam")
        for name, given in (("grids", grids), ("images", grids if images is None else images)):
            if len(given) != len(replay.tokens):
                raise ValueError(f"{len(given)} {name} for {len(replay.tokens)} answers; give one for each")
        features = self.features(replay, words, grids, images)
        with torch.no_grad():
            coarse = self.coarse(features)
            return coarse if images is None else self.refine(features, coarse)

    def features(
        self,
        replay: Replay,
        words: Words,
        grids: Sequence[TokenGrid],
        images: Sequence[Any] | None = None,
    ) -> "WordFeatures":
        """What the frozen models give for the masks of words; arguments as of `predict`."""
        device, config = self.out.weight.device, self.config
        read = read_words(replay, words, config.row, config.merge, hidden=images is not None)
        maps = [grid_maps(a, grid, config.views) for a, grid in zip(read.attention, grids, strict=True)]
        embeddings, canvases = (None, None)
        if images is not None:
            embeddings, canvases = cast(SAMRefiner, self.refiner).encode(images)
        return WordFeatures(
            [one.to(device) for one in maps],
            list(grids),
            [state.to(device) for states in read.hidden for state in states],
            embeddings,
            canvases,
        )

    def coarse(self, features: "WordFeatures") -> list[Tensor]:
        """Masks by the U-Net, logits in pixels: for each answer `[words, H, W]`."""
        by_size: dict[tuple[int, int], list[int]] = {}
        for number, maps in enumerate(features.maps):
            by_size.setdefault((maps.shape[2], maps.shape[3]), []).append(number)
        found: dict[int, Tensor] = {}
        for numbers in by_size.values():
            logits = self(torch.cat([features.maps[number] for number in numbers]))
            parts = logits.split([len(features.maps[number]) for number in numbers])
            found |= dict(zip(numbers, parts, strict=True))
        return [to_pixels(found[number], grid) for number, grid in enumerate(features.grids)]

    def refine(self, features: "WordFeatures", coarse: Sequence[Tensor]) -> list[Tensor]:
        """The same by the SAM, from masks of the U-Net."""
        assert features.embeddings is not None
        assert features.canvases is not None
        prompts, boxes, owners = [], [], []
        for number, (logits, canvas) in enumerate(zip(coarse, features.canvases, strict=True)):
            logits = logits.detach()
            prompts.append(canvas.shrink(logits))
            around = mask_boxes(logits > 0).view(-1, 2, 2).cpu()
            boxes.append(canvas.place(around).view(-1, 4).to(logits.device))
            owners += [number] * len(logits)
        low_res = cast(SAMRefiner, self.refiner)(
            features.embeddings,
            torch.tensor(owners, device=features.embeddings.device),
            torch.cat(prompts),
            torch.cat(boxes),
            features.hidden,
        )
        parts = low_res.split([len(logits) for logits in coarse])
        return [
            canvas.enlarge(part) if len(part) else part.new_zeros(0, *canvas.image)
            for canvas, part in zip(features.canvases, parts, strict=True)
        ]

    def save_pretrained(self, folder: str | Path, half: bool = False) -> Path:
        """Write `config.json` and `model.safetensors`, without SAM's image encoder; returns the folder.

        Args:
            folder: to write into.
            half: in half precision.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        state = {
            key: (value.half() if half and value.is_floating_point() else value).detach().cpu().contiguous()
            for key, value in self.state_dict().items()
        }
        settings = asdict(self.config) | {"refined": self.refiner is not None}
        with whole_file(folder / WEIGHTS) as partial:
            save_file(state, partial, metadata={"format": "pt"})
            partial.chmod(0o644)  # safetensors makes it private
        with whole_file(folder / CONFIG) as partial:
            partial.write_text(json.dumps(settings, indent=2) + "\n")
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path, sam: nn.Module | None = None) -> Self:
        """A head that `save_pretrained` wrote, in evaluation mode and float32.

        Args:
            folder: of it.
            sam: the SAM whose refiner it holds; its image encoder is used. None: the head without refiner.

        Raises:
            FileNotFoundError: when a file is missing.
            ValueError: for a file that is broken or does not fit, and a sam for a head without refiner.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"no {name} in {folder}: not the folder of a mask head; train one with train.grounding"
                )
        try:
            settings = json.loads((folder / CONFIG).read_text())
            refined = settings.pop("refined")
            if unknown := set(settings) - {field.name for field in fields(MaskHeadConfig)}:
                raise ValueError(f"unknown {sorted(unknown)[0]!r} in {CONFIG}")
            config, state = MaskHeadConfig(**settings), load_file(folder / WEIGHTS)
            if sam is not None and not refined:
                raise ValueError("it has no refiner, so it takes no sam")
            head = cls(config, sam)
            wanted = {
                k: v.float() for k, v in state.items() if sam is not None or not k.startswith("refiner.")
            }
            head.load_state_dict(wanted)
        except (SafetensorError, RuntimeError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{folder} holds no mask head that fits: {error}") from error
        return head.eval()


@dataclass(frozen=True, eq=False)
class WordFeatures:
    """What frozen models give for the words of some answers.

    Attributes:
        maps: for each answer attention on its grid, `[words, channels, h, w]`.
        grids: of the answers' images.
        hidden: for each word of all answers, in order, its hidden states `[tokens, layers, hidden]`; empty
            where no refiner wants them.
        embeddings: of the images by SAM, `[B, C, h, w]`; None likewise.
        canvases: the places of the images on SAM's square; None likewise.
    """

    maps: list[Tensor]
    grids: list[TokenGrid]
    hidden: list[Tensor]
    embeddings: Tensor | None
    canvases: list[Any] | None


def normalized(maps: Tensor) -> Tensor:
    """Maps `[..., h, w]` divided by their sums; maps of 0 stay so."""
    return maps / maps.sum((-2, -1), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def to_pixels(logits: Tensor, grid: TokenGrid) -> Tensor:
    """Logits on the finest grid of an image, at any resolution `[N, h, w]`, in its pixels `[N, H, W]`.

    Pixels that the grid does not show, as where a processor crops, are outside: they get the lowest logit of
    each, and at most -1.
    """
    height, width = logits.shape[1:]
    view = View(
        "image", torch.arange(height * width).view(height, width), torch.empty(0), fine_view(grid).box
    )
    floor = logits.detach().amin((1, 2)).clamp(max=-1)[:, None]
    raised = TokenGrid(height * width, grid.size, (view,)).rasterize(logits.flatten(1) - floor)
    return raised + floor[..., None]
