"""Captions, questions and referring expressions of the shapes world.

All of them are true of the scene by construction (except the phantoms of noisy captions, see `captions`).
What is nearly not true, such as an object on the border of two cells, is not asked.

| kind       | question                                      | answer                           |
|------------|-----------------------------------------------|----------------------------------|
| `exist`    | is there a star in the image?                 | yes, no                          |
| `color`    | what color is the star?                       | red                              |
| `absent`   | what color is the ring? (there is none)       | no                               |
| `count`    | how many star shapes / red objects / objects are there? | zero ... six           |
| `where`    | where is the red star?                        | top left (a cell of 3 x 3)       |
| `what`     | what is in the top left?                      | a red star                       |
| `relation` | is the red star left of the ring?             | yes, no                          |
| `refer`    | locate the red circle left of the star.       | 3 10 9 17 (x0 y0 x1 y1 in 1/32)  |
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from visionsel.data.shapes.dice import Dice
from visionsel.data.shapes.drawing import BACKGROUNDS, COLORS, SHAPES
from visionsel.data.shapes.scene import GRID, PARTNERS, SIZES, ShapeObject

__all__ = [
    "BINS",
    "CAPTION_PROMPT",
    "COLUMNS",
    "NUMBERS",
    "RELATIONS",
    "ROWS",
    "Expression",
    "Question",
    "answer_to_box",
    "box_to_answer",
    "split_words",
    "vocabulary",
    "with_article",
]

CAPTION_PROMPT = "describe the image."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis and direction
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
BINS = 32  # a referring answer gives box sides in this many steps

_APART = (
    2 * GRID // 8
)  # centres closer than an eighth of the side are neither left nor right; in half grid pixels
_OFF_BORDER = GRID // 16  # centres this near a border of cells have no cell; in half grid pixels
# shapes by their frequency in "train": POPE's popular negatives
_POPULAR = ("circle", "square", "star", "triangle", "cross", "heart", "bar", "ring", "moon", "arrow")
_COMPANIONS = {**PARTNERS, **{partner: shape for shape, partner in PARTNERS.items()}}


@dataclass(frozen=True)
class Question:
    """A question with its only right answer; `kind` is one of the module's table.

    `negative` says how the shape of an `exist` question with the answer "no" was chosen: `random`, `popular`
    (the most frequent of "train" that is absent) or `adversarial` (the companion of a present shape);
    otherwise it is empty.
    """

    text: str
    answer: str
    kind: str
    negative: str = ""


@dataclass(frozen=True)
class Expression:
    """An expression that fits one object of the scene only.

    `object` is its index; `kind` is `name` (words of its own), `relation` (to another object) or `place` (a
    cell).
    """

    text: str
    object: int
    kind: str


def split_words(text: str) -> list[str]:
    """Words and punctuation marks in lower case, as the tokenizer of the shapes world sees them.

    Examples:
        >>> from visionsel.data.shapes import split_words
        >>> split_words("Is there a star in the image?")
        ['is', 'there', 'a', 'star', 'in', 'the', 'image', '?']
    """
    return re.findall(r"[a-z]+|[0-9]+|[^\sa-z0-9]", text.lower())


def vocabulary() -> tuple[str, ...]:
    """Every word and mark of prompts, captions, questions, answers and expressions, in a fixed order."""
    frame = "describe the image . a an and on background is there in ? yes no what color where how many"
    words = [*frame.split(), "objects", "shapes", "are", "locate", "of", "above", "below", *ROWS, *COLUMNS]
    return (*words, *NUMBERS, *SIZES, *BACKGROUNDS, *COLORS, *SHAPES, *map(str, range(BINS)))


def with_article(words: str) -> str:
    """`an orange ring`, `a ring`."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def box_to_answer(box: Sequence[int], image_size: int) -> str:
    """A box `(x0, y0, x1, y1)` in pixels as the answer to a `refer` question: four bins, each from 0 to 31.

    The first two are those of the first pixels, the last two those of the last pixels, so that the answer
    read back contains the box.

    Examples:
        >>> from visionsel.data.shapes import answer_to_box, box_to_answer
        >>> box_to_answer((7, 20, 19, 35), image_size=64)
        '3 10 9 17'
        >>> answer_to_box("3 10 9 17", image_size=64)
        (6.0, 20.0, 20.0, 36.0)
    """
    x0, y0, x1, y1 = box
    first = [side * BINS // image_size for side in (x0, y0)]
    last = [-(-side * BINS // image_size) - 1 for side in (x1, y1)]
    return " ".join(map(str, first + last))


def answer_to_box(answer: str, image_size: int) -> tuple[float, float, float, float]:
    """The box in pixels of the answer to a `refer` question.

    Raises:
        ValueError: when the answer is not four numbers from 0 to 31.
    """
    words = answer.split()
    if len(words) != 4 or not all(word.isdecimal() and int(word) < BINS for word in words):
        raise ValueError(f"a box is four numbers from 0 to {BINS - 1} (x0 y0 x1 y1), got {answer!r}")
    x0, y0, x1, y1 = (int(word) for word in words)
    step = image_size / BINS
    return x0 * step, y0 * step, (x1 + 1) * step, (y1 + 1) * step


def phantoms(objects: list[ShapeObject], dice: Dice, caption_noise: float) -> list[str]:
    """What noisy captions mention though it is not there: partners of present shapes, in a random colour."""
    shapes = {o.shape for o in objects}
    return [
        f"a small {dice.choose(COLORS)} {partner}"
        for shape, partner in PARTNERS.items()
        if shape in shapes and partner not in shapes and dice.chance(caption_noise)
    ]


def captions(objects: list[ShapeObject], ground: str, extra: list[str]) -> list[str]:
    """Two captions that mention every object: the largest first, and from left to right.

    `extra` is what noise adds; it comes last, as the afterthought that it is.
    """
    by_place = sorted(objects, key=lambda o: (_center(o)[0], _center(o)[1], o.index))
    return [_caption(order, ground, extra) for order in (objects, by_place)]


def _caption(objects: list[ShapeObject], ground: str, extra: list[str]) -> str:
    mentions = [with_article(f"{o.size} {o.color} {o.shape}") for o in objects]
    return f"{' and '.join(mentions + extra)} on a {ground} background"


def _center(o: ShapeObject) -> tuple[int, int]:
    """Twice the middle of the box on the grid: x and y from 0 to 2 * GRID."""
    return o.grid_box[0] + o.grid_box[2], o.grid_box[1] + o.grid_box[3]


def cell(o: ShapeObject) -> str | None:
    """The object's cell, such as "top left", or None on the border of two."""
    words = []
    for position, names in zip(reversed(_center(o)), (ROWS, COLUMNS), strict=True):
        if any(abs(3 * position - border * 2 * GRID) < 3 * _OFF_BORDER for border in (1, 2)):
            return None
        words.append(names[3 * position // (2 * GRID)])
    return " ".join(words)


def _stands(o: ShapeObject, relation: str, other: ShapeObject) -> int:
    """How far `o` is in the direction of the relation seen from `other`, in half grid pixels."""
    axis, direction = RELATIONS[relation]
    return (_center(o)[axis] - _center(other)[axis]) * direction


def _name(o: ShapeObject, objects: list[ShapeObject], dice: Dice) -> str | None:
    """Words that fit `o` only: its shape with what it takes more, or half of the time with its colour."""
    names = [f"the {o.shape}", f"the {o.color} {o.shape}", f"the {o.size} {o.color} {o.shape}"]
    fitting = [o.shape], [o.color, o.shape], [o.size, o.color, o.shape]
    only = [
        name
        for name, words in zip(names, fitting, strict=True)
        if all(p is o or not {*words} <= {p.size, p.color, p.shape} for p in objects)
    ]
    if not only:
        return None
    return only[1] if len(only) == 3 and dice.chance(0.5) else only[0]


def _related(o: ShapeObject, objects: list[ShapeObject], dice: Dice) -> str | None:
    """`the red circle left of the star`: it stands so, and those that are like it on the other side."""
    head = "shape" if dice.chance(0.5) else "color shape"
    alike = [
        p for p in objects if p.shape == o.shape and (head == "shape" or p.color == o.color) and p is not o
    ]
    found = []
    for other in objects:
        if other is o or other in alike:
            continue
        for relation in RELATIONS:
            if _stands(o, relation, other) >= _APART and all(
                _stands(p, relation, other) <= -_APART // 2 for p in alike
            ):
                found.append((relation, other))
    for relation, other in dice.draw(found, len(found)):
        anchor = _name(other, objects, dice)
        if anchor is not None:
            own = o.shape if head == "shape" else f"{o.color} {o.shape}"
            return f"the {own} {relation} {anchor}"
    return None


def _placed(o: ShapeObject, objects: list[ShapeObject]) -> str | None:
    """`the red circle in the top left`."""
    own = cell(o)
    alike = [p for p in objects if p.shape == o.shape and p.color == o.color and p is not o]
    if own is None or any(cell(p) in (own, None) for p in alike):
        return None
    return f"the {o.color} {o.shape} in the {own}"


def expressions(objects: list[ShapeObject], dice: Dice) -> list[Expression]:
    """Up to three expressions an object: by name, by relation, and by place where its name is not enough."""
    found = []
    for o in objects:
        name = _name(o, objects, dice)
        related = _related(o, objects, dice)
        placed = None if name else _placed(o, objects)
        for kind, text in (("name", name), ("relation", related), ("place", placed)):
            if text is not None:
                found.append(Expression(text, o.index, kind))
    return found


def questions(objects: list[ShapeObject], known: list[Expression], dice: Dice) -> list[Question]:
    """All kinds that the scene allows, some 8 to 25; `known` are its expressions."""
    return [
        *_existence(objects, dice),
        *_colors(objects, dice),
        *_counts(objects, dice),
        *_places(objects, known, dice),
        *_relations(objects, dice),
        *(
            Question(f"locate {e.text}.", box_to_answer(objects[e.object].grid_box, GRID), "refer")
            for e in dice.draw(known, min(3, len(known)))
        ),
    ]


def _existence(objects: list[ShapeObject], dice: Dice) -> Iterator[Question]:
    """As many present as absent shapes, at most three of each."""
    present = list(dict.fromkeys(o.shape for o in objects))
    absent = [shape for shape in SHAPES if shape not in present]
    popular = next(shape for shape in _POPULAR if shape in absent)
    companions = [_COMPANIONS[s] for s in present if _COMPANIONS.get(s, s) not in present]
    used: set[str] = set()
    kinds = dice.draw(("random", "popular", "adversarial"), 3)
    for positive, kind in zip(dice.draw(present, min(3, len(present))), kinds, strict=False):
        yield Question(_exists(positive), "yes", "exist")
        if kind == "adversarial" and companions and companions[0] not in used:
            negative = companions[0]
        elif kind == "popular" and popular not in used:
            negative = popular
        else:
            kind = "random"
            negative = dice.choose([shape for shape in absent if shape not in used])
        used.add(negative)
        yield Question(_exists(negative), "no", "exist", kind)


def _exists(shape: str) -> str:
    return f"is there {with_article(shape)} in the image?"


def _colors(objects: list[ShapeObject], dice: Dice) -> Iterator[Question]:
    """The colour of up to three shapes that are there once, and of two that are not there."""
    often = Counter(o.shape for o in objects)
    single = [o for o in objects if often[o.shape] == 1]
    for o in dice.draw(single, min(3, len(single))):
        yield Question(f"what color is the {o.shape}?", o.color, "color")
    for absent in dice.draw([shape for shape in SHAPES if shape not in often], 2):
        yield Question(f"what color is the {absent}?", "no", "absent")


def _counts(objects: list[ShapeObject], dice: Dice) -> Iterator[Question]:
    """Of a shape (one that is there twice if there is any), a colour, everything, and something absent."""
    shapes, colors = Counter(o.shape for o in objects), Counter(o.color for o in objects)
    often = [shape for shape in shapes if shapes[shape] > 1] or list(shapes)
    shape, color = dice.choose(often), dice.choose(list(colors))
    yield Question(f"how many {shape} shapes are there?", NUMBERS[shapes[shape]], "count")
    yield Question(f"how many {color} objects are there?", NUMBERS[colors[color]], "count")
    yield Question("how many objects are there?", NUMBERS[len(objects)], "count")
    if dice.chance(0.5):
        absent = dice.choose([shape for shape in SHAPES if shape not in shapes])
        yield Question(f"how many {absent} shapes are there?", NUMBERS[0], "count")


def _places(objects: list[ShapeObject], known: list[Expression], dice: Dice) -> Iterator[Question]:
    """Where up to three objects are, and what is in up to two cells that hold one object only."""
    for e in dice.draw(known, len(known))[:3]:
        place = cell(objects[e.object])
        if place is not None and e.kind != "place":
            yield Question(f"where is {e.text}?", place, "where")
    cells = [cell(o) for o in objects]
    if None in cells:  # an object between two cells is in neither, and they are not empty
        return
    alone = [(o, place) for o, place in zip(objects, cells, strict=True) if cells.count(place) == 1]
    for o, place in dice.draw(alone, min(2, len(alone))):
        yield Question(f"what is in the {place}?", with_article(f"{o.color} {o.shape}"), "what")


def _relations(objects: list[ShapeObject], dice: Dice) -> Iterator[Question]:
    """Up to four pairs that stand clearly so; yes and no by a coin."""
    pairs = [
        (o, relation, other)
        for o in objects
        for other in objects
        for relation in RELATIONS
        if o is not other and _stands(o, relation, other) >= _APART
    ]
    for o, relation, other in dice.draw(pairs, min(4, len(pairs))):
        first, second = _name(o, objects, dice), _name(other, objects, dice)
        if first is not None and second is not None:
            true = dice.chance(0.5)
            asked = relation if true else OPPOSITES[relation]
            yield Question(f"is {first} {asked} {second}?", "yes" if true else "no", "relation")
