"""Label maps as pictures and as files."""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image, ImageDraw, ImageFont

from train.segmentation_transforms import IGNORED
from visionsel.data.imagefolder import open_image
from visionsel.files import whole_file
from visionsel.viz import OKABE_ITO, overlay_masks

__all__ = ["WritePredictions", "class_colors", "draw_labels", "save_label_map"]


def class_colors(classes: int) -> list[str]:
    """Colours of classes: first those that every kind of colour vision tells apart, then a wheel of hues."""
    colors = list(OKABE_ITO.values())[:classes]
    for index in range(classes - len(colors)):
        hue, level = index * 0.618034 % 1, (0.95, 0.7, 0.45)[index % 3]  # steps of the golden ratio
        rgb = colorsys.hsv_to_rgb(hue, 0.75, level)
        colors.append("#" + "".join(f"{round(255 * part):02x}" for part in rgb))
    return colors


def draw_labels(
    image: Image.Image, labels: np.ndarray, names: Sequence[str], alpha: float = 0.6, legend: bool = True
) -> Image.Image:
    """A grey image under the colours of its labels, with the names of the classes that it has beside it.

    Args:
        image: of `[H, W]` pixels.
        labels: integers `[H, W]`; 255, and what is no class, stays grey.
        names: of the classes.
        alpha: share of the colour.
        legend: add the strip of names, those with most pixels first, as many as there is room for.

    Raises:
        ValueError: when the sizes differ.
    """
    if labels.shape != (image.height, image.width):
        raise ValueError(
            f"labels are [{image.height}, {image.width}] like the image, got {list(labels.shape)}"
        )
    colors = class_colors(len(names))
    found, counts = np.unique(labels, return_counts=True)
    order = [int(k) for k in found[np.argsort(-counts, kind="stable")] if k < len(names)]
    grey = image.convert("L")
    picture = overlay_masks(grey, [labels == k for k in order], [colors[k] for k in order], alpha)
    if not legend:
        return picture
    font, line = ImageFont.load_default(10), 14
    shown = order[: max(1, picture.height // line)]
    width = max((int(ImageDraw.Draw(picture).textlength(names[k], font=font)) for k in shown), default=0)
    whole = Image.new("RGB", (picture.width + width + 22, picture.height), "white")
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for row, index in enumerate(shown):
        x, y = picture.width + 4, row * line + 2
        draw.rectangle((x, y, x + 10, y + 10), fill=colors[index])
        draw.text((x + 14, y - 1), names[index], fill="black", font=font)
    return whole


def save_label_map(path: str | Path, labels: np.ndarray, classes: int, reduce_zero_label: bool) -> Path:
    """Write a label map as the PNG that it would be in the data set, with colours for viewers.

    Args:
        path: of the file.
        labels: uint8 `[H, W]`, below `classes`.
        classes: number of classes.
        reduce_zero_label: write class k as k + 1, as ADE20K does.

    Returns:
        The path.
    """
    image = Image.fromarray(labels.astype(np.uint8) + np.uint8(reduce_zero_label)).convert("P")
    colors = ["#000000"] * reduce_zero_label + class_colors(classes)
    image.putpalette([int(color[i : i + 2], 16) for color in colors[: IGNORED + 1] for i in (1, 3, 5)])
    with whole_file(path) as partial:
        image.save(partial)
    return Path(path)


class WritePredictions(Callback):
    """Writes the label map of each image that `SegmentationData` gave to predict, under the image's name.

    Args:
        folder: where to write.
        class_names: of the data.
        reduce_zero_label: see `save_label_map`.
        pictures: a folder for the images under their labels; None draws none.
    """

    def __init__(
        self,
        folder: Path,
        class_names: Sequence[str],
        reduce_zero_label: bool,
        pictures: Path | None = None,
    ) -> None:
        self.folder = folder
        self.class_names = class_names
        self.reduce_zero_label = reduce_zero_label
        self.pictures = pictures
        self.written = 0

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the maps of a batch: positions and labels."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        for position, labels in outputs:
            name, found = data.predict_names[position], labels.to(torch.uint8).cpu().numpy()
            save_label_map(self.folder / name, found, len(self.class_names), self.reduce_zero_label)
            if self.pictures is not None:
                picture = draw_labels(open_image(data.predict_files[position]), found, self.class_names)
                with whole_file(self.pictures / name) as partial:
                    picture.save(partial)
            self.written += 1
