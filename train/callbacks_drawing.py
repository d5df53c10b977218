"""Panels of pictures on a sheet, and where a run keeps them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from visionsel.files import whole_file
from visionsel.viz import enlarge

__all__ = ["keep_picture", "pictures_folder", "sheet", "to_images"]

LEAST = 192  # pixels that the longer side of a small image is brought to


def pictures_folder(trainer: Trainer, folder: str | None) -> Path:
    """The folder that was asked for, or `pictures` beside the logs of the run.

    Raises:
        ValueError: when the run has no logs.
    """
    if folder is not None:
        return Path(folder)
    folders = [folder for logger in trainer.loggers if (folder := getattr(logger, "log_dir", None))]
    if not folders:
        raise ValueError("the run keeps no logs; give the callback a folder for its pictures")
    return Path(folders[0]) / "pictures"


def keep_picture(trainer: Trainer, picture: Image.Image, folder: Path, name: str) -> Path:
    """Write a PNG named after epoch and update, and give the picture to TensorBoard; returns the path."""
    path = folder / f"{name}_epoch{trainer.current_epoch:03d}_step{trainer.global_step:06d}.png"
    with whole_file(path) as partial:
        picture.save(partial)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.array(picture), trainer.global_step, dataformats="HWC")
    return path


def to_images(batch: Tensor, preprocessing: dict[str, Any] | None) -> list[Image.Image]:
    """Images that a model saw, as they look.

    Args:
        batch: normalized `[B, 3, H, W]`.
        preprocessing: with `mean` and `std`; None stretches each image from its least to its largest value.
    """
    pixels = batch.detach().float().cpu()
    if preprocessing is not None:
        mean, std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
        pixels = pixels * std + mean
    else:
        low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
        pixels = (pixels - low) / (high - low).clamp(min=1e-12)
    array = (255 * pixels.clamp(0, 1)).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in array]


def enlarged(image: Image.Image) -> Image.Image:
    """A small image with its pixels as squares."""
    return enlarge(image, max(1, LEAST // max(image.size)))


def sheet(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], gap: int = 4) -> Image.Image:
    """Pictures in rows, with a title above each column."""
    font = ImageFont.load_default(11)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widths = [
        max(*(row[column].width for row in rows), int(measure.textlength(title, font=font)) + 2)
        for column, title in enumerate(titles)
    ]
    heights = [max(picture.height for picture in row) for row in rows]
    top = 18
    whole = Image.new(
        "RGB", (sum(widths) + gap * (len(widths) - 1), top + sum(heights) + gap * (len(rows) - 1)), "white"
    )
    draw = ImageDraw.Draw(whole)
    x = 0
    for width, title in zip(widths, titles, strict=True):
        draw.text((x + 1, 3), title, fill="black", font=font)
        x += width + gap
    y = top
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for picture, width in zip(row, widths, strict=True):
            whole.paste(picture, (x, y))
            x += width + gap
        y += height + gap
    return whole
