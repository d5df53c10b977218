"""Real handwritten digits as an image folder.

scikit-learn ships the test half of the UCI "Optical Recognition of Handwritten Digits" set: 1,797 digits of
13 writers, scanned, 8 x 8 pixels of 17 grey levels. They need no download, and written as an image folder
they take the same path through a trainer as ImageNet. The split is by image: a writer may be in all three
parts.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["CLASSES", "write_digits"]

CLASSES = tuple("0123456789")
_CARD = "digits.json"


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
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        _check_existing(root, card)
        return root

    scans, labels = _load_scans()
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
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
                folder = partial / part / name
                folder.mkdir(parents=True)
                for index in indices:
                    pixels = np.round(scans[index] * (255 / 16)).astype(np.uint8)
                    image = Image.fromarray(pixels).resize((image_size, image_size), Image.Resampling.BICUBIC)
                    image.save(folder / f"{index:04d}.png")
        (partial / _CARD).write_text(json.dumps(card, indent=2) + "\n")
        partial.chmod(0o755)  # mkdtemp makes it private
        if root.exists():
            root.rmdir()  # empty, as checked above
        try:
            os.rename(partial, root)
        except OSError:  # another process was first
            _check_existing(root, card)
            shutil.rmtree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return root


def _check_existing(root: Path, card: dict[str, Any]) -> None:
    try:
        found = json.loads((root / _CARD).read_text())
    except (OSError, ValueError):
        raise FileExistsError(
            f"{root} exists and was not written by write_digits; name another folder"
        ) from None
    if found != card:
        raise ValueError(
            f"{root} holds digits written with {found}, not {card}; delete it or name another folder"
        )


def _load_scans() -> tuple[np.ndarray, np.ndarray]:
    """`[1797, 8, 8]` in 0..16, and `[1797]`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "visionsel[train]"') from error
    data = load_digits()
    return data.images, data.target
