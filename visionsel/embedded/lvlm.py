"""The small vision-language model of the shapes world: a LLaVA of transformers with an ordinary processor."""

from pathlib import Path
from typing import Any

from visionsel.embedded.files import WEIGHTS
from visionsel.embedded.tokenizer import ASSISTANT, BEGIN, END, IMAGE, USER, build_tokenizer

__all__ = ["CHAT_TEMPLATE", "build_processor", "load_lvlm"]

CHAT_TEMPLATE = (
    f"{{{{ '{BEGIN}' }}}}"
    "{% for message in messages %}"
    "{% set parts = message['content'] %}"
    "{% if parts is string %}{% set parts = [{'type': 'text', 'text': parts}] %}{% endif %}"
    "{% if message['role'] == 'user' %}"
    f"{{% for part in parts if part['type'] == 'image' %}}{IMAGE}{{% endfor %}}{USER}"
    "{% for part in parts if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% elif message['role'] == 'assistant' %}"
    f"{ASSISTANT}"
    "{% for part in parts if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    f"{END}"
    "{% else %}{{ raise_exception('roles are user and assistant, got ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{ASSISTANT}{{% endif %}}"
)
"""A conversation as in training: `<s> image <user> question <assistant> answer </s> <user> question ...`."""

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def build_processor(image_size: int = 64, patch_size: int = 8, class_token: bool = True) -> Any:
    """A `LlavaProcessor` with the word-level tokenizer: images are scaled to their shorter side and cropped.

    Args:
        image_size: pixels a side that the vision tower sees.
        patch_size: pixels a side of an image token.
        class_token: the tower has a class token, which LLaVA drops.

    Raises:
        ImportError: without the extra "multimodal".
    """
    tokenizer = build_tokenizer()
    from transformers import CLIPImageProcessor, LlavaProcessor

    images = CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default" if class_token else "full",
        num_additional_image_tokens=int(class_token),
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def load_lvlm(folder: str | Path | None = None) -> tuple[Any, Any]:
    """The trained model and its processor, from ordinary files of transformers.

    `AutoModelForImageTextToText.from_pretrained` and `AutoProcessor.from_pretrained` on the folder give the
    same. The model describes 64-pixel images of coloured shapes (`describe the image.`) and answers the
    questions of `visionsel.data.shapes`; its card, `README.md` in the folder, says how well. Words outside
    its vocabulary of 96 are read as `<unk>`.

    Args:
        folder: one written by `train.lvlm`; default the one shipped with visionsel.

    Returns:
        A `LlavaForConditionalGeneration` in float32 and evaluation mode, and a `LlavaProcessor` that pads on
        the left.

    Raises:
        ImportError: without the extra "multimodal".
        FileNotFoundError: when the folder lacks the model or the processor.

    Examples:
        >>> from visionsel.data.shapes import ShapesWorld
        >>> from visionsel.embedded import load_lvlm
        >>> scene = ShapesWorld("balanced", seed=1)[0]
        >>> model, processor = load_lvlm()
        >>> content = [{"type": "image"}, {"type": "text", "text": "describe the image."}]
        >>> chat = [{"role": "user", "content": content}]
        >>> prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        >>> inputs = processor(images=scene.image, text=prompt, return_tensors="pt")
        >>> answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        >>> processor.decode(answer, skip_special_tokens=True)
        'a large cyan heart and a large orange triangle and a large orange triangle on a plain background'
    """
    folder = WEIGHTS / "lvlm" if folder is None else Path(folder)
    for name in ("config.json", "model.safetensors", "processor_config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no {name} in {folder}; reinstall visionsel, or train the model again with 'make embedded'"
            )
    try:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        import visionsel.multimodal  # noqa: F401  (registers the tower of a timm backbone)
    except ImportError as error:
        raise ImportError('load_lvlm needs transformers: pip install "visionsel[multimodal]"') from error
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would be there for a hundredth of a second
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)
