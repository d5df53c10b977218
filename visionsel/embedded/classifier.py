"""Small classifiers of the ten shapes that ship with the package: timm models, trained from scratch.

Each is a folder of `config.json` and `model.safetensors`, written by `train.shapes_classifier`.
"""

import json
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import nn

from visionsel.data.shapes import Sample
from visionsel.embedded.files import WEIGHTS, read_weights, write_weights

__all__ = ["CLASSIFIERS", "load_classifier", "measure_classifier", "save_classifier"]

CLASSIFIERS = ("biformer", "nat", "selectformer")
_KEYS = ("model", "model_args", "label_names", "input_size", "mean", "std", "interpolation")


def load_classifier(name: str = "selectformer", folder: str | Path | None = None) -> nn.Module:
    """A trained classifier of single shapes, in eval mode.

    Its `pretrained_cfg` says how images are prepared and what the classes are called.

    Args:
        name: "biformer", "nat" or "selectformer".
        folder: of another classifier, written by `save_classifier`; then `name` says nothing. Default is the
            one in the package.

    Raises:
        ValueError: for an unknown name, a configuration that is not whole, or weights that do not fit it.
        FileNotFoundError: when a file is missing.

    Examples:
        >>> import timm, torch
        >>> from visionsel.data.shapes import ShapesWorld
        >>> from visionsel.embedded import load_classifier
        >>> sample = ShapesWorld("balanced", seed=1, max_objects=1)[0]
        >>> model = load_classifier("nat")
        >>> transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
        >>> names = model.pretrained_cfg["label_names"]
        >>> names[model(transform(sample.image)[None]).argmax()], sample.objects[0].shape
        ('triangle', 'triangle')
    """
    if folder is None and name not in CLASSIFIERS:
        raise ValueError(f"unknown classifier {name!r}; choose one of {', '.join(CLASSIFIERS)}")
    folder = WEIGHTS / f"classifier_{name}" if folder is None else Path(folder)
    config = _read_config(folder / "config.json")
    state = read_weights(folder / "model.safetensors")
    overlay = {key: config[key] for key in ("input_size", "mean", "std", "label_names")}
    overlay = {key: tuple(value) for key, value in overlay.items()}
    overlay |= {"interpolation": config["interpolation"], "crop_pct": 1.0}
    overlay |= {"url": None, "tag": "shapes"}  # these are not the weights of the architecture's release
    try:
        model = timm.create_model(
            config["model"],
            num_classes=len(config["label_names"]),
            pretrained_cfg_overlay=overlay,
            **config["model_args"],
        )
        model.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'model.safetensors'} does not fit {config['model']} with model_args "
            f"{config['model_args']} of {folder / 'config.json'}: {' '.join(str(error).split())[:300]}"
        ) from error
    return model.eval()


def save_classifier(
    model: nn.Module,
    folder: str | Path,
    architecture: str,
    model_args: dict[str, Any],
    label_names: Sequence[str],
) -> Path:
    """Write a classifier for `load_classifier`; weights in half precision.

    Args:
        model: a timm model, whose `pretrained_cfg` says the input's size, mean, std and interpolation.
        folder: made if it is not there.
        architecture: the model's timm name.
        model_args: what `timm.create_model` was given beside the name and the number of classes.
        label_names: of the classes, in the order of the logits.

    Returns:
        The folder.

    Raises:
        ValueError: when the number of names is not that of the classes.
    """
    folder = Path(folder)
    classes = model.num_classes
    if len(label_names) != classes:
        raise ValueError(f"{len(label_names)} label_names for a model of {classes} classes")
    data = resolve_data_config(model=model)
    config = {
        "model": architecture,
        "model_args": model_args,
        "num_classes": classes,
        "label_names": list(label_names),
        **{key: data[key] for key in ("input_size", "mean", "std", "interpolation")},
    }
    text = json.dumps(config, indent=2) + "\n"  # what JSON cannot say fails before anything is written
    write_weights(model.state_dict(), folder / "model.safetensors")
    partial = folder / f".config.json.{os.getpid()}"
    try:
        partial.write_text(text)
        partial.rename(folder / "config.json")
    finally:
        partial.unlink(missing_ok=True)
    return folder


@torch.inference_mode()
def measure_classifier(
    model: nn.Module, samples: Iterable[Sample], batch_size: int = 100
) -> dict[str, float | int]:
    """Top-1 accuracy on images of one shape each, and what it is on the easy and the hard ones.

    Args:
        model: from `load_classifier`; it is used in eval mode and left as it was.
        samples: such as `ShapesWorld("balanced", seed, size, max_objects=1)`.
        batch_size: images at a time.

    Returns:
        `{"count", "top1", "solid", "faint", "small", "large"}`; without those of which there is no image.

    Raises:
        ValueError: when there is no sample, one has several objects, or a shape that the model does not know.
    """
    transform = create_transform(**resolve_data_config(model=model))
    names = list(model.pretrained_cfg["label_names"])  # type: ignore[index]
    device = next(model.parameters()).device
    correct: dict[str, list[bool]] = {key: [] for key in ("top1", "solid", "faint", "small", "large")}
    stream, training = iter(samples), model.training
    model.eval()
    try:
        while batch := list(islice(stream, batch_size)):
            _check(batch, names)
            logits = model(torch.stack([transform(sample.image) for sample in batch]).to(device))
            for sample, index in zip(batch, logits.argmax(-1).tolist(), strict=True):
                thing = sample.objects[0]
                for key in ("top1", "faint" if thing.faint else "solid", thing.size):
                    correct[key].append(names[index] == thing.shape)
    finally:
        model.train(training)
    if not correct["top1"]:
        raise ValueError("no samples to measure on")
    shares = {key: sum(values) / len(values) for key, values in correct.items() if values}
    return {"count": len(correct["top1"]), **shares}


def _check(samples: Sequence[Sample], names: list[str]) -> None:
    for sample in samples:
        if len(sample.objects) != 1:
            raise ValueError(
                f"a sample has {len(sample.objects)} objects; a classifier is measured on single ones: "
                'ShapesWorld("balanced", ..., max_objects=1)'
            )
        if sample.objects[0].shape not in names:
            raise ValueError(f"a sample is a {sample.objects[0].shape}, the model knows {', '.join(names)}")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no classifier at {path.parent} (no {path.name}); reinstall visionsel, or train it again with "
            "'make embedded'"
        )
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    missing = [key for key in _KEYS if not isinstance(config, dict) or key not in config]
    if missing:
        raise ValueError(f"{path} is not the configuration of a classifier: it lacks {', '.join(missing)}")
    return config
