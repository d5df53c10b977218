"""What is measured of a segmentation: mIoU, mAcc and aAcc of all pixels of a split together.

As in mmsegmentation, one confusion matrix is counted over the whole split, and the measures come from it:

- IoU of a class: intersection over union of its true and its predicted pixels; a class that is neither in the
  truth nor in any prediction has none, and mIoU is the mean over the others;
- accuracy of a class: the share of its true pixels that are found; mAcc is the mean over classes in the
  truth;
- aAcc: the share of all labelled pixels that are right.

Unlabelled pixels (255) count nowhere.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from visionsel.files import whole_file

__all__ = ["class_measures", "mean_measures", "write_class_table"]


def class_measures(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and accuracy of each class, NaN where a class has none.

    Args:
        confusion: pixels `[classes, classes]`, truth by row, prediction by column.

    Returns:
        Two float64 `[classes]`.
    """
    counts = confusion.double()
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    return right / (true + predicted - right), right / true


def mean_measures(confusion: Tensor) -> dict[str, float]:
    """`{"miou", "macc", "aacc"}` of a confusion matrix.

    Raises:
        ValueError: when it counts no pixel.
    """
    if not confusion.sum():
        raise ValueError("there is no labelled pixel to measure on")
    iou, accuracy = class_measures(confusion)
    return {
        "miou": float(iou.nanmean()),
        "macc": float(accuracy.nanmean()),
        "aacc": float(confusion.diagonal().sum() / confusion.sum()),
    }


def write_class_table(path: str | Path, names: Sequence[str], confusion: Tensor) -> Path:
    """Write IoU, accuracy and true pixels of each class as CSV; returns the path."""
    iou, accuracy = (
        ["" if torch.isnan(value) else f"{value:.4f}" for value in part] for part in class_measures(confusion)
    )
    with whole_file(path) as partial, partial.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["class", "iou", "accuracy", "pixels"])
        writer.writerows(zip(names, iou, accuracy, confusion.sum(1).tolist(), strict=True))
    return Path(path)
