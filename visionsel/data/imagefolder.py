"""Image folders: `root/train/<class>/*.jpg`, `root/val/<class>/*.jpg`, read and checked.

Reading is torchvision's `ImageFolder`; what is added is that a broken folder is refused before training
starts, and that a broken image is named.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

__all__ = ["check_image_folder", "class_names", "list_images", "open_image", "read_image_folder"]


def open_image(path: str | Path) -> Image.Image:
    """Read an image as RGB.

    Raises:
        ValueError: naming the file that cannot be read.
        FileNotFoundError: naming the file that is not there.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {path}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not an image that Pillow can read: {error}") from error


def list_images(folder: str | Path) -> list[Path]:
    """Images in a folder and the folders below it, sorted.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when it holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not images:
        raise ValueError(f"{folder} holds no images ({', '.join(IMG_EXTENSIONS)})")
    return images


def class_names(folder: str | Path) -> list[str]:
    """Names of the class folders, sorted; the position is the class index.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when it has no class folders.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no image folder at {folder}; expected one folder a class in it")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise ValueError(f"{folder} has no class folders; expected one folder a class, with images in it")
    return names


def check_image_folder(root: str | Path, splits: Sequence[str], verify: bool = False) -> list[str]:
    """Refuse an image folder that training would stumble over later.

    Args:
        root: holds one folder a split.
        splits: their names, such as `("train", "val")`.
        verify: also decode every image (slow: reads all of it).

    Returns:
        The class names.

    Raises:
        FileNotFoundError: when a split's folder is missing.
        ValueError: naming the split without classes, the class without images, the classes that two splits do
            not share, or, with `verify`, the images that cannot be read.
    """
    names = {split: class_names(Path(root) / split) for split in splits}
    first = splits[0]
    for split in splits[1:]:
        missing = sorted(set(names[first]) - set(names[split]))
        extra = sorted(set(names[split]) - set(names[first]))
        if missing or extra:
            raise ValueError(
                f"{Path(root) / split} does not have the classes of {first}: "
                f"missing {_some(missing)}, only there {_some(extra)}"
            )
    empty = [
        str(Path(root) / split / name)
        for split in splits
        for name in names[split]
        if not any(p.suffix.lower() in IMG_EXTENSIONS for p in (Path(root) / split / name).rglob("*"))
    ]
    if empty:
        raise ValueError(f"class folders without images: {_some(empty)}; fill or remove them")
    if verify:
        broken = [error for split in splits for error in _unreadable(Path(root) / split)]
        if broken:
            raise ValueError(f"{len(broken)} broken images: {_some(broken)}")
    return names[first]


def read_image_folder(
    folder: str | Path, transform: Callable[[Image.Image], Any] | None = None
) -> ImageFolder:
    """torchvision's dataset of a split, with a loader that names the file it cannot read."""
    return ImageFolder(str(folder), transform=transform, loader=open_image)


def _unreadable(folder: Path) -> list[str]:
    errors = []
    for path in list_images(folder):
        try:
            open_image(path)
        except ValueError as error:
            errors.append(str(error))
    return errors


def _some(names: Sequence[str], limit: int = 5) -> str:
    if not names:
        return "none"
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
