"""Classify images with a registered model and a file of weights; what `visionsel predict` does."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionsel.devices import choose_device
from visionsel.generation import open_image
from visionsel.names import near


@dataclass
class Classifier:
    """A model in evaluation mode with the transform and the class labels that belong to it."""

    model: nn.Module
    transform: Any
    labels: list[str]
    device: torch.device


def load_classifier(
    name: str | None, checkpoint: Path | None = None, device: str | torch.device | None = None
) -> Classifier:
    """Build a classifier from a model name, a file of weights, or both.

    Args:
        name: a timm model name; not needed when `checkpoint` is one of `train.classification`.
        checkpoint: the authors' file, a safetensors file, or a checkpoint of `train.classification`. None
            downloads the release that the name's tag stands for.
        device: default cuda if there is one, else cpu.

    Raises:
        ValueError: when the model has no released weights, file and model do not fit, or this machine has no
            such device.
        FileNotFoundError: when there is no such checkpoint.
    """
    import timm
    from timm.data import create_transform, resolve_data_config

    import visionsel.models  # noqa: F401  (registers the names)

    if name is None and checkpoint is None:
        raise ValueError("name a model, or a training checkpoint with --checkpoint")
    chosen = choose_device(device)
    if name is not None:
        _check_name(name)
    if checkpoint is not None and not checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint at {checkpoint}")
    model: Any
    trained = _read_training_checkpoint(checkpoint) if checkpoint is not None else None
    if trained is not None:
        recipe = trained["hyper_parameters"]
        if name not in (None, recipe["model"]):
            raise ValueError(
                f"{checkpoint} holds a {recipe['model']}, not a {name}; leave out the name of the model"
            )
        labels = list(recipe["class_names"])
        model = timm.create_model(
            recipe["model"],
            num_classes=len(labels),
            pretrained_cfg_overlay=recipe["preprocessing"],
            **recipe["model_args"] or {},
        )
        prefix = "net."
        weights = trained["state_dict"].items()
        model.load_state_dict({k.removeprefix(prefix): v for k, v in weights if k.startswith(prefix)})
    elif checkpoint is not None:
        if name is None:
            raise ValueError(f"{checkpoint} does not name its model; name it too")
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(checkpoint)})
        labels = _imagenet_labels(model.num_classes)
    else:
        elsewhere = ":" in str(name)  # in a folder or on the hub, with labels of its own
        cfg = None if elsewhere else timm.get_pretrained_cfg(str(name))
        if not elsewhere and (cfg is None or not cfg.has_weights):
            raise ValueError(f"no weights of {name} were released; give your own with --checkpoint")
        model = timm.create_model(str(name), pretrained=True)
        labels = list(model.pretrained_cfg.get("label_names") or _imagenet_labels(model.num_classes))
    transform = create_transform(**resolve_data_config({}, model=model), is_training=False)
    return Classifier(model.eval().to(chosen), transform, labels, chosen)


def _check_name(name: str) -> None:
    """Refuse a name that timm does not know, with those near it."""
    import timm

    architecture, _, tag = name.partition(".")
    if ":" in name:  # of another place, as hf-hub:NAME
        return
    if not timm.is_model(architecture):
        raise ValueError(
            f"unknown model {name!r}{near(architecture, timm.list_models())}; "
            "'visionsel models' lists ours, timm.list_models() all"
        )
    releases = timm.list_models(f"{architecture}.*", include_tags=True)
    if tag and name not in releases:
        raise ValueError(f"unknown release {name!r}; {architecture} has {', '.join(releases) or 'none'}")


def predict_images(classifier: Classifier, paths: Sequence[Path], topk: int = 5) -> list[dict[str, Any]]:
    """The likeliest classes of each image: `[{"image", "classes": [{"label", "index", "probability"}]}]`.

    All images are opened before the first is classified, so that a broken one costs nothing.

    Raises:
        ValueError: when `topk` is below 1, or naming the file that is not an image.
        FileNotFoundError: naming the file that is not there.
    """
    if topk < 1:
        raise ValueError(f"topk must be at least 1, got {topk}")
    inputs = [classifier.transform(open_image(path)) for path in paths]
    results = []
    for path, image in zip(paths, inputs, strict=True):
        with torch.inference_mode():
            logits: Tensor = classifier.model(image[None].to(classifier.device))[0]
        probabilities, indices = logits.float().softmax(0).topk(min(topk, logits.numel()))
        classes = [
            {"label": classifier.labels[index], "index": index, "probability": round(probability, 6)}
            for probability, index in zip(probabilities.tolist(), indices.tolist(), strict=True)
        ]
        results.append({"image": str(path), "classes": classes})
    return results


def _read_training_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint if `train.classification` wrote it; None if it is a bare release."""
    if path.suffix == ".safetensors":
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a readable checkpoint (damaged, or not weights only): {error}"
        ) from error
    wanted = {"hyper_parameters", "state_dict"}
    return checkpoint if isinstance(checkpoint, dict) and wanted <= checkpoint.keys() else None


def _imagenet_labels(num_classes: int) -> list[str]:
    from timm.data import ImageNetInfo

    if num_classes == 1000:
        info = ImageNetInfo("imagenet-1k")
        return [info.index_to_description(i) for i in range(num_classes)]
    return [f"class {i}" for i in range(num_classes)]
