"""Tiny random models of every supported family, and batches for them, without a processor."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

PAD, START, END, VIDEO, IMAGE, VOCABULARY = 0, 96, 97, 98, 99, 100
LAYERS = 4
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32], [16, 48]]
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START}


def _clip(side: int = 16) -> tf.CLIPVisionConfig:
    return tf.CLIPVisionConfig(**TOWER, image_size=side, patch_size=4, projection_dim=32)


def _siglip(side: int = 16) -> tf.SiglipVisionConfig:
    return tf.SiglipVisionConfig(**TOWER, image_size=side, patch_size=4, vision_use_head=False)


def _llava() -> nn.Module:
    config = tf.LlavaConfig(vision_config=_clip(), text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE)
    return tf.LlavaForConditionalGeneration(config)


def _llava_next() -> nn.Module:
    config = tf.LlavaNextConfig(
        vision_config=_clip(),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    return tf.LlavaNextForConditionalGeneration(config)


def _llava_onevision() -> nn.Module:
    config = tf.LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=PINPOINTS,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config)


def _rope(sections: Sequence[int], **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}
    return TEXT | {"rope_parameters": rope}


QWEN_TOWER = {"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _qwen2_vl() -> nn.Module:
    vision = QWEN_TOWER | {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    config = tf.Qwen2VLConfig(
        vision_config=vision, text_config=_rope((2, 3, 3)), vision_end_token_id=END, **IDS
    )
    return tf.Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl() -> nn.Module:
    vision = QWEN_TOWER | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    config = tf.Qwen2_5_VLConfig(
        vision_config=vision, text_config=_rope((2, 3, 3)), vision_end_token_id=END, **IDS
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> nn.Module:
    vision = QWEN_TOWER | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = _rope((4, 2, 2), mrope_interleaved=True) | {"head_dim": 16}
    config = tf.Qwen3VLConfig(vision_config=vision, text_config=text, vision_end_token_id=END, **IDS)
    return tf.Qwen3VLForConditionalGeneration(config)


def _internvl() -> nn.Module:
    config = tf.InternVLConfig(
        vision_config=TOWER | {"image_size": [32, 32], "patch_size": [4, 4]},
        text_config=tf.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
    )
    return tf.InternVLForConditionalGeneration(config)


def _connected(config_class: Any, model_class: Any) -> nn.Module:
    config = config_class(
        vision_config=TOWER | {"image_size": 32, "patch_size": 4},
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    return model_class(config)


def _smolvlm() -> nn.Module:
    return _connected(tf.SmolVLMConfig, tf.SmolVLMForConditionalGeneration)


def _idefics3() -> nn.Module:
    return _connected(tf.Idefics3Config, tf.Idefics3ForConditionalGeneration)


def _gemma3() -> nn.Module:
    text = TEXT | {
        "head_dim": 16,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    config = tf.Gemma3Config(
        vision_config=_siglip(32),
        text_config=tf.Gemma3TextConfig(**text),
        image_token_id=IMAGE,
        mm_tokens_per_image=16,
    )
    return tf.Gemma3ForConditionalGeneration(config)


def _paligemma() -> nn.Module:
    vision = _siglip()
    vision.projection_dim = 64
    config = tf.PaliGemmaConfig(
        vision_config=vision,
        text_config=tf.GemmaConfig(**TEXT | {"head_dim": 16}),
        image_token_id=IMAGE,
        projection_dim=64,
    )
    return tf.PaliGemmaForConditionalGeneration(config)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "smolvlm": _smolvlm,
    "idefics3": _idefics3,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
}
FAMILIES = tuple(BUILDERS)
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
WITH_VIDEO = ("llava_onevision", *QWEN)
DYNAMIC = ("llava_next", "llava_onevision", *QWEN)  # more tokens for larger images
SIDES = {"internvl": 32, "smolvlm": 32, "idefics3": 32, "gemma3": 32}  # of a crop; 16 elsewhere
SIZES = {"llava_next": ((16, 40), (40, 24)), "llava_onevision": ((16, 40), (40, 24))}  # height, width


def make_model(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A random model in eval mode: four decoder layers of width 64, three tower layers, no end token.

    Weights are larger than at initialisation, so that attention is far from uniform and greedy tokens win
    by a margin. Padding and special tokens have logit 0: they are never generated.
    """
    torch.manual_seed(seed)
    model: Any = BUILDERS[name]().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
        model.get_output_embeddings().weight[[PAD, START, END, VIDEO, IMAGE]] = 0
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def make_inputs(
    name: str,
    batch: int = 2,
    before: Sequence[int] = (3, 6),
    after: Sequence[int] = (5, 4),
    images: int | Sequence[int] = 1,
    seed: int = 1,
    dtype: torch.dtype = torch.float64,
    video: bool = False,
    image_sizes: Sequence[tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """A left-padded batch: text, images, a video, text.

    Args:
        name: of the family.
        batch: samples.
        before: text tokens of each sample before its images, repeated cyclically as `after`, `images` and
            `image_sizes` are.
        after: text tokens after them.
        images: how many, for all samples or for each.
        seed: of tokens and pixels.
        dtype: of the pixels.
        video: whether each sample has a video of four frames too.
        image_sizes: height and width of each image of the batch in pixels (multiples of 8 for Qwen), for the
            families in `DYNAMIC`; by default two different ones in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = [images] * batch if isinstance(images, int) else [images[b % len(images)] for b in range(batch)]
    total = sum(numbers)
    sizes = image_sizes or SIZES.get(name, ((32, 40), (24, 32)))
    pixels = _images(name, numbers, [sizes[i % len(sizes)] for i in range(total)], generator, dtype)
    runs = {"image": _runs(name, "image", pixels, total)}
    if video:
        pixels_video = _videos(name, batch, generator, dtype)
        runs["video"] = _runs(name, "video", pixels_video, batch)
        pixels |= pixels_video
    rows = []
    for b in range(batch):
        first = sum(numbers[:b])
        row = _text(before[b % len(before)], generator)
        row += [token for run in runs["image"][first : first + numbers[b]] for token in run]
        row += runs["video"][b] if video else []
        rows.append(row + _text(after[b % len(after)], generator))
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask, **pixels}
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if name == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if "mm_token_type_ids" in inspect.signature(_counter(name).forward).parameters:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return inputs


def grow(inputs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """The batch with tokens `[B, T]` appended, as if they had been generated."""
    ids = inputs["input_ids"]
    grown = inputs | {
        "input_ids": torch.cat((ids, tokens), 1),
        "attention_mask": torch.cat((inputs["attention_mask"], torch.ones_like(tokens)), 1),
    }
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        grown["mm_token_type_ids"] = torch.cat((types, torch.zeros_like(tokens, dtype=types.dtype)), 1)
    if "token_type_ids" in inputs:
        types = inputs["token_type_ids"]
        marks_images = torch.equal(types == 1, ids == IMAGE)  # Gemma3; PaliGemma marks the prefix by 0
        value = 0 if marks_images else 1
        grown["token_type_ids"] = torch.cat((types, torch.full_like(tokens, value, dtype=types.dtype)), 1)
    return grown


def _text(number: int, generator: torch.Generator) -> list[int]:
    return torch.randint(2, 90, (number,), generator=generator).tolist()


@lru_cache
def _counter(name: str) -> Any:
    """A model that is only asked how many tokens an image has."""
    return make_model(name)


def _images(
    name: str,
    numbers: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    generator: torch.Generator,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The tensors that a processor makes of the images; empty without images."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    total, side = len(sizes), SIDES.get(name, 16)
    if total == 0:
        return {}
    if name in QWEN:
        grid = torch.tensor([[1, h // 4, w // 4] for h, w in sizes])
        return {"pixel_values": noise(int(grid.prod(1).sum()), 3 * 2 * 4 * 4), "image_grid_thw": grid}
    if name in ("smolvlm", "idefics3"):
        pixels = torch.zeros(len(numbers), max(numbers), 3, side, side, dtype=dtype)
        for b, number in enumerate(numbers):
            pixels[b, :number] = noise(number, 3, side, side)
        return {
            "pixel_values": pixels,
            "pixel_attention_mask": torch.ones(len(numbers), max(numbers), side, side, dtype=torch.long),
        }
    if name not in ("llava_next", "llava_onevision"):
        return {"pixel_values": noise(total, 3, side, side)}
    extra = {"image_sizes": torch.tensor(sizes)}
    tiles = [image_size_to_num_patches(size, PINPOINTS, side) for size in sizes]
    if name == "llava_onevision":  # samples with several images have no tiles
        extra["batch_num_images"] = torch.tensor([number for number in numbers if number])
        alone = [number == 1 for number in numbers for _ in range(number)]
        tiles = [tile if one else 1 for tile, one in zip(tiles, alone, strict=True)]
    pixels = torch.zeros(total, max(tiles), 3, side, side, dtype=dtype)
    for i, tile in enumerate(tiles):
        pixels[i, :tile] = noise(tile, 3, side, side)
    return {"pixel_values": pixels, **extra}


def _videos(name: str, batch: int, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Any]:
    """A video of four frames for each sample."""
    if name == "llava_onevision":
        pixels = torch.randn(batch, 4, 3, 16, 16, generator=generator, dtype=dtype)
        return {"pixel_values_videos": pixels}
    if name in QWEN:
        grid = torch.tensor([[2, 4, 6 + 2 * (b % 2)] for b in range(batch)])
        pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator, dtype=dtype)
        return {"pixel_values_videos": pixels, "video_grid_thw": grid}
    raise ValueError(f"{name} has no videos; those with videos are {', '.join(WITH_VIDEO)}")


def _runs(name: str, modality: str, pixels: dict[str, Any], number: int) -> list[list[int]]:
    """The prompt tokens of each image or video; how many, the model itself says."""
    if not pixels:
        return []
    model, token = _counter(name), IMAGE if modality == "image" else VIDEO
    if name == "llava_onevision" and modality == "video":  # versions add the newline at different places
        return [[token] * (4 * 2 * 2 + 1)] * number
    with torch.no_grad():
        method = model.model.get_image_features if modality == "image" else model.model.get_video_features
        wide = {k: v.double() if v.is_floating_point() else v for k, v in pixels.items()}
        features = method(**wide, return_dict=True).pooler_output
    if name in ("smolvlm", "idefics3"):  # one entry per sample or one per crop, by version
        counts = [sum(len(f.flatten(0, -2)) for f in features) // number] * number
    else:
        counts = [len(feature) for feature in features]
    if name == "qwen3_vl" and modality == "video":  # each frame has its own start and end, behind a timestamp
        frames = pixels["video_grid_thw"][:, 0].tolist()
        return [
            ([90] + [START] + [token] * (count // f) + [END]) * f
            for count, f in zip(counts, frames, strict=True)
        ]
    if name in (*QWEN, "gemma3", "smolvlm", "idefics3"):
        return [[START] + [token] * count + [END] for count in counts]
    return [[token] * count for count in counts]


def alone(inputs: Mapping[str, Any], row: int) -> dict[str, Any]:
    """One sample of a batch with an image each, without padding."""
    start = int((inputs["attention_mask"][row] == 0).sum())
    one: dict[str, Any] = {}
    for key, value in inputs.items():
        if key == "pixel_values" and "image_grid_thw" in inputs:
            one[key] = value.split(inputs["image_grid_thw"].prod(1).tolist())[row]
        elif value.shape == inputs["input_ids"].shape:
            one[key] = value[row : row + 1, start:]
        else:
            one[key] = value[row : row + 1]
    return one
