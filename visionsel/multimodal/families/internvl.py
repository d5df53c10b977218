"""InternVL: tiles and a thumbnail, each a picture of its own whose patches are merged by pixel shuffle."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from visionsel.multimodal.families.canvas import Canvas
from visionsel.multimodal.families.family import Encoded, Family, TokenLayout
from visionsel.multimodal.families.pictures import Picture, picture_layouts

__all__ = ["InternVL"]


class InternVL(Family):
    """Frames of videos are pictures too."""

    name = "InternVL"
    model_types = ("internvl",)
    has_cls = True
    one_layout_an_image = False

    def tower_layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The layers of InternViT."""
        return model.model.vision_tower.encoder.layer  # type: ignore[union-attr, return-value]

    def tower_attention(self, layer: nn.Module) -> nn.Module:
        """Called `attention` in InternViT."""
        return layer.attention  # type: ignore[return-value]

    def feature_layer(self, model: nn.Module) -> int:
        """The layer whose output is shuffled and projected."""
        config: Any = model.config
        chosen, count = config.vision_feature_layer, len(self.tower_layers(model))
        # hidden state 0 is what enters layer 0, hidden state i is the output of layer i - 1
        return max(0, chosen - 1 if chosen >= 0 else count + chosen)

    def pool(self, model: nn.Module, values: Tensor, encoded: Encoded) -> Tensor:
        """The mean over the square of patches that pixel shuffle puts into one token."""
        side, merge = _grid(model, encoded)
        squares = values.unflatten(0, (-1, side // merge, merge, side // merge, merge))
        return squares.mean((2, 4)).flatten(0, 2)

    def projector(self, model: nn.Module) -> nn.Module:
        """Gets the patches of a token side by side."""
        return model.model.multi_modal_projector  # type: ignore[union-attr, return-value]

    def layouts(
        self,
        model: nn.Module,
        encoded: Encoded,
        processor: Any = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[TokenLayout]:
        """With processor and sizes one layout an image: its tiles, row by row, then its thumbnail.

        Without them one layout a picture, because the call does not say which are of one image.
        """
        config: Any = model.config
        strategy = encoded.arguments.get("vision_feature_select_strategy")
        if (strategy or config.vision_feature_select_strategy) != "default":
            raise ValueError(
                'vision_feature_select_strategy "full" keeps the class token, which cannot be shuffled; '
                'set it to "default"'
            )
        side, merge = _grid(model, encoded)
        pictures = len(encoded.arguments["pixel_values"])
        images: list[list[Picture]] = [[("image", None)]] * pictures
        if processor is not None and sizes is not None:
            images = [_tiles(getattr(processor, "image_processor", processor), size) for size in sizes]
            if sum(map(len, images)) != pictures == len(sizes):  # frames, or crop_to_patches=False
                images = [[("image", Canvas.of(size).box)] for size in sizes]
        return picture_layouts(images, pictures, (side // merge, side // merge))


def _grid(model: nn.Module, encoded: Encoded) -> tuple[int, int]:
    """Patches a side of a picture, and of the square that becomes a token.

    Raises:
        ValueError: for pictures that are not square; the model takes their patches for a square.
    """
    config: Any = model.config
    height, width = encoded.arguments["pixel_values"].shape[-2:]
    if height != width:
        raise ValueError(f"pictures of {height} x {width} pixels; pixel shuffle takes squares")
    return height // config.vision_config.patch_size[0], int(1 / config.downsample_ratio)


def _tiles(images: Any, size: Sequence[int]) -> list[Picture]:
    """The tiles of an image, row by row, and the whole image where there is more than one tile."""
    rows, columns = _tile_grid(images, size)
    canvas = Canvas.of(size).resized(rows, columns)
    if rows * columns == 1:
        return [("image", canvas.box)]
    tiles: list[Picture] = []
    for row in range(rows):
        tiles += [("tile", canvas.cropped(row, column, 1, 1).box) for column in range(columns)]
    return [*tiles, ("thumbnail", canvas.box)]


def _tile_grid(images: Any, size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns nearest to the aspect ratio of the image.

    Of those equally near, one with more tiles wins while its area is below twice the image's.
    """
    (height, width), tile = size, images.size["height"] * images.size["width"]
    most = images.max_patches
    grids = [(rows, columns) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)]
    grids = [grid for grid in grids if grid[0] * grid[1] >= images.min_patches]
    best, distance = (1, 1), float("inf")
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        away = abs(width / height - columns / rows)
        larger = away == distance and height * width > 0.5 * tile * rows * columns
        if away < distance or larger:
            best, distance = (rows, columns), away
    return best
