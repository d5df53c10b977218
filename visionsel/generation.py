"""Answers of vision-language models about an image, with interventions or without: `visionsel generate`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError

__all__ = ["Answer", "generate_answer", "load_lvlm"]


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


def load_lvlm(name: str = "embedded", device: str | None = None) -> tuple[Any, Any]:
    """A vision-language model of transformers in evaluation mode, and its processor.

    Args:
        name: `"embedded"` for the small one of the package, else a folder or a name of transformers.
        device: default cuda if there is one, else cpu.

    Raises:
        ImportError: without the extra "multimodal".
        OSError: when there is no such model.
    """
    import visionsel.multimodal  # noqa: F401  (names the extra where transformers is missing)

    if name == "embedded":
        from visionsel.embedded import load_lvlm as load_embedded

        model, processor = load_embedded()
    else:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained(name)
        processor = AutoProcessor.from_pretrained(name)
    return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor


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
        decode: a method of decoding with two views, such as `"vcd:alpha=1"`.

    Raises:
        FileNotFoundError: when there is no such image.
        ValueError: for a file that is no image, an unknown method, or one that does not fit the model or
            does not go together with the others.
    """
    from visionsel.multimodal.decoding import DECODERS
    from visionsel.multimodal.intervention import Stack, parse
    from visionsel.multimodal.modulation import MODULATORS
    from visionsel.multimodal.pruning import PRUNERS
    from visionsel.multimodal.pruning.random import RandomPrune

    # keeping everything changes nothing, but the report counts
    methods = [parse(text, PRUNERS) for text in prune] or [RandomPrune(keep=1.0)]
    methods += [parse(text, MODULATORS) for text in modulate]
    if decode is not None:
        methods.append(_with_view(parse(decode, DECODERS), model, processor))
    picture = _open(image)
    inputs = processor(images=[picture], text=[_chat(processor, prompt)], return_tensors="pt").to(
        model.device
    )
    if torch.is_floating_point(pixels := inputs["pixel_values"]):
        inputs["pixel_values"] = pixels.to(model.dtype)
    with Stack(*methods)(model) as (pruned, *_):
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    answer = processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    return Answer(answer, pruned.report(), pruned, picture, processor)


def _with_view(decoder: Any, model: Any, processor: Any) -> Any:
    """The decoder with its own kind of view, made with what the processor knows better than the model."""
    from visionsel.multimodal.decoding import ICD, Disturbance, RandomTransform, Ritual

    if isinstance(decoder, ICD) and decoder.view is None:
        return replace(decoder, view=Disturbance.of(processor.tokenizer))
    if isinstance(decoder, Ritual) and decoder.view is None:
        return replace(decoder, view=RandomTransform.of(model, processor=processor))
    return decoder


def _open(image: str | Path | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    path = Path(image)
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is not an image, or is cut off") from error


def _chat(processor: Any, prompt: str) -> str:
    """The prompt as one turn with an image; models without a chat template get the image, then the text."""
    from visionsel.multimodal.prompts import chat_texts

    if getattr(processor, "chat_template", None) is None:
        return f"{getattr(processor, 'image_token', '<image>')}{prompt}"
    return chat_texts(processor, [prompt])[0]
