"""`ShapesWorld`: a sequence of scenes, each made when it is asked for."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from PIL import Image

from visionsel.data.shapes import language
from visionsel.data.shapes.dice import Dice
from visionsel.data.shapes.language import Expression, Question
from visionsel.data.shapes.scene import DISTRIBUTIONS, MAX_OBJECTS, ShapeObject, draw_scene

__all__ = ["WORLD_VERSION", "Sample", "ShapesWorld"]

WORLD_VERSION = 1  # goes up with every change that makes another sample of the same key

# streams of draws: a change of one kind of text leaves the image and the other texts as they are
_SCENE, _NOISE, _EXPRESSIONS, _QUESTIONS = range(4)


class Sample:
    """One scene. Texts are made when first read; they do not depend on the size of the image.

    Attributes:
        pixels: the image, uint8 `[H, W, 3]`.
        labels: uint8 `[H, W]`: 0 is background, `j + 1` the visible pixels of object `j`.
        background: its name, one of `BACKGROUNDS`.
        objects: the largest visible area first.
    """

    def __init__(
        self,
        key: tuple[int, int, int],
        scene: tuple[str, np.ndarray, np.ndarray, list[ShapeObject]],
        caption_noise: float,
    ) -> None:
        self._key = key
        self._caption_noise = caption_noise
        self.background, self.pixels, self.labels, self.objects = scene

    @property
    def image(self) -> Image.Image:
        """The image, RGB."""
        return Image.fromarray(self.pixels)

    @cached_property
    def phantoms(self) -> list[str]:
        """What the captions mention though it is not there: `["a small red ring"]`; empty without noise."""
        if not self._caption_noise:
            return []
        return language.phantoms(self.objects, Dice(*self._key, _NOISE), self._caption_noise)

    @cached_property
    def captions(self) -> list[str]:
        """Two captions that mention every object: the largest first, and from left to right."""
        return language.captions(self.objects, self.background, self.phantoms)

    @cached_property
    def expressions(self) -> list[Expression]:
        """Expressions that fit one object only; an object without any is one of several that look alike."""
        return language.expressions(self.objects, Dice(*self._key, _EXPRESSIONS))

    @cached_property
    def questions(self) -> list[Question]:
        """Questions of every kind that the scene allows, grouped by kind; never touched by caption noise."""
        return language.questions(self.objects, self.expressions, Dice(*self._key, _QUESTIONS))


class ShapesWorld:
    """A sequence of images of one to six coloured shapes, with masks, captions, questions and expressions.

    A sample depends on the distribution, the seed and its index only (and on the switches below): not on
    `size`, on what was read before or on the machine.

    Distributions differ in which shapes come together:

    - `"train"`: one to three of circle, square (weight 3 each), triangle, star, cross, heart and bar (weight
      2); a star brings a ring, a heart a moon and a cross an arrow with probability `co_occurrence`; a ring,
      moon or arrow comes by itself with probability 0.06.
    - `"balanced"`: one to `max_objects` objects of ten shapes, all alike.
    - `"anti"`: as `"train"`, but there is at least one star, heart or cross, and none of them brings its
      partner.

    In a quarter of the scenes one shape comes twice. Colours are uniform. Half of the objects are small; a
    ring, moon or arrow is small with probability 0.75 and faint with probability 0.4, the others are faint
    with 0.2.

    Args:
        distribution: one of the above.
        seed: from 0 to 2**32 - 1; another seed is fresh data.
        size: number of samples.
        image_size: pixels a side, 32 to 1024. The same sample at another size is the same scene with the same
            texts.
        co_occurrence: how often a shape brings its partner in `"train"`.
        caption_noise: in `"train"` only, and for training only: with this probability captions mention, in a
            random colour, the partner of a present shape though it is absent. That is how caption models
            learn to hallucinate. Images, questions and expressions are not touched.
        max_objects: 1 to 6, in `"balanced"` only; 1 gives images for a classifier.

    Raises:
        ValueError: for an unknown distribution, a value out of range, or a switch of another distribution.

    Examples:
        >>> from visionsel.data.shapes import ShapesWorld
        >>> sample = ShapesWorld("balanced", seed=0, size=200)[7]
        >>> sample.image.size
        (64, 64)
        >>> sample.captions[0]
        'a large purple heart and a small green triangle on a shaded background'
        >>> sample.objects[0].shape, sample.objects[0].box
        ('heart', (5, 8, 31, 31))
        >>> sample.questions[0]
        Question(text='is there a heart in the image?', answer='yes', kind='exist', negative='')
        >>> sample.expressions[0].text
        'the heart'
    """

    def __init__(
        self,
        distribution: str,
        seed: int = 0,
        size: int = 200,
        image_size: int = 64,
        *,
        co_occurrence: float = 0.8,
        caption_noise: float = 0.0,
        max_objects: int = MAX_OBJECTS,
    ) -> None:
        if distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"unknown distribution {distribution!r}; choose one of {', '.join(DISTRIBUTIONS)}"
            )
        for name, value, low, high in (
            ("seed", seed, 0, 2**32 - 1),
            ("size", size, 0, 2**32 - 1),
            ("image_size", image_size, 32, 1024),
            ("max_objects", max_objects, 1, MAX_OBJECTS),
        ):
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise ValueError(f"{name} must be an integer, got {value!r}")
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {value}")
        for name, share, default in (
            ("co_occurrence", co_occurrence, 0.8),
            ("caption_noise", caption_noise, 0.0),
        ):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is a probability from 0 to 1, got {share}")
            if distribution != "train" and share != default:
                raise ValueError(f'{name} is a switch of "train"; leave it out for {distribution!r}')
        if distribution != "balanced" and max_objects != MAX_OBJECTS:
            raise ValueError(f'max_objects is a switch of "balanced"; leave it out for {distribution!r}')
        self.distribution = distribution
        self.seed = int(seed)
        self.size = int(size)
        self.image_size = int(image_size)
        self.co_occurrence = co_occurrence
        self.caption_noise = caption_noise
        self.max_objects = int(max_objects)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not -self.size <= index < self.size:
            raise IndexError(f"sample {index} of {self.size}; a larger size gives more")
        key = DISTRIBUTIONS.index(self.distribution), self.seed, int(index) % self.size
        dice = Dice(*key, _SCENE)
        scene = draw_scene(self.distribution, dice, self.image_size, self.co_occurrence, self.max_objects)
        return Sample(key, scene, self.caption_noise)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(self.size))
