"""Real handwritten digits as an image folder.

scikit-learn ships the test half of the UCI "Optical Recognition of Handwritten Digits" set: 1,797 digits of
13 writers, scanned, 8 x 8 pixels of 17 grey levels. They need no download, and written as an image folder
they take the same path through a trainer as ImageNet. The split is by image: a writer may be in all three
parts.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from visionsel.data.folders import write_once

__all__ = ["CLASSES", "write_digits"]

CLASSES = tuple("0123456789")


def write_digits(
    root: str | Path, image_size: int = 32, seed: int = 0, val_ratio: float = 0.1, test_ratio: float = 0.2
) -> Path:
    """Write the digits as `root/{train,val,test}/{0..9}/*.png`, or reuse a folder that has them.

    The folder appears under its name only when it is complete: it is written beside it and renamed.

    Args:
        root: the folder to make.
        image_size: pixels per side; the scans are enlarged bicubically.
        seed: fixes which digit is in which part.
        val_ratio, test_ratio: share of each class in these parts, rounded; the rest is for training.

    Returns:
        `root` as a `Path`.

    Raises:
        ValueError: when the ratios leave nothing to train on, `image_size` is below 8, or `root` holds digits
            written with other settings.
        FileExistsError: when `root` holds something else.
        ImportError: without scikit-learn.
    """
    root = Path(root)
    if image_size < 8:
        raise ValueError(f"image_size must be at least 8, the size of the scans; got {image_size}")
    if val_ratio <= 0 or test_ratio <= 0 or val_ratio + test_ratio >= 1:
        raise ValueError(
            "val_ratio and test_ratio must be above 0 and leave some to train on, "
            f"got {val_ratio} and {test_ratio}"
        )
    card = {"image_size": image_size, "seed": seed, "val_ratio": val_ratio, "test_ratio": test_ratio}

    def write(folder: Path) -> None:
        scans, labels = _load_scans()
        generator = np.random.default_rng(seed)
        for label, name in enumerate(CLASSES):
            order = generator.permutation(np.flatnonzero(labels == label))
            tests, vals = round(test_ratio * len(order)), round(val_ratio * len(order))
            parts = {
                "test": order[:tests],
                "val": order[tests : tests + vals],
                "train": order[tests + vals :],
            }
            for part, indices in parts.items():
                (folder / part / name).mkdir(parents=True)
                for index in indices:
                    pixels = np.round(scans[index] * (255 / 16)).astype(np.uint8)
                    image = Image.fromarray(pixels).resize((image_size, image_size), Image.Resampling.BICUBIC)
                    image.save(folder / part / name / f"{index:04d}.png")

    return write_once(root, "digits.json", card, write)


def _load_scans() -> tuple[np.ndarray, np.ndarray]:
    """`[1797, 8, 8]` in 0..16, and `[1797]`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "visionsel[train]"') from error
    data = load_digits()
    return data.images, data.target
