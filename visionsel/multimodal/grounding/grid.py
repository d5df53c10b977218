"""Where the tokens of an image lie on its pixels, and maps over tokens as maps over pixels."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from visionsel.multimodal.families import find_family
from visionsel.multimodal.families.family import Encoded, Family, TokenLayout, View
from visionsel.multimodal.families.raster import axis_cells, axis_weights

__all__ = ["TokenGrid"]

Size = tuple[int, int]


@dataclass(frozen=True)
class TokenGrid:
    """The tokens of one image.

    Attributes:
        n: how many tokens stand for it in the prompt, newline tokens counted.
        size: height and width of the original image.
        views: its grids, each with `index` int64 `[h, w]` (numbers of tokens among the `n`), `box` (x0, y0,
            x1, y1 in pixels; over the border where the processor padded, inside where it cropped) and `kind`
            (`"image"`, `"thumbnail"`, `"tile"`, `"tiles"`).
        sample: the row of the batch that holds it; None where the inputs have no `input_ids`.
        start: number of its first token among the image tokens of that row; None likewise. With
            `AttentionRecorder(columns="image")`, its columns are `start` to `start + n`.

    Examples:
        With `model`, `processor`, `inputs` and `scene` as in `visionsel.embedded.load_lvlm`:

        >>> import torch
        >>> from visionsel.multimodal import TokenGrid
        >>> grid = TokenGrid.from_inputs(model, processor, inputs, image_size=(64, 64))
        >>> grid.n, grid.views[0].index.shape, grid.views[0].box
        (64, torch.Size([8, 8]), (0.0, 0.0, 64.0, 64.0))
        >>> grid.rasterize(torch.rand(grid.n)).shape
        torch.Size([64, 64])
    """

    n: int
    size: Size
    views: tuple[View, ...]
    sample: int | None = None
    start: int | None = None

    @classmethod
    def from_inputs(
        cls,
        model: nn.Module,
        processor: Any,
        inputs: Mapping[str, Any],
        image_size: Size | Sequence[Size],
        image: int = 0,
    ) -> "TokenGrid":
        """The grid of an image of a batch.

        Args:
            model: a vision-language model of transformers.
            processor: the processor, or its image processor, that made the inputs.
            inputs: all that it returned.
            image_size: height and width of the original image; or those of all images of the batch, in the
                order of the prompts, which is needed where a model cuts images into pictures and is not told
                which belong together (InternVL, Idefics3, SmolVLM, Gemma 3) and there are several images.
            image: which image of the batch.

        Raises:
            ValueError: for a model of no supported family, no images, an image that does not exist, or sizes
                that cannot be those of the pixels.
        """
        family = find_family(model)
        if inputs.get("pixel_values") is None:
            raise ValueError(
                "the inputs hold no image (no pixel_values); pass all that the processor returned"
            )
        if processor is None:
            raise ValueError("processor is None; pass the processor or image processor that made the inputs")
        # what the model itself would be called with
        accepted = inspect.signature(cast(Any, model).model.get_image_features).parameters
        arguments = {name: value for name, value in inputs.items() if name in accepted and value is not None}
        encoded = Encoded("image", arguments, {})
        sizes = _sizes(model, family, encoded, image_size, image)
        layouts = family.layouts(model, encoded, processor, sizes)
        if not 0 <= image < len(layouts):
            raise ValueError(f"image {image} does not exist: the inputs hold images 0 to {len(layouts) - 1}")
        sample = start = None
        if inputs.get("input_ids") is not None:
            here = torch.as_tensor(inputs["input_ids"]) == family.token_ids(model)["image"]
            sample, start = _place(here.cpu(), layouts, image)
        layout = layouts[image]
        return cls(layout.n, sizes[image], layout.views, sample, start)

    def rasterize(self, values: Tensor, kinds: Sequence[str] | None = None, smooth: bool = True) -> Tensor:
        """A map over tokens as a map over pixels.

        Each view is stretched into its box; where several views show a pixel, it has their mean. Pixels that
        no view shows are 0, and newline tokens count for nothing.

        Args:
            values: `[..., n]`.
            kinds: of the views to use; None: all.
            smooth: linear between the middles of cells; otherwise a cell has one value.

        Returns:
            `[..., H, W]`, floating point, on the device of the values.

        Raises:
            ValueError: for another number of values, or kinds that no view has.
        """
        if values.shape[-1:] != (self.n,):
            raise ValueError(
                f"the image has {self.n} tokens, got values of shape {list(values.shape)}"
                + (f"; its columns begin at {self.start}" if self.start else "")
            )
        views = [view for view in self.views if kinds is None or view.kind in kinds]
        if not views:
            have = ", ".join(sorted({view.kind for view in self.views}))
            raise ValueError(f"no view is of kind {', '.join(kinds or ())}; this image has {have}")
        dtype = values.dtype if values.is_floating_point() else torch.float32
        work = torch.promote_types(dtype, torch.float32)
        values, (height, width) = values.to(work), self.size
        total = values.new_zeros(*values.shape[:-1], height, width)
        shown = values.new_zeros(height, width)
        for view in views:
            assert view.box is not None
            x0, y0, x1, y1 = view.box
            rows, columns = view.index.shape
            axis = axis_weights if smooth else _one_cell
            down = axis(height, y0, y1, rows).to(values)
            across = axis(width, x0, x1, columns).to(values)
            cells = values[..., view.index.to(values.device)]
            total += down @ cells @ across.T
            shown += down.sum(1)[:, None].round() * across.sum(1).round()
        return (total / shown.clamp(min=1)).to(dtype)


def _one_cell(pixels: int, start: float, end: float, cells: int) -> Tensor:
    """`[pixels, cells]`: 1 for the cell that holds the middle of a pixel."""
    return (axis_cells(pixels, start, end, cells)[:, None] == torch.arange(cells)).double()


def _sizes(
    model: nn.Module, family: Family, encoded: Encoded, given: Size | Sequence[Size], image: int
) -> list[Size]:
    """Height and width of each image of the call, as far as they matter to the one that is asked for."""
    message = "image_size must be (height, width) in pixels, or a list of these"
    try:
        numbers = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{message}; got {given!r}") from None
    if numbers.shape[-1:] != (2,) or numbers.ndim > 2 or bool((numbers < 1).any()):
        raise ValueError(f"{message}; got {given!r}")
    if numbers.ndim == 2:
        return [(int(height), int(width)) for height, width in numbers.tolist()]
    own = int(numbers[0]), int(numbers[1])
    if not family.one_layout_an_image:
        return [own]
    others = encoded.arguments.get("image_sizes")
    if others is None:
        return [own] * len(family.layouts(model, encoded))
    sizes = [(int(height), int(width)) for height, width in torch.as_tensor(others).tolist()]
    if 0 <= image < len(sizes):
        sizes[image] = own
    return sizes


def _place(here: Tensor, layouts: Sequence[TokenLayout], image: int) -> tuple[int, int]:
    """Row of an image, and how many image tokens stand before it in this row."""
    before, wanted = sum(layout.n for layout in layouts[:image]), sum(layout.n for layout in layouts)
    counts = here.sum(1)
    if int(counts.sum()) != wanted:
        raise ValueError(
            f"the prompts have {int(counts.sum())} tokens for images, but the images of these sizes make "
            f"{wanted}; pass the inputs as the processor returned them, before beams or answers are made"
        )
    ends = counts.cumsum(0)
    sample = int((ends <= before).sum())
    return sample, before - int(ends[sample] - counts[sample])
