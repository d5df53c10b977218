"""A small CLIP of the shapes world, through open_clip: a backbone of ours and a text transformer.

    model, preprocess, tokenizer = load_clip()
    images = model.encode_image(preprocess(image)[None], normalize=True)       # [1, 128]
    texts = model.encode_text(tokenizer(["a red star", "a blue ring"]), normalize=True)

The folder of weights has open_clip's own layout: once visionsel is imported, "local-dir:FOLDER" is a name for
`open_clip.create_model_and_transforms` and `open_clip.get_tokenizer` too.
"""

import json
import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import visionsel  # noqa: F401  (registers the image towers with timm)
from visionsel.embedded.files import WEIGHTS, read_weights, write_weights
from visionsel.embedded.tokenizer import BEGIN, END, build_tokenizer

__all__ = [
    "CLIP_NAME",
    "PREPROCESSING",
    "ClipTokenizer",
    "build_clip",
    "clip_config",
    "load_clip",
    "register_open_clip_configs",
    "save_clip",
]

CLIP_NAME = "visionsel_shapes"
PREPROCESSING = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
"""Of images, as open_clip's `preprocess_cfg`; the size is the model's."""

_CONFIGS = Path(__file__).parent / "open_clip_configs"
_CONFIG_FILE, _WEIGHTS_FILE = "open_clip_config.json", "model.safetensors"


class ClipTokenizer:
    """Words to `<s> ... </s>`, padded on the right, called as open_clip's tokenizers are.

    Args:
        context_length: ids of each text, the two marks included.

    Raises:
        ImportError: without the extra "multimodal".
    """

    def __init__(self, context_length: int = 40) -> None:
        self.context_length = context_length
        self.tokenizer = build_tokenizer(padding_side="right")
        from tokenizers.processors import TemplateProcessing

        marks = [(mark, self.tokenizer.convert_tokens_to_ids(mark)) for mark in (BEGIN, END)]
        self.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{BEGIN} $A {END}", special_tokens=marks
        )

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Ids, int64 `[N, context_length]`.

        Raises:
            ValueError: when a text is longer; it would lose its end, at which the text tower is read.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        limit = self.context_length if context_length is None else context_length
        if not texts:
            return torch.empty(0, limit, dtype=torch.int64)
        ids = self.tokenizer(texts)["input_ids"]
        for text, row in zip(texts, ids, strict=True):
            if len(row) > limit:
                raise ValueError(
                    f"a text has {len(row) - 2} words and marks, at most {limit - 2} fit: {text[:80]!r}; "
                    "shorten it"
                )
        padding = self.tokenizer.pad_token_id
        return torch.tensor([row + [padding] * (limit - len(row)) for row in ids])


def register_open_clip_configs() -> None:
    """Make `open_clip.create_model("visionsel_shapes")` work; a second call changes nothing.

    By this name open_clip would choose its own tokenizer; use `ClipTokenizer`.

    Raises:
        ImportError: without the extra "multimodal".
    """
    open_clip = _open_clip()
    if CLIP_NAME not in open_clip.list_models():
        open_clip.add_model_config(_CONFIGS)


def clip_config(name: str = CLIP_NAME) -> dict[str, Any]:
    """The model configuration that visionsel ships under a name, in open_clip's format.

    Raises:
        ValueError: for another name.
    """
    path = _CONFIGS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _CONFIGS.glob("*.json")))
        raise ValueError(f"unknown CLIP configuration {name!r}; choose one of {known}")
    return json.loads(path.read_text())


def build_clip(config: dict[str, Any]) -> nn.Module:
    """A model with random weights from a model configuration, which is not changed.

    Raises:
        ImportError: without the extra "multimodal".
        ValueError: for a configuration that open_clip does not take.
    """
    open_clip = _open_clip()
    arguments = deepcopy(config)
    arguments.pop("custom_text", None)
    try:
        return open_clip.CustomTextCLIP(**arguments)
    except (TypeError, RuntimeError, AssertionError, KeyError) as error:
        raise ValueError(f"open_clip does not take the model configuration {config}: {error}") from error


def load_clip(folder: str | Path | None = None) -> tuple[nn.Module, Callable[..., Tensor], ClipTokenizer]:
    """The trained model in evaluation mode, its preprocessing of PIL images, and its tokenizer.

    Args:
        folder: as `save_clip` writes it; default the weights in the package.

    Returns:
        `model` with `encode_image` (`[B, 3, 64, 64]` -> `[B, 128]`) and `encode_text` (`[N, 40]` ->
        `[N, 128]`), `preprocess` (PIL image -> `[3, 64, 64]`), `tokenizer` (texts -> `[N, 40]`).

    Raises:
        ImportError: without the extra "multimodal".
        FileNotFoundError: when a file is not there.
        ValueError: when a file is damaged, or the weights are not those of the configuration.

    Examples:
        >>> from visionsel.data.shapes import ShapesWorld
        >>> from visionsel.embedded import load_clip
        >>> scene = ShapesWorld("balanced", seed=1)[0]
        >>> model, preprocess, tokenizer = load_clip()
        >>> image = model.encode_image(preprocess(scene.image)[None], normalize=True)
        >>> texts = model.encode_text(tokenizer([scene.captions[0], "a small pink moon"]), normalize=True)
        >>> int((image @ texts.T).argmax())
        0
    """
    open_clip = _open_clip()
    folder = WEIGHTS / "clip" if folder is None else Path(folder)
    path = folder / _CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no CLIP at {folder}: {_CONFIG_FILE} is missing; "
            "reinstall visionsel, or train it again with 'make embedded'"
        )
    try:
        written = json.loads(path.read_text())
        config, preprocessing = written["model_cfg"], written["preprocess_cfg"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a configuration of open_clip, or is cut off: {error}") from error
    state = read_weights(folder / _WEIGHTS_FILE)
    model = build_clip(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{folder / _WEIGHTS_FILE} holds other weights than {path} describes: {error}"
        ) from error
    size = config["vision_cfg"]["image_size"]
    preprocessing = {**preprocessing, "size": (size, size)}
    open_clip.model.set_model_preprocess_cfg(model, preprocessing)
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**preprocessing), is_train=False
    )
    return model.eval(), transform, ClipTokenizer(config["text_cfg"]["context_length"])


def save_clip(model: nn.Module, config: dict[str, Any], folder: str | Path | None = None) -> Path:
    """Write configuration, tokenizer and weights (half precision); each file appears when it is complete.

    Args:
        model: built from `config`.
        config: the model configuration.
        folder: default the one in the package.

    Returns:
        The folder.

    Raises:
        ImportError: without the extra "multimodal".
    """
    folder = WEIGHTS / "clip" if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = deepcopy(config)
    # open_clip reads the tokenizer beside the configuration when any name is given
    config["text_cfg"]["hf_tokenizer_name"] = CLIP_NAME
    config["vision_cfg"]["timm_model_pretrained"] = False
    with TemporaryDirectory(prefix=".partial", dir=folder) as partial:
        ClipTokenizer().tokenizer.save_pretrained(partial)
        text = json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESSING}, indent=2)
        (Path(partial) / _CONFIG_FILE).write_text(f"{text}\n")
        for path in sorted(Path(partial).iterdir()):
            os.replace(path, folder / path.name)
    write_weights(model.state_dict(), folder / _WEIGHTS_FILE)
    return folder


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError('the small CLIP needs open_clip: pip install "visionsel[multimodal]"') from error
    return open_clip
