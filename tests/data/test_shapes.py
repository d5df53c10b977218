"""The shapes world: what is drawn is what the labels say, and a sample depends on its key only."""

import hashlib
import os
import pickle
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from visionsel.data import shapes
from visionsel.data.shapes import COLORS, PARTNERS, SHAPES, ShapesWorld, scene
from visionsel.data.shapes.dice import Dice
from visionsel.data.shapes.drawing import BACKGROUNDS, FULL, RGB, UNITS, background, coverage

# (distribution, seed, index): SHA-256 of pixels and labels, and of all texts; only WORLD_VERSION changes them
FROZEN = {
    ("train", 0, 0): ("3b93b233dba67e03", "aaa08e8cf68e7233"),
    ("balanced", 0, 3): ("cdf72a89f7f01fc4", "36c8a064c6710d2d"),
    ("anti", 12345, 77): ("570fcf60f3c365fd", "0e721944efabb027"),
}


def fingerprints(distribution: str, seed: int, index: int) -> tuple[str, str]:
    sample = ShapesWorld(distribution, seed, size=index + 1)[index]
    drawn = hashlib.sha256(sample.pixels.tobytes() + sample.labels.tobytes())
    said = [*sample.captions, *(f"{q.text} {q.answer} {q.kind} {q.negative}" for q in sample.questions)]
    said += [f"{e.text} {e.object} {e.kind}" for e in sample.expressions]
    return drawn.hexdigest()[:16], hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def same(one: shapes.Sample, other: shapes.Sample) -> bool:
    return (
        np.array_equal(one.pixels, other.pixels)
        and np.array_equal(one.labels, other.labels)
        and one.captions == other.captions
        and one.questions == other.questions
        and one.expressions == other.expressions
    )


@pytest.mark.parametrize("key", FROZEN, ids=str)
def test_samples_are_those_of_every_other_machine(key: tuple[str, int, int]) -> None:
    assert fingerprints(*key) == FROZEN[key]


def test_a_process_with_another_hash_seed_makes_the_same_samples() -> None:
    code = "from tests.data.test_shapes import *; print([fingerprints(*key) for key in FROZEN])"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert result.stdout.strip() == str(list(FROZEN.values()))


@pytest.mark.parametrize("distribution", shapes.DISTRIBUTIONS)
def test_a_sample_made_alone_equals_the_one_made_in_sequence(distribution: str) -> None:
    world = ShapesWorld(distribution, seed=3, size=30)
    sequence = list(world)
    assert len(sequence) == len(world) == 30
    for index in (29, 0, 17, -1):
        alone = ShapesWorld(distribution, seed=3, size=1000)[index % 30]
        assert same(alone, sequence[index])
    assert same(pickle.loads(pickle.dumps(world))[5], sequence[5])
    assert not same(ShapesWorld(distribution, seed=4)[5], sequence[5])


def test_another_image_size_shows_the_same_scene_with_the_same_texts() -> None:
    for small, large in zip(
        ShapesWorld("balanced", 5, 40), ShapesWorld("balanced", 5, 40, image_size=160), strict=True
    ):
        assert (small.captions, small.questions, small.expressions) == (
            large.captions,
            large.questions,
            large.expressions,
        )
        for one, other in zip(small.objects, large.objects, strict=True):
            assert np.abs(np.array(one.box) * 2.5 - np.array(other.box)).max() <= 10
            assert 0.6 < other.area / one.area / 2.5**2 < 1.6


@pytest.mark.parametrize("image_size", [32, 50, 64, 224])
def test_boxes_and_masks_agree_at_every_size(image_size: int) -> None:
    for sample in ShapesWorld("balanced", 6, 60, image_size):
        assert sample.image.mode == "RGB"
        assert sample.image.size == (image_size, image_size)
        assert np.array_equal(np.asarray(sample.image), sample.pixels)
        assert 1 <= len(sample.objects) <= 6
        covered = np.zeros((image_size, image_size), dtype=int)
        for j, o in enumerate(sample.objects):
            assert o.index == j
            assert o.shape in SHAPES
            assert o.color in COLORS
            assert o.mask.dtype == bool
            assert o.mask.any()
            rows, columns = np.nonzero(o.mask)
            assert o.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert o.area == o.mask.sum()
            covered += o.mask
        assert covered.max() == 1
        assert np.array_equal(covered == 0, sample.labels == 0)


def redraw(monkeypatch: pytest.MonkeyPatch, key: tuple[str, int, int]) -> list[tuple[np.ndarray, ...]]:
    """For each object of a sample its pixels, coverage, and the image with and without it."""
    caught: list[tuple[object, ...]] = []
    paint = scene._paint

    def spy(dice: Dice, layouts: list, windows: list, image_size: int) -> tuple[str, np.ndarray]:
        state = dice._bits.state, list(dice._words)
        for leave_out in range(len(layouts)):
            dice._bits.state, dice._words = state[0], list(state[1])
            kept = [j for j in range(len(layouts)) if j != leave_out]
            _, without = paint(dice, [layouts[j] for j in kept], [windows[j] for j in kept], image_size)
            caught.append((leave_out, layouts[leave_out], windows, without))
        dice._bits.state, dice._words = state[0], list(state[1])
        return paint(dice, layouts, windows, image_size)

    monkeypatch.setattr(scene, "_paint", spy)
    distribution, seed, index = key
    sample = ShapesWorld(distribution, seed, size=index + 1)[index]
    monkeypatch.undo()
    found = []
    for position, layout, windows, without in caught:
        (o,) = [o for o in sample.objects if (o.shape, o.color) == (layout.shape, layout.color)] or [None]
        above = [full(window, 64) for window in windows[position + 1 :]]
        found.append((o.mask, full(windows[position], 64), above, sample.pixels, without))
    return found


def full(window: tuple[int, int, np.ndarray], image_size: int) -> np.ndarray:
    top, left, covered = window
    image = np.zeros((image_size, image_size), dtype=int)
    image[top : top + covered.shape[0], left : left + covered.shape[1]] = covered
    return image


def test_masks_are_the_pixels_that_drawing_an_object_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = 0
    for index in range(40):
        sample = ShapesWorld("balanced", 8, index + 1)[index]
        if len({(o.shape, o.color) for o in sample.objects}) < len(sample.objects):
            continue
        for mask, covered, above, pixels, without in redraw(monkeypatch, ("balanced", 8, index)):
            hidden = np.any([2 * layer >= FULL for layer in above], axis=0) if above else covered < 0
            assert np.array_equal(mask, (2 * covered >= FULL) & ~hidden)
            changed = (pixels != without).any(-1)
            assert not changed[covered == 0].any()  # nothing outside its outline
            wholly = (covered == FULL) & mask
            assert changed[wholly].mean() > 0.97  # a faint paint may meet its own tone on a texture
            checked += 1
    assert checked > 80


def test_solid_objects_have_the_colour_that_they_are_called_by() -> None:
    for sample in ShapesWorld("balanced", 9, 100):
        for o in sample.objects:
            if not o.faint:
                tone = np.median(sample.pixels[o.mask].astype(int), axis=0)
                distances = {name: np.abs(tone - np.array(value)).sum() for name, value in RGB.items()}
                assert min(distances, key=distances.__getitem__) == o.color


def test_no_object_is_hidden_beyond_the_least_visible_share(monkeypatch: pytest.MonkeyPatch) -> None:
    overlapping = 0
    caught: list[tuple[list[scene.Window], np.ndarray]] = []
    arrange = scene._arrange

    def spy(dice: Dice, layouts: list[scene.Layout]) -> tuple[list[scene.Layout], np.ndarray]:
        placed, labels = arrange(dice, layouts)
        caught.append(([scene._window(o, scene.GRID) for o in placed], labels))
        return placed, labels

    monkeypatch.setattr(scene, "_arrange", spy)
    list(ShapesWorld("balanced", 10, 200))
    for windows, labels in caught:
        for j, (_, _, covered) in enumerate(windows):
            own, visible = int((2 * covered >= FULL).sum()), int((labels == j + 1).sum())
            assert visible >= scene.MIN_VISIBLE
            assert visible / own >= 0.6
            overlapping += visible < own
    assert overlapping > 50  # there is occlusion


def test_six_large_objects_of_one_colour_find_room() -> None:
    for index in range(6):
        dice = Dice(1, index)
        layout = scene.Layout("circle", "red", "large", UNITS // 5, 0, 256, (200, 30, 30))
        placed, labels = scene._arrange(dice, [layout] * 6)
        assert len(placed) == 6
        assert np.unique(labels).tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_cover_what_a_finer_raster_says(shape: str) -> None:
    """Coverage at 64 pixels is the mean of that at 256, but for what falls between the coarser samples."""
    for tilt in (-60, 0, 31):
        center, radius = (UNITS * 47 // 100, UNITS * 53 // 100), UNITS // 6
        coarse = full(coverage(shape, center, radius, tilt, 64), 64)
        fine = full(coverage(shape, center, radius, tilt, 256), 256)
        mean = fine.reshape(64, 4, 64, 4).mean((1, 3))
        assert np.abs(coarse - mean).max() <= 0.25 * FULL
        assert abs(coarse.sum() - mean.sum()) <= 0.04 * mean.sum()
        assert coarse.max() == FULL


def test_the_area_of_a_circle_and_a_square_is_theirs() -> None:
    center, radius = (UNITS // 2, UNITS // 2), UNITS * 3 // 10
    for shape, area in (
        ("circle", np.pi),
        ("square", 1.7**2),
        ("ring", np.pi * (1 - 0.55**2)),
        ("bar", 2.2 * 0.6),
    ):
        drawn = coverage(shape, center, radius, 20, 256)[2].sum() / FULL
        assert drawn == pytest.approx(area * (0.3 * 256) ** 2, rel=0.01)


def test_backgrounds_are_all_drawn_and_stay_dim() -> None:
    names = Counter()
    for index in range(200):
        name, pixels = background(Dice(3, index), 48)
        names[name] += 1
        assert pixels.shape == (48, 48, 3)
        assert pixels.mean() < 160
        assert (pixels.std((0, 1)).max() == 0) == (name == "plain")
    assert set(names) == set(BACKGROUNDS)
    assert min(names.values()) > 30


def presence(world: ShapesWorld) -> list[set[str]]:
    return [{o.shape for o in sample.objects} for sample in world]


def share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


@pytest.mark.parametrize("co_occurrence", [0.8, 0.3])
def test_in_training_data_a_shape_brings_its_partner_as_often_as_configured(co_occurrence: float) -> None:
    images = presence(ShapesWorld("train", 11, 1500, 32, co_occurrence=co_occurrence))
    for shape, partner in PARTNERS.items():
        brought = [partner in image for image in images if shape in image]
        alone = [partner in image for image in images if shape not in image]
        assert share(brought) == pytest.approx(co_occurrence, abs=0.08)  # 3.5 standard errors of 400 images
        assert share(alone) == pytest.approx(scene.STRAY, abs=0.03)


def test_balanced_data_is_uniform_in_shapes_colours_and_numbers() -> None:
    samples = list(ShapesWorld("balanced", 12, 1500, 32))
    numbers = Counter(len(sample.objects) for sample in samples)
    assert all(abs(numbers[n] / 1500 - 1 / 6) < 0.04 for n in range(1, 7))
    objects = [o for sample in samples for o in sample.objects]
    for words, counts in (
        (SHAPES, Counter(o.shape for o in objects)),
        (COLORS, Counter(o.color for o in objects)),
    ):
        assert set(counts) == set(words)
        assert all(abs(counts[word] / len(objects) * len(words) - 1) < 0.2 for word in words)
    repeats = [len({o.shape for o in s.objects}) < len(s.objects) for s in samples if len(s.objects) > 1]
    assert share(repeats) == pytest.approx(scene.REPEAT, abs=0.05)
    for shape, partner in PARTNERS.items():
        with_shape = [s for s in samples if shape in {o.shape for o in s.objects}]
        expected = np.mean([(len({o.shape for o in s.objects}) - 1) / 9 for s in with_shape])
        assert share([partner in {o.shape for o in s.objects} for s in with_shape]) == pytest.approx(
            expected, abs=0.08
        )


def test_in_the_shifted_data_partners_are_missing() -> None:
    for image in presence(ShapesWorld("anti", 13, 500, 32)):
        assert image & set(PARTNERS)
        assert not image & {PARTNERS[shape] for shape in image & set(PARTNERS)}


def test_faintness_and_size_are_as_configured() -> None:
    objects = [o for sample in ShapesWorld("balanced", 14, 1000, 32) for o in sample.objects]
    for partner, faint, small in (
        (True, scene.FAINT_PARTNER, scene.SMALL_PARTNER),
        (False, scene.FAINT, scene.SMALL),
    ):
        group = [o for o in objects if (o.shape in PARTNERS.values()) == partner]
        assert share([o.faint for o in group]) == pytest.approx(faint, abs=0.05)
        assert share([o.size == "small" for o in group]) == pytest.approx(small, abs=0.05)


def test_one_object_an_image_serves_classifiers() -> None:
    samples = list(ShapesWorld("balanced", 15, 300, max_objects=1))
    assert {len(sample.objects) for sample in samples} == {1}
    assert {sample.objects[0].shape for sample in samples} == set(SHAPES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distribution": "test"}, "unknown distribution 'test'; choose one of train, balanced, anti"),
        ({"distribution": "train", "seed": -1}, "seed must be from 0"),
        ({"distribution": "train", "seed": 2**32}, "seed must be from 0"),
        ({"distribution": "train", "seed": 0.5}, "seed must be an integer"),
        ({"distribution": "train", "size": -3}, "size must be from 0"),
        ({"distribution": "train", "image_size": 16}, "image_size must be from 32 to 1024, got 16"),
        ({"distribution": "train", "image_size": True}, "image_size must be an integer"),
        ({"distribution": "train", "caption_noise": 1.5}, "caption_noise is a probability"),
        ({"distribution": "train", "co_occurrence": float("nan")}, "co_occurrence is a probability"),
        ({"distribution": "anti", "caption_noise": 0.5}, 'caption_noise is a switch of "train"'),
        ({"distribution": "balanced", "co_occurrence": 0.5}, 'co_occurrence is a switch of "train"'),
        ({"distribution": "train", "max_objects": 2}, 'max_objects is a switch of "balanced"'),
        ({"distribution": "balanced", "max_objects": 7}, "max_objects must be from 1 to 6"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapesWorld(**arguments)


def test_an_index_past_the_end_raises() -> None:
    with pytest.raises(IndexError, match="sample 200 of 200"):
        ShapesWorld("train")[200]
    with pytest.raises(IndexError):
        ShapesWorld("train", size=0)[0]


def test_dice_are_uniform_and_keyed() -> None:
    rolls = Counter(Dice(1, 2).below(6) for _ in range(1))
    assert rolls == Counter([Dice(1, 2).below(6)])
    dice = Dice(4)
    counts = Counter(dice.below(6) for _ in range(6000))
    assert all(abs(counts[i] - 1000) < 120 for i in range(6))
    weighted = Counter(dice.draw("ab", 1, [3, 1])[0] for _ in range(4000))
    assert abs(weighted["a"] - 3000) < 120
    assert sorted(dice.draw(range(20), 20)) == list(range(20))
    assert not any(dice.chance(0.0) for _ in range(100))
    assert all(dice.chance(1.0) for _ in range(100))
    noise = dice.noise(50, 50, 3)
    assert noise.shape == (50, 50, 3)
    assert (noise.min(), noise.max()) == (-15, 15)
    assert abs(noise.mean()) < 0.4
