"""Tables of synonyms: which words of a caption mean which object.

A table is a text file in the format of CHAIR's (Rohrbach et al. 2018): a line for each object, its name
first, then the words that mean it, separated by commas. The package has that of the 80 COCO classes
(`coco_synonyms.txt`); the shapes world needs none but the names of its shapes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from visionsel.data.shapes import SHAPES

__all__ = ["Synonyms", "coco_synonyms", "read_synonyms", "shapes_synonyms"]

_COCO = Path(__file__).parent / "coco_synonyms.txt"
# the rules that CHAIR's code adds to its table: what two words in a row are taken for. "baby bear" is no
# person; "home plate" and "train track" (of the ports) are not in the table, so that they are no train
_COCO_PAIRS = {
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",  # how `pattern` leaves it
    "home plate": "home plate",
    "train track": "train track",
    "passenger jet": "jet",
    "passenger train": "train",
} | {
    f"{age} {animal}": animal
    for age in ("baby", "adult")
    for animal in "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
}


@dataclass(frozen=True)
class Synonyms:
    """A table of synonyms.

    Attributes:
        names: the name of the object for each word, or run of words, that means it.
        pairs: what two words in a row are taken for, before the table is asked; two-word entries of `names`
            are pairs of their own.
    """

    names: Mapping[str, str]
    pairs: Mapping[str, str]

    @classmethod
    def of(cls, rows: Iterable[Iterable[str]], pairs: Mapping[str, str] | None = None) -> "Synonyms":
        """From rows of words, the name of the object first.

        Raises:
            ValueError: for an empty row, or a word that means two objects.
        """
        names: dict[str, str] = {}
        for number, row in enumerate(rows, 1):
            words = [" ".join(word.lower().split()) for word in row]
            if not words or not all(words):
                raise ValueError(f"row {number} of the synonyms has an empty word: {words}")
            for word in words:
                if names.setdefault(word, words[0]) != words[0]:
                    raise ValueError(
                        f"{word!r} means {names[word]!r} and, in row {number}, {words[0]!r}; "
                        "leave it in one of the rows"
                    )
        if not names:
            raise ValueError("the table of synonyms is empty; a row is 'name, synonym, synonym'")
        doubles = {word: word for word in names if word.count(" ") == 1}
        return cls(names, doubles | dict(pairs or {}))

    @cached_property
    def objects(self) -> frozenset[str]:
        """The names of all objects."""
        return frozenset(self.names.values())

    @cached_property
    def words(self) -> frozenset[str]:
        """The single words of the table and of its pairs."""
        return frozenset(word for entry in (*self.names, *self.pairs) for word in entry.split())


def read_synonyms(path: str | Path, pairs: Mapping[str, str] | None = None) -> Synonyms:
    """Read a table; CHAIR's own file is read as it is.

    That file has stray spaces ("scooter,  motor bike") and a capital ("iPhone"), by which CHAIR's code never
    finds these words; here they count.

    Args:
        path: of a text file in the module's format.
        pairs: see `Synonyms`; default the rules of CHAIR's code for COCO.

    Raises:
        FileNotFoundError: when there is no file.
        ValueError: for an empty table or row, or a word that means two objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no table of synonyms at {path}")
    try:
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
        return Synonyms.of(
            (line.split(",") for line in lines if line), _COCO_PAIRS if pairs is None else pairs
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@cache
def coco_synonyms() -> Synonyms:
    """The words of the 80 COCO classes, with the rules of CHAIR's code."""
    return read_synonyms(_COCO)


@cache
def shapes_synonyms() -> Synonyms:
    """The shapes of the shapes world; each is called by its name only."""
    return Synonyms.of([shape] for shape in SHAPES)
