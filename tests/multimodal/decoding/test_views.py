"""Views change what they say and nothing else, and each sample's is its own in any batch."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as pictures
from transformers import Qwen2VLImageProcessor

from tests.multimodal.decoding.restated import CONFUSION, confused, single, without_image
from tests.multimodal.runs import tiny
from tests.multimodal.tiny import FAMILIES, IMAGE, PAD, QWEN, VIDEO, WITH_VIDEO, make_inputs
from visionsel.multimodal.decoding.views import (
    KINDS,
    DiffusionNoise,
    Disturbance,
    RandomTransform,
    RemoveImages,
    diffusion_share,
    from_patches,
    to_patches,
)

ONE_IMAGE = tuple(name for name in FAMILIES if name not in ("llava_next", "llava_onevision"))


def pixels_of(name: str, inputs: dict[str, Any], row: int) -> Tensor:
    one = single(name, inputs, row)["pixel_values"]
    assert torch.is_tensor(one)
    return one


# noise


def test_the_share_of_the_image_is_the_published_schedule() -> None:
    share, expected = 1.0, {}
    for step in range(1000):
        place = -6 + 12 * step / 999
        share *= 1 - ((5e-3 - 1e-5) / (1 + math.exp(-place)) + 1e-5)
        expected[step] = share
    for step in (0, 1, 500, 999):
        assert diffusion_share(step) == pytest.approx(expected[step], rel=1e-6)
    assert diffusion_share(0) == pytest.approx(1 - 2.234e-5, abs=1e-7)


def test_noise_has_the_variance_that_the_image_lost() -> None:
    image = torch.full((1, 3, 64, 64), 2.0, dtype=torch.float64)
    noised = DiffusionNoise(600)({"pixel_values": image})["pixel_values"]
    share = diffusion_share(600)
    assert float(noised.mean()) == pytest.approx(2 * share**0.5, abs=0.05)
    assert float(noised.var()) == pytest.approx(1 - share, abs=0.05)


def test_the_noise_belongs_to_the_seed_and_the_image() -> None:
    inputs = make_inputs("llava")
    first = DiffusionNoise()(inputs)["pixel_values"]
    assert torch.equal(first, DiffusionNoise()(inputs)["pixel_values"])
    assert not torch.equal(first, DiffusionNoise(seed=1)(inputs)["pixel_values"])
    noise = first - diffusion_share(500) ** 0.5 * inputs["pixel_values"]
    assert not torch.allclose(noise[0], noise[1])


@pytest.mark.parametrize("step", [-1, 1000])
def test_steps_that_do_not_exist_are_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"from 0 to 999, got {step}"):
        DiffusionNoise(step)


@pytest.mark.parametrize("name", FAMILIES)
def test_only_pixels_change_and_padding_crops_stay_empty(name: str) -> None:
    images = (1, 2) if name in ("smolvlm", "idefics3") else 1
    inputs = make_inputs(name, images=images)
    before = {key: value.clone() for key, value in inputs.items()}
    for view in (DiffusionNoise(), RandomTransform.of(tiny(name), kinds=("hflip",))):
        changed = view(inputs)
        assert changed.keys() == inputs.keys()
        assert all(torch.equal(changed[key], inputs[key]) for key in inputs if key != "pixel_values")
        assert all(torch.equal(before[key], inputs[key]) for key in inputs), "the user's own are left alone"
        old, new = inputs["pixel_values"], changed["pixel_values"]
        assert old.shape == new.shape
        assert not torch.equal(old, new)
        if old.ndim == 5:
            empty = ~old.flatten(2).any(2)
            assert torch.equal(empty, ~new.flatten(2).any(2))


@pytest.mark.parametrize("name", ONE_IMAGE)
def test_a_sample_has_the_same_view_alone_and_in_a_batch(name: str) -> None:
    inputs = make_inputs(name, batch=3)
    swapped = {}
    for view in (DiffusionNoise(), RandomTransform.of(tiny(name)), RandomTransform.of(tiny(name), seed=4)):
        changed = view(inputs)
        for row in range(3):
            alone = view(single(name, inputs, row))["pixel_values"]
            swapped[row] = alone
            assert torch.equal(alone, pixels_of(name, changed, row))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_a_sample_has_the_same_view_whatever_the_number_of_tiles_in_its_batch(name: str) -> None:
    small, both = (make_inputs(name, batch=n, image_sizes=[(16, 16), (32, 32)]) for n in (1, 2))
    tiles = small["pixel_values"].shape[1]
    assert both["pixel_values"].shape[1] > tiles
    both["pixel_values"][0, :tiles] = small["pixel_values"][0]
    for view in (DiffusionNoise(), RandomTransform.of(tiny(name))):
        alone, among = view(small)["pixel_values"], view(both)["pixel_values"]
        assert torch.equal(alone[0], among[0, :tiles])


@pytest.mark.parametrize("name", WITH_VIDEO)
def test_videos_change_too(name: str) -> None:
    inputs = make_inputs(name, video=True)
    for view in (DiffusionNoise(), RandomTransform.of(tiny(name), kinds=("vflip",))):
        changed = view(inputs)
        for key in ("pixel_values", "pixel_values_videos"):
            assert changed[key].shape == inputs[key].shape
            assert not torch.equal(changed[key], inputs[key])


def test_inputs_without_pixels_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"the inputs have none \(pixel_values\)"):
        DiffusionNoise()({"input_ids": torch.zeros(1, 2), "mm_encoder_outputs": {}})


# images removed


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_without_images_is_its_text_padded_on_the_left(name: str) -> None:
    inputs = make_inputs(name, before=(3, 9), after=(5, 4))
    view = RemoveImages.of(tiny(name))(inputs)
    assert "pixel_values" not in view
    assert "image_grid_thw" not in view
    assert not torch.isin(view["input_ids"], torch.tensor([IMAGE, VIDEO])).any(), "nor in the padding"
    for row in range(2):
        real = view["attention_mask"][row].bool()
        assert bool((real.int().diff() >= 0).all())
        kept = [t for t in inputs["input_ids"][row].tolist() if t not in (PAD, IMAGE)]
        assert view["input_ids"][row, real].tolist() == kept
        if name in (*QWEN, "gemma3"):
            types = "token_type_ids" if name == "gemma3" else "mm_token_type_ids"
            assert not view[types].any()
            expected = without_image(single(name, inputs, row))
            assert torch.equal(view[types][row, real], expected[types][0])


def test_a_sample_of_images_alone_cannot_lose_them() -> None:
    with pytest.raises(ValueError, match="a sample is nothing but images"):
        RemoveImages((IMAGE,))({"input_ids": torch.full((1, 4), IMAGE)})


# disturbed instruction


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_disturbance_stands_in_front_of_each_sample(name: str) -> None:
    inputs = make_inputs(name)
    view = Disturbance(CONFUSION)(inputs)
    for row in range(2):
        expected, real = confused(single(name, inputs, row)), view["attention_mask"][row].bool()
        for key in ("input_ids", "token_type_ids", "mm_token_type_ids"):
            if key in inputs:
                assert torch.equal(view[key][row, real], expected[key][0])
    assert view["pixel_values"] is inputs["pixel_values"]


def test_a_disturbance_goes_behind_the_token_that_begins_a_prompt() -> None:
    ids = torch.tensor([[0, 1, 5, 6], [1, 7, 8, 9], [0, 0, 5, 1]])
    view = Disturbance((50, 51), bos=1)({"input_ids": ids, "attention_mask": (ids != 0).long()})
    assert view["input_ids"].tolist() == [[0, 1, 50, 51, 5, 6], [1, 50, 51, 7, 8, 9], [0, 0, 50, 51, 5, 1]]
    assert view["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 1], [1] * 6, [0, 0, 1, 1, 1, 1]]


def test_a_disturbance_is_made_of_the_tokens_of_a_tokenizer() -> None:
    class Tokenizer:
        bos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert not add_special_tokens
            return {"input_ids": [len(word) for word in text.split()]}

    assert Disturbance.of(Tokenizer(), "you are confused") == Disturbance((3, 3, 8), bos=1)
    assert len(Disturbance.of(Tokenizer()).ids) == 16


# transforms


def test_flips_by_hand() -> None:
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    luck = np.random.default_rng(0)
    view = RandomTransform()
    assert view.apply(image, "hflip", luck)[0, 0].tolist() == [[2.0, 1.0], [4.0, 3.0]]
    assert view.apply(image, "vflip", luck)[0, 0].tolist() == [[3.0, 4.0], [1.0, 2.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_each_transform_keeps_the_shape_and_changes_the_image(kind: str) -> None:
    image = torch.rand(2, 3, 20, 28, dtype=torch.float64)
    view = RandomTransform(mean=(0.5,) * 3, std=(0.5,) * 3)
    changed = view.apply(image, kind, np.random.default_rng(2))
    assert changed.shape == image.shape
    assert changed.dtype == image.dtype
    assert changed.isfinite().all()
    assert not torch.allclose(changed, image)
    same = torch.stack([image[0], image[0]])
    changed = view.apply(same, kind, np.random.default_rng(2))
    assert torch.equal(changed[0], changed[1]), "the crops of an image change alike"


def test_what_a_rotation_uncovers_is_black() -> None:
    mean, std = (0.2, 0.4, 0.6), (0.1, 0.2, 0.3)
    white = (1 - torch.tensor(mean)) / torch.tensor(std)
    image = white[None, :, None, None].expand(1, 3, 16, 16)
    changed = RandomTransform(mean=mean, std=std).apply(image, "rotate", np.random.default_rng(1))
    black = -torch.tensor(mean) / torch.tensor(std)
    assert torch.allclose(changed[0, :, 0, 0], black)
    assert torch.allclose(changed[0, :, 8, 8], white)


def test_colours_stay_colours() -> None:
    image = torch.rand(1, 3, 8, 8)
    view = RandomTransform(mean=(0.0,) * 3, std=(1.0,) * 3)
    for seed in range(20):
        changed = view.apply(image, "jitter", np.random.default_rng(seed))
        assert changed.min() >= 0
        assert changed.max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_in_half_precision_stay_so(kind: str) -> None:
    image = torch.randn(1, 3, 16, 16).bfloat16()
    for view in (RandomTransform((kind,)), DiffusionNoise()):
        changed = view({"pixel_values": image})["pixel_values"]
        assert changed.dtype == torch.bfloat16
        assert changed.isfinite().all()


def test_all_kinds_are_drawn() -> None:
    seen: set[str] = set()

    class Listening(RandomTransform):
        def apply(self, pixels: Tensor, kind: str, luck: np.random.Generator) -> Tensor:
            seen.add(kind)
            return pixels

    Listening()({"pixel_values": torch.randn(60, 3, 4, 4)})
    assert seen == set(KINDS)


@pytest.mark.parametrize("kinds", [(), ("hflip", "shear")])
def test_unknown_transforms_are_refused(kinds: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="kinds must be some of hflip, vflip"):
        RandomTransform(kinds)


def test_the_statistics_are_the_processors_or_the_familys() -> None:
    processor = Qwen2VLImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    model = tiny("qwen2_5_vl")
    view = RandomTransform.of(model, seed=3, processor=processor)
    assert view == RandomTransform(KINDS, 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (4, 2, 2))
    assert RandomTransform.of(model).mean == pytest.approx(Qwen2VLImageProcessor().image_mean)
    assert RandomTransform.of(tiny("gemma3")).mean == (0.5, 0.5, 0.5)
    assert RandomTransform.of(tiny("internvl")).mean == (0.485, 0.456, 0.406)


def test_flat_patches_need_to_know_their_model() -> None:
    with pytest.raises(ValueError, match=r"RandomTransform.of\(model\)"):
        RandomTransform()(make_inputs("qwen2_5_vl"))


def test_qwens_patches_are_those_of_the_picture() -> None:
    """What their processor makes of a mirrored picture."""
    processor = Qwen2VLImageProcessor(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        do_resize=False,
        do_rescale=False,
        do_normalize=False,
    )
    picture = torch.rand(3, 16, 24)
    made, mirrored = (
        processor(images=[one], return_tensors="pt") for one in (picture, pictures.hflip(picture))
    )
    grid, patch = made["image_grid_thw"][0], (4, 2, 2)
    images = from_patches(made["pixel_values"], grid, patch)
    assert torch.equal(images, torch.stack([picture, picture]))
    assert torch.equal(to_patches(images, grid, patch), made["pixel_values"])
    view = RandomTransform(("hflip",), patch=patch)
    assert torch.equal(view(dict(made))["pixel_values"], mirrored["pixel_values"])
