"""Second views of a prompt: its image noised, transformed or removed, its instruction disturbed.

A view is a function from the inputs of `generate()` to such inputs. The ones here work on the tensors that
the processor made. What is random depends on the seed and on the pixels of the image alone, so that an image
has the same view in any batch. To work on the picture itself, prepare the inputs and pass
`view=lambda inputs: others`.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import functional as pictures

from visionsel.multimodal.families import find_family

__all__ = ["KINDS", "DiffusionNoise", "Disturbance", "RandomTransform", "RemoveImages", "diffusion_share"]

PIXELS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
SEQUENCES = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
KINDS = ("hflip", "vflip", "rotate", "jitter", "blur", "crop")
CONFUSED = (  # the disturbance of ICD's released code
    "You are a confused objects detector to provide a fuzzy overview or impression of the image."
)
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_STATISTICS = {  # with which the processors of the families normalise; CLIP's elsewhere
    "internvl": _IMAGENET,
    "gemma3": _HALF,
    "paligemma": _HALF,
    "idefics3": _HALF,
    "smolvlm": _HALF,
    "llava_onevision": _HALF,
    "qwen3_vl": _HALF,
}
Change = Callable[[Tensor, Tensor | None, np.random.Generator], Tensor]


@dataclass(frozen=True)
class DiffusionNoise:
    """The image after some steps of a diffusion process, as VCD makes it (Leng et al. 2024).

    Of the pixels `x` it makes `sqrt(a) x + sqrt(1 - a) e`, `e` normal; see `diffusion_share` for `a`.

    Args:
        step: from 0 to 999; 500 in the released script, 999 for POPE by reports of its users.
        seed: of the noise.

    Raises:
        ValueError: for a step that does not exist.
    """

    step: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        diffusion_share(self.step)

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The same inputs with other pixels."""
        return _change_pixels(inputs, self.seed, self._noise)

    def _noise(self, pixels: Tensor, grid: Tensor | None, luck: np.random.Generator) -> Tensor:
        share = diffusion_share(self.step)
        noise = torch.from_numpy(luck.standard_normal(tuple(pixels.shape))).to(pixels)
        return share**0.5 * pixels + (1 - share) ** 0.5 * noise


def diffusion_share(step: int) -> float:
    """How much of the image's variance is left: the product of `1 - b` up to this step (VCD's released code).

    The `b` of its 1000 steps are `sigmoid(s) (5e-3 - 1e-5) + 1e-5`, `s` evenly from -6 to 6.

    Raises:
        ValueError: for a step that does not exist.
    """
    if not 0 <= step < 1000:
        raise ValueError(f"step must be from 0 to 999, got {step}")
    return _shares()[step]


@lru_cache
def _shares() -> list[float]:
    place = torch.linspace(-6, 6, 1000, dtype=torch.float64)
    shares: list[float] = (1 - (place.sigmoid() * (5e-3 - 1e-5) + 1e-5)).cumprod(0).tolist()
    return shares


@dataclass(frozen=True)
class RemoveImages:
    """The prompt without its image tokens; markers around them stay.

    Args:
        tokens: the ids that stand for images and videos.
    """

    tokens: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "RemoveImages":
        """For the tokens of a model."""
        return cls(tuple(find_family(model).token_ids(model).values()))

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Ids, mask and token types only, padded on the left.

        Raises:
            ValueError: for a sample that has no text.
        """
        ids, mask = inputs["input_ids"], mask_of(inputs)
        keep = mask.bool() & ~torch.isin(ids, torch.tensor(self.tokens, device=ids.device))
        if not bool(keep.any(1).all()):
            raise ValueError("a sample is nothing but images, and cannot be read without them")
        number = int(keep.sum(1).amax())
        order = keep.to(torch.int8).argsort(dim=1, stable=True)[:, -number:]
        real = keep.gather(1, order)
        # padding may not look like an image
        view = {name: inputs[name].gather(1, order) * real for name in SEQUENCES if name in inputs}
        view["input_ids"] = torch.where(real, view["input_ids"], view["input_ids"][:, -1:])
        return view | {"attention_mask": real.to(mask.dtype)}


@dataclass(frozen=True)
class Disturbance:
    """The prompt with an instruction in front of it that misleads, as ICD has it (Wang et al. 2024).

    Args:
        ids: of the tokens of the instruction.
        bos: the id after which it goes where a prompt begins with it; None: it goes in front of all.
    """

    ids: tuple[int, ...]
    bos: int | None = None

    @classmethod
    def of(cls, tokenizer: Any, text: str = CONFUSED) -> "Disturbance":
        """For the tokens of a tokenizer."""
        return cls(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), tokenizer.bos_token_id)

    @classmethod
    def beside(cls, model: nn.Module) -> "Disturbance":
        """With the tokenizer that lies where the weights of the model are from.

        Raises:
            ValueError: when there is none.
        """
        from transformers import AutoTokenizer

        name: Any = getattr(model, "name_or_path", "")
        try:
            if not name:
                raise OSError("it was not loaded from a folder or hub")
            return cls.of(AutoTokenizer.from_pretrained(name))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"no tokenizer is found beside the model ({error}); pass "
                "view=Disturbance.of(processor.tokenizer)"
            ) from error

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The same inputs with longer prompts."""
        ids, mask = inputs["input_ids"], mask_of(inputs)
        first = mask.int().argmax(1).tolist()
        cuts = [
            place + int(self.bos is not None and int(row[place]) == self.bos)
            for row, place in zip(ids, first, strict=True)
        ]
        return with_tokens(inputs, self.ids, cuts)


def with_tokens(inputs: dict[str, Any], ids: Sequence[int], cuts: Sequence[int]) -> dict[str, Any]:
    """The same inputs with tokens of text put in.

    Args:
        inputs: of `generate()`.
        ids: of the tokens.
        cuts: for each sample the place in front of which they go.
    """
    view = {name: value for name, value in inputs.items() if name != "position_ids"}
    view["attention_mask"] = mask_of(inputs)
    fill = {"input_ids": list(ids), "attention_mask": [1] * len(ids)}
    for name in SEQUENCES:
        if name in view:
            value = view[name]
            added = value.new_tensor(fill.get(name, [0] * len(ids)))
            rows = [torch.cat((row[:cut], added, row[cut:])) for row, cut in zip(value, cuts, strict=True)]
            view[name] = torch.stack(rows)
    return view


@dataclass(frozen=True)
class RandomTransform:
    """The image under a transform drawn from RITUAL's (Woo et al. 2024, released code).

    `"hflip"`, `"vflip"`; `"rotate"` by up to 180 degrees; `"jitter"`: brightness, contrast and saturation by
    a factor from 0 to 2 and hue by up to half a turn; `"blur"`: Gaussian, 13 pixels wide, sigma 1.5 to 2;
    `"crop"`: 8 to 100 percent of the image, resized to all of it. Where a processor cuts an image into tiles,
    each tile is transformed in itself.

    Args:
        kinds: to draw from, each with the same chance.
        seed: of what is drawn.
        mean, std: with which the processor normalised the pixels.
        patch: of Qwen's flat patches: their side, how many go together on a side, and their frames.

    Raises:
        ValueError: for a kind that does not exist.
    """

    kinds: tuple[str, ...] = KINDS
    seed: int = 0
    mean: tuple[float, ...] = _CLIP[0]
    std: tuple[float, ...] = _CLIP[1]
    patch: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {self.kinds}")

    @classmethod
    def of(
        cls, model: nn.Module, kinds: tuple[str, ...] = KINDS, seed: int = 0, processor: Any = None
    ) -> "RandomTransform":
        """With the patches of a model, and the statistics of its processor, or else of its family's."""
        config: Any = model.config
        mean, std = _STATISTICS.get(config.model_type, _CLIP)
        if processor is not None:
            images = getattr(processor, "image_processor", processor)
            mean, std = tuple(images.image_mean), tuple(images.image_std)
        vision = config.vision_config
        names = ("patch_size", "spatial_merge_size", "temporal_patch_size")
        patch: Any = tuple(getattr(vision, name) for name in names) if hasattr(vision, names[2]) else None
        return cls(kinds, seed, mean, std, patch)

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The same inputs with other pixels."""
        return _change_pixels(inputs, self.seed, self._transform)

    def _transform(self, pixels: Tensor, grid: Tensor | None, luck: np.random.Generator) -> Tensor:
        kind = self.kinds[int(luck.integers(len(self.kinds)))]
        wide = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        if grid is None:
            return self.apply(wide, kind, luck).to(pixels)
        if self.patch is None:
            raise ValueError("these pixels are flat patches; make the view with RandomTransform.of(model)")
        images = self.apply(from_patches(wide, grid, self.patch), kind, luck)
        return to_patches(images, grid, self.patch).to(pixels)

    def apply(self, pixels: Tensor, kind: str, luck: np.random.Generator) -> Tensor:
        """One transform on pictures `[n, C, H, W]`, all alike."""
        if kind == "hflip":
            return pixels.flip(-1)
        if kind == "vflip":
            return pixels.flip(-2)
        height, width = pixels.shape[-2:]
        if kind == "crop":
            top, left, tall, wide = _crop(height, width, luck)
            return pictures.resized_crop(pixels, top, left, tall, wide, [height, width], antialias=True)
        if kind == "blur":
            return pictures.gaussian_blur(pixels, [13, 13], [luck.uniform(1.5, 2.0)] * 2)
        mean, std = (pixels.new_tensor(one)[:, None, None] for one in (self.mean, self.std))
        image = pixels * std + mean  # black is 0, and colours are from 0 to 1
        if kind == "rotate":
            image = pictures.rotate(image, luck.uniform(-180, 180))
        else:
            image = image.clamp(0, 1)
            changes: list[Callable[[Tensor, float], Tensor]] = [
                pictures.adjust_brightness,
                pictures.adjust_contrast,
                pictures.adjust_saturation,
                pictures.adjust_hue,
            ]
            ranges = [(0.0, 2.0)] * 3 + [(-0.5, 0.5)]
            for number in luck.permutation(4):
                image = changes[number](image, luck.uniform(*ranges[number]))
        return (image - mean) / std


def _crop(height: int, width: int, luck: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random part, with sides from 3:4 to 4:3."""
    for _ in range(10):
        area = height * width * luck.uniform(0.08, 1)
        ratio = np.exp(luck.uniform(np.log(3 / 4), np.log(4 / 3)))
        tall, wide = round(float(np.sqrt(area / ratio))), round(float(np.sqrt(area * ratio)))
        if 0 < tall <= height and 0 < wide <= width:
            top, left = luck.integers(height - tall + 1), luck.integers(width - wide + 1)
            return int(top), int(left), tall, wide
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def from_patches(patches: Tensor, grid: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Qwen's patches `[t h w, C frames side side]` of one image as pictures `[t frames, C, H, W]`."""
    (t, h, w), (side, merge, frames) = grid.tolist(), patch
    x = patches.view(t, h // merge, w // merge, merge, merge, -1, frames, side, side)
    x = x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return x.reshape(t * frames, -1, h * side, w * side)


def to_patches(images: Tensor, grid: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """The reverse of `from_patches`."""
    (t, h, w), (side, merge, frames) = grid.tolist(), patch
    x = images.reshape(t, frames, -1, h // merge, merge, side, w // merge, merge, side)
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)


def mask_of(inputs: dict[str, Any]) -> Tensor:
    """The attention mask of a prompt, or what it is without one."""
    mask: Tensor | None = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask


def samples_of(
    inputs: dict[str, Any], name: str, token: int, patch: tuple[int, int, int] | None
) -> list[int]:
    """For each row of pixels (an image, or a crop), or each grid of flat patches, the sample it belongs to.

    Args:
        inputs: of `generate()`.
        name: of the pixels in them.
        token: the id that stands for them.
        patch: of flat patches, see `RandomTransform`.

    Raises:
        NotImplementedError: where samples have several images and their tokens do not say which.
    """
    pixels, ids = inputs[name], inputs["input_ids"]
    tokens = ((ids == token) & mask_of(inputs).bool()).sum(1).tolist()
    samples = len(tokens)
    if pixels.ndim == 2:
        assert patch is not None
        merged = (inputs[PIXELS[name]].prod(1) // patch[1] ** 2).tolist()
        owners, left = [], list(tokens)
        for number in merged:  # in the order of the prompts
            owner = next((sample for sample in range(samples) if left[sample]), samples - 1)
            left[owner] -= number
            owners.append(owner)
        return owners
    if len(pixels) == samples:
        return list(range(samples))
    rows = [len(pixels) * number / max(1, sum(tokens)) for number in tokens]
    if pixels.ndim != 4 or any(number != int(number) for number in rows):
        raise NotImplementedError(
            f"{len(pixels)} images for {samples} samples, and this family's tokens do not say whose they "
            "are; give each sample one image, or one sample at a time"
        )
    return [sample for sample, number in enumerate(rows) for _ in range(int(number))]  # rows of equal tokens


def _change_pixels(inputs: dict[str, Any], seed: int, change: Change) -> dict[str, Any]:
    """Send the pixels of each image and video through a function.

    It gets crops `[n, C, H, W]`, or flat patches `[N, D]` with their grid, and luck of its own.

    Raises:
        NotImplementedError: where there are no pixels.
    """
    if not any(torch.is_tensor(inputs.get(name)) for name in PIXELS):
        raise NotImplementedError(
            "this view changes pixels, and the inputs have none (pixel_values); pass what the processor "
            "returns, or another view"
        )
    view = dict(inputs)
    for name, grids in PIXELS.items():
        pixels = inputs.get(name)
        if pixels is None:
            continue
        if pixels.ndim == 2:
            grid = inputs[grids]
            parts = pixels.split(grid.prod(1).tolist())
            changed = [
                change(part, one, _luck(part, seed)) for part, one in zip(parts, grid.cpu(), strict=True)
            ]
            view[name] = torch.cat(changed)
            continue
        view[name] = pixels.clone()
        for row, image in enumerate(pixels):
            crops = image if image.ndim == 4 else image[None]
            there = crops.flatten(1).any(1)  # where samples have different numbers of crops, 0 fills up
            if bool(there.any()):
                crops = crops[there]
                changed_crops = change(crops, None, _luck(crops, seed))
                if image.ndim == 4:
                    view[name][row, there] = changed_crops
                else:
                    view[name][row] = changed_crops[0]
    return view


def _luck(pixels: Tensor, seed: int) -> np.random.Generator:
    """Random numbers that belong to an image, wherever it stands."""
    image = zlib.crc32(pixels.detach().cpu().contiguous().float().numpy().tobytes())
    return np.random.default_rng([seed, image])
