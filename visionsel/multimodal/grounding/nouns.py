"""Which words of an answer name objects: without a tagger, or by a list of names.

Papers take the labels of captions from Tag2Text's tagger (VL-SAM) or spaCy's noun chunks. Neither is at hand
here, so the rule is plain: between words that are no part of a name (articles, verbs of description, ...) the
last word of a run is taken for its noun, `a small red ring` -> `ring`. Participles in -ing and -ed end a run
too. It takes other verbs for nouns at times; where that matters, give the names, or a function of your own.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from visionsel.multimodal.grounding.words import find_words

__all__ = ["Names", "find_names"]

Mention = tuple[str, tuple[int, int]]
Names = Collection[str] | Callable[[str], Sequence[Mention]] | None

# what stands between names in descriptions, and what is said of things but is none
_OTHER = frozenset(
    """a an the this that these those some any each every no none all both another other others its his her
    their my your our it he she they them we you i him us who which what whose there here
    and or but nor so yet if then than as because while when where how why with without of in on at by for
    from to into onto over under above below behind beside besides between among near around through across
    along against about after before during inside outside toward towards within upon next up down off out
    is are was were be been being am do does did has have had can could may might must shall should will
    would not also very too more most less least many much few several just only still even quite rather
    yes one two three four five six seven eight nine ten zero first second third last
    see sees seen show shows shown appear appears contain contains include includes depict depicts feature
    features visible located placed positioned made look looks stand stands sit sits lie lies hang hangs hold
    holds wear wears fill fills
    image picture photo photograph scene view object objects thing things shape shapes item items left right
    top bottom center centre middle front back side corner foreground background
    red orange yellow green blue purple pink brown black white gray grey cyan magenta violet silver golden
    small large big little tiny huge tall short long wide narrow round square-shaped bright dark light plain
    old new young different same various multiple wooden open closed empty full""".split()
)
_PARTICIPLE = re.compile(r"[a-z]{2,}(?:ing|ed)")
_THINGS = frozenset(
    "building ceiling painting clothing ring king string railing awning wing bed shed".split()
)


def find_names(text: str, names: Names = None) -> list[Mention]:
    """What a text names, in order.

    Args:
        text: an answer.
        names: None: by the rule above. A list of names, of one word or several: these and their plurals, in
            any case; where two fit, the longer. A function: gets the text and gives its mentions.

    Returns:
        for each mention the name, of those given or in lower case, and its span in the text.

    Raises:
        TypeError: for names that are one text.
        ValueError: for spans of a function that are not in the text.
    """
    if isinstance(names, str):
        raise TypeError(f"names is a list of names, got the text {names!r}; write [{names!r}]")
    if callable(names):
        found = [(str(name), (int(start), int(end))) for name, (start, end) in names(text)]
        if bad := [span for _, span in found if not 0 <= span[0] < span[1] <= len(text)]:
            raise ValueError(f"span {bad[0]} is not in a text of {len(text)} characters")
        return found
    spans = find_words(text)
    return _by_rule(text, spans) if names is None else _by_list(text, spans, names)


def _by_rule(text: str, spans: Sequence[tuple[int, int]]) -> list[Mention]:
    found: list[Mention] = []
    for number, (start, end) in enumerate(spans):
        word = text[start:end].lower()
        following = spans[number + 1] if number + 1 < len(spans) else None
        goes_on = (
            following is not None
            and not text[end : following[0]].strip()  # a mark ends a run
            and not _is_other(text[slice(*following)].lower())
        )
        if not _is_other(word) and not goes_on:
            found.append((word, (start, end)))
    return found


def _is_other(word: str) -> bool:
    if word in _OTHER or any(character.isdigit() for character in word):
        return True
    return word not in _THINGS and _PARTICIPLE.fullmatch(word) is not None


def _by_list(text: str, spans: Sequence[tuple[int, int]], names: Collection[str]) -> list[Mention]:
    known: dict[tuple[str, ...], str] = {}
    for name in names:
        parts = [name[slice(*span)].lower() for span in find_words(name)]
        if not parts:
            raise ValueError(f"the name {name!r} holds no word")
        for last in _plurals(parts[-1]):
            known.setdefault((*parts[:-1], last), name)
    longest = max(map(len, known), default=0)
    words: list[Any] = [text[slice(*span)].lower() for span in spans]
    found: list[Mention] = []
    place = 0
    while place < len(words):
        for length in range(min(longest, len(words) - place), 0, -1):
            said = known.get(tuple(words[place : place + length]))
            if said is not None:
                found.append((said, (spans[place][0], spans[place + length - 1][1])))
                place += length
                break
        else:
            place += 1
    return found


def _plurals(word: str) -> list[str]:
    """The word and what its plural may be."""
    irregular = {"person": "people", "mouse": "mice", "goose": "geese", "foot": "feet", "tooth": "teeth"}
    forms = [word, f"{word}s", f"{word}es", irregular.get(word, word)]
    if word.endswith("y"):
        forms.append(f"{word[:-1]}ies")
    if word.endswith(("f", "fe")):
        forms.append(f"{word.removesuffix('e').removesuffix('f')}ves")
    if word.endswith("man"):
        forms.append(f"{word[:-3]}men")
    if word.endswith("child"):
        forms.append(f"{word}ren")
    return forms
