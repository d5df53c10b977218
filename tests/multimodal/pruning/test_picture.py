"""The picture of what was kept, pixel by pixel."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.multimodal.tiny import make_inputs, make_model
from visionsel.embedded.lvlm import build_processor
from visionsel.multimodal.pruning.picture import token_fates
from visionsel.multimodal.pruning.pruner import Pruner, Stage, VisualTokens
from visionsel.multimodal.pruning.report import Pruned

TOP, LEFT = 32, 20  # where the first panel begins


@dataclass(frozen=True)
class Chosen(Pruner):
    """Keeps, at each layer, the tokens of these numbers."""

    plan: tuple[tuple[int, tuple[int, ...]], ...]

    def stages(self, layers: int) -> list[Stage]:
        return [Stage(layer, self._select(numbers)) for layer, numbers in self.plan]

    def _select(self, numbers: tuple[int, ...]) -> Callable[[VisualTokens], Tensor]:
        return lambda tokens: tokens.valid & torch.isin(tokens.index, torch.tensor(numbers))


@pytest.fixture(scope="module")
def llava() -> Any:
    return make_model("llava")


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor(image_size=16, patch_size=4).image_processor


def prune(model: Any, name: str, pruner: Pruner, **arguments: Any) -> Pruned:
    with pruner(model) as pruned, torch.no_grad():
        model(**make_inputs(name, **arguments))
    return pruned


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def panel(picture: Image.Image, width: int, height: int, left: int = LEFT, top: int = TOP) -> np.ndarray:
    return np.asarray(picture)[top : top + height, left : left + width].astype(int)


def inner(values: np.ndarray) -> np.ndarray:
    """Without the two pixels at the border, where lines may be."""
    return values[2:-2, 2:-2]


def test_kept_patches_keep_their_pixels_and_dropped_ones_are_veiled(llava: Any) -> None:
    pruned = prune(llava, "llava", Chosen(((1, (0, 6)),)), batch=1)  # a grid of 4 x 4 tokens
    image = noise(192, 192)
    shown = panel(pruned.picture(image), 384, 384)
    given = np.asarray(image).repeat(2, 0).repeat(2, 1).astype(int)
    for token in range(16):
        rows, columns = (slice(96 * i, 96 * i + 96) for i in divmod(token, 4))
        before, after = given[rows, columns], shown[rows, columns]
        if token in (0, 6):
            assert np.array_equal(after, before)
        else:
            assert inner(after).std() < 0.3 * inner(before).std()
            assert inner(after).mean() < 0.8 * inner(before).mean()


def test_a_small_image_is_enlarged_and_a_large_one_made_smaller(llava: Any) -> None:
    pruned = prune(llava, "llava", Chosen(((0, (5,)),)), batch=1)
    small = pruned.picture(noise(64, 64))
    assert small.width == LEFT + 384 + 20
    margin = round(20 * 1024 / 384)  # what is beside a panel grows with it
    assert pruned.picture(noise(2048, 1024)).width == margin + 1024 + margin


def test_each_stage_has_its_shade_the_later_the_lighter(llava: Any) -> None:
    plan = ((0, (0, 1, 2, 3)), (2, (0, 1)), (3, (0,)))
    pruned = prune(llava, "llava", Chosen(plan), batch=1)
    assert token_fates(pruned.record).tolist() == [-1, 2, 1, 1, *[0] * 12]
    picture = pruned.picture(Image.new("RGB", (384, 384), (128, 128, 128)))
    shown = panel(picture, 384, 384)
    middles = [
        shown[48, 48],
        shown[48, 144],
        shown[48, 240],
        shown[240, 48],
    ]  # kept, third, second, first stage
    assert middles[0].tolist() == [128, 128, 128]
    brightness = [int(pixel.sum()) for pixel in middles[1:]]
    assert brightness == sorted(brightness, reverse=True)
    assert len({tuple(pixel) for pixel in middles}) == 4
    legend = np.asarray(picture)[TOP + 384 :].reshape(-1, 3).tolist()
    assert all(middle.tolist() in legend for middle in middles[1:])


def test_what_the_processor_cuts_off_fades_and_the_rest_lies_where_it_was_seen(
    llava: Any, processor: Any
) -> None:
    pruned = prune(llava, "llava", Chosen(((0, tuple(range(0, 16, 4))),)), batch=1)  # the left column
    image = noise(400, 200)  # its middle square of 200 x 200 pixels is seen
    left, top = 21, 33  # what is beside a panel grows with it
    shown, given = panel(pruned.picture(image, processor), 400, 200, left, top), np.asarray(image).astype(int)
    assert np.array_equal(shown[:, 100:150], given[:, 100:150])
    assert (shown[:, :97] > 200).all()
    assert (shown[:, 303:] > 200).all()
    assert shown[:, 155:295].mean() < 0.8 * given[:, 155:295].mean()
    # without the processor the grid lies over the whole image
    over = panel(pruned.picture(image), 400, 200, left, top)
    assert np.array_equal(over[:, :100], given[:, :100])


def test_every_image_of_a_batch_has_a_panel_with_its_own_patches(llava: Any) -> None:
    pruned = prune(llava, "llava", Chosen(((0, (0, 31)),)), batch=2, images=2)  # 16 tokens an image
    fates = token_fates(pruned.record).split(16)
    assert [(fate == -1).nonzero()[:, 0].tolist() for fate in fates] == [[0], [15], [0], [15]]
    images = [noise(384, 384, seed) for seed in range(4)]
    picture = pruned.picture(images)
    for number, image in enumerate(images):
        row, column = divmod(number, 2)
        shown = panel(picture, 384, 384, LEFT + column * 404, TOP + row * 426)
        given = np.asarray(image).astype(int)
        corner = (slice(0, 96), slice(0, 96)) if number % 2 == 0 else (slice(288, 384), slice(288, 384))
        assert np.array_equal(shown[corner], given[corner])
        assert inner(shown[97:287, 97:287]).mean() < 0.8 * given.mean()


def test_whole_and_tiles_of_an_image_are_two_panels() -> None:
    model = make_model("llava_next")
    pruned = prune(model, "llava_next", Chosen(((0, tuple(range(16))),)), batch=1)  # all of the thumbnail
    image = noise(384, 384)
    picture = pruned.picture(image)
    whole, tiles = panel(picture, 384, 384), panel(picture, 384, 384, LEFT + 404)
    given = np.asarray(image).astype(int)
    assert np.array_equal(whole, given)
    assert tiles.std() < 0.3 * given.std()


def test_beams_are_drawn_as_often_as_the_tower_saw_the_image(llava: Any) -> None:
    with Chosen(((0, (3,)),))(llava) as pruned:
        llava.generate(**make_inputs("llava", batch=1), num_beams=2, max_new_tokens=2)
    encoded = pruned.record.scope.encoded["image"].arguments["pixel_values"]
    assert len(token_fates(pruned.record)) == 16 * len(
        encoded
    )  # before 5.20 transformers encodes the copies too
    assert pruned.picture([noise(64, 64)] * len(encoded)).width >= 384


def test_images_that_do_not_fit_the_prompt_are_refused(llava: Any) -> None:
    pruner = Chosen(((0, (0,)),))
    with pytest.raises(ValueError, match="2 images for a prompt with 1"):
        prune(llava, "llava", pruner, batch=1).picture([noise(8, 8)] * 2)
    with pytest.raises(ValueError, match="no images"):
        prune(llava, "llava", pruner, images=0).picture([])
    model = make_model("smolvlm")
    with pytest.raises(ValueError, match="processor= where the model cuts images into tiles"):
        prune(model, "smolvlm", pruner, batch=1, images=2).picture(noise(8, 8))


def test_the_tiles_that_a_processor_cut_are_put_together_again() -> None:
    images = SimpleNamespace(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_resize=True)
    pruner = Chosen(((0, (*range(16), *range(64, 80))),))  # the first tile and the thumbnail
    pruned = prune(
        make_model("smolvlm"), "smolvlm", pruner, batch=1, images=5
    )  # a square in 2 x 2 tiles, and whole
    image = noise(384, 384)
    picture, given = pruned.picture(image, images), np.asarray(image).astype(int)
    whole, tiles = panel(picture, 384, 384), panel(picture, 384, 384, LEFT + 404)
    assert np.array_equal(whole, given)
    assert np.array_equal(tiles[:192, :192], given[:192, :192])
    assert tiles[196:].mean() < 0.8 * given.mean()
    assert tiles[:, 196:].mean() < 0.8 * given.mean()
