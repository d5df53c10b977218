"""Answers of vision-language models about an image, with interventions or without: `visionsel generate`."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from visionsel.devices import choose_device
from visionsel.names import near

__all__ = ["Answer", "generate_answer", "load_lvlm", "open_image", "parse_methods", "read_methods"]


@dataclass(frozen=True)
class Answer:
    """What a model said, and what was pruned.

    Attributes:
        answer: the text.
        report: tokens, FLOPs and cache bytes of the prompt, a `visionsel.multimodal.pruning.report.Report`.
        pruned: what the pruners did, with `kept`.
        image: as it was read.
        processor: of the model.
    """

    answer: str
    report: Any
    pruned: Any
    image: Image.Image
    processor: Any

    def picture(self) -> Image.Image:
        """Which patches of the image were kept."""
        return self.pruned.picture(self.image, self.processor)


def load_lvlm(name: str = "embedded", device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """A vision-language model of transformers in evaluation mode, and its processor.

    Args:
        name: `"embedded"` for the small one of the package, else a folder or a name of transformers.
        device: default cuda if there is one, else cpu.
        dtype: of the weights, such as `"bfloat16"`; default what they are stored in.

    Raises:
        ImportError: without the extra "multimodal".
        OSError: when there is no such model.
        ValueError: for a dtype that torch does not have, or a device that this machine does not.
    """
    precision = None if dtype in (None, "auto") else getattr(torch, str(dtype), None)
    if dtype not in (None, "auto") and not (
        isinstance(precision, torch.dtype) and precision.is_floating_point
    ):
        raise ValueError(
            f"dtype must be one of torch such as bfloat16, float16 or float32, or auto; got {dtype!r}"
        )
    where = choose_device(device)
    import visionsel.multimodal  # noqa: F401  (names the extra where transformers is missing)

    if name == "embedded":
        from visionsel.embedded import load_lvlm as load_embedded

        model, processor = load_embedded()
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            with _bars_for_eyes_alone():
                model = AutoModelForImageTextToText.from_pretrained(name)
                processor = AutoProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:  # also for a folder that is not there
            raise OSError(
                f"no vision-language model of transformers is at {name!r}{near(name, ['embedded'])}: {error}"
            ) from error
    return model.eval().to(where, precision), processor


@contextmanager
def _bars_for_eyes_alone() -> Iterator[None]:
    """Bars of transformers are for terminals, not for files."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.inference_mode()
def generate_answer(
    model: Any,
    processor: Any,
    image: str | Path | Image.Image,
    prompt: str,
    prune: Sequence[str] = (),
    max_new_tokens: int = 64,
    modulate: Sequence[str] = (),
    decode: str | None = None,
) -> Answer:
    """Ask a model about an image, greedily.

    Args:
        model, processor: of `load_lvlm`.
        image: a file, or the image.
        prompt: what to say to the model; it becomes the user's turn of the model's chat template.
        prune: pruners as text, such as `"fastv:keep=0.25,layer=2"`; all of them work together.
        max_new_tokens: after which the answer is cut.
        modulate: methods that change attention or heads, such as `"vhr:alpha=2"`; all of them, with the
            pruners.
        decode: a method of decoding, such as `"vcd:alpha=1"` or `"glc"`. `"agla"` needs another model to
            tell what matters in the image: it has the package's CLIP for the package's model, and else a view
            of its own has to be made, see `visionsel.multimodal.decoding.matching_view`.

    Raises:
        FileNotFoundError: when there is no such image.
        ValueError: for a file that is no image, an unknown method, or one that does not fit the model or
            does not go together with the others.

    Examples:
        >>> from visionsel.data.shapes import ShapesWorld
        >>> from visionsel.generation import generate_answer, load_lvlm
        >>> scene = ShapesWorld("balanced", seed=1)[0]
        >>> model, processor = load_lvlm(device="cpu")
        >>> prune = ["fastv:keep=0.5,layer=1"]
        >>> result = generate_answer(model, processor, scene.image, "describe the image.", prune)
        >>> result.answer
        'a large cyan heart and a large orange triangle and a large orange triangle on a plain background'
        >>> result.report.visual_tokens
        (64.0, 32.0, 32.0, 32.0)
    """
    from visionsel.multimodal.intervention import Stack
    from visionsel.multimodal.prompts import chat_inputs, user_turn
    from visionsel.multimodal.pruning.random import RandomPrune

    methods = parse_methods(model, processor, prune, modulate, decode)
    if not prune:  # keeping everything changes nothing, but the report counts
        methods = [RandomPrune(keep=1.0), *methods]
    picture = open_image(image)
    inputs = chat_inputs(processor, [[user_turn(prompt)]], [[picture]]).to(model.device, model.dtype)
    with Stack(*methods)(model) as (pruned, *_):
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    answer = processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    return Answer(answer, pruned.report(), pruned, picture, processor)


def parse_methods(
    model: Any,
    processor: Any,
    prune: Sequence[str] = (),
    modulate: Sequence[str] = (),
    decode: str | None = None,
) -> list[Any]:
    """The interventions that texts name, in the order in which they go on the model: pruners first.

    Args:
        model, processor: of `load_lvlm`; what a method can take from the processor, it is given.
        prune, modulate, decode: as for `generate_answer`.

    Raises:
        ValueError: for an unknown method or hyperparameter.
    """
    methods = read_methods(prune, modulate, decode)
    if decode is not None:
        methods[-1] = _with_view(methods[-1], model, processor)
    return methods


def read_methods(
    prune: Sequence[str] = (), modulate: Sequence[str] = (), decode: str | None = None
) -> list[Any]:
    """The interventions of `parse_methods`, as they are before they know of a model.

    Raises:
        ValueError: for an unknown method or hyperparameter.
    """
    from visionsel.multimodal.decoding import DECODERS
    from visionsel.multimodal.intervention import parse
    from visionsel.multimodal.modulation import MODULATORS
    from visionsel.multimodal.pruning import PRUNERS

    methods = [parse(text, PRUNERS) for text in prune] + [parse(text, MODULATORS) for text in modulate]
    return methods if decode is None else [*methods, parse(decode, DECODERS)]


def _with_view(decoder: Any, model: Any, processor: Any) -> Any:
    """The decoder with its own kind of view, made with what the processor knows better than the model."""
    from visionsel.multimodal.decoding import AGLA, ICD, ChosenTransform, Disturbance, RandomTransform, Ritual

    if getattr(decoder, "view", None) is not None:
        return decoder
    if isinstance(decoder, ICD):
        return replace(decoder, view=Disturbance.of(processor.tokenizer))
    if isinstance(decoder, Ritual):
        if decoder.plus:
            return replace(decoder, view=ChosenTransform.of(model, processor), plus=False)
        return replace(decoder, view=RandomTransform.of(model, processor=processor))
    if isinstance(decoder, AGLA) and _is_embedded(model):
        from visionsel.embedded import load_clip
        from visionsel.multimodal.decoding import ClipMatcher, matching_view

        with torch.inference_mode(False):  # it takes gradients
            clip, _, tokenizer = load_clip()
            matcher = ClipMatcher(clip.to(model.device), tokenizer)
        return replace(decoder, view=matching_view(model, processor, matcher))
    return decoder


def _is_embedded(model: Any) -> bool:
    """Whether it is the model of the package, for whose images the package has a CLIP."""
    from visionsel.embedded.files import WEIGHTS

    name = getattr(model, "name_or_path", "")
    return bool(name) and Path(name).resolve() == (WEIGHTS / "lvlm").resolve()


def open_image(image: str | Path | Image.Image) -> Image.Image:
    """An image in RGB.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file that is no image.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    path = Path(image)
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # as Pillow's formats raise
        raise ValueError(f"{path} is not an image that Pillow can read: {error}") from error
